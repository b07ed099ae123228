"""What tests ask of real DeepSpeed, in a process that has imported it: a server of forks.

A job is a line of JSON, `["make", CASE, OUT, UNIVERSAL]`, `["judge", FOLDER, CASE, CHANGES, UNIVERSAL, STEPS]` or
`["onward", FOLDER, CASE, [[RANKS, TP], …]]`; the answer is one too, `{"value": …}` or `{"error": TEXT}`.
"""

from __future__ import annotations

import json
import sys
import traceback
from pathlib import Path
from typing import Any, TextIO

import forks

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "data"))

from foundry import make, onward, ranks, resume


def done(job: str, *arguments: Any) -> Any:
    """What make.py, resume.py or onward.py makes of a job."""
    if job == "make":
        case, out, universal = arguments
        return str(make.make(case, Path(out), universal))
    if job == "onward":
        folder, case, programs = arguments
        return onward.judge(Path(folder), resume.case_folder(case), programs)
    folder, case, changes, universal, steps = arguments
    return resume.judge(Path(folder), resume.case_folder(case), changes, universal, steps)


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
