"""Real DeepSpeed as the judge of the checkpoints that tests write.

`resume` runs data/foundry/resume.py, which loads a checkpoint in fresh ranks and compares what the engine
then holds, bit by bit, with the truth that was gathered when the case was trained.
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

DATA = Path(__file__).resolve().parents[1] / "data"
HANGS = 1800.0  # seconds after which ranks that wait for each other are ended: no bound on how long a machine may take


def requires_deepspeed(test: Callable[..., None]) -> Callable[..., None]:
    """Mark a test that starts DeepSpeed: skipped without it, and never beside another one (two cores are
    few)."""
    missing = importlib.util.find_spec("deepspeed") is None
    for mark in (
        pytest.mark.deepspeed,
        pytest.mark.xdist_group("deepspeed"),
        pytest.mark.skipif(missing, reason="deepspeed is not installed"),
    ):
        test = mark(test)
    return test


def resume(
    folder: Path,
    case: str | Path,
    *,
    universal: bool = False,
    limit: float = HANGS,
    **changes: object,
) -> dict[str, Any]:
    """Resume `folder` as `case` (of data/, or a folder made by make.py) and return the report of resume.py.

    `changes` are its options: tp, pp, dp, zero, dtype, zero_config, steps. `status` in the report is "equal",
    "different" (then `differences` says where) or "failed" (then `error` says why). After `limit` seconds all
    ranks are ended and TimeoutError is raised.
    """
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch, "report.json")
        command = [sys.executable, DATA / "foundry" / "resume.py", folder, case, "--json", report]
        command += ["--universal"] if universal else []
        for name, value in changes.items():
            option = "--" + name.replace("_", "-")
            command += [option, json.dumps(value) if isinstance(value, dict) else value]
        output = _run(list(map(str, command)), limit)
        if not report.exists():
            raise RuntimeError(f"resume.py made no report:\n{output}")
        return json.loads(report.read_text())


def make_case(case: str, out: Path, *, universal: bool = False, limit: float = HANGS) -> Path:
    """Train a case of data/foundry/make.py that is not committed, in `out`; returns its folder."""
    command = [sys.executable, str(DATA / "foundry" / "make.py"), case, "--out", str(out)]
    output = _run(command + (["--universal"] if universal else []), limit)
    if not (out / case / "truth.json").exists():
        raise RuntimeError(f"make.py did not make {case}:\n{output}")
    return out / case


def _run(command: list[str], limit: float) -> str:
    """Run a command in a session of its own, so that its ranks end with it; returns what it printed."""
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        return process.communicate(timeout=limit)[0]
    except subprocess.TimeoutExpired as error:
        raise TimeoutError(f"DeepSpeed took longer than {limit:g} s: {' '.join(command)}") from error
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
