"""The checkpoints of a run as one: every step is what that step's checkpoint holds; what is broken is told."""

from __future__ import annotations

import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import xarray as xr
from compare import DATA, GPT
from helpers.files import refuse_reading
from safetensors.numpy import save_file

import ckptlab
from ckptlab import open_run, stats
from ckptlab.analysis.run import Run
from ckptlab.errors import CheckpointError

STEPS = DATA / "plain_zero1_dp2_steps"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run that a test may damage."""
    return Path(shutil.copytree(STEPS, tmp_path / "run"))


def test_a_run_over_its_steps() -> None:
    run = open_run(STEPS)
    assert run.steps == (2, 4, 5)
    assert run.skipped == ()
    assert run[4].path.endswith("global_step4")
    tree = run.full()
    node = tree["blocks.fc1.weight"]
    assert node.master.dims == ("step", "layer", "out", "in")
    assert node["step"].values.tolist() == [2, 4, 5]
    assert node.param.dtype == ml_dtypes.bfloat16
    for step in run.steps:
        alone = run[step].full()["blocks.fc1.weight"]
        for state in ("master", "exp_avg", "param"):
            assert node[state].sel(step=step).values.tobytes() == alone[state].values.tobytes()
    moved = (node.master.sel(step=5) - node.master.sel(step=2)).values
    assert np.abs(moved).max() > 0
    assert set(tree.children) == set(run[5].full().children)


def test_shards_and_flat_buffers_over_the_steps() -> None:
    run = open_run(STEPS)
    shards, flat = run.shards("exp_avg"), run.flat()
    assert list(shards["blocks.fc1.weight"].data_vars) == ["exp_avg"]
    for step in run.steps:
        alone = run[step].shards()["blocks.fc1.weight"].exp_avg
        assert shards["blocks.fc1.weight"].exp_avg.sel(step=step, drop=True).identical(alone)
        assert (
            flat["pp0/group0"]
            .to_dataset()
            .sel(step=step, drop=True)
            .identical(run[step].flat()["pp0/group0"].to_dataset())
        )
    with pytest.raises(CheckpointError, match="no state 'moment': there are master"):
        run.shards("moment")


def test_opening_and_selecting_read_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    run = open_run(STEPS)

    refuse_reading(monkeypatch)
    part = run.full()["blocks.fc1.weight"].master.sel(step=[2, 5], layer=1).transpose("out", ...)
    assert part.dims == ("out", "step", "in")
    assert "global_step" not in repr(part)
    with pytest.raises(AssertionError, match="is read"):
        part.values  # noqa: B018


def test_states_and_dtypes_are_chosen() -> None:
    run = open_run(STEPS)
    assert set(run.full("exp_avg")["wte.weight"].data_vars) == {"exp_avg"}
    assert run.full(["param"], dtype="float32")["wte.weight"].param.dtype == np.float32
    with pytest.raises(CheckpointError, match="no state 'fp23'"):
        run.full("fp23")
    with pytest.raises(CheckpointError, match="no step 3: there are 2, 4, 5"):
        run[3]


def test_statistics_have_a_step_dim() -> None:
    run = open_run(STEPS)
    found = stats(run)
    assert found["norm"].dims == ("step", "tensor", "state")
    assert found["histogram"].dims == ("step", "tensor", "state", "bin")
    for step in run.steps:
        alone = stats(run[step])
        for name in ("elements", "norm", "mean", "std", "min", "max", "zeros"):
            np.testing.assert_allclose(found[name].sel(step=step), alone[name], rtol=1e-12, err_msg=name)
        bins = found["histogram"].sel(step=step, bin=alone["bin"])
        np.testing.assert_array_equal(bins, alone["histogram"])
    view = stats(run.full("master"))
    same = found.sel(tensor=view["tensor"], state=["master"])
    np.testing.assert_allclose(view["norm"], same["norm"], rtol=1e-12)
    assert stats(run, by="model", states=["master"])["norm"].shape == (3, 1, 1)


def test_an_incomplete_step_is_skipped_and_told(folder: Path) -> None:
    (folder / "global_step4" / "mp_rank_00_model_states.pt").unlink()
    (folder / "global_step9").mkdir()
    (folder / "notes").mkdir()
    cut = folder / "global_step2" / "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt"
    cut.write_bytes(cut.read_bytes()[:-2000])
    run = open_run(folder)
    assert run.steps == (5,)
    assert [Path(one.path).name for one in run.skipped] == ["global_step2", "global_step4", "global_step9", "notes"]
    assert all(one.reason for one in run.skipped)
    assert "skipped global_step4: " in repr(run)
    assert run.full()["wte.weight"]["step"].values.tolist() == [5]
    shutil.rmtree(folder / "global_step5")
    with pytest.raises(CheckpointError, match=r"no checkpoint.*\n  global_step2: "):
        open_run(folder)
    with pytest.raises(CheckpointError, match="no such folder"):
        open_run(folder / "nothing")


def test_a_step_on_another_mesh_is_the_same_run(folder: Path) -> None:
    before = stats(open_run(folder), histogram=False)
    reshaped = ckptlab.open(folder / "global_step4").reshape(ckptlab.Mesh(dp=3))
    reshaped.save(folder / "new")
    shutil.rmtree(folder / "global_step4")
    (folder / "new").rename(folder / "global_step4")
    run = open_run(folder)
    assert run.steps == (2, 4, 5)
    assert {ckpt.mesh.dp for ckpt in run.checkpoints.values()} == {2, 3}
    assert repr(run).count("dp 3") == 1
    after = stats(run, histogram=False)
    np.testing.assert_allclose(after["norm"], before["norm"], rtol=1e-12)
    np.testing.assert_array_equal(after["max"], before["max"])


def test_a_second_checkpoint_of_a_step_is_skipped() -> None:
    run = open_run(GPT)
    assert run.steps == (3,)
    assert run[3].format == "deepspeed"
    [twice] = run.skipped
    assert Path(twice.path).name == "universal"
    assert "is step 3 too, which was taken from global_step3" in str(twice)


def weights(folder: Path, **tensors: np.ndarray) -> None:
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors")


def test_tensors_that_come_and_change(tmp_path: Path) -> None:
    """Steps by the folders' names alone; a tensor that comes later, one of another shape, one of another dtype."""
    for step in (10, 9, 200):
        tensors = {"w": np.full((2, 3), step, np.float32), "n": np.zeros(4 if step == 9 else 5, np.float32)}
        tensors["d"] = np.full(3, step, np.float16 if step == 9 else ml_dtypes.bfloat16)
        if step > 9:
            tensors["late"] = np.ones(2, np.float32)
        weights(tmp_path / f"step-{step}", **tensors)
    weights(tmp_path / "final", w=np.zeros((2, 3), np.float32))
    run = open_run(tmp_path)
    assert run.steps == (9, 10, 200)
    assert "neither the checkpoint nor the name" in str(run.skipped[0])
    tree = run.full()
    steps = {name: node["step"].values.tolist() for name, node in tree.children.items()}
    assert steps == {"w": [9, 10, 200], "n": [10, 200], "d": [9, 10, 200], "late": [10, 200]}
    state = next(iter(tree["d"].data_vars))
    assert tree["d"][state].dtype == np.float32
    np.testing.assert_array_equal(tree["d"][state][:, 0], [9, 10, 200])
    found = stats(run, histogram=False).sel(state="master")
    assert found["elements"].sel(tensor="late").values.tolist() == [0, 2, 2]
    assert np.isnan(found["norm"].sel(tensor="late", step=9))
    assert found["elements"].sel(tensor="n").values.tolist() == [4, 5, 5]


def test_a_run_is_what_its_checkpoints_are() -> None:
    first = ckptlab.open(STEPS / "global_step2")
    run = Run("here", {2: first})
    xr.testing.assert_equal(
        run.full("master")["wte.weight"].master.isel(step=0, drop=True), first.full()["wte.weight"].master
    )
