"""Memory of each rank by kind: module weights, master weights, moments, others."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from ckptlab.catalog import MASTER, MODULE, Catalog
from ckptlab.draw import Drawing, Stack, bars
from ckptlab.draw.blocks import blocks, span, told
from ckptlab.viz.model import catalog_of

if TYPE_CHECKING:
    from ckptlab.checkpoint import Checkpoint, Reshape

KINDS = ("module weights", "master weights", "moments", "other")
BARS = 32  # bars that are drawn


def memory(model: Catalog | Checkpoint | Reshape | Mapping[str, Mapping[str, int]]) -> Drawing:
    """Bytes on each rank, by kind, as stacked bars; of a reshape, on the target's ranks.

    model: a checkpoint, its catalog, a reshape, or any mapping from labels of ranks to {kind: bytes}. Of many ranks,
    each bar is the fullest of its block. Lengths are proportional to bytes. Cells: class `amount`, data-kind,
    data-bytes, data-rank.
    """
    if isinstance(model, Mapping):
        labels = list(model)
        table = {label: {k: int(n) for k, n in kinds.items() if n} for label, kinds in model.items()}
        notes: list[str] = []
    else:
        catalog = catalog_of(model)
        found = memory_by_rank(catalog)
        mesh = catalog.mesh
        labels = [_label(mesh.coordinate(r)) if mesh.size > 1 else "the rank" for r in range(mesh.size)]
        labels = [f"{r}: {label}" if mesh.size > 1 else label for r, label in enumerate(labels)]
        table = {
            label: {k: int(n) for k, n in zip(KINDS, row, strict=True) if n}
            for label, row in zip(labels, found.tolist(), strict=True)
        }
        notes = ["tensors and their states with flat padding; no gradients, no activations"]
    stacks = []
    for block in blocks(len(labels), BARS):
        fullest = max(block, key=lambda r: sum(table[labels[r]].values()))
        label = labels[fullest] if len(block) == 1 else f"{span(block)}, fullest {labels[fullest]}"
        stacks.append(Stack(label, table[labels[fullest]], {"rank": told(block)}))
    if len(stacks) < len(labels):
        step = len(blocks(len(labels), BARS)[0])
        notes.insert(0, f"{len(labels):,} ranks in {len(stacks)} bars: each bar is the fullest of {step:,} ranks")
    return bars(_ordered(stacks), title="memory by rank", notes=notes)


def _ordered(stacks: list[Stack]) -> list[Stack]:
    """Kinds in the order of KINDS wherever they are known, so that a colour means the same in every picture."""
    kinds = list(dict.fromkeys(k for s in stacks for k in s.amounts))
    if not set(kinds) <= set(KINDS):
        return stacks
    return [Stack(s.label, {k: s.amounts.get(k, 0) for k in KINDS if k in kinds}, s.data) for s in stacks]


def _label(coordinate: Mapping[str, int]) -> str:
    return " ".join(f"{axis} {k}" for axis, k in coordinate.items())


def memory_by_rank(catalog: Catalog) -> np.ndarray:
    """(rank, kind) bytes, int64, kinds as KINDS: what training holds of the tensors and their states, from headers.

    Flat buffers with their padding, in equal parts over dp; module weights on every dp rank (ZeRO-3 cuts them).
    """
    mesh = catalog.mesh
    found = np.zeros((mesh.size, len(KINDS)), np.int64)
    for group in catalog.flat_groups:
        for tp, flat in enumerate(group.flats):
            ranks = mesh.ranks(pp=group.stage, tp=tp)
            for state, dtype in group.dtypes.items():
                found[ranks, _kind(state)] += flat.size(0) * dtype.itemsize
    flat_names = {name for group in catalog.flat_groups for name in group.names}
    for (cut, stages, state, itemsize, kind, is_flat), times in _outside(catalog, flat_names).items():
        column = _kind(state) if kind != "buffer" else KINDS.index("other")
        cut_over_dp = catalog.zero_stage == 3 and kind != "buffer" and not is_flat
        for tp in range(mesh.tp):
            held = math.prod(cut.shard_shape(cut.coordinate(dict.fromkeys(mesh.axes, 0) | {"tp": tp}))) * times
            for stage in stages:
                ranks = mesh.ranks(pp=stage, tp=tp)
                found[ranks, column] += (-(-held // mesh.dp) if cut_over_dp else held) * itemsize
    return found


def _outside(catalog: Catalog, flat_names: set[str]) -> Counter:
    """What lies outside flat buffers, alike tensors counted: module weights, frozen tensors, buffers."""
    count: Counter = Counter()
    for name, tensor in catalog.tensors.items():
        for state, dtype in tensor.states.items():
            if state == MODULE or name not in flat_names:
                count[tensor.cut, tensor.stages, state, dtype.itemsize, tensor.kind, False] += 1
    return count


def _kind(state: str) -> int:
    return 0 if state == MODULE else 1 if state == MASTER else 2
