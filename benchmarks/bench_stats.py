"""A full pass of statistics beside reading the same files once: seconds, their ratio, and the peak of memory.

`python benchmarks/bench_stats.py [--real] [--megabytes N] [--rounds N] [--checkpoint FOLDER] [--cold]`. Without --real
the checkpoint is made up here in a second (random weights in float32 and bfloat16, as safetensors); with it, it is the
1.4 GB one of large.py, by real DeepSpeed. Rounds alternate between the commands. Files are in the page cache; --cold
evicts them before each command, as of a checkpoint that is larger than memory. `cat` writes to /dev/null; two of them
share the files between them. Statistics run on as many threads as there are cores, if not said.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

MEASURED = """
import resource, sys, time
import numpy, xarray
import ckptlab
from ckptlab import stats, updates
stats(xarray.DataArray(numpy.zeros(1)))  # xarray loads dask and scipy when it is first used
ckpt = ckptlab.open(sys.argv[1])
cpu, began = time.process_time(), time.monotonic()
{}
wall, cpu = time.monotonic() - began, time.process_time() - cpu
print(wall, cpu, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""
PASSES = {
    "stats": "stats(ckpt)",
    "stats, one thread": "stats(ckpt, on=1)",
    "stats, no histograms": "stats(ckpt, histogram=False)",
    "stats of tp shards": "stats(ckpt.shards())",
    "adam": "updates(ckpt)",
}


def made_up(folder: Path, megabytes: int) -> Path:
    """Random weights: three parts in four float32, the rest bfloat16, in files of at most 256 MB."""
    rng = np.random.default_rng(0)
    block = rng.standard_normal(1 << 22).astype(np.float32) * np.float32(0.02)  # 16 MiB
    folder.mkdir(parents=True)
    for file in range(max(megabytes // 256, 1)):
        size = min(256, megabytes) * 1_000_000
        tensors: dict[str, np.ndarray] = {}
        while (held := sum(t.nbytes for t in tensors.values())) < size:
            whole = len(tensors) % 4 != 3
            array = block if whole else np.concatenate([block, block]).astype(ml_dtypes.bfloat16)
            tensors[f"layers.{file}.{len(tensors)}.weight"] = array[: max((size - held) // array.itemsize, 1)]
        save_file(tensors, folder / f"model-{file + 1:05d}.safetensors")
    return folder


def files_of(folder: Path) -> list[str]:
    return sorted(str(path) for path in folder.rglob("*") if path.is_file() and path.suffix in (".pt", ".safetensors"))


def evict(files: list[str]) -> None:
    """Make the next reader of these files read them from the disk."""
    for file in files:
        handle = os.open(file, os.O_RDONLY)
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def cat(files: list[str], processes: int) -> tuple[float, ...]:
    """Seconds, and those of a core, in which some processes together have read all files once."""
    parts = [files[i::processes] for i in range(processes)]
    before, began = os.times(), time.monotonic()
    running = [subprocess.Popen(["cat", *part], stdout=subprocess.DEVNULL) for part in parts if part]
    if any(process.wait() for process in running):
        raise RuntimeError(f"cat failed on {files[0]} …")
    wall, after = time.monotonic() - began, os.times()
    return wall, after.children_user + after.children_system - before.children_user - before.children_system, 0.0


def measure(folder: Path, call: str) -> tuple[float, ...]:
    """Seconds of a pass, without imports and opening, those of a core, and the peak resident MiB of its process."""
    command = [sys.executable, "-c", MEASURED.format(call), str(folder)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return tuple(map(float, done.stdout.split()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--real", action="store_true", help="the 1.4 GB checkpoint of large.py (makes it: 40 s, 7 GB)")
    parser.add_argument("--megabytes", type=int, default=512, help="size of the made-up one")
    parser.add_argument("--checkpoint", type=Path, help="another checkpoint; with --real: where it is or shall be")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cold", action="store_true", help="evict the files from the page cache before each command")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        if options.real:
            place = (options.checkpoint or Path(scratch)).resolve()
            large = Path(__file__).with_name("large.py")
            subprocess.run([sys.executable, large, place, "gpt_tp2_pp1_dp2"], check=True, stdout=subprocess.DEVNULL)
            folder = place / "gpt_tp2_pp1_dp2" / "global_step1"
        else:
            folder = options.checkpoint or made_up(Path(scratch) / "made", options.megabytes)
        files = files_of(folder)
        size = sum(os.path.getsize(file) for file in files)
        print(f"{len(files)} files, {size / 1e9:.2f} GB, {os.cpu_count()} cores, {options.rounds} rounds\n")
        skipped = set() if options.real else {"stats of tp shards", "adam"}
        commands: dict[str, Callable[[], tuple[float, ...]]] = {
            "cat": partial(cat, files, 1),
            "cat, two at a time": partial(cat, files, 2),
        }
        commands |= {name: partial(measure, folder, call) for name, call in PASSES.items() if name not in skipped}
        found: dict[str, list[tuple[float, ...]]] = {}
        cat(files, 1)
        for _ in range(options.rounds):
            for name, command in commands.items():
                if options.cold:
                    evict(files)
                found.setdefault(name, []).append(command())
    print("| pass | seconds, median (range) | × cat | GB/s | seconds of a core | peak MiB |\n|---|---|---|---|---|---|")
    once = statistics.median(s for s, *_ in found["cat"])
    for name, runs in found.items():
        seconds, cores, peaks = zip(*runs, strict=True)
        middle = statistics.median(seconds)
        spread = f"{middle:.2f} ({min(seconds):.2f}–{max(seconds):.2f})"
        figures = f"{middle / once:.1f} | {size / middle / 1e9:.2f} | {statistics.median(cores):.2f}"
        print(f"| {name} | {spread} | {figures} | {f'{max(peaks):.0f}' if max(peaks) else ''} |")


if __name__ == "__main__":
    main()
