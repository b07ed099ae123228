"""Optimizers other than Adam, as DeepSpeed's files have them: Muon's whole momentum, states that do not begin at zero
or are copies of the weights at first."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from compare import ZERO2, ZERO3, differences, whole
from helpers.files import edit

import ckptlab
from ckptlab.arrays import Tally
from ckptlab.catalog import MASTER, Catalog
from ckptlab.convert.manifest import MANIFEST
from ckptlab.errors import CheckpointError
from ckptlab.formats import fileplan, get, read
from ckptlab.formats.torch import torchfile
from ckptlab.mesh import Mesh
from ckptlab.reshaping import Reshape

MOMENTUM = "momentum_buffer"
BF16 = np.dtype(ml_dtypes.bfloat16)
GROUP = 0  # of matrices, in the cases of data/


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    return Path(shutil.copytree(ZERO2, tmp_path / "run", ignore=shutil.ignore_patterns("truth*", "universal")))


def base(content: dict[str, Any]) -> dict[str, Any]:
    return content["optimizer_state_dict"]["base_optimizer_state"]


def momentum(catalog: Catalog, name: str) -> np.ndarray:
    """What Muon's momentum of a tensor is in the copy that `muon` makes: the first moment, rounded."""
    return whole(catalog, name, "exp_avg").astype(BF16)


@pytest.fixture
def muon(copied: Path) -> Path:
    """A run at ZeRO-2 on dp 2 as Muon leaves it: each rank has the momentum of the matrices in its partition, in part
    or not, whole and in the gradients' dtype."""
    source = read(ZERO2)
    flat = source.flat_groups[GROUP].flats[source.flat_groups[GROUP].holders[0]]

    def change(content: dict[str, Any], d: int) -> None:
        names = [flat.names[i] for i in flat.within(d)[:, 0]]
        base(content)["state"][GROUP] = {MOMENTUM: np.concatenate([momentum(source, n).ravel() for n in names])}
        base(content)["param_groups"][GROUP].update(use_muon=True, momentum=0.9)

    for d, file in enumerate(sorted(copied.rglob("*optim_states.pt"))):
        edit(file, lambda content, d=d: change(content, d))
    return copied


def test_muon_has_whole_momentum(muon: Path) -> None:
    source, found = read(ZERO2), read(muon)
    matrices = found.groups[GROUP].tensors
    assert len(matrices) > 10
    for name in matrices:
        assert set(found[name].states) == {MASTER, MOMENTUM, "param"}
        assert np.array_equal(whole(found, name, MOMENTUM), momentum(source, name))
    assert differences(source, found) == []
    assert ckptlab.check(muon).verdict == "healthy"


@pytest.mark.parametrize(
    "target",
    [
        {"dp": 3},
        {"dp": 1},
        {"zero_stage": 1, "dp": 4},
        {"zero_stage": 3},
        {"zero_stage": 0},
        {"dp": 3, "round_robin": True},
    ],
    ids=str,
)
def test_muon_there_and_back(muon: Path, target: dict[str, Any], tmp_path: Path) -> None:
    source = ckptlab.open(muon)
    source.reshape(**target).save(tmp_path / "there" / "global_step3")
    there = ckptlab.open(tmp_path / "there")
    assert differences(source.catalog, there.catalog) == []
    there.reshape(dp=2, zero_stage=2, round_robin=False).save(tmp_path / "back" / "global_step3")
    assert differences(source.catalog, read(tmp_path / "back")) == []
    for file in sorted(tmp_path.glob("back/*/*optim_states.pt")):  # as DeepSpeed keeps it
        want = base(torchfile.read(muon / "global_step3" / file.name))["state"][GROUP][MOMENTUM]
        have = base(torchfile.read(file))["state"][GROUP][MOMENTUM]
        assert have.dtype == want.dtype
        assert np.array_equal(have.map(), want.map())


def test_muon_with_an_offloaded_optimizer_cuts_it(muon: Path, tmp_path: Path) -> None:
    for file in muon.rglob("*_states.pt"):
        edit(file, lambda c: c["ds_config"]["zero_optimization"].update(offload_optimizer={"device": "cpu"}))
    ckptlab.open(muon).reshape(dp=3).save(tmp_path / "there" / "global_step3")
    for file in tmp_path.glob("there/*/*optim_states.pt"):
        content = torchfile.read(file)["optimizer_state_dict"]
        cut = content["single_partition_of_fp32_groups"][GROUP].numel + content["group_paddings"][GROUP]
        assert base({"optimizer_state_dict": content})["state"][GROUP][MOMENTUM].numel == cut


@pytest.mark.parametrize("dp", [1, 2, 3, 5])
def test_the_plans_figures_are_what_happens(muon: Path, dp: int, tmp_path: Path) -> None:
    """A matrix that ranks share is written on each of them."""
    source, tally = read(muon), Tally()
    reshaped = Reshape.of(source, Mesh(dp=dp))
    for plan in get("deepspeed").files(source, reshaped.target, tally):
        fileplan.write(plan, tmp_path / plan.name)
    cost = reshaped.cost()
    assert cost.read == sum(tally.read.values())
    assert cost.moved == sum(n for (a, b), n in tally.read.items() if a != b)
    assert cost.written == sum(reshaped.file_sizes.values())


def test_a_momentum_of_another_size_is_refused(muon: Path) -> None:
    file = next(muon.rglob("*rank_1_*optim_states.pt"))
    edit(file, lambda c: base(c)["state"][GROUP].update({MOMENTUM: np.zeros(4000, BF16)}))
    with pytest.raises(CheckpointError, match="momentum_buffer of group 0"):
        ckptlab.open(muon)


def test_muon_without_zero_sorts_by_size(muon: Path, tmp_path: Path) -> None:
    """The larger shapes first; nothing names a tensor there."""
    ckptlab.open(muon).reshape(zero_stage=0).save(tmp_path / "zero0" / "global_step3")
    file = tmp_path / "zero0" / "global_step3" / "mp_rank_00_model_states.pt"

    def change(content: dict[str, Any]) -> None:
        optimizer = content["optimizer"]
        inner, masters = optimizer["optimizer_state_dict"], optimizer["fp32_groups"][GROUP]
        order = sorted(range(len(masters)), key=lambda i: masters[i].shape, reverse=True)
        assert order != list(range(len(masters)))
        ids = inner["param_groups"][GROUP]["params"]
        inner["state"].update(zip(ids, [inner["state"][ids[i]] for i in order], strict=True))
        optimizer["fp32_groups"][GROUP] = [masters[i] for i in order]

    edit(file, change)
    assert differences(read(muon), read(tmp_path / "zero0")) == []
    assert set(read(tmp_path / "zero0").states) == set(read(muon).states)


@pytest.mark.parametrize("case", [ZERO2, ZERO3], ids=lambda c: c.name)
def test_states_with_other_beginnings_are_healthy(case: Path, tmp_path: Path) -> None:
    """Rprop's step sizes, which padding has too, and ASGD's average, which is the weights until it begins."""
    folder = Path(shutil.copytree(case, tmp_path / "run", ignore=shutil.ignore_patterns("truth*", "universal")))

    def change(content: dict[str, Any]) -> None:
        inner = content["optimizer_state_dict"]
        masters = inner.get("single_partition_of_fp32_groups") or inner["fp32_flat_groups"]
        states = (inner.get("base_optimizer_state") or inner["optimizer_state_dict"])["state"]
        for i, state in states.items():
            size = state.pop("exp_avg").numel
            del state["exp_avg_sq"]
            padded = np.zeros(size, np.float32)
            padded[: masters[i].numel] = masters[i].map()
            state.update(step_size=np.full(size, 1e-6, np.float32), ax=padded)

    for file in folder.rglob("*optim_states.pt"):
        edit(file, change)
    assert ckptlab.check(folder).findings == ()


def test_a_master_over_a_moment_is_found(copied: Path) -> None:
    """What the states of one tensor may have in common is not what these may."""

    def change(content: dict[str, Any]) -> None:
        master = content["optimizer_state_dict"]["single_partition_of_fp32_groups"][GROUP]
        base(content)["state"][GROUP]["exp_avg"] = master.map().copy()

    edit(next(copied.rglob("*rank_0_*optim_states.pt")), change)
    assert "doubled-data" in [f.code for f in ckptlab.check(copied).findings]


def test_a_frozen_tied_weight_left_out(tmp_path: Path) -> None:
    """What `exclude_frozen_parameters` leaves of one at ZeRO-3 is a placeholder under its other name."""
    folder = Path(shutil.copytree(ZERO3, tmp_path / "run", ignore=shutil.ignore_patterns("truth*")))
    for file in folder.rglob("*model_states.pt"):
        edit(file, lambda c: c["module"].update({"head.weight": np.empty(0, BF16)}))
    source = ckptlab.open(folder)
    assert "head.weight" not in source
    for stage, kept in ((3, True), (1, False)):
        source.reshape(dp=1, zero_stage=stage).save(tmp_path / f"z{stage}" / "global_step3")
        file = next((tmp_path / f"z{stage}").rglob("*model_states.pt"))
        assert ("head.weight" in torchfile.read(file)["module"]) is kept
        assert differences(source.catalog, read(tmp_path / f"z{stage}")) == []


def test_a_factored_optimizer_without_zero_is_all_that_is_said(tmp_path: Path) -> None:
    """Adafactor's rows and columns: not that optimizer files are missing, which there never were."""
    ckptlab.open(ZERO2).reshape(zero_stage=0).save(tmp_path / "run" / "global_step3")

    def change(content: dict[str, Any]) -> None:
        for state in content["optimizer"]["optimizer_state_dict"]["state"].values():
            moment = state.pop("exp_avg")
            del state["exp_avg_sq"]
            state.update(row_var=np.ones((moment.shape[0], 1), np.float32), col_var=np.ones(7, np.float32))

    edit(next((tmp_path / "run").rglob("*model_states.pt")), change)
    (tmp_path / "run" / "global_step3" / MANIFEST).unlink()
    assert [f.code for f in ckptlab.check(tmp_path / "run").findings] == ["not-read-yet"]


@pytest.mark.parametrize("case", [ZERO2, ZERO3], ids=lambda c: c.name)
@pytest.mark.parametrize("stage", [2, 3])
def test_frozen_tensors_that_a_run_leaves_out(case: Path, stage: int, tmp_path: Path) -> None:
    """As PEFT's runs do. An engine takes every frozen tensor of its model out of `frozen_param_fragments`, if there is
    such a thing, even an empty one."""
    folder = Path(shutil.copytree(case, tmp_path / "run", ignore=shutil.ignore_patterns("truth*", "universal")))

    def change(content: dict[str, Any]) -> None:
        for name in content["frozen_param_shapes"]:
            del content["module"][name]
        content.update(frozen_param_shapes=None, frozen_param_fragments=None)

    for file in folder.rglob("*model_states.pt"):
        edit(file, change)
    ckptlab.open(folder).reshape(zero_stage=stage).save(tmp_path / "out" / "global_step3")
    for file in (tmp_path / "out").rglob("*model_states.pt"):
        content = torchfile.read(file)
        assert content["frozen_param_fragments"] is content["frozen_param_shapes"] is None
