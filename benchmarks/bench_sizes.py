"""How the commands grow with the size of a checkpoint, and with the number of its files, beside `cp -r` of the same;
and what memory a tensor of 2 GB takes.

`python benchmarks/bench_sizes.py [--gb 0.3 1.4 6] [--files 2 16 128 1024] [--rounds 3] [--tensor 2] [--folder FOLDER]`.
The checkpoints are ZeRO-1 (bf16, master, two moments), written by ckptlab itself from 16 MB of random numbers, so that
making them takes no memory to speak of. Whole processes, page cache warm, commands in turn, medians; FOLDER needs room
for three times the largest, and what is made there stays. --tensor: GB of float32 in one tensor, which lies in a file
of holes; each format is written from it, and the peak of resident memory printed (0: none).
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
from bench_convert import CKPTLAB, PYTHON, run
from bench_dcp import COLUMNS, ROWS, source

from ckptlab import Mesh
from ckptlab.catalog import MASTER, Extents, Fragment
from ckptlab.catalog.extents import ALONE
from ckptlab.reshaping import Reshape
from ckptlab.stored import Stored

BYTES = 14 * ROWS * COLUMNS  # of a tensor: bf16, master, two moments
NAMES = ("universal", "native", "safetensors", "check", "stats", "info")
WRITE = """
import sys
sys.path.insert(0, sys.argv[1])
from bench_sizes import write
write(*sys.argv[2:4], *map(int, sys.argv[4:7]), *sys.argv[7:])
"""


def write(folder: str, out: str, tensors: int, rows: int, ranks: int, form: str = "deepspeed") -> None:
    """A checkpoint on so many dp ranks, whose tensors and states begin at different places of the same numbers (of
    `folder`/numbers, where that is there). In a process of its own, as it opens what it writes."""
    states = (MASTER, "exp_avg", "exp_avg_sq")
    apart, path = 4099, Path(folder, "numbers")  # a prime: no two parts of the same numbers are alike
    if not path.exists():
        count = rows * COLUMNS + apart * tensors * len(states)
        np.abs(np.random.default_rng(0).standard_normal(count, np.float32)).tofile(path)
    held = source(Path(folder), tensors, rows, COLUMNS, states)
    room = path.stat().st_size // 4 - rows * COLUMNS
    stored = (
        Stored(str(path), 4 * min(apart * i, room), np.dtype(np.float32), (rows, COLUMNS), (COLUMNS, 1))
        for i in range(tensors * len(states))
    )
    places = {key: {ALONE: (Fragment(0, next(stored)),)} for key in held.placements}
    options = {"dtype": "bf16", "zero_stage": 1} if form == "deepspeed" else {}
    of = replace(held, extents=Extents(places))
    Reshape.of(of, Mesh(dp=ranks), form, **options).save(out, sync=False)


def made(numbers: Path, tensors: int, rows: int, ranks: int, out: Path, form: str = "deepspeed") -> list[str]:
    """The command for `write`."""
    return [PYTHON, "-c", WRITE, *map(str, (Path(__file__).parent, numbers, out, tensors, rows, ranks, form))]


def saved(folder: Path, gb: float, ranks: int, scratch: Path) -> Path:
    """The step folder of a checkpoint of about so many GB on so many ranks, made unless it is there."""
    out = folder / f"{gb:g}GB_dp{ranks}" / "global_step3"
    if not out.exists():
        out.parent.mkdir(parents=True, exist_ok=True)
        run(made(out.parent, max(round(gb * 1e9 / BYTES), 1), ROWS, ranks, out), scratch / "log")
        (out.parent / "numbers").unlink()
    return out


def table(folders: dict[str, Path], rounds: int, scratch: Path) -> None:
    """A line for each checkpoint: its size and files, `cp`, and what each command takes of it."""
    print(f"| checkpoint | GB | files | cp -r, s | {' | '.join(f'{n}, s (× cp)' for n in NAMES)} | peak MiB |")
    print(f"|{'---|' * (5 + len(NAMES))}")
    for name, folder in folders.items():
        found: dict[str, list[float]] = {}
        peak = 0.0
        files = [f for f in folder.iterdir() if f.is_file()]
        for warm in [True, *[False] * rounds]:
            for command, words in commands(folder, scratch / "out").items():
                seconds, memory, _ = run(words, scratch / "out")
                peak = max(peak, memory)
                if not warm:
                    found.setdefault(command, []).append(seconds)
        shutil.rmtree(scratch / "out")
        medians = {command: statistics.median(each) for command, each in found.items()}
        copy = medians.pop("cp")
        told = " | ".join(f"{medians[n]:.2f} ({medians[n] / copy:.1f})" for n in NAMES)
        size = sum(f.stat().st_size for f in files) / 1e9
        print(f"| {name} | {size:.2f} | {len(files)} | {copy:.2f} | {told} | {peak:.0f} |", flush=True)


def commands(folder: Path, out: Path) -> dict[str, list[str]]:
    to, source, ckptlab = str(out / "made"), str(folder), [PYTHON, "-m", "ckptlab"]
    return {
        "cp": ["cp", "-r", source, to],
        "universal": [*CKPTLAB, source, to, "--to", "universal", "--no-sync"],
        "native": [*CKPTLAB, source, to, "--to", "deepspeed", "--dp", "3", "--no-sync"],
        "safetensors": [*CKPTLAB, source, to, "--to", "safetensors", "--no-sync"],
        "check": [*ckptlab, "check", source],
        "stats": [*ckptlab, "stats", source],
        "info": [*ckptlab, "info", source],
    }


def holes(gb: float, scratch: Path) -> None:
    """A line for each format that one large tensor of holes is written as."""
    rows = round(gb * 1e9 / (4 * COLUMNS))
    with (scratch / "numbers").open("wb") as file:
        file.truncate(4 * rows * COLUMNS)
    print(f"\n| one tensor of {gb:g} GB, all holes, to | s | peak MiB |\n|---|---|---|")
    for form in ("deepspeed", "universal", "safetensors", "dcp"):
        words = made(scratch, 1, rows, 1 if form == "safetensors" else 2, scratch / "out" / "made", form)
        seconds, memory, _ = run(words, scratch / "out")
        shutil.rmtree(scratch / "out")
        print(f"| {form} | {seconds:.1f} | {memory:.0f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, nargs="*", default=[0.3, 1.4, 6])
    parser.add_argument("--files", type=int, nargs="*", default=[2, 16, 128, 1024])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tensor", type=float, default=2)
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as made_here:
        scratch = Path(made_here)
        folder = (options.folder or scratch).resolve()
        table({f"{gb:g} GB": saved(folder, gb, 1, scratch) for gb in sorted(options.gb)}, options.rounds, scratch)
        if options.files:
            small = min(options.gb, default=0.3)
            each = {f"{small:g} GB, dp {n}": saved(folder, small, n, scratch) for n in options.files}
            table(each, options.rounds, scratch)
        if options.tensor:
            holes(options.tensor, scratch)


if __name__ == "__main__":
    main()
