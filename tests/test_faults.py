"""Single faults in whole checkpoints: few of each kind here, three thousand are planted by hand (benchmarks/)."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest
from compare import DATA, GPT, ZERO3

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "faults.py"
CASES = [GPT / "global_step3", ZERO3 / "global_step3", DATA / "fsdp2_tp2_dp2" / "step-3"]


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.parent.name)
def test_single_faults_are_found(case: Path, tmp_path: Path) -> None:
    """By `check`, its checksums, or a conversion: but DCP's files name no rank, and its `.metadata` has no checksum; at
    ZeRO-3 the file of another run of the same step is as good as this one's."""
    told = tmp_path / "faults.json"
    runpy.run_path(str(SCRIPT))["main"]([str(case), "--flips", "1", "--json", str(told)])
    planted = json.loads(told.read_text())
    kinds = {fault["kind"] for fault in planted}
    assert {"cut", "missing", "swapped", "doubled", "moment, some bit", "master, lowest bit"} <= kinds
    missed = [fault for fault in planted if fault["finder"] in ("nobody", "traceback")]
    no_file_tells = {("swapped", ".distcp"), ("bit of the whole file", ".metadata")}
    no_file_tells |= {("another run's", "")} if case.parent == ZERO3 else set()
    assert not [f for f in missed if not any(f["kind"] == kind and name in f["where"] for kind, name in no_file_tells)]
