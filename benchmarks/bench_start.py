"""What starting costs: `ckptlab info` of a small checkpoint, whole process, beside `python -c "import numpy"`.

`python benchmarks/bench_start.py [FOLDER] [--rounds N] [--tree FOLDER ...]`. Commands in turn; seconds of the wall and
of the processor, medians and the least. Bytecode is compiled beforehand, as pip does, into a folder of its own, and
PYTHONDONTWRITEBYTECODE is taken out of the environment: without bytecode everything takes twice as long. --tree: other
source trees of ckptlab, to be held against this one. For what a user has, run it by the Python of an environment that
has what `pip install .` brings and nothing else: other packages' entry points and editable installs take time too.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parents[1]


def timed(command: list[str], environment: dict[str, str]) -> tuple[float, float]:
    """Seconds of the wall and of the processor."""
    began, used = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=True)
    seconds, now = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    return seconds, now.ru_utime + now.ru_stime - used.ru_utime - used.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=HERE / "data/gpt_tp2_pp2_dp2/global_step3")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--tree", nargs="*", type=Path, default=[])
    options = parser.parse_args()
    folder = options.folder.resolve()
    found: dict[str, list[tuple[float, float]]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        commands: dict[str, tuple[list[str], dict[str, str]]] = {}
        for number, tree in enumerate([HERE, *(tree.resolve() for tree in options.tree)]):
            told = {"PYTHONPATH": str(tree), "PYTHONPYCACHEPREFIX": str(Path(scratch, str(number)))}
            environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"} | told
            if not number:
                commands["python -c pass"] = [sys.executable, "-c", "pass"], environment
                commands["import numpy"] = [sys.executable, "-c", "import numpy"], environment
            name = f"ckptlab info, {len(list(folder.iterdir()))} files" + (f", of {tree}" if number else "")
            commands[name] = [sys.executable, "-m", "ckptlab", "info", str(folder)], environment
        for warm in [True, *[False] * options.rounds]:
            for name, command in commands.items():
                one = timed(*command)
                if not warm:
                    found.setdefault(name, []).append(one)
    print("| command | s, median (least) | CPU s, median (least) | × import numpy, CPU |\n|---|---|---|---|")
    base = statistics.median(cpu for _, cpu in found["import numpy"])
    for name, runs in found.items():
        wall, cpu = zip(*runs, strict=True)
        told = [f"{statistics.median(v):.3f} ({min(v):.3f})" for v in (wall, cpu)]
        print(f"| {name} | {' | '.join(told)} | {statistics.median(cpu) / base:.2f} |")


if __name__ == "__main__":
    main()
