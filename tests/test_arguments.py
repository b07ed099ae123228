"""Whatever is typed, the error is ours: public functions and methods with arguments of wrong kinds and wrong words."""

from __future__ import annotations

import inspect
import io
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import xarray as xr
from compare import GPT, ZERO2
from helpers.small import small

import ckptlab
import ckptlab.testing
from ckptlab import CheckpointError, CkptlabError, Layout, Mesh, Rules, deepspeed, families, plots
from ckptlab.arguments import described, explained, fits
from ckptlab.errors import InputError
from ckptlab.sharding import strategies

pytest.importorskip("matplotlib")

FOLDER = TemporaryDirectory()  # until the process ends
STEPS = [
    small(Path(FOLDER.name) / f"global_step{step}", step, zero_stage=2) for step in (1, 2)
]  # so that a call costs little
CKPT = ckptlab.open(STEPS[-1])
GPTS = ckptlab.open(GPT)
PLAN = CKPT.reshape(Mesh(dp=3))
WHOLE = xr.DataArray(np.zeros((4, 4), np.float32), dims=("out", "in"))
CUT = Layout("(tp out) in").resolve((4, 4), Mesh(tp=2))
CHECKPOINTS = [CKPT, PLAN, CKPT.full()]  # right for most parameters that are called so
WRONG: list[Any] = [
    *(None, True, 5, -1, float("nan"), "nonsense", "", b"x", [1, "a"], {"a": object()}, {1: 2}, {"s"}, object(), int),
    *(np.zeros((2, 2)), np.array("x"), Mesh(tp=2), WHOLE, WHOLE.to_dataset(name="x"), Path("made")),
    *(float("inf"), "(", iter([]), io.StringIO("x"), np.zeros(0), CUT, PLAN.plan, ckptlab.check(CKPT)),
    *CHECKPOINTS,
]
RIGHT: dict[str, Any] = {
    **dict.fromkeys(("view", "ckpt", "a", "b", "source", "run", "model", "catalog", "weights"), CKPT),
    "found": ckptlab.stats(CKPT.shards()),
    **dict.fromkeys(("array", "whole"), WHOLE),
    **dict.fromkeys(("layout", "text"), "(tp out) in"),
    **dict.fromkeys(("path", "dir", "checkpoint"), str(STEPS[-1])),
    "shards": WHOLE.expand_dims(tp=2),
    "mesh": Mesh(tp=2),
    "shape": (4, 4),
    "axis": "tp",
    "rank": 0,
    "cut": CUT,
    "plan": PLAN.plan,
    "group": CKPT.catalog.flat_groups[0],
    "line": families.Rename("a", "b"),
    "left": "a.weight",
    "right": "b.weight",
    "names": ["a"],
    "family": "llama",
    "numbers": {"heads": 4},
    "strategy": "megatron",
    "shapes": {"a.weight": (8, 4)},
    "mapping": {".*": "out"},
    "state": "master",
}
OPEN = {"ax", "default", "other", "value"}  # matplotlib's, Mapping's
SKIPPED = {"load_into", "load", "of", "make"}  # of a module of torch's, or what makes a value of ours
CLASSES = (Mesh, Layout, ckptlab.Megatron, ckptlab.Cluster)
MADE = ("FlatBuffer", "Placement", "Rename", "Join", "Permute", "Stack", "Family")  # by users too, of the families
MODULES: list[tuple[str, ModuleType]] = [
    ("ckptlab", ckptlab),
    ("plots", plots),
    ("viz", ckptlab.viz),
    ("plan", ckptlab.plan),
    ("families", families),
    ("analysis", ckptlab.analysis),
    ("testing", ckptlab.testing),
    ("deepspeed", deepspeed),
]
OBJECTS = [
    CKPT,
    CKPT.catalog,
    CKPT["2.mlp.dense_h_to_4h.weight"],
    CKPT.full(stack=False),
    CKPT.catalog.flat_groups[0],
    PLAN,
    PLAN.plan,
    PLAN.plan.best_ranks(),
    Mesh(tp=2, dp=2),
    Layout("(tp out) in"),
    CUT,
    Rules(()),
    ckptlab.Megatron(),
    families.resolve("gpt2", CKPT),
    ckptlab.open_run(FOLDER.name),
    ckptlab.stats(CKPT).ckptlab,
    GPTS.shards("master", stack=False)["2.mlp.dense_h_to_4h.weight"].ckptlab,
    ckptlab.diff(CKPT, CKPT),
    ckptlab.check(CKPT),
    ckptlab.viz.mesh(Mesh()),
    deepspeed.DeepSpeedCheckpoint(str(GPT / "global_step3")),
]


def public() -> Iterator[tuple[str, Callable[..., Any]]]:
    """Every public function, class that users make, and method, once."""
    known = set()
    for prefix, module in MODULES:
        for name in dir(module):
            found = getattr(module, name)
            made = found in CLASSES or name in MADE or (module is deepspeed and inspect.isclass(found))
            if (made or inspect.isfunction(found)) and found not in known:
                known.add(found)
                yield f"{prefix}.{name}", found
    yield "Rules.of", Rules.of
    yield from ((f"strategies.{name}", getattr(strategies, name)) for name in ("resolve", "column"))
    for owner in OBJECTS:
        for name in dir(owner):
            if (not name.startswith("_") and name not in SKIPPED) or name == "__getitem__":
                method = getattr(type(owner), name, None)
                if callable(method):
                    yield f"{type(owner).__name__}.{name}", getattr(owner, name)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "function"), list(public()), ids=lambda x: x if isinstance(x, str) else "")
def test_errors_are_ours(
    name: str, function: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    parameters = inspect.signature(function).parameters.values()
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    named = [p for p in parameters if p.kind in kinds and p.name not in OPEN]
    needed = {p.name: RIGHT.get(p.name) for p in named if p.default is p.empty}
    for parameter in named:
        for wrong in WRONG[: -len(CHECKPOINTS)] if RIGHT.get(parameter.name) is CKPT else WRONG:
            if parameter.name == "window" and isinstance(wrong, int):  # of so few bytes
                continue
            try:
                function(**{**needed, parameter.name: wrong})
            except CkptlabError:
                continue
    if function.__module__.startswith("ckptlab") and not any(p.kind is p.VAR_KEYWORD for p in parameters):
        with pytest.raises(InputError, match="nosuch"):
            function(**needed, nosuch=1)


@pytest.mark.parametrize(("name", "module"), MODULES, ids=lambda x: x if isinstance(x, str) else "")
def test_modules_list_their_public_names(name: str, module: ModuleType) -> None:
    assert {n for n in dir(module) if not n.startswith("__")} <= {*module.__all__, "Tensor", "open"}
    assert all(hasattr(module, n) for n in dir(module))


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
        (lambda: ckptlab.diff(CKPT.full(), CKPT), "diff takes a=.*Checkpoint.*, not a ckptlab.DataTree"),
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


def test_what_means_something_is_taken() -> None:
    """Paths, catalogs and reshapes where checkpoints are."""
    assert str(ckptlab.viz.memory(PLAN).svg) == str(ckptlab.viz.memory(PLAN.target).svg)
    assert ckptlab.viz.plan(PLAN).svg == ckptlab.viz.plan(PLAN.plan, PLAN.source.mesh, PLAN.mesh).svg
    assert ckptlab.viz.mesh(CKPT).svg == ckptlab.viz.mesh(CKPT.mesh).svg
    tensor = GPTS["2.mlp.dense_h_to_4h.weight"]
    drawn = ckptlab.viz.tensor(tensor.layout, tensor.shape, tensor.cut.mesh, name=tensor.name)
    assert ckptlab.viz.tensor(tensor).svg == drawn.svg
    assert ckptlab.with_weights(str(ZERO2), ZERO2).mesh == CKPT.mesh


def test_a_page_begins_with_the_mesh_of_a_reshape() -> None:
    pytest.importorskip("anywidget")
    assert ckptlab.explore(PLAN).mesh == Mesh(dp=3)
    assert ckptlab.explore(str(ZERO2)).mesh == CKPT.mesh
    own = GPTS.reshape(strategy={".*dense_h_to_4h.weight": "(tp out) (dp in)"})
    with pytest.raises(CheckpointError, match="layouts of your own is no state of this page"):
        ckptlab.explore(own)


def test_options_of_a_target_are_of_their_kinds() -> None:
    for wrong in ({"sub_group_size": "a"}, {"zero_stage": "1"}, {"padded_vocab": 1.5}, {"heads": True}):
        [(name, value)] = wrong.items()
        with pytest.raises(InputError, match=f"reshape takes {name}=.*, not {value!r}"):
            GPTS.reshape(**wrong)
    for text, fields in (("(tp out)", {"sizes": {"out": 3.5}}), ("(tp out)", {"totals": {"out": "4"}})):
        with pytest.raises(InputError):
            Layout(text, **fields)
    with pytest.raises(ckptlab.ReshapeError, match=r"ranks, ckptlab plans for 16,777,216 at most"):
        GPTS.reshape(dp=10**30)
    with pytest.raises(ckptlab.MeshError, match="not True"):
        Mesh(tp=True)
    with pytest.raises(ckptlab.MeshError, match=r"no axis 'pt': .* Mesh\(tp=3\)"):
        Mesh(tp=2).replace(pt=3)


def test_a_name_that_a_tree_lacks_is_told_where_it_has_gone() -> None:
    full = GPTS.full()
    for key, said in (
        ("2.mlp.dense_h_to_4h.weight", r"is a layer of a stack here: \['mlp.dense_h_to_4h.weight'\].sel\(layer=2\)"),
        ("mlp.dense_h_to_4h.wait", "did you mean mlp.dense_h_to_4h.weight"),
    ):
        with pytest.raises(KeyError, match=said):
            full[key]
    with pytest.raises(KeyError, match="there are master, exp_avg"):
        full["mlp.dense_h_to_4h.weight"]["module"]
    with pytest.raises(KeyError, match="is in 4 layers, 2.mlp.dense_h_to_4h.weight, …: full"):
        GPTS["mlp.dense_h_to_4h.weight"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("3", "expected a JSON object of pattern: notation, found 3"),
        ('{".*": 3}', "expected a line of notation, .*, found 3"),
        ('{".*": "((tp"}', r"'\.\*': expected a '\)'"),
        ('{".*": {"layout": "out", "padded": [3]}}', "padded: expected an object, name: length, found"),
        ('{".*": {"layout": "(tp out)", "totals": {"out": 1.5}}}', "1.5"),
        ('{".*": "(tp out) (dp in)"}', "names dp, and DeepSpeed's files cut tensors over tp alone"),
    ],
)
def test_strategies_in_json_say_what_is_wrong(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "own.json").write_text(text)
    with pytest.raises(CkptlabError, match=said):
        ckptlab.open(GPT, strategy=str(tmp_path / "own.json"))


def test_what_only_looks_like_a_thing_is_not_taken_for_it(tmp_path: Path) -> None:
    """A tensor of torch's has a `layout` and a plan has `rows`: neither is a strategy or what has statistics."""
    torch = pytest.importorskip("torch")
    for strategy in (torch.zeros(2), GPTS["6.weight"], ckptlab):
        with pytest.raises(InputError, match="open takes strategy="):
            ckptlab.open(ZERO2, strategy=strategy)  # type: ignore[arg-type]
    for view in (PLAN.plan, CUT):
        with pytest.raises(CkptlabError, match="takes|statistics are of"):
            ckptlab.stats(view)  # type: ignore[arg-type]
    assert [f.code for f in ckptlab.check(CKPT)] == list(ckptlab.check(CKPT).codes)  # and ends
    assert list(CKPT.catalog) == list(CKPT)
    for path in ("/dev/null", tmp_path / "nothing"):
        with pytest.raises(CheckpointError, match=r"cannot be read: Not a directory|no such file"):
            ckptlab.open(path)


def test_numbers_of_threads_and_elements_are_those_that_can_be() -> None:
    for run in (ckptlab.stats, ckptlab.updates, ckptlab.check):
        for wrong in (0, -1, 1.5, True):
            with pytest.raises(InputError, match=r"window=(int, not|.*: expected a whole number, 1 at least)"):
                run(CKPT, window=wrong)  # type: ignore[operator]
        for on in (0, 10**30, np.int8(-3)):
            with pytest.raises(InputError, match="expected how many threads, 1 to 4096"):
                run(CKPT, on=on)  # type: ignore[operator]
    with pytest.raises(InputError, match=r"tensors='\(' is no regular expression"):
        plots.norms(CKPT, tensors="(")
    with pytest.raises(InputError, match="mesh takes width=float or None, not inf"):
        ckptlab.viz.mesh(CKPT.mesh, width=float("inf"))


def test_more_folders_than_can_be_searched_are_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for n in range(6):
        (tmp_path / "a" / str(n)).mkdir(parents=True)
    monkeypatch.setattr(import_module("ckptlab.formats.locate"), "_MOST", 5)
    with pytest.raises(CheckpointError, match="one of more than 5 folders to search: name the checkpoint's"):
        ckptlab.open(tmp_path)
