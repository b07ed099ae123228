"""Real DeepSpeed as the judge of the checkpoints that tests write.

`resume` loads a checkpoint in fresh ranks and compares what the engine then holds, bit by bit, with the truth that was
gathered when the case was trained; `make_case` trains one. Both are jobs of deepspeed_jobs.py, one process a session,
since importing DeepSpeed takes longer than most of them.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import select
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

import forks
import pytest

DATA = Path(__file__).resolve().parents[1] / "data"
JOBS = Path(__file__).with_name("deepspeed_jobs.py")
HANGS = 1800.0  # seconds after which ranks that wait for each other are ended: no bound on how long a machine may take


def requires_deepspeed(test: Callable[..., None]) -> Callable[..., None]:
    """Mark a test that starts DeepSpeed: skipped without it."""
    missing = importlib.util.find_spec("deepspeed") is None
    skipped = pytest.mark.skipif(missing, reason="deepspeed is not installed")
    return pytest.mark.deepspeed(skipped(test))


@functools.cache
def _jobs() -> tuple[socket.socket, TextIO, int]:
    """A fork that does all jobs of this process, and its process group: a fork of what has so much memory is dear."""
    connection = forks.connect(JOBS)
    lines = connection.makefile("rw")
    return connection, lines, int(lines.readline())


def _ask(limit: float, *job: Any) -> Any:
    """The value of a job. RuntimeError if it fails; TimeoutError, and the end of all ranks, after `limit` s."""
    connection, lines, group = _jobs()
    print(json.dumps(job), file=lines, flush=True)
    if not select.select([connection], [], [], limit)[0]:
        os.killpg(group, signal.SIGKILL)
        _jobs.cache_clear()
        raise TimeoutError(f"DeepSpeed took longer than {limit:g} s: {job}")
    said = lines.readline()
    if not said:
        _jobs.cache_clear()
    answer = json.loads(said or '{"error": "the process ended"}')
    if "error" in answer:
        raise RuntimeError(f"{job} failed:\n{answer['error']}")
    return answer["value"]


def resume(
    folder: Path, case: str | Path, *, universal: bool = False, steps: int = 1, limit: float = HANGS, **changes: object
) -> dict[str, Any]:
    """Resume `folder` as `case` (of data/, or a folder made by make.py) and return the report of resume.py.

    `changes` are fields of the case: tp, pp, dp, ep, zero, dtype, zero_config. `steps` are trained after loading.
    `status` in the report is "equal", "different" (then `differences` says where) or "failed" (then `error` says why).
    After `limit` seconds all ranks are ended and TimeoutError is raised.
    """
    return _ask(limit, "judge", str(folder.resolve()), str(case), changes, universal, steps)


def onward(folder: Path, case: Path, *programs: tuple[int, int]) -> list[dict[str, Any]]:
    """Load a DCP folder that was made of `case` into FSDP2 on so many ranks, with tp, and train one step, for each
    (ranks, tp); return the reports of onward.py."""
    return _ask(HANGS, "onward", str(folder.resolve()), str(case), programs)


def make_case(case: str, out: Path, *, universal: bool = False, limit: float = HANGS) -> Path:
    """Train a case of data/foundry/make.py that is not committed, in `out`; returns its folder."""
    return Path(_ask(limit, "make", case, str(out.resolve()), universal))
