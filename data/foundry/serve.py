"""One process that has imported DeepSpeed, and makes cases and judges checkpoints, a job a line: for whoever has many.

`python data/foundry/serve.py FD`: jobs are lines of JSON on standard input, `["make", CASE, OUT, UNIVERSAL]`,
`["judge", FOLDER, CASE, CHANGES, UNIVERSAL, STEPS]` or `["onward", FOLDER, CASE, [[RANKS, TP], …]]`; each is answered
by a line of JSON on the file descriptor FD, `{"value": …}` or `{"error": TEXT}`. It ends with its input.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `foundry`, from wherever the script is run

from foundry import make, onward, resume


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


def main() -> None:
    with os.fdopen(int(sys.argv[1]), "w") as answers:
        for line in sys.stdin:
            try:
                answer = {"value": done(*json.loads(line))}
            except Exception:
                answer = {"error": traceback.format_exc()}
            print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
