"""Loading a tensor onto a device, as a fraction of the peer's speed in the same run.

`python benchmarks/bench_to_device.py [--gib 2] [--device cuda] [--rounds 5]` writes a safetensors file of random bits,
once read so that it lies in the page cache, and times: `numpy.fromfile` and torch's `.to(device)`; safetensors'
`load_file(device=)`; ckptlab's lazy view on torch and on jax. Medians in seconds, and how much faster than each
peer ckptlab is on torch. All results are compared bit for bit.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save_file
from safetensors.torch import load_file

import ckptlab
from ckptlab.arrays.backends import resolve


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=2.0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    rows = int(args.gib * 2**30) // (4 * 4096)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        values = np.random.default_rng(0).integers(0, 2**31, (rows, 4096), np.int32).view(np.float32)
        save_file({"w": values}, path)
        header = path.stat().st_size - values.nbytes
        ways: dict[str, Callable[[], Any]] = {
            "numpy.fromfile, .to(device)": lambda: torch.from_numpy(
                np.fromfile(path, np.float32, offset=header).reshape(values.shape)
            ).to(args.device),
            "safetensors.load_file": lambda: load_file(path, device=args.device)["w"],
            "ckptlab, torch": lambda: loaded(path, "torch", args.device),
            "ckptlab, jax": lambda: loaded(path, "jax", args.device),
        }
        where = torch.cuda.get_device_name() if args.device.startswith("cuda") else args.device
        print(
            f"{date.today()}, {args.gib} GiB of float32, {where}\n\n| way | s, median (range) | GB/s |\n|---|---|---|"
        )
        medians = {}
        for name, way in ways.items():
            assert bits(way()) == bits(values), name  # and warms up
            taken = [seconds(way) for _ in range(args.rounds)]
            medians[name] = statistics.median(taken)
            speed = values.nbytes / medians[name] / 1e9
            print(f"| {name} | {medians[name]:.3f} ({min(taken):.3f}–{max(taken):.3f}) | {speed:.1f} |", flush=True)
        mine = medians["ckptlab, torch"]
        for name in list(ways)[:2]:
            print(f"\nckptlab on torch is {medians[name] / mine:.2f} × as fast as {name}")


def loaded(path: Path, backend: str, device: str) -> Any:
    (array,) = ckptlab.open(path).full(stack=False, backend=backend, device=device)["w"].data_vars.values()
    return array.load().data.array


def bits(array: Any) -> bytes:
    if isinstance(array, np.ndarray):
        return array.tobytes()
    return resolve("torch" if isinstance(array, torch.Tensor) else "jax").to_numpy(array).tobytes()


def seconds(way: Callable[[], Any]) -> float:
    began = time.perf_counter()
    array = way()
    if hasattr(array, "block_until_ready"):
        array.block_until_ready()
    elif array.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
