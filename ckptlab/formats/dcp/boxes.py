"""The chunks of a tensor as boxes of it, and the grid that they make up."""

from __future__ import annotations

import itertools
import math
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ckptlab.catalog import Fragment
from ckptlab.errors import CheckpointError
from ckptlab.formats.dcp.items import Items, Window, window
from ckptlab.formats.dcp.metadata import Int64

_MOST_CELLS = 1 << 22  # of a grid that boxes which are no grid are cut into

Cell = tuple[int, ...]
Span = tuple[int, int]  # where an interval of a dim begins, and its length


@dataclass(frozen=True)
class Boxes:
    """What is stored of one state of one tensor: box i begins at `starts[i]`, has `sizes[i]` (both int64, (n, dims)),
    was stored by rank `ranks[i]` (-1: not known) and is `items(i)`."""

    shape: tuple[int, ...]
    dtype: np.dtype
    starts: Int64
    sizes: Int64
    ranks: Int64
    items: Items

    def slices(self, count: int) -> dict[tuple[int, ...], Boxes]:
        """The tensors that are stacked along the first `count` dims, by their place there."""
        found = {}
        ends = self.starts + self.sizes
        for place in itertools.product(*(range(n) for n in self.shape[:count])):
            at = np.array(place, np.int64)
            mine = np.flatnonzero(((self.starts[:, :count] <= at) & (at < ends[:, :count])).all(axis=1))
            inside = np.zeros_like(self.starts[mine])
            inside[:, :count] = at - self.starts[mine, :count]
            sizes = self.sizes[mine].copy()
            sizes[:, :count] = 1
            items = Window(self.items, mine, inside, sizes, count)
            starts = np.ascontiguousarray(self.starts[mine, count:])
            sizes = np.ascontiguousarray(sizes[:, count:])
            found[place] = Boxes(self.shape[count:], self.dtype, starts, sizes, self.ranks[mine], items)
        return found


@dataclass(frozen=True)
class Grid:
    """Boxes as a grid: dim d is cut at `edges[d]`, cell [i, j, …] is box `cells[i, j, …]`, stored by `ranks[i, j, …]`.

    `hollow[d]`: an empty box was stored too, by a rank for which nothing of that dim was left. `flat`: cell → (start,
    box) of the pieces of its flattened elements, where a cell is not one box.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    edges: tuple[Int64, ...]
    cells: Int64
    ranks: Int64
    hollow: tuple[bool, ...]
    items: Items
    flat: Mapping[Cell, list[tuple[int, int]]] = field(default_factory=dict)

    @property
    def counts(self) -> tuple[int, ...]:
        """Into how many intervals each dim is cut."""
        return tuple(len(edges) - 1 for edges in self.edges)

    def spans(self, dim: int) -> list[Span]:
        """The intervals of a dim, in order."""
        edges = self.edges[dim].tolist()
        return [(a, b - a) for a, b in itertools.pairwise(edges)]

    def fragments(self, spans: list[list[Span]]) -> tuple[Fragment, ...]:
        """Where a shard lies that is composed of these intervals of each dim, one or several of the grid's each, in
        the order of its elements."""
        widths = [sum(length for _, length in dim) for dim in spans]
        if not math.prod(widths):
            return ()
        if not widths:
            return self._cell((), 0)
        places = [
            [k for start, n in dim for k in range(bisect_left(edges, start), bisect_left(edges, start + n))]
            for edges, dim in zip(self.edges, spans, strict=True)
        ]
        split = max((d for d, dim in enumerate(places) if len(dim) > 1), default=0)
        whole = math.prod(widths[:split]) == 1  # else cells lie side by side, and their rows come in turn
        if self.flat and not whole:
            raise CheckpointError("flattened pieces lie side by side in one shard, which no writer is known to do")
        outer = [
            [(place, k) for place in places[d] for k in range(int(edges[place + 1] - edges[place]))]
            for d, edges in enumerate(self.edges[:split])
        ]
        found: list[Fragment] = []
        done = 0
        for above in itertools.product(*outer):
            for place in places[split]:
                cell = (*(at for at, _ in above), place, *(dim[0] for dim in places[split + 1 :]))
                pieces = self._cell(cell, done) if whole else (self._row(cell, [k for _, k in above], done),)
                found += pieces
                done += sum(piece.count for piece in pieces)
        return tuple(found)

    def _cell(self, cell: Cell, start: int) -> tuple[Fragment, ...]:
        if self.flat:
            return tuple(Fragment(start + at, self.items(box)) for at, box in self.flat[cell])
        return (Fragment(start, self.items(int(self.cells[cell]))),)

    def _row(self, cell: Cell, above: list[int], start: int) -> Fragment:
        """Of a cell what is at these places on its first dims."""
        stored = self.items(int(self.cells[cell]))
        inner = stored.shape[len(above) :]
        return Fragment(start, window(stored, [*above, *(0 for _ in inner)], [*(1 for _ in above), *inner]))


def grid_of(boxes: Boxes) -> Grid:
    """The grid that boxes make up; where they are none, the coarsest in which each box is several cells, which are then
    parts of it. CheckpointError, saying where, if boxes overlap or leave a gap."""
    ndim = len(boxes.shape)
    held = (boxes.sizes > 0).all(axis=1) if ndim else np.ones(len(boxes.starts), bool)
    kept = np.flatnonzero(held)
    starts, sizes = boxes.starts[kept], boxes.sizes[kept]
    empty = ~held
    hollow = tuple(bool((empty & (boxes.sizes[:, d] == 0)).any()) and boxes.shape[d] > 0 for d in range(ndim))
    if not math.prod(boxes.shape):
        edges = tuple(np.array([0, n], np.int64) for n in boxes.shape)
        nothing = np.full((1,) * ndim, -1, np.int64)
        return Grid(boxes.shape, boxes.dtype, edges, nothing, nothing, hollow, boxes.items)
    edges = tuple(
        np.unique(np.concatenate([starts[:, d], starts[:, d] + sizes[:, d], [0, n]])) for d, n in enumerate(boxes.shape)
    )
    counts = tuple(len(e) - 1 for e in edges)
    if math.prod(counts) > max(_MOST_CELLS, len(kept)):
        raise CheckpointError(f"{len(kept)} chunks would make a grid of {math.prod(counts):,} cells")
    first = np.stack([np.searchsorted(e, starts[:, d]) for d, e in enumerate(edges)], 1) if ndim else starts
    last = np.stack([np.searchsorted(e, starts[:, d] + sizes[:, d]) for d, e in enumerate(edges)], 1) if ndim else sizes
    cells = np.full(counts, -1, np.int64)
    if (last - first == 1).all():
        flat = np.ravel_multi_index(tuple(first.T), counts) if ndim else np.zeros(len(kept), np.int64)
        twice = np.bincount(flat, minlength=math.prod(counts)) > 1
        if twice.any():
            raise _wrong("held by two chunks", edges, np.unravel_index(int(np.argmax(twice)), counts))
        cells.reshape(-1)[flat] = np.arange(len(kept))
    else:
        for i, (a, b) in enumerate(zip(first.tolist(), last.tolist(), strict=True)):
            region = tuple(slice(lo, hi) for lo, hi in zip(a, b, strict=True))
            if (cells[region] >= 0).any():
                raise _wrong("held by two chunks", edges, tuple(a))
            cells[region] = i
    if (cells < 0).any():
        raise _wrong("held by no chunk", edges, np.unravel_index(int(np.argmax(cells.reshape(-1) < 0)), counts))
    ranks, made = boxes.ranks[kept][cells], kept[cells]
    if (last - first == 1).all():
        return Grid(boxes.shape, boxes.dtype, edges, made, ranks, hollow, boxes.items)
    place = np.indices(counts).reshape(ndim, -1).T
    low = np.stack([e[place[:, d]] for d, e in enumerate(edges)], 1)
    high = np.stack([e[place[:, d] + 1] for d, e in enumerate(edges)], 1)
    of = made.reshape(-1)
    items = Window(boxes.items, of, low - boxes.starts[of], high - low)
    return Grid(boxes.shape, boxes.dtype, edges, np.arange(of.size).reshape(counts), ranks, hollow, items)


def _wrong(how: str, edges: tuple[Int64, ...], cell: Any) -> CheckpointError:
    start = tuple(int(e[k]) for e, k in zip(edges, cell, strict=True))
    size = tuple(int(e[k + 1] - e[k]) for e, k in zip(edges, cell, strict=True))
    return CheckpointError(f"the {size} elements at {start} are {how}")
