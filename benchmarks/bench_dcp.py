"""torch Distributed Checkpoint: converting one beside torch's own ways, and opening a `.metadata` of 100,000 chunks.

`python benchmarks/bench_dcp.py [--gigabytes 1.4] [--ranks 4] [--rounds 3]` makes a folder as FSDP2 saves it (weights,
both moments in float32, rows cut over the ranks), then runs each command in a process of its own, in turn, and prints
seconds and the peak of resident memory. torch's `dcp_to_torch_save` makes one file, `dcp.load` fills tensors in memory;
ckptlab writes a folder for twice as many ranks, one file, DeepSpeed's ZeRO-1 files, and the weights.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from ckptlab import Mesh
from ckptlab.catalog import MASTER, Catalog, Extents, Fragment, ParameterGroup, Tensor, Training, whole_placements
from ckptlab.catalog.extents import ALONE
from ckptlab.layout import Cut, Layout
from ckptlab.reshaping import Reshape
from ckptlab.stored import Stored

CHUNKS = (1024, 100)  # ranks × tensors of the large `.metadata`
ROWS, COLUMNS = 4096, 1024

COMMANDS = {
    "cp -r": "import shutil, sys; shutil.copytree(sys.argv[1], sys.argv[2])",
    "dcp_to_torch_save": """
import sys, warnings
warnings.simplefilter("ignore")
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
dcp_to_torch_save(sys.argv[1], sys.argv[2])""",
    "dcp.load, one process, into memory": """
import sys, warnings
warnings.simplefilter("ignore")
import torch, torch.distributed.checkpoint as dcp
found = dcp.FileSystemReader(sys.argv[1]).read_metadata().state_dict_metadata
state = {k: torch.empty(tuple(e.size), dtype=e.properties.dtype) for k, e in found.items() if hasattr(e, "size")}
dcp.load(state, checkpoint_id=sys.argv[1])""",
    "ckptlab → dcp, dp 8": """
import sys, ckptlab
ckptlab.open(sys.argv[1]).reshape(ckptlab.Mesh(dp=8), format="dcp").save(sys.argv[2])""",
    "ckptlab → dcp, dp 8, --no-sync": """
import sys, ckptlab
ckptlab.open(sys.argv[1]).reshape(ckptlab.Mesh(dp=8), format="dcp").save(sys.argv[2], sync=False)""",
    "ckptlab → dcp, one file": """
import sys, ckptlab
ckptlab.open(sys.argv[1]).reshape(format="dcp", chunks="whole").save(sys.argv[2])""",
    "ckptlab → deepspeed, dp 4, ZeRO-1": """
import sys, ckptlab
to = ckptlab.open(sys.argv[1]).reshape(ckptlab.Mesh(dp=4), format="deepspeed", zero_stage=1, dtype="bf16")
to.save(sys.argv[2] + "/step")""",
    "ckptlab → safetensors": """
import sys, ckptlab
ckptlab.save_weights(ckptlab.open(sys.argv[1]), sys.argv[2])""",
}
MEASURED = """
import resource, time
began = time.monotonic()
{}
print(time.monotonic() - began, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""
WRITTEN = """
import sys
sys.path.insert(0, sys.argv[2])
from bench_dcp import large
large(sys.argv[1])"""
READ_BY_TORCH = """
import sys, torch.distributed.checkpoint as dcp
began = time.monotonic()
assert len(dcp.FileSystemReader(sys.argv[1]).read_metadata().state_dict_metadata) >= int(sys.argv[2])"""
OPENED = """
import sys, ckptlab
began = time.monotonic()
ckpt = ckptlab.open(sys.argv[1])
assert len(ckpt) == int(sys.argv[2]), len(ckpt)"""


def source(folder: Path, tensors: int, rows: int, columns: int, states: tuple[str, ...]) -> Catalog:
    """A catalog of so many tensors, all of whose states are the same bytes of one file of random numbers."""
    path = folder / "numbers"
    if not path.exists():
        np.random.default_rng(0).standard_normal(rows * columns, np.float32).tofile(path)
    names = [f"layers.{i}.weight" for i in range(tensors)]
    stored = Stored(str(path), 0, np.dtype(np.float32), (rows, columns), (columns, 1))
    cut, layout = Cut.whole((rows, columns)), Layout("out in")
    kinds = dict.fromkeys(states, np.dtype(np.float32))
    held = {n: Tensor(n, (rows, columns), layout, cut, "parameter", kinds, 0) for n in names}
    places = [(name, state) for name in names for state in states]
    options = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    groups = (ParameterGroup(options, tuple(names), {"step": 3}),)
    extents = Extents({key: {ALONE: (Fragment(0, stored),)} for key in places})
    training = Training(step=3, dtype="fp32", groups=groups)
    return Catalog(
        str(path), "torch", Mesh(), held, whole_placements(held, places), extents, training=training, files=()
    )


def large(root: str) -> None:
    """The folder of many chunks. In a process of its own: what a child is said to have held begins at its parent's."""
    ranks, tensors = CHUNKS
    whole = source(Path(root), tensors, ranks, 1, (MASTER,))
    Reshape.of(whole, Mesh(dp=ranks), "dcp", keys="weights").save(Path(root, "large"), sync=False, verify=False)


def measured(program: str, *arguments: str) -> tuple[float, float]:
    """Seconds and peak MiB of a program in a process of its own, the start of Python left out."""
    command = [sys.executable, "-c", MEASURED.format(program), *arguments]
    ran = subprocess.run(command, check=True, capture_output=True, text=True)
    seconds, peak = ran.stdout.split()[-2:]
    return float(seconds), float(peak)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=1.4)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        states = (MASTER, "exp_avg", "exp_avg_sq")
        count = max(round(options.gigabytes * 1e9 / (ROWS * COLUMNS * 4 * len(states))), 1)
        folder = root / "fsdp"
        Reshape.of(source(root, count, ROWS, COLUMNS, states), Mesh(dp=options.ranks), "dcp").save(folder, sync=False)
        size = sum(f.stat().st_size for f in folder.iterdir())
        print(f"{size / 1e9:.2f} GB, {options.ranks} ranks, {count} tensors\n")
        print("| command | seconds, median (range) | × cp | peak MiB |\n|---|---|---|---|", flush=True)
        found: dict[str, list[tuple[float, float]]] = {name: [] for name in COMMANDS}
        for _ in range(options.rounds):
            for name, program in COMMANDS.items():
                target = root / "out"
                found[name].append(measured(program, str(folder), str(target)))
                if target.is_dir():
                    shutil.rmtree(target)
                else:
                    target.unlink(missing_ok=True)
        copy = statistics.median(seconds for seconds, _ in found["cp -r"])
        for name, runs in found.items():
            seconds = [s for s, _ in runs]
            middle, peak = statistics.median(seconds), max(p for _, p in runs)
            told = f"{middle:.2f} ({min(seconds):.2f}–{max(seconds):.2f})"
            print(f"| {name} | {told} | {middle / copy:.1f} | {peak:.0f} |")
        shutil.rmtree(folder)
        ranks, tensors = CHUNKS
        (root / "numbers").unlink()
        seconds, peak = measured(WRITTEN, str(root), str(Path(__file__).parent))
        print(f"\na folder of {ranks * tensors:,} chunks is written: {seconds:.1f} s, {peak:.0f} MiB")
        for what, program in (("ckptlab opens it", OPENED), ("torch reads its .metadata", READ_BY_TORCH)):
            seconds, peak = measured(program, str(root / "large"), str(tensors))
            print(f"{what}: {seconds:.2f} s (imports left out), {peak:.0f} MiB")


if __name__ == "__main__":
    main()
