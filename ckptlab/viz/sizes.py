"""Memory of each rank while it trains, by kind: weights, master weights, moments, gradients, others; activations by
kinds of their own."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import TypeAlias

import numpy as np

from ckptlab.aliases import Int64
from ckptlab.arguments import explained
from ckptlab.catalog import DTYPES, MASTER, PARAM, Catalog, Gradients, Tensor
from ckptlab.draw import Axes, Drawing, Stack, bars
from ckptlab.draw.blocks import blocks, listed
from ckptlab.layout import Cut
from ckptlab.mesh import Mesh, spoken
from ckptlab.sharding.activations import KINDS as ACTIVATIONS
from ckptlab.sharding.activations import Activations
from ckptlab.viewed import Viewed
from ckptlab.words import ranges

STATES = ("module weights", "master weights", "moments", "gradients", "other")
KINDS = (*STATES, *ACTIVATIONS)
GRADIENTS = STATES.index("gradients")
RANKS = 16  # ranks that have a bar each
BARS = 24  # bars that are drawn
TITLE = "memory by rank"

Table = Int64
Model: TypeAlias = Viewed | Catalog | Mapping[str, Mapping[str, int]]


@explained
def memory(
    model: Model,
    *,
    activations: Activations | None = None,
    title: str | None = None,
    width: float | None = None,
) -> Drawing:
    """Bytes on each rank, by kind, as stacked bars: see `memory_by_rank`.

    model: a checkpoint, a reshape (what the target's ranks hold), a catalog, or any mapping from labels of ranks to
    {kind: bytes}. activations: those too, by kind. title: what stands above (None: that it is memory by rank). Of many
    ranks, each bar is the fullest of its block. Lengths are proportional to bytes. width: of the page, in pixels
    (None: as wide as it likes). Cells: class `amount`, data-kind, data-bytes, data-rank.
    """
    model = ranked(model)
    found, kinds, labels = table(model, activations)
    if isinstance(model, Mapping):
        return _drawn(found, kinds, lambda ranks: _ends(labels, ranks), title or TITLE, [], width)
    axes = Axes(model.mesh.axes, model.mesh.shape)
    order = spoken(axes.names)
    notes = ["padding of flat buffers is in it; activations and buffers of the communication are not"]
    if activations is not None:
        notes = [
            f"activations: {activations}",
            "padding of flat buffers is in it; buffers of the communication are not",
        ]

    def label(ranks: Sequence[int]) -> str:
        return f"{ranges(ranks)}: {axes.label(ranks, order, short=True)}"

    return _drawn(found, kinds, label, title or titled(model), notes, width)


def ranked(model: Model) -> Catalog | Mapping[str, Mapping[str, int]]:
    """Whose ranks are meant: of a checkpoint its own, of a reshape the target's."""
    return model.held if isinstance(model, Viewed) else model


def titled(model: Catalog | Mapping[str, Mapping[str, int]]) -> str:
    """What the picture is called: of a run, with how it keeps its gradients."""
    kept = None if isinstance(model, Mapping) else model.training.gradients
    return TITLE if kept is None else f"{TITLE}, {kept}"


def table(
    model: Catalog | Mapping[str, Mapping[str, int]], activations: Activations | None = None
) -> tuple[Table, Sequence[str], list[str]]:
    """(rank, kind) bytes, the kinds, and what each rank is called."""
    if not isinstance(model, Mapping):
        found = memory_by_rank(model, activations)
        return found, KINDS, [str(rank) for rank in range(len(found))]
    kinds = list(dict.fromkeys(kind for amounts in model.values() for kind in amounts))
    if not set(kinds).isdisjoint(KINDS):  # then a kind has the colour that it has elsewhere
        kinds = [*KINDS, *(k for k in kinds if k not in KINDS)]
    rows = [[int(amounts.get(k, 0)) for k in kinds] for amounts in model.values()]
    return np.array(rows, np.int64).reshape(len(model), len(kinds)), kinds, list(model)


def _drawn(
    found: Table,
    kinds: Sequence[str],
    label: Callable[[Sequence[int]], str],
    title: str,
    notes: list[str],
    width: float | None,
) -> Drawing:
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
    sums = found.sum(axis=1).tolist()
    for ranks in sets:
        fullest = max(ranks, key=sums.__getitem__)
        amounts = dict(zip(kinds, found[fullest].tolist(), strict=True))
        many = f" ({len(ranks):,} ranks)" if len(ranks) > 1 else ""
        stacks.append(Stack(f"{label(ranks)}{many}", amounts, {"rank": listed(ranks)}))
    return bars(stacks, title=title, notes=notes, families={"activations": ACTIVATIONS}, width=width)


def _ends(labels: Sequence[str], ranks: Sequence[int]) -> str:
    return labels[ranks[0]] if len(ranks) == 1 else f"{labels[ranks[0]]} … {labels[ranks[-1]]}"


@explained
def fullest(model: Viewed | Catalog, activations: Activations | None = None) -> dict[str, int]:
    """Kind → bytes on the rank that keeps most: see `memory_by_rank`."""
    found = memory_by_rank(model, activations)
    return dict(zip(KINDS, found[found.sum(axis=1).argmax()].tolist(), strict=True))


@explained
def memory_by_rank(model: Viewed | Catalog, activations: Activations | None = None) -> Table:
    """(rank, kind) bytes, int64, kinds as KINDS: what a rank keeps of the model while it trains, from headers.

    By ZeRO stage, master weights and moments (from 1), gradients (from 2) and module weights (at 3) are cut over dp
    (Rajbhandari et al. 2020, arXiv:1910.02054, figure 1), in equal parts with their padding: every dp rank keeps as
    much as the first. Gradients are those of `gradients`. Of files of which no run is known, what is stored.
    activations: what is kept of a step's, by kind. Of a checkpoint: where its names are of a family, or `facts` say
    how it computes; LayoutError, with what is to be said, where they are not.
    """
    catalog = model.held if isinstance(model, Viewed) else model
    if id(catalog) not in _TABLES:
        _TABLES[id(catalog)] = _by_rank(catalog)
        weakref.finalize(catalog, _TABLES.pop, id(catalog), None)
    found = _TABLES[id(catalog)].copy()
    if activations is not None:
        found[:, len(STATES) :] = _kept(catalog, activations)
    return found


def _kept(catalog: Catalog, activations: Activations) -> Table:
    """(rank, kind of activations) bytes."""
    from ckptlab.sharding.families.described import described

    of, mesh = described(catalog, activations.facts), catalog.mesh
    if activations.active is None:
        activations = replace(activations, active=of.active)
    found = np.zeros((*mesh.shape, len(ACTIVATIONS)), np.int64)
    for stage, kept in enumerate(activations.by_stage(of.model, mesh, of.stages)):
        found[mesh.where(pp=stage)] = [*kept.values()]
    return found.reshape(mesh.size, len(ACTIVATIONS))


_TABLES: dict[int, Table] = {}  # of catalogs that are there: a picture and a figure beside it are of the same one


def _by_rank(catalog: Catalog) -> Table:
    catalog = catalog.as_stored
    mesh, kept = catalog.mesh, catalog.training.gradients
    found = np.zeros((mesh.size, len(KINDS)), np.int64)
    for group in catalog.flat_groups:
        on = catalog.mesh_of(group)
        table = found.reshape(*on.shape, len(KINDS))
        for holder, flat in group.flats.items():
            ranks, size = on.where(**holder), flat.size(0)
            for state, dtype in group.dtypes.items():
                table[*ranks, _kind(state)] += size * dtype.itemsize
            if kept and kept.flat:
                table[*ranks, GRADIENTS] += (size if kept.cut else flat.total) * kept.dtype.itemsize

    @cache
    def ranks_at(on: Mesh, stage: int, axes: tuple[str, ...], at: tuple[int, ...]) -> tuple[int | slice, ...]:
        return on.where(pp=stage, **dict(zip(axes, at, strict=True)))

    for cut, stages, column, size, cut_over_dp, times in _outside(catalog, kept):
        on = cut.mesh if cut.mesh.size == mesh.size else mesh  # whole tensors lie on one rank
        table = found.reshape(*on.shape, len(KINDS))
        for at in cut.coordinates():
            held = math.prod(cut.shard_shape(at))
            left = math.prod(on[axis] for axis in on.leaves("dp") if axis not in cut.axes)
            nbytes = (-(-held // left) if cut_over_dp else held) * size * times
            for stage in {min(s, on.pp - 1) for s in stages}:  # whole tensors on one rank know their run's stages
                table[*ranks_at(on, stage, cut.axes, at), column] += nbytes
    return found.reshape(mesh.size, len(KINDS))


def _outside(catalog: Catalog, kept: Gradients | None) -> Iterator[tuple[Cut, tuple[int, ...], int, int, bool, int]]:
    """(cut, stages, kind, bytes an element, whether dp cuts it, how many) of what lies outside flat buffers."""
    flat = {name for group in catalog.flat_groups for name in group.names}
    alike: dict[tuple, list[Tensor]] = {}
    for name, tensor in catalog.tensors.items():
        key = (id(tensor.cut), tensor.stages, tensor.kind, tuple(tensor.states.items()), name in flat)
        alike.setdefault(key, []).append(tensor)
    for (_, stages, kind, states, is_flat), tensors in alike.items():
        cut, times = tensors[0].cut, len(tensors)
        cut_over_dp = catalog.zero_stage == 3 and kind != "buffer"
        for state, dtype in states:
            if state == PARAM or not is_flat:
                column = KINDS.index("other") if kind == "buffer" else _kind(state)
                yield cut, stages, column, dtype.itemsize, cut_over_dp, times
        if kept and kind == "parameter":
            if PARAM not in dict(states):  # ZeRO-3 does not store what is the master weight, rounded
                yield cut, stages, _kind(PARAM), DTYPES[catalog.training.dtype or "fp32"].itemsize, cut_over_dp, times
            if not (kept.flat and catalog.flat_groups):
                yield cut, stages, GRADIENTS, kept.dtype.itemsize, False, times


def _kind(state: str) -> int:
    return 0 if state == PARAM else 1 if state == MASTER else 2
