"""This tree beside an older one, step by step: seconds of processor and their ratio, in one run.

`python benchmarks/against.py OLD [--rounds 5] [--checkpoint FOLDER]`: OLD is a work tree of an earlier commit (`git
worktree add`). The trees take turns, each step in a process of its own, on what both can read: the 384 ranks of
holes.py, and a checkpoint of `large.py` if FOLDER has one. Steps use only what both trees offer.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from holes import make

HERE = Path(__file__).resolve().parents[1]
MEASURED = """
import sys, tempfile, time
from pathlib import Path
import numpy, xarray
import ckptlab
ckptlab.open(sys.argv[1])  # imports what opening needs
began = time.process_time()
def said(what):
    global began
    print(what, time.process_time() - began, sep="\\t")
    began = time.process_time()
ckpt = ckptlab.open(sys.argv[1])
said("open 384 ranks")
reshaped = ckpt.reshape(ckptlab.Mesh(tp=8, pp=6, dp=16))
said("reshape to tp 8 · pp 6 · dp 16")
reshaped.plan.rows
said("plan")
reshaped.cost()
said("cost")
ckpt._repr_html_()
said("HTML repr")
ckpt.full()
said("full(), a tree")
ckpt.shards()
said("shards(), a tree")
from ckptlab import Layout, Mesh
import numpy as np, xarray as xr
layout, mesh = Layout("(3 tp out) in", dims=("out", "in")), Mesh(tp=4)
whole = xr.DataArray(np.zeros((3 * 4096, 4096), np.float32), dims=("out", "in"))
ckptlab.merge(ckptlab.split(whole, layout, mesh), layout)
began = time.process_time()
for _ in range(5):
    ckptlab.merge(ckptlab.split(whole, layout, mesh), layout)
said("split and merge 200 MB, 5 times")
if len(sys.argv) > 2:
    large = ckptlab.open(sys.argv[2])
    began = time.process_time()
    ckptlab.stats(large)
    said("statistics of 1.4 GB")
    with tempfile.TemporaryDirectory(dir=Path(sys.argv[2]).parent) as scratch:
        large.reshape(ckptlab.Mesh(tp=1, dp=4)).save(Path(scratch) / "out")
        said("convert 1.4 GB, native")
"""


def measured(tree: Path, arguments: list[str]) -> dict[str, float]:
    """Step → seconds of processor, of a process on that tree."""
    environment = {**os.environ, "PYTHONPATH": str(tree)}
    command = [sys.executable, "-c", MEASURED, *arguments]
    done = subprocess.run(command, env=environment, cwd=tree, check=True, stdout=subprocess.PIPE, text=True)
    rows = (line.split("\t") for line in done.stdout.splitlines())
    return {what: float(seconds) for what, seconds in rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path)
    parser.add_argument("--checkpoint", type=Path, help="a step folder of about a GB")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "holes"
        make(folder)
        arguments = [str(folder), *([str(options.checkpoint.resolve())] if options.checkpoint else [])]
        rounds = [
            (measured(options.old.resolve(), arguments), measured(HERE, arguments)) for _ in range(options.rounds)
        ]
    print("| step | before, CPU s | now, CPU s | now ÷ before, median (range) |\n|---|---|---|---|")
    for step in rounds[0][1]:
        before, now = ([one[step] for one in tree] for tree in zip(*rounds, strict=True))
        ratios = sorted(b / a for a, b in zip(before, now, strict=True))
        middle = statistics.median(ratios)
        seconds = f"{statistics.median(before):.3f} | {statistics.median(now):.3f}"
        print(f"| {step} | {seconds} | {middle:.2f} ({ratios[0]:.2f}–{ratios[-1]:.2f}) |")


if __name__ == "__main__":
    main()
