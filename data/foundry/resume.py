"""Judge a checkpoint: does real DeepSpeed resume it, and with exactly what was saved?

`python data/foundry/resume.py FOLDER CASE [--tp N] [--pp N] [--dp N] [--ep N] [--zero S] [--universal] [--json OUT]`

Fresh ranks with other initial weights load FOLDER (the one that holds `latest`, or a step folder) with
`engine.load_checkpoint`. Whole tensors are then compared, bit by bit, with the truth of CASE (a case of
data/, or a folder that holds truth.json), and training goes on for some steps. The mesh defaults to the
case's own.

Exit status: 0 equal; 1 different; 2 could not be loaded or trained on.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `foundry`, from wherever the script is run

from foundry.ranks import RankError, run_ranks
from foundry.train import DTYPES, Case, Run
from foundry.truth import Truth, differences, gather, in_dtype, load

DATA = Path(__file__).resolve().parents[1]
SALT = 99
"""Seeds initial weights that are not those of the case, so that what was not loaded shows."""
NOT_RESTORED = ("frozen", "buffer")
"""States that DeepSpeed does not read from a universal checkpoint."""


def find_checkpoint(folder: Path, universal: bool) -> tuple[Path, str]:
    """The folder to load from and the tag in it."""
    latest = folder / ("latest_universal" if universal else "latest")
    if latest.is_file():
        return folder, latest.read_text().strip()
    return folder.parent, folder.name


def resume(rank: int, case: Case, folder: Path, universal: bool, truth: Truth, steps: int, report: Path) -> None:
    """One rank: load, compare, train on. Rank 0 writes the report, and again with the losses."""
    run = Run(case, rank, salt=SALT, universal=universal)
    root, tag = find_checkpoint(folder, universal)
    path, _ = run.engine.load_checkpoint(str(root), tag=tag)
    if path is None:
        raise FileNotFoundError(f"engine.load_checkpoint found nothing under the tag {tag!r}")
    gathered = gather(run)
    result: dict[str, Any] = {}
    if gathered is not None:
        found = differences(gathered, truth)
        result["status"] = "different" if found else "equal"
        result["compared"] = Counter(key.split("/", 1)[0] for key in truth.tensors)
        result["differences"] = found
        report.write_text(json.dumps(result))
    first = run.engine.global_steps + 1
    result["losses"] = {step: run.step(step) for step in range(first, first + steps)}
    if rank == 0:
        report.write_text(json.dumps(result))


def judge(folder: Path, case_folder: Path, changes: dict[str, Any], universal: bool, steps: int) -> dict[str, Any]:
    """Resume `folder` on the case's mesh with `changes` (fields of Case) and report."""
    truth, description = load(case_folder)
    trained = Case(**description["case"])
    case = replace(trained, **changes)
    if case.zero != 1:
        case = replace(case, grad_accum_dtype=None)
    if case.dtype != trained.dtype:
        case = replace(case, grad_accum_dtype=None)
        truth = in_dtype(truth, DTYPES[case.dtype])
    if universal:
        truth.tensors = {key: t for key, t in truth.tensors.items() if not key.startswith(NOT_RESTORED)}
    if universal and case.zero == 3:
        truth.settings = {}  # DeepSpeed 0.19.8 gives every parameter group the settings of the first
    with tempfile.TemporaryDirectory(prefix="resume-") as scratch:
        report, error = Path(scratch, "report.json"), None
        try:
            run_ranks(resume, case.world, case, folder, universal, truth, steps, report)
        except RankError as failure:
            error = str(failure)
        result = json.loads(report.read_text()) if report.exists() else {}
    if error is not None:
        result |= {"status": "failed", "error": error}
    uninterrupted = {step: loss for step, loss in description["losses"].items() if int(step) > trained.saved_step}
    return result | {"case": description["name"], "mesh": case.mesh, "uninterrupted": uninterrupted}


def case_folder(case: str) -> Path:
    """The folder of a case of data/, or one that holds truth.json. FileNotFoundError if there is none."""
    for folder in (DATA / case, Path(case)):
        if (folder / "truth.json").is_file():
            return folder
    raise FileNotFoundError(f"no truth.json in {DATA / case} nor in {case}")


def show(result: dict[str, Any]) -> None:
    """Print a report for a person."""
    mesh = " · ".join(f"{axis} {degree}" for axis, degree in result["mesh"].items())
    print(f"{result['case']} on {mesh}: {result['status']}")
    for key, problem in list(result.get("differences", {}).items())[:20]:
        print(f"  {key}: {problem}")
    for step, loss in result.get("losses", {}).items():
        without_break = result["uninterrupted"].get(step)
        print(f"  step {step}: loss {loss}, uninterrupted {without_break}")
    if "error" in result:
        print(result["error"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("case", help="a case of data/, or a folder that holds truth.json")
    for axis in ("tp", "pp", "dp", "ep"):
        parser.add_argument(f"--{axis}", type=int)
    parser.add_argument("--zero", type=int, choices=(0, 1, 2, 3), help="ZeRO stage")
    parser.add_argument("--dtype", choices=DTYPES)
    parser.add_argument("--zero-config", type=json.loads, metavar="JSON", help="instead of the case's own")
    parser.add_argument("--universal", action="store_true", help="FOLDER is in DeepSpeed's universal format")
    parser.add_argument("--steps", type=int, default=2, help="steps to train after loading (default: 2)")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the report here")
    options = parser.parse_args()
    try:
        folder = case_folder(options.case)
    except FileNotFoundError as error:
        parser.error(str(error))
    asked = {name: getattr(options, name) for name in ("tp", "pp", "dp", "ep", "zero", "dtype", "zero_config")}
    changes = {name: value for name, value in asked.items() if value is not None}
    result = judge(options.folder.resolve(), folder, changes, options.universal, options.steps)
    show(result)
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    return {"equal": 0, "different": 1, "failed": 2}[result["status"]]


if __name__ == "__main__":
    sys.exit(main())
