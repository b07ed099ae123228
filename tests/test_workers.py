"""One worker, two, processes: the same results, to the bit."""

from __future__ import annotations

import shutil
from concurrent.futures import Executor
from pathlib import Path

import pytest
import xarray as xr
from compare import GPT, ZERO2, ZERO3
from helpers.files import poke

import ckptlab

CASES = pytest.mark.parametrize("case", [GPT, ZERO2, ZERO3], ids=lambda c: c.name)


@pytest.mark.slow
@CASES
def test_stats_are_the_same_on_all_workers(case: Path, processes: Executor) -> None:
    for view in (ckptlab.open(case), ckptlab.open(case).shards()):
        one = ckptlab.stats(view, on=1, window=100)
        for workers in (2, processes):
            xr.testing.assert_identical(ckptlab.stats(view, on=workers, window=100), one)


@pytest.mark.slow
@CASES
def test_updates_are_the_same_on_all_workers(case: Path, processes: Executor) -> None:
    one = ckptlab.updates(case, on=1, window=100)
    for workers in (2, processes):
        xr.testing.assert_identical(ckptlab.updates(case, on=workers, window=100), one)


@pytest.mark.slow
@CASES
def test_differences_are_the_same_on_all_workers(case: Path, processes: Executor) -> None:
    other = case / "universal" if case == GPT else GPT
    one = ckptlab.diff(case, other, on=1, window=100)
    assert one.measures or other == GPT
    for workers in (2, processes):
        assert ckptlab.diff(case, other, on=workers, window=100) == one


def test_findings_are_the_same_on_all_workers(tmp_path: Path, processes: Executor) -> None:
    folder = Path(shutil.copytree(GPT / "global_step3", tmp_path / "global_step3"))
    poke(folder, "3.self_attention.dense.weight", "exp_avg", float("inf"), tp=1, element=3)
    (folder / "layer_03-model_00-model_states.pt").write_bytes(b"")
    one = ckptlab.check(folder, on=1, window=256, checksums=True)
    assert not one.healthy
    for workers in (2, processes):
        assert ckptlab.check(folder, on=workers, window=256, checksums=True) == one


def test_what_processes_read_is_counted_here(processes: Executor) -> None:
    ckpt = ckptlab.open(GPT)
    size = sum(t.numel * dtype.itemsize for t in ckpt.tensors.values() for dtype in t.states.values())
    for workers in (1, 2, processes):
        with ckptlab.reading() as read:
            ckptlab.stats(ckpt, on=workers)
        assert read.bytes == size


@pytest.mark.slow
def test_a_view_is_counted_as_it_is_read() -> None:
    with ckptlab.reading() as read:
        array = ckptlab.open(GPT).full("master", stack=False)["3.self_attention.dense.weight"]
        assert read.bytes == 0
        assert array.values.nbytes == 1024
    assert read.bytes == 1024
