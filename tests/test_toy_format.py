"""A format of a package of its own (tests/toy), that no line of ckptlab knows: all that ours can do, it can."""

from __future__ import annotations

from concurrent.futures import Executor
from importlib.metadata import entry_points
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from compare import GPT, differences, digest
from helpers.html import assert_well_formed

import ckptlab
from ckptlab import Layout, Mesh, viz
from ckptlab.catalog import MASTER, PARAM
from ckptlab.errors import CheckpointError, LawError, ReshapeError
from ckptlab.formats import get, locate
from ckptlab.testing import check_format

MESH = Mesh(ring=2, tp=2)
LAYOUTS = {
    "embed.weight": Layout("(tp out) in", padded={0: 12}),
    "layers.0.qkv.weight": Layout("(3 tp out) (ring in)", dims=("out", "in")),
    "layers.1.qkv.weight": Layout("(3 tp out) (ring in)", dims=("out", "in")),
    "layers.0.norm.weight": Layout("out"),
    "layers.1.norm.weight": Layout("out"),
    "experts": Layout("(ring expert) (tp out)", sizes={"out": (5, 3)}, dims=("expert", "out")),
}
SHAPES = {"embed": (11, 8), "qkv": (24, 8), "norm": (8,), "experts": (4, 8)}


@pytest.fixture(scope="session")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of the toy, written by hand."""
    assert entry_points(group="ckptlab.formats", name="toy"), "see Makefile: pip install --no-deps ./tests/toy"
    from toy_format.by_hand import write

    folder = tmp_path_factory.mktemp("toy") / "step7"
    chance = np.random.default_rng(0)
    tensors = {}
    for name, layout in LAYOUTS.items():
        shape = next(shape for part, shape in SHAPES.items() if part in name)
        master = chance.normal(size=shape).astype(np.float32)
        states = {MASTER: master, "momentum": master * 2, PARAM: master.astype(ml_dtypes.bfloat16)}
        tensors[name] = (layout, states)
    write(folder, MESH, tensors, step=7)
    return folder


def test_nobody_here_knows_it() -> None:
    package = Path(ckptlab.__file__).parent
    assert [str(path) for path in package.rglob("*.py") if "toy" in path.read_text().lower().split()] == []
    assert get("toy").title == "a toy checkpoint (toy.json beside .npy files of ranks)"


def test_it_passes_the_suite(toy: Path) -> None:
    meshes = [Mesh(ring=2, tp=2), Mesh(ring=1, tp=4), Mesh(ring=4, tp=1), Mesh()]
    assert len(check_format("toy", toy, meshes=meshes)) == 12


def test_it_opens_and_is_shown(toy: Path) -> None:
    ckpt = ckptlab.open(toy)
    assert (ckpt.format, ckpt.mesh, ckpt.iteration) == ("toy", MESH, 7)
    assert ckpt.states == (MASTER, "momentum", PARAM)
    shards = ckpt.shards()["layers.qkv.weight"]
    assert shards.master.dims == ("layer", "ring", "tp", "out", "in")
    whole = ckpt.full()["layers.qkv.weight"].momentum
    np.testing.assert_array_equal(ckptlab.merge(shards.momentum, LAYOUTS["layers.0.qkv.weight"]).values, whole.values)
    assert "toy" in repr(ckpt)
    assert "ring 2" in repr(ckpt)
    assert_well_formed(ckpt._repr_html_())
    experts = ckpt["experts"]
    pictures = (viz.mesh(ckpt.mesh), viz.tensor(experts.layout, experts.shape, ckpt.mesh), experts.cut)
    for picture in (*pictures, viz.stages(ckpt.catalog), viz.memory(ckpt.catalog)):
        assert_well_formed(picture._repr_html_())


def test_it_is_checked_and_compared(toy: Path, tmp_path: Path) -> None:
    health = ckptlab.check(toy)
    assert health.healthy, health
    assert ckptlab.stats(toy)
    ckptlab.open(toy).reshape(Mesh(ring=4)).save(tmp_path / "there")
    found = ckptlab.diff(toy, tmp_path / "there")
    assert found.equal
    assert health.format == "toy"


def test_it_is_reshaped_by_processes_too(toy: Path, tmp_path: Path, processes: Executor) -> None:
    reshape = ckptlab.open(toy).reshape(Mesh(ring=1, tp=4))
    assert "tp 2 → 4" in repr(reshape)
    assert_well_formed(viz.plan(reshape.plan)._repr_html_())
    reshape.save(tmp_path / "threads", on=2)
    reshape.save(tmp_path / "processes", on=processes)
    assert digest(tmp_path / "threads") == digest(tmp_path / "processes")
    with pytest.raises(ReshapeError, match="toy checkpoints know ring and tp, not pp"):
        ckptlab.open(toy).reshape(Mesh(pp=2))


def test_from_one_program_to_another(toy: Path, tmp_path: Path) -> None:
    """DeepSpeed's checkpoint becomes a toy one; the toy's weights become safetensors."""
    ckptlab.open(GPT).reshape(Mesh(ring=1, tp=2), format="toy").save(tmp_path / "toy")
    assert differences(ckptlab.open(GPT).catalog, ckptlab.open(tmp_path / "toy").catalog) == []
    ckptlab.save_weights(ckptlab.open(toy), tmp_path / "weights")
    assert differences(ckptlab.open(toy).catalog, ckptlab.open(tmp_path / "weights").catalog) == []


def test_what_is_broken_is_an_error_of_its_own(toy: Path, tmp_path: Path) -> None:
    (tmp_path / "toy.json").write_text("{}")
    assert locate(tmp_path).format == "toy"
    with pytest.raises(CheckpointError, match="expected mesh, step and tensors"):
        ckptlab.open(tmp_path)


@pytest.mark.slow
def test_the_suite_finds_what_a_careless_format_does(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from toy_format import files

    right = files._data
    monkeypatch.setattr(files, "_data", lambda path, size: len(files._npy(size)))  # looks at no file
    with pytest.raises(LawError, match=r"ring0_tp0\.npy is missing: it opens, and"):
        check_format("toy", toy)
    monkeypatch.setattr(files, "_data", lambda path, size: right(path, size) + 1)  # one byte off
    with pytest.raises(LawError, match="a check finds nothing wrong|whole tensors"):
        check_format("toy", toy)
