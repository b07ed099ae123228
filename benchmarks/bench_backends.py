"""Merging and splitting in memory, as a fraction of the device's plain copy of the same bytes in the same run.

`python benchmarks/bench_backends.py [--gib 1] [--backends numpy torch jax] [--device cuda] [--rounds 7]` times five
layouts over tp 4 on bfloat16 and float32. Each figure is the median over the rounds of copy time / operation time,
the two one after the other, so 1 is the speed of a copy. numpy and torch write into a destination that is there
already, as their plain copies do (`np.copyto`, `copy_`); jax arrays cannot be written to: there both make a new array.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from datetime import date
from typing import Any

import ml_dtypes
import numpy as np

from ckptlab.arrays.backends import Backend, resolve
from ckptlab.arrays.moves import Moves, flat_merge, flat_split, moves
from ckptlab.layout import Cut, Layout
from ckptlab.mesh import Mesh
from ckptlab.plan import FlatBuffer

TP = 4
LAYOUTS = {
    "column": ("(tp out) in", {}),
    "row": ("out (tp in)", {}),
    "fused q, k, v": ("(3 tp out) in", {}),
    "unequal q, k, v": ("((tp q) + (tp k) + (tp v)) in", {"q": 4, "k": 1, "v": 1}),
}


def cases(elements: int) -> dict[str, tuple[Moves, Moves]]:
    """Layout → (merge, split) of about so many elements, a multiple of 6 · TP rows."""
    side = int(elements**0.5) // 96 * 96
    found = {}
    for name, (text, parts) in LAYOUTS.items():
        totals = {part: side * share // 6 for part, share in parts.items()}
        cut = Layout(text, totals=totals).resolve((side, side), Mesh(tp=TP))
        whole = Cut.whole((side, side))
        found[name] = moves(cut, whole), moves(whole, cut)
    flat = FlatBuffer.contiguous(["w"], [side * side], 8)
    shapes = ((side * side,),)
    found["ZeRO flat, dp 8"] = flat_merge((flat,), (1,), 0, flat.size(0), shapes), flat_split((flat,), (1,), (shapes,))
    return found


def copier(backend: Backend, source: Any) -> Callable[[], Any]:
    """The device's plain copy of an array."""
    if backend.name == "jax":
        import jax
        import jax.numpy as jnp

        copy = jax.jit(jnp.copy)
        return lambda: copy(source)
    out = backend.empty(tuple(source.shape), backend.dtype_of(source))
    return lambda: backend.assign(out, source)


def mover(backend: Backend, planned: Moves, source: Any) -> Callable[[], Any]:
    if backend.name == "jax":
        return lambda: backend.move(planned, [source])
    out = backend.empty(planned.shape, backend.dtype_of(source))
    return lambda: backend.move(planned, [source], out)


def seconds(backend: Backend, run: Callable[[], Any]) -> float:
    began = time.perf_counter()
    finished(backend, run())
    return time.perf_counter() - began


def finished(backend: Backend, result: Any) -> None:
    if backend.name == "jax":
        result.block_until_ready()
    elif backend.device.startswith("cuda"):
        import torch

        torch.cuda.synchronize()


def measure(backend: Backend, dtype: np.dtype, nbytes: int, rounds: int) -> None:
    for name, both in cases(nbytes // dtype.itemsize).items():
        row = []
        for planned in both:
            shape = planned.sources[0]
            host = np.random.default_rng(0).integers(1, 100, shape, np.uint8).astype(dtype)
            source = backend.from_numpy(host, owned=True)
            del host
            plain, operation = copier(backend, source), mover(backend, planned, source)
            seconds(backend, plain), seconds(backend, operation)  # compiled, and the memory touched
            pairs = [(seconds(backend, plain), seconds(backend, operation)) for _ in range(rounds)]
            ratios = [copy / moved for copy, moved in pairs]
            speed = source.nbytes / min(copy for copy, _ in pairs) / 1e9
            row += [f"{statistics.median(ratios):.2f} ({min(ratios):.2f}–{max(ratios):.2f})", f"{speed:.1f}"]
        print(f"| {backend.name} {backend.device} | {dtype} | {name} | {row[0]} | {row[2]} | {row[1]} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--backends", nargs="+", default=["numpy", "torch", "jax"])
    parser.add_argument("--device", help="cuda, say, for all of them (default: the CPU)")
    args = parser.parse_args()
    print(f"{date.today()}, {args.gib} GiB, {card(args.device)}\n")
    print("| backend | dtype | layout, tp 4 | merge, × copy (range) | split, × copy (range) | plain copy, GB/s |")
    print("|---|---|---|---|---|---|")
    for name in args.backends:
        for dtype in (np.dtype(ml_dtypes.bfloat16), np.dtype(np.float32)):
            measure(resolve(name, args.device), dtype, int(args.gib * 2**30), args.rounds)


def card(device: str | None) -> str:
    """What it runs on, in words."""
    if device is None or not device.startswith("cuda"):
        return "on the CPU"
    import torch

    return torch.cuda.get_device_name()


if __name__ == "__main__":
    main()
