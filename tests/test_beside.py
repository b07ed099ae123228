"""What a Trainer leaves beside a step folder goes along where it stays true, and is listed where it does not."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from compare import DATA

import ckptlab

FILES = ("config.json", "trainer_state.json", "scheduler.pt", "tokenizer.json", "rng_state_0.pth", "rng_state_1.pth",
         "model.safetensors.index.json")  # fmt: skip


@pytest.fixture
def trainer(tmp_path: Path) -> Path:
    folder = Path(shutil.copytree(DATA / "plain_zero2_dp2", tmp_path / "run", ignore=shutil.ignore_patterns("truth*")))
    for name in FILES:
        (folder / name).write_text(f"this is {name}")
    return folder


def beside(folder: Path) -> set[str]:
    return {p.name for p in folder.iterdir() if p.is_file()} - {"latest"}


def test_all_of_it_on_the_same_mesh(trainer: Path, tmp_path: Path) -> None:
    reshaped = ckptlab.open(trainer / "global_step3").reshape(zero_stage=1)
    assert [f.code for f in reshaped.check()] == []
    report = reshaped.save(tmp_path / "out" / "global_step3")
    assert beside(tmp_path / "out") == set(FILES) == set(report.beside)
    assert (tmp_path / "out" / "scheduler.pt").read_text() == "this is scheduler.pt"


def test_what_is_of_each_rank_stays_on_another_mesh(trainer: Path, tmp_path: Path) -> None:
    reshaped = ckptlab.open(trainer / "global_step3").reshape(dp=1, dtype="fp16")
    left = {name for f in reshaped.check() if f.code == "left-behind" for name in f.where.files}
    assert left == {"rng_state_0.pth", "rng_state_1.pth", "model.safetensors.index.json"}
    reshaped.save(tmp_path / "out" / "global_step3")
    assert beside(tmp_path / "out") == set(FILES) - left


def test_what_is_there_already_stays(trainer: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text("mine")
    report = ckptlab.open(trainer / "global_step3").reshape().save(tmp_path / "out" / "global_step3")
    assert (tmp_path / "out" / "config.json").read_text() == "mine"
    assert "config.json" not in report.beside
    again = ckptlab.open(trainer / "global_step3").reshape().save(trainer / "elsewhere")  # beside the source itself
    assert again.beside == ()
