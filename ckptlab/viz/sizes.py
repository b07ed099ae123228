"""Memory of each rank by kind: module weights, master weights, moments, others."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ckptlab.catalog import MASTER, MODULE, Catalog, Tensor
from ckptlab.draw import Axes, Drawing, Stack, bars
from ckptlab.draw.blocks import blocks
from ckptlab.draw.words import ranges
from ckptlab.layout import Cut
from ckptlab.viz.model import catalog_of

if TYPE_CHECKING:
    from typing_extensions import TypeIs

    from ckptlab.checkpoint import Checkpoint, Reshape

KINDS = ("module weights", "master weights", "moments", "other")
RANKS = 16  # ranks that have a bar each
BARS = 24  # bars that are drawn

Table = NDArray[np.int64]
Model: TypeAlias = "Catalog | Checkpoint | Reshape | Mapping[str, Mapping[str, int]]"


def memory(model: Model) -> Drawing:
    """Bytes on each rank, by kind, as stacked bars; of a reshape, on the target's ranks.

    model: a checkpoint, its catalog, a reshape, or any mapping from labels of ranks to {kind: bytes}. Of many ranks,
    each bar is the fullest of its block. Lengths are proportional to bytes. Cells: class `amount`, data-kind,
    data-bytes, data-rank.
    """
    found, kinds, labels = table(model)
    if _is_labelled(model):
        return _drawn(found, kinds, lambda ranks: _ends(labels, ranks), [])
    mesh = catalog_of(model).mesh
    axes = Axes(mesh.axes, mesh.shape)
    notes = ["what is stored of tensors and states, with flat padding; no gradients, no activations"]
    return _drawn(found, kinds, lambda ranks: f"{ranges(ranks)}: {axes.label(ranks)}", notes)


def table(model: Model) -> tuple[Table, Sequence[str], list[str]]:
    """(rank, kind) bytes, the kinds, and what each rank is called."""
    if not _is_labelled(model):
        found = memory_by_rank(catalog_of(model))
        return found, KINDS, [str(rank) for rank in range(len(found))]
    kinds = list(dict.fromkeys(kind for amounts in model.values() for kind in amounts))
    if not set(kinds).isdisjoint(KINDS):  # then a kind has the colour that it has elsewhere
        kinds = [*KINDS, *(k for k in kinds if k not in KINDS)]
    rows = [[int(amounts.get(k, 0)) for k in kinds] for amounts in model.values()]
    return np.array(rows, np.int64).reshape(len(model), len(kinds)), kinds, list(model)


def _is_labelled(model: Model) -> TypeIs[Mapping[str, Mapping[str, int]]]:
    return isinstance(model, Mapping) and not hasattr(model, "tensors")  # a checkpoint is a mapping too


def _drawn(found: Table, kinds: Sequence[str], label: Callable[[Sequence[int]], str], notes: list[str]) -> Drawing:
    """Bars for (rank, kind) bytes: a bar a rank; of many, one for those that are alike; of very many, of neighbours."""
    sets: list[list[int]] = [[r] for r in range(len(found))]
    if len(found) > RANKS:
        alike: dict[bytes, list[int]] = {}
        for rank, row in enumerate(found):
            alike.setdefault(row.tobytes(), []).append(rank)
        sets = list(alike.values())
        notes = [f"{len(found):,} ranks in {len(sets):,} bars: ranks that hold as much of everything are one", *notes]
    if len(sets) > BARS:
        sets = [list(block) for block in blocks(len(found), BARS)]
        notes = [f"{len(found):,} ranks in {len(sets):,} bars, each the fullest of {len(sets[0]):,} ranks", *notes[1:]]
    stacks = []
    for ranks in sets:
        fullest = max(ranks, key=lambda r: int(found[r].sum()))
        amounts = dict(zip(kinds, found[fullest].tolist(), strict=True))
        many = f" ({len(ranks):,} ranks)" if len(ranks) > 1 else ""
        stacks.append(Stack(f"{label(ranks)}{many}", amounts, {"rank": ranges(ranks, to="-").replace(" ", "")}))
    return bars(stacks, title="memory by rank", notes=notes)


def _ends(labels: Sequence[str], ranks: Sequence[int]) -> str:
    return labels[ranks[0]] if len(ranks) == 1 else f"{labels[ranks[0]]} … {labels[ranks[-1]]}"


def memory_by_rank(catalog: Catalog) -> Table:
    """(rank, kind) bytes, int64, kinds as KINDS: what training holds of the tensors and their states, from headers.

    Flat buffers with their padding, in equal parts over dp; module weights on every dp rank (ZeRO-3 cuts them).
    """
    mesh = catalog.mesh
    found = np.zeros((mesh.size, len(KINDS)), np.int64)
    for group in catalog.flat_groups:
        for holder, flat in group.flats.items():
            ranks = mesh.ranks(**holder)
            for state, dtype in group.dtypes.items():
                found[ranks, _kind(state)] += flat.size(0) * dtype.itemsize
    for cut, stages, column, size, cut_over_dp, times in _outside(catalog):
        for at in cut.coordinates():
            held = math.prod(cut.shard_shape(at))
            nbytes = (-(-held // mesh.dp) if cut_over_dp else held) * size * times
            for stage in {min(s, mesh.pp - 1) for s in stages}:  # whole tensors on one rank know their run's stages
                found[mesh.ranks(pp=stage, **dict(zip(cut.axes, at, strict=True))), column] += nbytes
    return found


def _outside(catalog: Catalog) -> Iterator[tuple[Cut, tuple[int, ...], int, int, bool, int]]:
    """(cut, stages, kind, bytes an element, whether dp cuts it, how many) of what lies outside flat buffers."""
    flat = {name for group in catalog.flat_groups for name in group.names}
    alike: dict[tuple, list[Tensor]] = {}
    for name, tensor in catalog.tensors.items():
        key = (id(tensor.cut), tensor.stages, tensor.kind, tuple(tensor.states.items()), name in flat)
        alike.setdefault(key, []).append(tensor)
    for (_, stages, kind, states, is_flat), tensors in alike.items():
        for state, dtype in states:
            if state == MODULE or not is_flat:
                column = KINDS.index("other") if kind == "buffer" else _kind(state)
                cut_over_dp = catalog.zero_stage == 3 and kind != "buffer"
                yield tensors[0].cut, stages, column, dtype.itemsize, cut_over_dp, len(tensors)


def _kind(state: str) -> int:
    return 0 if state == MODULE else 1 if state == MASTER else 2
