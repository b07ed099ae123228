"""Whatever is typed, the error is ours: public functions and methods with arguments of wrong kinds and wrong words."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
from compare import DATA, ZERO2

import ckptlab
from ckptlab import CheckpointError, CkptlabError, Layout, Mesh, plots
from ckptlab.arguments import described, explained, fits
from ckptlab.errors import InputError

pytest.importorskip("matplotlib")

CKPT = ckptlab.open(ZERO2)
PLAN = CKPT.reshape(Mesh(dp=3))
WHOLE = xr.DataArray(np.zeros((4, 4), np.float32), dims=("out", "in"))
WRONG: list[Any] = [None, 5, "nonsense", [1, "a"], {"a": object()}, object(), np.zeros((2, 2)), Mesh(tp=2), CKPT, WHOLE]
RIGHT: dict[str, Any] = {
    **dict.fromkeys(("view", "ckpt", "a", "b", "source", "found"), CKPT),
    **dict.fromkeys(("array", "whole"), WHOLE),
    "shards": WHOLE.expand_dims(tp=2),
    "layout": "(tp out) in",
    "mesh": Mesh(tp=2),
    "path": str(ZERO2),
    "shape": (4, 4),
    "axis": "tp",
    "rank": 0,
}
OPEN = {"ax", "default", "window", "workers", "other", "value"}  # matplotlib's, Mapping's, and what `pool` is asked
CLASSES = (Mesh, Layout, ckptlab.Megatron, ckptlab.Cluster)
OBJECTS = [
    CKPT,
    PLAN,
    PLAN.plan,
    Mesh(tp=2, dp=2),
    Layout("(tp out) in"),
    Layout("(tp out) in").resolve((4, 4), Mesh(tp=2)),
    ckptlab.open_run(DATA / "plain_zero1_dp2_steps"),
    ckptlab.diff(CKPT, CKPT),
    ckptlab.check(CKPT),
]


def public() -> Iterator[tuple[str, Callable[..., Any]]]:
    """Every public function, class that users make, and method."""
    for name in (*ckptlab.__all__, "open"):
        found = getattr(ckptlab, name)
        widgets = name in ("explore", "playground")
        if found in CLASSES or (inspect.isfunction(found) and not widgets):
            yield name, found
    yield from ((f"plots.{name}", getattr(plots, name)) for name in ("norms", "histograms", "drift", "spectrum"))
    yield from ((f"viz.{name}", getattr(ckptlab.viz, name)) for name in ckptlab.viz.__all__ if name.islower())
    yield from ((f"plan.{name}", getattr(ckptlab.plan, name)) for name in ("between", "compose"))
    yield from ((f".ckptlab.{name}", getattr(WHOLE.ckptlab, name)) for name in ("merge", "split", "to"))
    for owner in OBJECTS:
        for name, method in inspect.getmembers(owner, callable):
            if not name.startswith("_") and name not in ("load_into", "of"):
                yield f"{type(owner).__name__}.{name}", method


@pytest.mark.slow
@pytest.mark.parametrize(("name", "function"), public(), ids=lambda x: x if isinstance(x, str) else "")
def test_errors_are_ours(
    name: str, function: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    parameters = inspect.signature(function).parameters.values()
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and p.name not in OPEN]
    needed = {p.name: RIGHT.get(p.name) for p in named if p.default is p.empty}
    for parameter in named:
        for wrong in WRONG:
            try:
                function(**{**needed, parameter.name: wrong})
            except CkptlabError:
                continue


def test_the_argument_is_named_with_what_is_taken() -> None:
    for attempt, said in (
        (
            lambda: ckptlab.merge(np.zeros(3), "out"),
            r"merge takes shards=DataArray, not a numpy.ndarray: name its dims",
        ),
        (lambda: ckptlab.merge(xr.Dataset(), "out"), "not a xarray.Dataset: take one of its variables"),
        (lambda: ckptlab.open(5), "open takes path=str, path or Sequence of str or path, not 5"),
        (lambda: Layout(3), "Layout takes text=str, not 3"),
        (lambda: Layout("out", dim=("out",)), "^Layout takes no dim=: it takes dims, text, "),
        (lambda: CKPT.full(dtyp="float32"), "full takes no dtyp=: it takes dtype, "),
        (lambda: ckptlab.diff(CKPT.full(), CKPT), "diff takes a=.*Checkpoint.*, not a xarray.DataTree"),
        (lambda: ckptlab.viz.plan(CKPT), "plan takes plan=Plan or Reshape, not a ckptlab.Checkpoint"),
        (lambda: CKPT.full(dtype="float33"), "not 'float33'"),
        (lambda: ckptlab.open(ZERO2, strategy=5), "open takes strategy="),
    ):
        with pytest.raises(InputError, match=said):
            attempt()
    assert "x" not in CKPT
    assert 5 not in CKPT
    assert ckptlab.diff(CKPT, CKPT, states="master").equal
    with pytest.raises(CheckpointError, match="nosuch://b: Protocol not known"):
        ckptlab.open("nosuch://b/run")


def test_an_error_of_ones_own_is_left_alone() -> None:
    @explained
    def halved(number: int) -> float:
        return 1 / number

    with pytest.raises(ZeroDivisionError):
        halved(0)
    with pytest.raises(TypeError, match="missing 1 required positional argument"):
        halved()  # type: ignore[call-arg]
    with pytest.raises(InputError, match="halved takes number=int, not 'a'"):
        halved("a")  # type: ignore[arg-type]
    assert fits([1, 2], list[int])
    assert not fits("ab", dict[str, int])
    assert described(int | str | None) == "int, str or None"
