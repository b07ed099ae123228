"""How the commands grow with the size of a checkpoint, and with the number of its files, beside `cp -r` of the same.

`python benchmarks/bench_sizes.py [--gb 0.3 1.4 6] [--files 2 16 128 1024] [--rounds 3] [--folder FOLDER]`. Each size is
saved by real DeepSpeed (ZeRO-1, one rank, a step of training), which takes some five times as much memory: 6 GB want
20 GB and minutes. The numbers of files are made of the smallest by ckptlab itself, on as many dp ranks. Whole
processes, page cache warm, commands in turn, medians; FOLDER needs room for three times the largest, and what is made
there stays.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "data"))  # `foundry`

from bench_convert import CKPTLAB, PYTHON, run

LAYER, BYTES = 7_087_872, 14  # elements of a layer of hidden size 768; bytes of an element: bf16, master, two moments
VOCAB = 8000


def train(rank: int, layers: int, folder: str) -> None:
    from foundry import models
    from foundry.train import Case, Run

    models.CONFIGS["plain_large"] = replace(models.LARGE, vocab=VOCAB, layers=layers)
    run = Run(Case("plain_large"), rank)
    run.step(1)
    run.engine.save_checkpoint(folder, tag="global_step1", client_state={"iteration": 1})


def saved(gb: float, folder: Path) -> Path:
    """The step folder of a checkpoint of about so many GB, made unless it is there."""
    out = folder / f"{gb:g}GB"
    if not (out / "latest").exists():
        from foundry.ranks import run_ranks

        out.mkdir(parents=True, exist_ok=True)
        run_ranks(train, 1, max(round((gb * 1e9 / BYTES - VOCAB * 768) / LAYER), 1), str(out))
    return out / "global_step1"


def split(source: Path, ranks: int, folder: Path) -> Path:
    """The same checkpoint on so many dp ranks, of which each has a file."""
    out = folder / f"dp{ranks}" / "global_step1"
    if not out.exists():
        out.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run([*CKPTLAB, str(source), str(out), "--to", "deepspeed", "--dp", str(ranks)], check=True)
    return out


def table(folders: dict[str, Path], rounds: int, scratch: Path) -> None:
    """A line for each checkpoint: its size and files, `cp`, and what each command takes of it."""
    names = ("universal", "native", "safetensors", "check", "stats", "info")
    print(f"| checkpoint | GB | files | cp -r, s | {' | '.join(f'{n}, s (× cp)' for n in names)} |")
    print(f"|{'---|' * (4 + len(names))}")
    for name, folder in folders.items():
        found: dict[str, list[float]] = {}
        files = [f for f in folder.iterdir() if f.is_file()]
        for warm in [True, *[False] * rounds]:
            for command, words in commands(folder, scratch / "out").items():
                seconds, *_ = run(words, scratch / "out")
                if not warm:
                    found.setdefault(command, []).append(seconds)
        medians = {command: statistics.median(each) for command, each in found.items()}
        copy = medians.pop("cp")
        told = " | ".join(f"{medians[n]:.2f} ({medians[n] / copy:.1f})" for n in names)
        size = sum(f.stat().st_size for f in files) / 1e9
        print(f"| {name} | {size:.2f} | {len(files)} | {copy:.2f} | {told} |", flush=True)


def commands(folder: Path, out: Path) -> dict[str, list[str]]:
    made, source, ckptlab = str(out / "made"), str(folder), [PYTHON, "-m", "ckptlab"]
    return {
        "cp": ["cp", "-r", source, made],
        "universal": [*CKPTLAB, source, made, "--to", "universal", "--no-sync"],
        "native": [*CKPTLAB, source, made, "--to", "deepspeed", "--dp", "3", "--no-sync"],
        "safetensors": [*CKPTLAB, source, made, "--to", "safetensors", "--no-sync"],
        "check": [*ckptlab, "check", source],
        "stats": [*ckptlab, "stats", source],
        "info": [*ckptlab, "info", source],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, nargs="*", default=[0.3, 1.4, 6])
    parser.add_argument("--files", type=int, nargs="*", default=[2, 16, 128, 1024])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as scratch:
        folder = (options.folder or Path(scratch)).resolve()
        sizes = {f"{gb:g} GB": saved(gb, folder) for gb in sorted(options.gb)}
        table(sizes, options.rounds, Path(scratch))
        smallest = next(iter(sizes.values()))
        table({f"dp {n}": split(smallest, n, folder) for n in options.files}, options.rounds, Path(scratch))


if __name__ == "__main__":
    main()
