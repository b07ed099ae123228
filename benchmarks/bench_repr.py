"""What a notebook waits for: HTML of checkpoints, plans, meshes and layouts, and every drawing; nothing is read.

`python benchmarks/bench_repr.py` prints milliseconds of this process (the best of five) and kB. 10,000 tensors are the
small GPT checkpoint's in `data/` with a layer repeated, under names of layers or names that have nothing in common.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import ckptlab
from ckptlab import Checkpoint, Layout, Mesh, viz
from ckptlab.plan import FlatBuffer

GPT = Path(__file__).resolve().parent.parent / "data" / "gpt_tp2_pp2_dp2"
ROUNDS = 5


def enlarged(naming: str) -> Checkpoint:
    """10,000 tensors: those of one layer again and again, called `naming` with {layer} and {name} filled in."""
    catalog = ckptlab.open(GPT).catalog
    layer = [(t, name[2:]) for name, t in catalog.tensors.items() if re.match(r"3\.", name)]
    tensors = {}
    for i in range(10_000):
        one, name = layer[i % len(layer)]
        called = naming.format(layer=i // len(layer), name=name, plain=f"{i:05}".translate(LETTERS))
        tensors[called] = replace(one, name=called, stages=(i % 2,))
    return Checkpoint(replace(catalog, tensors=tensors))


LETTERS = str.maketrans("0123456789", "abcdefghij")


def best(work: Callable[[], str]) -> tuple[float, int]:
    """Milliseconds, and characters."""
    took, said = [], ""
    for _ in range(ROUNDS):
        began = time.process_time()
        said = work()
        took.append(time.process_time() - began)
    return 1000 * min(took), len(said)


def main() -> None:
    gpt, tree, plain = ckptlab.open(GPT), enlarged("layers.{layer}.{name}"), enlarged("{plain}.weight")
    small, large = gpt.reshape(Mesh(tp=4, dp=2)), gpt.reshape(Mesh(tp=4, pp=4, dp=32))
    assert small.plan
    assert large.plan
    block = Mesh(tp=8, pp=8, dp=8)
    names = [f"layers.{i}.weight" for i in range(10_000)]
    buffer = FlatBuffer.contiguous(names, range(4096, 14_096), 512)
    measured: dict[str, Callable[[], str]] = {
        "checkpoint, 52 tensors": gpt._repr_html_,
        "checkpoint, 10,000 tensors, layers": tree._repr_html_,
        "checkpoint, 10,000 tensors, names that share nothing": plain._repr_html_,
        "plan, 8 → 8 ranks": small._repr_html_,
        "plan, 8 → 512 ranks": large._repr_html_,
        "mesh, 512 ranks": block._repr_html_,
        "layout by itself": Layout("((tp q) + (tp k) + (tp v)) in")._repr_html_,
        "viz.mesh, 512 ranks, groups": lambda: viz.mesh(block, group="dp").svg,
        "viz.tensor, 262,144 strips": lambda: (
            viz.tensor(Layout("(head tp d) in", sizes={"head": 65536}), (1 << 20, 8), Mesh(tp=4)).svg
        ),
        "viz.flat, 10,000 tensors over dp 512": lambda: viz.flat(buffer).svg,
        "viz.stages, 10,000 tensors": lambda: viz.stages(tree.catalog).svg,
        "viz.memory, 512 ranks": lambda: viz.memory(large.target).svg,
        "viz.plan, 8 → 512 ranks": lambda: viz.plan(large.plan, large.source.mesh, large.mesh).svg,
    }
    print("| what | ms | kB |\n|---|---|---|")
    for what, work in measured.items():
        milliseconds, characters = best(work)
        print(f"| {what} | {milliseconds:.1f} | {characters / 1000:.0f} |", flush=True)


if __name__ == "__main__":
    main()
