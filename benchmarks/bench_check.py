"""`ckptlab check` beside reading the same files once: `cat` into nothing, in turn, in the same run.

`python benchmarks/bench_check.py [FOLDER ...]` takes step folders; without any it makes those of large.py (`--out`).
Whole processes, page cache warm; and the check's time inside its process, without starting Python, with the processor
seconds that it used there (on a machine that others use too, those say more). `--small` takes the
checkpoints of data/, to see that the script runs.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

INSIDE = """
import resource, sys, time
import ckptlab
from ckptlab.analysis import check
began, used = time.perf_counter(), time.process_time()
found = check(sys.argv[1])
took = time.perf_counter() - began, time.process_time() - used
print(*took, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, found.checked.bytes, found.codes)
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
        print(
            "| checkpoint | GB | cat, s | its CPU s | check, s (× cat) | inside, s (× cat) | its CPU s | MiB | found |"
        )
        print("|---|---|---|---|---|---|---|---|---|")
        for folder in folders:
            measure(folder.resolve(), options.rounds)


def measure(folder: Path, rounds: int) -> None:
    """One line of the table: medians of `rounds` rounds, one command after the other in each."""
    files = sorted(str(p) for p in folder.glob("*.pt"))
    size = sum(Path(f).stat().st_size for f in files)
    reading, reading_cpu, whole, inside, inside_cpu, peak, found = [], [], [], [], [], 0, ""
    for warm in [True, *[False] * rounds]:
        cat, cat_cpu, _ = timed(["cat", *files])
        check, *_ = timed([sys.executable, "-m", "ckptlab", "check", str(folder)])
        told = timed([sys.executable, "-c", INSIDE, str(folder)])[2].split(maxsplit=4)
        if warm:
            continue
        reading.append(cat)
        reading_cpu.append(cat_cpu)
        whole.append(check)
        inside.append(float(told[0]))
        inside_cpu.append(float(told[1]))
        peak, found = max(peak, int(told[2]) // 1024), told[4].strip()
    medians = (statistics.median(v) for v in (reading, reading_cpu, whole, inside, inside_cpu))
    cat, cat_cpu, check, within, within_cpu = medians
    print(
        f"| {folder.parent.name} | {size / 1e9:.2f} | {cat:.3f} | {cat_cpu:.3f} | "
        f"{check:.2f} ({check / cat:.1f}) | {within:.3f} ({within / cat:.1f}) | {within_cpu:.3f} | {peak} | {found} |",
        flush=True,
    )


def timed(command: list[str]) -> tuple[float, float, str]:
    """Seconds that a command takes, those of the processor, and what it prints; `cat` prints into nothing."""
    out = subprocess.DEVNULL if command[0] == "cat" else subprocess.PIPE
    began, used = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, stdout=out, text=True, check=False)
    seconds, now = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode not in (0, 1):
        raise SystemExit(f"{command[:4]} ended with {done.returncode}")
    return seconds, now.ru_utime + now.ru_stime - used.ru_utime - used.ru_stime, done.stdout or ""


if __name__ == "__main__":
    main()
