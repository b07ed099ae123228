"""Real DeepSpeed resumes what ckptlab wrote: native files by a plain `load_checkpoint`, and universal folders."""

from __future__ import annotations

from pathlib import Path

import pytest
from compare import DATA
from real_deepspeed import make_case, requires_deepspeed, resume

from ckptlab.formats import read
from ckptlab.mesh import Mesh
from ckptlab.reshaping import Reshape

GPT, ZERO2, ZERO3 = "gpt_tp2_pp2_dp2", "plain_zero2_dp2", "plain_zero3_dp2"


def judge(case: str | Path, tmp_path: Path, mesh: Mesh, form: str = "deepspeed", **options: object) -> None:
    folder = DATA / case
    Reshape.of(read(folder), mesh, form, **options).save(tmp_path / "out" / "step")
    stage = {"zero": options["zero_stage"]} if "zero_stage" in options else {}
    changes = {"tp": mesh.tp, "pp": mesh.pp, "dp": mesh.dp, **stage}
    if options.get("round_robin") is False:
        changes["zero_config"] = {}
    report = resume(tmp_path / "out" / "step", case, universal=form == "universal", **changes)
    assert report["status"] == "equal", report.get("error") or report["differences"]
    assert report["compared"]["exp_avg_sq"] > 20


@requires_deepspeed
@pytest.mark.parametrize("mesh", [Mesh(tp=4), Mesh(pp=4), Mesh(dp=3)], ids=str)
def test_3d_native(mesh: Mesh, tmp_path: Path) -> None:
    judge(GPT, tmp_path, mesh)


@requires_deepspeed
@pytest.mark.parametrize("mesh", [Mesh(tp=4), Mesh(pp=2)], ids=str)
def test_3d_universal(mesh: Mesh, tmp_path: Path) -> None:
    judge(GPT, tmp_path, mesh, "universal")


@requires_deepspeed
def test_universal_by_a_strategy_of_the_targets(tmp_path: Path) -> None:
    """What one tp rank saved tells no layouts: those that are given say where DeepSpeed cuts."""
    case = make_case("gpt_tp1_pp2_dp2", tmp_path)
    judge(case, tmp_path, Mesh(tp=2), "universal", strategy="megatron")


@requires_deepspeed
@pytest.mark.parametrize(
    ("case", "mesh", "options"),
    [
        (ZERO2, Mesh(dp=3), {}),
        (ZERO2, Mesh(dp=1), {}),
        (ZERO2, Mesh(dp=2), {"zero_stage": 3}),
        (ZERO2, Mesh(dp=2), {"zero_stage": 1}),
        (ZERO3, Mesh(dp=3), {}),
        (ZERO3, Mesh(dp=1), {}),
        (ZERO3, Mesh(dp=2), {"zero_stage": 2}),
    ],
    ids=str,
)
def test_zero_native(case: str, mesh: Mesh, options: dict, tmp_path: Path) -> None:
    judge(case, tmp_path, mesh, **options)


@requires_deepspeed
@pytest.mark.parametrize("options", [{}, {"round_robin": False}, {"zero_stage": 0}], ids=str)
def test_from_round_robin(options: dict, tmp_path: Path) -> None:
    judge("plain_zero2_dp2_round_robin", tmp_path, Mesh(dp=3), **options)


@requires_deepspeed
def test_round_robin_scrambles_universal_folders_as_one_is_told(tmp_path: Path) -> None:
    case = DATA / "plain_zero2_dp2_round_robin"
    made = Reshape.of(read(case), Mesh(dp=2), "universal")
    assert "universal-round-robin" in [f.code for f in made.check()]
    made.save(tmp_path / "out" / "step")
    assert resume(tmp_path / "out" / "step", case.name, universal=True, steps=0)["status"] == "different"
    without = Reshape.of(read(case), Mesh(dp=2), "universal", round_robin=False)
    assert "universal-round-robin" not in [f.code for f in without.check()]
    plain = resume(tmp_path / "out" / "step", case.name, universal=True, steps=0, zero_config={})
    assert plain["status"] == "equal", plain["differences"]


@requires_deepspeed
@pytest.mark.parametrize("mesh", [Mesh(pp=2, dp=3), Mesh(pp=1)], ids=str)
def test_from_a_pipeline_with_round_robin(mesh: Mesh, tmp_path: Path) -> None:
    """Each stage deals its own tensors."""
    judge(make_case("gpt_tp1_pp2_dp2_round_robin", tmp_path), tmp_path, mesh)


@requires_deepspeed
@pytest.mark.parametrize("case", [ZERO2, ZERO3])
def test_zero_universal(case: str, tmp_path: Path) -> None:
    judge(case, tmp_path, Mesh(dp=3), "universal")


@requires_deepspeed
def test_unequal_sub_parameters(tmp_path: Path) -> None:
    """Grouped-query attention and SwiGLU: q, k, v and the two halves of the MLP are each cut on their own."""
    case = make_case("gqa_tp2_pp1_dp2", tmp_path)
    judge(case, tmp_path, Mesh(tp=1, pp=2))
