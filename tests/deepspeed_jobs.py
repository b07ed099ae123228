"""What tests ask of real DeepSpeed, in a process that has imported it: a server of forks.

A job is a line of JSON, `["make", CASE, OUT, UNIVERSAL]`, `["judge", FOLDER, CASE, CHANGES, UNIVERSAL, STEPS]` or
`["onward", FOLDER, CASE, [[RANKS, TP], …]]`; the answer is one too, `{"value": …}` or `{"error": TEXT}`.
"""

from __future__ import annotations

import fcntl
import json
import shutil
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any, TextIO

import forks

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "data"))

from foundry import make, onward, ranks, resume


def done(job: str, *arguments: Any) -> Any:
    """What make.py, resume.py or onward.py makes of a job."""
    if job == "make":
        return str(_made(*arguments))
    if job == "onward":
        folder, case, programs = arguments
        return onward.judge(Path(folder), resume.case_folder(case), programs)
    folder, case, changes, universal, steps = arguments
    return resume.judge(Path(folder), resume.case_folder(case), changes, universal, steps)


def _made(case: str, out: str, universal: bool) -> Path:
    """A case in a folder of the test's own. It is trained once a session."""
    cases = Path(sys.argv[1]).with_suffix(".universal" if universal else ".native")
    cases.mkdir(exist_ok=True)
    with (cases / f"{case}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (cases / case).exists():
            with tempfile.TemporaryDirectory(dir=cases) as unfinished:
                make.make(case, Path(unfinished), universal).rename(cases / case)
    return Path(shutil.copytree(cases / case, Path(out, case)))


def answer(lines: TextIO) -> None:
    for line in lines:
        try:
            found = {"value": done(*json.loads(line))}
        except Exception:
            found = {"error": traceback.format_exc()}
        print(json.dumps(found), file=lines, flush=True)


if __name__ == "__main__":
    ranks.preload()
    forks.serve(answer)
