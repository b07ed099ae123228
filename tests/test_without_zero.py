"""Training without ZeRO: the optimizer stands whole in the model file, and names no tensor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from compare import GPT, ZERO2, ZERO3, differences, differences_from_truth
from helpers.files import edit
from real_deepspeed import make_case, requires_deepspeed, resume

import ckptlab
from ckptlab.errors import CheckpointError, ReshapeError
from ckptlab.formats import read
from ckptlab.formats.torch import torchfile

MODEL = "mp_rank_00_model_states.pt"


def saved(case: Path, to: Path, **options: Any) -> Path:
    ckptlab.open(case).reshape(zero_stage=0, **options).save(to / "step")
    return to / "step"


class TestThereAndBack:
    @pytest.mark.slow
    @pytest.mark.parametrize("fused", [True, False])
    @pytest.mark.parametrize(("case", "stage"), [(ZERO2, 2), (ZERO2, 1), (ZERO3, 3)], ids=str)
    def test_of_a_plain_model(self, case: Path, stage: int, fused: bool, tmp_path: Path) -> None:
        whole = saved(case, tmp_path / "a", fused=fused, dp=3)
        there = ckptlab.open(whole)
        assert (there.zero_stage, there.findings) == (0, ())
        assert differences_from_truth(there.catalog, case / "truth.safetensors") == []
        there.reshape(zero_stage=stage, dp=2).save(tmp_path / "b" / "step")
        back = read(tmp_path / "b")
        assert back.zero_stage == stage
        assert differences(back, read(case)) == []
        assert [g.tensors for g in back.groups] == [g.tensors for g in read(case).groups]
        there.reshape().save(tmp_path / "c" / "step", "universal")
        assert differences(read(tmp_path / "c"), read(case)) == []

    def test_of_a_pipeline_in_fp16(self, tmp_path: Path) -> None:
        """Tied tensors have a copy on the last stage, which need not be equal to that of the first."""
        whole = saved(GPT, tmp_path / "a", dtype="fp16", tp=1, fused=False)
        there = read(whole)
        masters = {k for k in _truth(GPT) if not k.startswith("param/")}
        assert masters.isdisjoint(differences_from_truth(there, GPT / "truth.safetensors"))
        assert [len(g.tensors) for g in there.groups] == [len(g.tensors) for g in read(GPT).groups]

    def test_in_fp32_the_weights_are_the_masters(self, tmp_path: Path) -> None:
        there = read(saved(ZERO2, tmp_path, dtype="fp32"))
        for tensor in there.tensors.values():
            if tensor.kind == "parameter":
                assert tensor.states["master"] == tensor.states["param"] == np.float32
        state = torchfile.read(tmp_path / "step" / MODEL)["optimizer"]
        assert set(state) == {"state", "param_groups"}
        moved = differences_from_truth(there, ZERO2 / "truth.safetensors")
        assert all(key.startswith(("param/", "frozen/", "buffer/")) for key in moved)

    def test_what_is_written_is_what_is_planned(self, tmp_path: Path) -> None:
        reshaped = ckptlab.open(ZERO2).reshape(zero_stage=0)
        with ckptlab.reading() as did:
            report = reshaped.save(tmp_path / "step")
        cost = reshaped.cost()
        assert report.bytes_written == cost.written
        assert did.bytes == cost.read

    def test_a_bf16_pipeline_cannot_be_loaded_by_deepspeed_itself(self) -> None:
        with pytest.raises(ReshapeError, match="cannot load them"):
            ckptlab.open(GPT).reshape(zero_stage=0)


def _truth(case: Path) -> set[str]:
    from safetensors.numpy import load_file

    return set(load_file(case / "truth.safetensors"))


class TestNames:
    def test_frozen_tensors_of_a_trained_ones_shape_are_told_by_their_values(self, tmp_path: Path) -> None:
        step = saved(ZERO2, tmp_path, fused=False)
        like = read(step)["blocks.0.ln1.weight"]
        twin = np.full(like.shape, 0.25, like.states["param"])

        def add(content: dict, value: np.ndarray = twin) -> None:
            module = dict(content["module"])
            content["module"] = {"first.weight": value, **module}

        edit(step / MODEL, add)
        assert read(step)["first.weight"].kind == "frozen"
        assert differences_from_truth(read(step), ZERO2 / "truth.safetensors") == []

    def test_what_nothing_tells_is_left_out(self, tmp_path: Path) -> None:
        """In float32 there are no masters to compare with: weights are read, states are not guessed."""
        step = saved(ZERO2, tmp_path, dtype="fp32")
        like = next(t for t in read(step).tensors.values() if t.kind == "parameter" and len(t.shape) == 2)
        edit(step / MODEL, lambda c: c.update(module={"first": np.zeros(like.shape, np.float32), **c["module"]}))
        ckpt = ckptlab.open(step)
        assert [f.code for f in ckpt.findings] == ["optimizer-unnamed"]
        assert ckpt.states == ("param",)
        with pytest.raises(ReshapeError, match="weights alone"):
            ckpt.reshape(dp=1)

    def test_a_master_lost(self, tmp_path: Path) -> None:
        step = saved(ZERO2, tmp_path, fused=False)
        edit(step / MODEL, lambda c: c["optimizer"]["fp32_groups"].__setitem__(0, c["optimizer"]["fp32_groups"][0][1:]))
        with pytest.raises(CheckpointError, match="a master weight for each"):
            read(step)


def test_steps_are_counted_by_each_parameter(tmp_path: Path) -> None:
    """Torch counts steps in place: no two of them are the same memory."""
    torch = pytest.importorskip("torch")
    step = saved(ZERO2, tmp_path, fused=False)
    state = torch.load(step / MODEL, weights_only=False)["optimizer"]["optimizer_state_dict"]["state"]
    assert len({one["step"].data_ptr() for one in state.values()}) == len(state) == 42
    ckptlab.open(ZERO3).reshape().save(tmp_path / "z3" / "step")
    file = next((tmp_path / "z3" / "step").glob("*optim_states.pt"))
    state = torch.load(file, weights_only=False)["optimizer_state_dict"]["optimizer_state_dict"]["state"]
    assert len({one["step"].data_ptr() for one in state.values()}) == len(state) > 2


@requires_deepspeed
@pytest.mark.parametrize(
    ("case", "options", "changes"),
    [
        ("plain_zero0_dp2", {"dp": 3}, {"dp": 3}),
        ("plain_zero0_dp2", {"zero_stage": 2}, {"zero": 2}),
        ("plain_zero0_dp2_fp16", {}, {}),
        ("plain_zero0_dp2_fp32", {"dp": 1}, {"dp": 1}),
        ("plain_zero0_dp2_fp32", {"zero_stage": 1}, {"zero": 1}),
        ("gpt_tp2_pp2_dp1_zero0_fp16", {"tp": 1}, {"tp": 1}),
    ],
    ids=str,
)
def test_deepspeed_resumes(
    case: str, options: dict, changes: dict, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = make_case(case, tmp_path)
    assert differences_from_truth(read(folder), folder / "truth.safetensors") == []
    ckptlab.open(folder).reshape(**options).save(tmp_path / "out" / "step")
    report = resume(tmp_path / "out" / "step", folder, **changes)
    assert report["status"] == "equal", report.get("error") or report["differences"]


@requires_deepspeed
@pytest.mark.parametrize(("case", "dp"), [(ZERO2, 2), (ZERO3, 3)], ids=str)
def test_deepspeed_resumes_what_had_zero(case: Path, dp: int, tmp_path: Path) -> None:
    step = saved(case, tmp_path, dp=dp)
    report = resume(step, case.name, zero=0, dp=dp)
    assert report["status"] == "equal", report.get("error") or report["differences"]
