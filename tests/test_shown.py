"""Who shows what: types and their renderers find each other by registration."""

from __future__ import annotations

import subprocess
import sys
from importlib import import_module

import pytest
from compare import GPT

import ckptlab
from ckptlab import Mesh, shown
from ckptlab.shown import Shown, plot, shows, ways


class Thing(Shown):
    """Somebody else's."""


class Derived(Thing):
    pass


def test_a_type_of_which_nobody_said_anything_shows_as_python_does() -> None:
    assert repr(Shown()).startswith("<ckptlab.shown.Shown object at")
    assert Shown()._repr_html_() is None
    with pytest.raises(TypeError, match="how a Shown is plotted"):
        plot(Shown())


def test_somebody_elses_type_is_shown_and_what_is_derived_from_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shown, "_SHOWN", {})
    shows(Thing, text=lambda thing: f"a {type(thing).__name__}", html=lambda _: "<p>", plot=lambda _, where: where)
    assert (repr(Thing()), repr(Derived()), Derived()._repr_html_()) == ("a Thing", "a Derived", "<p>")
    assert plot(Derived(), 7) == 7
    shows(Derived, html=lambda _: "<b>")
    assert (Derived()._repr_html_(), Thing()._repr_html_()) == ("<b>", "<p>")


@pytest.mark.parametrize(("module", "renderer"), shown._RENDERERS.items())
def test_every_renderer_shows_what_it_is_imported_for(module: str, renderer: str) -> None:
    kinds = [k for k in vars(import_module(module)).values() if isinstance(k, type) and k.__module__ == module]
    mine = [kind for kind in kinds if issubclass(kind, Shown)]
    assert mine
    assert all(ways(kind).html for kind in mine), renderer
    assert all(ways(kind).text or "__repr__" in vars(kind) for kind in mine), renderer


def test_what_is_shown_imports_nothing_that_draws_until_it_is_shown() -> None:
    code = (
        "import sys\n"
        "from ckptlab.mesh import Mesh\n"
        f"import ckptlab; ckptlab.open({str(GPT)!r}); import ckptlab.analysis.run\n"
        "def drawing():\n"
        "    return [m for m in sys.modules if m.startswith(('ckptlab.draw', 'ckptlab.viz', 'ckptlab.describe'))]\n"
        "assert not drawing(), drawing()\n"
        "assert Mesh(tp=2)._repr_html_().startswith('<')\n"
        "assert 'ckptlab.viz.meshes' in drawing()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_mesh_that_is_derived_is_drawn_as_one() -> None:
    class Mine(Mesh):
        pass

    assert Mine(tp=2)._repr_html_() == Mesh(tp=2)._repr_html_()


def test_a_run_is_a_page_too(tmp_path: str) -> None:
    run = ckptlab.open_run(GPT)
    assert "<table>" in str(run._repr_html_())
    assert repr(run).splitlines()[0] == f"Run of {len(run.steps)} checkpoints: {run.path}"
