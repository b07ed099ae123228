"""`ckptlab check` beside reading the same files once: `cat` into nothing, in turn, in the same run.

`python benchmarks/bench_check.py [FOLDER ...]` takes step folders; without any it makes those of large.py (`--out`).
Whole processes, page cache warm; and the check's time inside its process, without starting Python. `--small` takes the
checkpoints of data/, to see that the script runs.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

INSIDE = """
import resource, sys, time
import ckptlab
from ckptlab.analysis import health
began = time.perf_counter()
found = health(sys.argv[1])
print(time.perf_counter() - began, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, found.checked.bytes, found.codes)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", type=Path)
    parser.add_argument("--out", type=Path, help="where the large checkpoints are or shall be (default: temporary)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--small", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folders = options.folders
        if options.small:
            folders = sorted(Path(__file__).resolve().parents[1].glob("data/*/global_step3"))
        elif not folders:
            from large import CASES, make

            folders = [make(name, (options.out or Path(scratch)).resolve()) for name in CASES]
        print("| checkpoint | GB | cat, s | check, s (× cat) | inside its process, s (× cat) | peak MiB | found |")
        print("|---|---|---|---|---|---|---|")
        for folder in folders:
            measure(folder.resolve(), options.rounds)


def measure(folder: Path, rounds: int) -> None:
    """One line of the table: medians of `rounds` rounds, one command after the other in each."""
    files = sorted(str(p) for p in folder.glob("*.pt"))
    size = sum(Path(f).stat().st_size for f in files)
    reading, whole, inside, peak, found = [], [], [], 0, ""
    for warm in [True, *[False] * rounds]:
        cat = timed(["cat", *files])[0]
        check = timed([sys.executable, "-m", "ckptlab", "check", str(folder)])[0]
        told = timed([sys.executable, "-c", INSIDE, str(folder)])[1].split(maxsplit=3)
        if warm:
            continue
        reading.append(cat)
        whole.append(check)
        inside.append(float(told[0]))
        peak, found = max(peak, int(told[1]) // 1024), told[3].strip()
    cat, check, within = (statistics.median(v) for v in (reading, whole, inside))
    print(
        f"| {folder.parent.name} | {size / 1e9:.2f} | {cat:.3f} | {check:.2f} ({check / cat:.1f}) | "
        f"{within:.3f} ({within / cat:.1f}) | {peak} | {found} |",
        flush=True,
    )


def timed(command: list[str]) -> tuple[float, str]:
    """Seconds that a command takes, and what it prints; `cat` prints into nothing."""
    out = subprocess.DEVNULL if command[0] == "cat" else subprocess.PIPE
    began = time.perf_counter()
    done = subprocess.run(command, stdout=out, text=True, check=False)
    seconds = time.perf_counter() - began
    if done.returncode not in (0, 1):
        raise SystemExit(f"{command[:4]} ended with {done.returncode}")
    return seconds, done.stdout or ""


if __name__ == "__main__":
    main()
