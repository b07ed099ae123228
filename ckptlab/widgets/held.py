"""What one rank holds: the pieces of one tensor with file, bytes and indices, and an inventory of everything."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from ckptlab.aliases import Int64
from ckptlab.catalog import Catalog, Tensor
from ckptlab.layout.cut import Coordinate
from ckptlab.layout.rows import intervals
from ckptlab.stored import Stored
from ckptlab.words import size


@dataclass(frozen=True)
class Piece:
    """Consecutive elements of a flattened shard that a rank holds of one state of a tensor.

    `start` and `count` are elements of the shard, `first` and `last` the indices in the whole of the first and the last
    of them; `stored` is None where nothing is stored (a target, a model on paper).
    """

    tensor: str
    state: str
    start: int
    count: int
    shard: int
    first: tuple[int, ...]
    last: tuple[int, ...]
    dtype: np.dtype
    stored: Stored | None

    @property
    def nbytes(self) -> int:
        return self.count * self.dtype.itemsize

    def __str__(self) -> str:
        shard = f"elements {_span(self.start, self.count)} of the shard's {self.shard:,}"
        indices = f"indices {list(self.first)} to {list(self.last)}" if self.count > 1 else f"index {list(self.first)}"
        if self.stored is None:
            place = f"{self.state}: {size(self.nbytes)}"
        else:
            file = os.path.basename(self.stored.path)
            place = f"{self.state}: {file}, bytes {_span(self.stored.offset, self.stored.nbytes)}"
        return " · ".join(["the whole shard" if self.count == self.shard else shard, indices, place])


def pieces(catalog: Catalog, name: str, state: str, rank: int) -> tuple[Piece, ...]:
    """What a rank holds of one state of a tensor, in the order of the shard's elements; nothing if it holds none.

    Of what lies in a model file, which one dp rank writes for all, every dp rank holds the whole shard.
    """
    tensor = catalog[name]
    return tuple(_piece(tensor, state, *span) for span in _spans(catalog, tensor.name, state, rank))


def _spans(catalog: Catalog, name: str, state: str, rank: int) -> Iterator[tuple[Coordinate, int, int, Stored | None]]:
    """(coordinate in the cut, start in the shard, count, stored) of the pieces that a rank holds."""
    for placement in catalog.placements.get((name, state), ()):
        holder = placement.holder(rank)
        if holder is None:
            continue
        at, dp = placement.coordinate(holder), placement.ranks(holder).tolist().index(rank)
        for whose, start, count, stored in catalog.parts(placement, name, state, holder):
            if whose in (None, dp):
                yield at, start, count, stored


def _piece(tensor: Tensor, state: str, at: Coordinate, start: int, count: int, stored: Stored | None) -> Piece:
    shape = tensor.cut.shard_shape(at)
    places = [intervals(dim.runs[k]) for dim, k in zip(tensor.cut.dims, tensor.cut.per_dim(at), strict=True)]
    ends = [
        tuple(_index(rows, int(i)) for rows, i in zip(places, np.unravel_index(k, shape), strict=True)) if count else ()
        for k in (start, start + count - 1)
    ]
    return Piece(tensor.name, state, start, count, math.prod(shape), ends[0], ends[1], tensor.states[state], stored)


def _index(rows: Int64, place: int) -> int:
    """The index in the whole of what lies at a place of the shard."""
    row = rows[(rows[:, 1] <= place) & (place < rows[:, 1] + rows[:, 2])][0]
    return int(row[0] + place - row[1])


def by_rank(catalog: Catalog, name: str, state: str) -> tuple[list[list[str]], list[int]]:
    """Of every rank what it holds of one state of a tensor, in words: (different texts, which of them each rank has).

    Nothing at all is -1. As `pieces` says it rank by rank, but each holder is looked at once.
    """
    tensor = catalog[name]
    held: list[list[str]] = [[] for _ in range(catalog.mesh.size)]
    for placement in catalog.placements.get((tensor.name, state), ()):
        for holder in placement.holders:
            ranks, at = placement.ranks(holder).tolist(), placement.coordinate(holder)
            for dp, start, count, stored in catalog.parts(placement, tensor.name, state, holder):
                if count or stored:
                    text = str(_piece(tensor, state, at, start, count, stored))
                    for rank in ranks if dp is None else [ranks[dp]]:
                        held[rank].append(text)
    texts: dict[tuple[str, ...], int] = {}
    of = [texts.setdefault(tuple(lines), len(texts)) if lines else -1 for lines in held]
    return [list(lines) for lines in texts], of


@dataclass
class Inventory:
    """All that one rank holds.

    `rows` are (tensor, start in its shard, elements, what of the shard this is in percent, bytes of all states that lie
    there, where); `files` maps each file to the bytes of it that are this rank's (without headers); `kinds` the states
    to their bytes, padding included.
    """

    rows: list[tuple[str, int, int, float, int, str]] = field(default_factory=list)
    files: dict[str, int] = field(default_factory=dict)
    kinds: dict[str, int] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        return sum(self.kinds.values())


def inventory(catalog: Catalog, rank: int) -> Inventory:
    """What a rank holds of every tensor: its partitions of the flat buffers, then what lies in model files."""
    found = Inventory()
    _add_flat_buffers(catalog, rank, found)
    _add_outside(catalog, rank, found)
    return found


def _add_flat_buffers(catalog: Catalog, rank: int, found: Inventory) -> None:
    number = -1
    for group in catalog.flat_groups:
        mesh = catalog.mesh_of(group)
        at = mesh.coordinate(rank)
        if any(at.get(axis, k) != k for axis, k in group.at.items()):
            continue
        number += 1
        holder = group.holder(at)
        flat, dp = group.flats[holder], mesh.ranks(**holder).index(rank)
        each = sum(dtype.itemsize for dtype in group.dtypes.values())
        for index, start, place, count in flat.within(dp).tolist():
            share = 100 * count / flat.counts[index]
            where = f"buffer {number} at {place:,}"
            found.rows.append((flat.names[index], start, count, share, count * each, where))
        for state, dtype in group.dtypes.items():
            _count(found.kinds, state, flat.size(dp) * dtype.itemsize)
            if catalog.extents:
                stored = catalog.extents.partitions[group.key, state][holder][dp]
                _count(found.files, os.path.basename(stored.path), stored.nbytes)


def _add_outside(catalog: Catalog, rank: int, found: Inventory) -> None:
    held: dict[int, bool] = {}  # many tensors share a placement
    for (name, state), placements in catalog.outside.items():
        for placement in placements:
            if id(placement) not in held:
                held[id(placement)] = placement.holder(rank) is not None
        if not any(held[id(placement)] for placement in placements):
            continue
        tensor = catalog.tensors[name]
        for at, start, count, stored in _spans(catalog, name, state, rank):
            shard = math.prod(tensor.cut.shard_shape(at))
            nbytes = count * tensor.states[state].itemsize
            file = os.path.basename(stored.path) if stored else "model file"
            found.rows.append((name, start, count, 100 * count / max(shard, 1), nbytes, f"{state}: {file}"))
            _count(found.kinds, state, nbytes)
            if stored:
                _count(found.files, file, nbytes)


def _count(table: dict[str, int], key: str, nbytes: int) -> None:
    table[key] = table.get(key, 0) + nbytes


def _span(start: int, count: int) -> str:
    """`0–63`, both ends included."""
    return f"{start:,}–{start + count - 1:,}" if count > 1 else f"{start:,}"


def in_words(catalog: Catalog, rank: int) -> str:
    """`rank 5: tp 1 · pp 1 · dp 0`."""
    return f"rank {rank}: {catalog.mesh.place(rank)}"


def sizes(table: dict[str, int]) -> str:
    """`fp32 1.2 MB, exp_avg 1.2 MB`."""
    return ", ".join(f"{key} {size(n)}" for key, n in table.items())
