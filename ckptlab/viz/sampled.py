"""A window of a stored tensor as a table of few cells: of each the element that is largest in size, and where it lies.

The table is read in pieces, and what it keeps does not grow with the tensor.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ckptlab.aliases import Int64
from ckptlab.arrays.gather import reader
from ckptlab.catalog import Catalog
from ckptlab.errors import InputError, UnsupportedError
from ckptlab.layout import Cut
from ckptlab.layout.rows import intervals
from ckptlab.plan import Holder, Placement
from ckptlab.stored import Stored
from ckptlab.words import ranges

CELLS = 96  # along each side of a table
PIECE = 1 << 22  # elements that are read at a time

Window = tuple[tuple[int, int], ...]
"""For each dim the first index and the one behind the last."""


@dataclass(frozen=True)
class Place:
    """Consecutive elements of a flattened shard that the same ranks hold: from `start` of it on; `stored` is None of
    what is put together from several tensors."""

    ranks: tuple[int, ...]
    start: int
    stored: Stored | None

    def byte(self, at: int) -> int | None:
        """Where in the file element `at` of the shard begins."""
        if self.stored is None:
            return None
        return self.stored.offset + (at - self.start) * self.stored.dtype.itemsize

    def text(self, at: int) -> str:
        """`rank 3 · zero_pp_rank_0.pt, bytes 128–131`."""
        who = f"{'rank' if len(self.ranks) == 1 else 'ranks'} {ranges(self.ranks)}"
        byte = self.byte(at)
        if self.stored is None or byte is None:
            return who
        last = byte + self.stored.dtype.itemsize - 1
        span = f"bytes {byte:,}–{last:,}" if last > byte else f"byte {byte:,}"
        return f"{who} · {os.path.basename(self.stored.path)}, {span}"


@dataclass(frozen=True, eq=False)
class Sampled:
    """A window of a tensor (dims `dims`, all but the last two of one index) in cells of `steps` elements each.

    All tables are (rows, columns) of cells: `values` (float64) the element that is largest in size, NaN before all;
    `rows` and `columns` its index in the whole; `place` indexes `places`, `at` is where in the shard it lies; `owner`
    is the place of a cell's first element. `nan` and `infinite` count over all that was read. `lowest` and
    `highest` are finite.
    """

    dims: tuple[str, ...]
    window: Window
    steps: tuple[int, int]
    dtype: np.dtype
    values: NDArray[np.float64]
    rows: Int64
    columns: Int64
    places: tuple[Place, ...]
    place: Int64
    at: Int64
    owner: Int64
    nan: int
    infinite: int
    lowest: float
    highest: float

    def index(self, i: int, j: int) -> tuple[int, ...]:
        """The index in the whole of the element that cell (i, j) shows."""
        both = (int(self.rows[i, j]), int(self.columns[i, j]))
        return (*(a for a, _ in self.window[:-2]), *both)[-len(self.dims) :] if self.dims else ()


def sample(
    catalog: Catalog,
    name: str,
    state: str | None = None,
    where: Mapping[str, int | slice] | None = None,
    most: tuple[int, int] = (CELLS, CELLS),
) -> Sampled:
    """Read a window of one state of a tensor (None: its first).

    where: dim → an index or a slice of step 1, of what is to be seen; of dims before the last two an index (default 0).
    most: cells (down, across). UnsupportedError where a catalog has no data; InputError for a window that is not there.
    """
    tensor = catalog[name]
    if catalog.extents is None:
        raise UnsupportedError(
            f"{catalog.path}: nothing is stored of a model on paper or a target: there are no values"
        )
    state = next(iter(tensor.states)) if state is None else state
    window = _window(tensor.layout.dims, tensor.shape, where or {})
    sizes, starts = [b - a for a, b in window], [a for a, _ in window]
    high, wide = ([1, 1, *sizes])[-2:]
    down, across = max(-(-high // most[0]), 1), max(-(-wide // most[1]), 1)
    table = _Table((-(-high // down), -(-wide // across)), (down, across))
    source, whole = reader(catalog, tensor.name, state), Cut.whole(tensor.shape)
    for top, left, h, w in _tiles((high, wide), (down, across)):
        begin, extent = list(starts), [1] * len(starts)
        for axis, offset, size in ((-2, top, h), (-1, left, w)):
            if len(starts) >= -axis:
                begin[axis], extent[axis] = starts[axis] + offset, size
        table.add(source.box(whole, (), begin, extent).reshape(h, w).astype(np.float64), top, left)
    first_row, first_column = ([0, 0, *starts])[-2:]
    rows, columns = table.rows + first_row, table.columns + first_column
    first = np.indices(table.values.shape, np.int64)
    corners = (first[0] * down + first_row, first[1] * across + first_column)
    places, (place, owner), (at, _) = _lying(catalog, tensor.name, state, starts[:-2], [(rows, columns), corners])
    low, high_ = (table.low, table.high) if table.low <= table.high else (0.0, 0.0)
    dims, dtype = tensor.layout.dims, tensor.states[state]
    read = (table.values, rows, columns, places, place, at, owner, table.nan, table.infinite, low, high_)
    return Sampled(dims, window, (down, across), dtype, *read)


class _Table:
    """What is found, tile by tile: of each cell the heaviest element, and where in the window it is."""

    def __init__(self, cells: tuple[int, int], steps: tuple[int, int]) -> None:
        self.steps, self.values = steps, np.zeros(cells)
        self.rows, self.columns = np.zeros(cells, np.int64), np.zeros(cells, np.int64)
        self.nan = self.infinite = 0
        self.low, self.high = math.inf, -math.inf

    def add(self, box: NDArray[np.float64], top: int, left: int) -> None:
        """A tile of whole cells that begins at a row and a column of the window."""
        finite = box[np.isfinite(box)]
        self.nan += int(np.isnan(box).sum())
        self.infinite += int(np.isinf(box).sum())
        if finite.size:
            self.low, self.high = min(self.low, float(finite.min())), max(self.high, float(finite.max()))
        i, j = _extremes(np.where(np.isnan(box), np.inf, np.abs(box)), self.steps)
        row, column = top // self.steps[0], left // self.steps[1]
        to = (slice(row, row + i.shape[0]), slice(column, column + i.shape[1]))
        self.values[to], self.rows[to], self.columns[to] = box[i, j], top + i, left + j


def _window(dims: Sequence[str], shape: Sequence[int], where: Mapping[str, int | slice]) -> Window:
    if unknown := [dim for dim in where if dim not in dims]:
        raise InputError(f"this tensor has no dim {unknown[0]!r} to look at: it has {', '.join(dims)}")
    found = []
    for i, (dim, n) in enumerate(zip(dims, shape, strict=True)):
        said = where.get(dim, 0 if i < len(shape) - 2 else slice(None))
        if isinstance(said, slice):
            start, stop, step = said.indices(n)
            if step != 1 or start >= stop or (i < len(shape) - 2 and stop - start > 1):
                what = "one index" if i < len(shape) - 2 else "a slice of step 1 with something in it"
                raise InputError(f"{dim} ({n:,} long) takes {what}, not {said}")
            found.append((start, stop))
        else:
            if not -n <= said < n:
                raise InputError(f"{dim} {said} is not among the {n:,} of this dim")
            found.append((said % n, said % n + 1))
    return tuple(found)


def _tiles(sizes: Sequence[int], steps: Sequence[int]) -> Iterator[tuple[int, int, int, int]]:
    """(top, left, height, width) of pieces of whole cells, of about PIECE elements, or one cell."""
    wide = max(min(sizes[1], PIECE // steps[0] // steps[1] * steps[1]), steps[1])
    high = max(PIECE // max(wide, 1) // steps[0] * steps[0], steps[0])
    for top in range(0, sizes[0], high):
        for left in range(0, sizes[1], wide):
            yield top, left, min(high, sizes[0] - top), min(wide, sizes[1] - left)


def _extremes(weight: NDArray[np.float64], steps: Sequence[int]) -> tuple[Int64, Int64]:
    """For each cell the row and column of its heaviest element."""
    (high, wide), (down, across) = weight.shape, steps
    cells = -(-high // down), -(-wide // across)
    full = np.full((cells[0] * down, cells[1] * across), -1.0)
    full[:high, :wide] = weight
    found = full.reshape(cells[0], down, cells[1], across).swapaxes(1, 2).reshape(*cells, down * across).argmax(axis=2)
    return np.arange(cells[0])[:, None] * down + found // across, np.arange(cells[1]) * across + found % across


Found = tuple[tuple[Place, ...], list[Int64], list[Int64]]


def _lying(catalog: Catalog, name: str, state: str, lead: Sequence[int], asked: Sequence[tuple[Int64, ...]]) -> Found:
    """Where elements lie, given as tables of rows and columns: (places, for each pair of tables which place every
    element has, and where in its shard it is)."""
    rank_tables: list[list[Int64]] = [[] for _ in asked]
    at_tables: list[list[Int64]] = [[] for _ in asked]
    spans: list[Place] = []
    placement = catalog.placement(name, state)
    for holder in placement.on(placement.stages[0]):
        mine = list(_spans(catalog, placement, name, state, holder))
        begins = np.array([span.start for span in mine], np.int64)
        shape = placement.shape(holder)
        for k, tables in enumerate(asked):
            at, held = _in_shard(placement, holder, shape, lead, tables)
            which = np.searchsorted(begins, at, "right") - 1 + len(spans) if mine else np.full(at.shape, -1)
            rank_tables[k].append(np.where(held, which, -1))
            at_tables[k].append(at)
        spans += mine
    combined: dict[tuple[int, ...], int] = {}
    places: list[Place] = []
    which_all, at_all = [], []
    for whose, ats in zip(rank_tables, at_tables, strict=True):
        stack = np.stack(whose)
        flat = stack.reshape(len(stack), -1)
        different, back = np.unique(flat, axis=1, return_inverse=True)
        numbers = []
        for column in different.T.tolist():
            key = tuple(k for k in column if k >= 0)
            if key not in combined:
                combined[key] = len(places)
                ranks = tuple(sorted({rank for k in key for rank in spans[k].ranks}))
                places.append(Place(ranks, *((spans[key[0]].start, spans[key[0]].stored) if key else (0, None))))
            numbers.append(combined[key])
        which_all.append(np.array(numbers, np.int64)[back.ravel()].reshape(stack.shape[1:]))
        first = (stack >= 0).argmax(axis=0)
        at_all.append(np.take_along_axis(np.stack(ats), first[None], axis=0)[0])
    return tuple(places), which_all, at_all


def _spans(catalog: Catalog, placement: Placement, name: str, state: str, holder: Holder) -> Iterator[Place]:
    """What the ranks of a holder have of its shard, in the order of its elements."""
    ranks = placement.ranks(holder).tolist()
    for dp, start, count, stored in catalog.parts(placement, name, state, holder):
        if count or dp is None:
            yield Place(tuple(ranks) if dp is None else (ranks[dp],), start, stored)


def _in_shard(
    placement: Placement, holder: Holder, shape: Sequence[int], lead: Sequence[int], tables: Sequence[Int64]
) -> tuple[Int64, NDArray[np.bool_]]:
    """Where in a holder's flattened shard elements are, and whether they are there at all."""
    at = placement.coordinate(holder)
    dims = placement.cut.dims
    indices: list[Int64] = [np.full(tables[0].shape, k, np.int64) for k in lead]
    indices += list(tables)[2 - min(len(dims), 2) :]
    place, held = np.zeros(tables[0].shape, np.int64), np.ones(tables[0].shape, bool)
    for index, n, dim, k in zip(indices, shape, dims, placement.cut.per_dim(at), strict=True):
        rows = intervals(dim.runs[k])[:, :3]
        rows = rows[np.argsort(rows[:, 0])]
        if not len(rows):
            return place, np.zeros(place.shape, bool)
        row = rows[np.maximum(np.searchsorted(rows[:, 0], index, "right") - 1, 0)]
        inside = (index >= row[..., 0]) & (index < row[..., 0] + row[..., 2])
        held &= inside
        place = place * n + np.where(inside, row[..., 1] + index - row[..., 0], 0)
    return place, held
