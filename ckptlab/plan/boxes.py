"""Boxes that two shards share, and the order of their elements: what lets a plan be a sorted merge.

Along each dim the shared indices ascend in both shards, so an element's number in the box (its *ordinal*)
grows with its place in either shard's flat order. Both sides' dp edges therefore map into ordinals, where
they can be merged.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ckptlab.aliases import Int64
from ckptlab.layout.cut import Coordinate, Cut, check_same_tensor, dim_overlap
from ckptlab.layout.rows import Rows, intervals


@dataclass(frozen=True, eq=False)
class Run:
    """Indices of one dim: `count` pieces of `length`, `stride` apart."""

    start: int
    length: int
    count: int
    stride: int

    @property
    def content(self) -> tuple[Any, ...]:
        return self.start, self.length, self.count, self.stride

    def locate(self, index: Int64) -> tuple[Int64, NDArray[np.bool_]]:
        """How many of the indices lie before each given one, and whether that is one of them."""
        index = index - self.start
        if self.count == 1:
            return np.clip(index, 0, self.length), (index >= 0) & (index < self.length)
        k, inside = np.divmod(index, self.stride)
        before = np.clip(k * self.length + np.minimum(inside, self.length), 0, self.count * self.length)
        return before, (k >= 0) & (k < self.count) & (inside < self.length)

    def at(self, number: Int64) -> Int64:
        """The index that has so many of the indices before it: what undoes `locate`."""
        k, inside = np.divmod(number, self.length)
        return self.start + k * self.stride + inside

    def scaled(self, width: int) -> Run:
        return Run(self.start * width, self.length * width, self.count, self.stride * width)

    def is_all(self, width: int) -> bool:
        return self.start == 0 and self.length == width and self.count == 1


@dataclass(frozen=True, eq=False)
class Pieces:
    """Indices of one dim: ascending intervals of their own lengths."""

    starts: Int64
    lengths: Int64

    @property
    def content(self) -> tuple[Any, ...]:
        return self.starts.tobytes(), self.lengths.tobytes()

    def locate(self, index: Int64) -> tuple[Int64, NDArray[np.bool_]]:
        """See Run.locate."""
        ends = np.cumsum(self.lengths)
        k = np.maximum(np.searchsorted(self.starts, index, "right") - 1, 0)
        inside = index - self.starts[k]
        before = ends[k] - self.lengths[k] + np.clip(inside, 0, self.lengths[k])
        return before, (inside >= 0) & (inside < self.lengths[k])

    def at(self, number: Int64) -> Int64:
        """See Run.at."""
        ends = np.cumsum(self.lengths)
        k = np.searchsorted(ends, number, "right")
        return self.starts[k] + number - (ends[k] - self.lengths[k])

    def scaled(self, width: int) -> Pieces:
        return Pieces(self.starts * width, self.lengths * width)

    def is_all(self, width: int) -> bool:
        return False  # then it would be a Run


@dataclass(frozen=True, eq=False)
class Side:
    """A box as one shard sees it, level by level; dims that are whole are part of the one before.

    A level is (elements of the shard at an index, indices in the box, elements of the box at an index).
    """

    levels: tuple[tuple[int, Run | Pieces, int], ...]

    @property
    def content(self) -> tuple[Any, ...]:
        return tuple((step, *indices.content, weight) for step, indices, weight in self.levels)

    def ordinals(self, places: Int64) -> Int64:
        """How many elements of the box come before each place of the flattened shard."""
        if len(self.levels) == 1:
            return self.levels[0][1].locate(places)[0]
        total = np.zeros(len(places), np.int64)
        alive = np.ones(len(places), bool)
        rest = places
        for step, indices, weight in self.levels:
            index, rest = np.divmod(rest, step)
            before, inside = indices.locate(index)
            total += np.where(alive, before * weight, 0)
            alive &= inside
        return total

    def places(self, ordinals: Int64) -> Int64:
        """Where elements of the box lie in the flattened shard: what undoes `ordinals`."""
        found, rest = np.zeros(len(ordinals), np.int64), ordinals
        for step, indices, weight in self.levels:
            number, rest = np.divmod(rest, weight)
            found += indices.at(number) * step
        return found


@dataclass(frozen=True, eq=False)
class Box:
    """Elements that two shards share, `size` of them, in the same order in both."""

    a: Side
    b: Side
    size: int

    @cached_property
    def content(self) -> tuple[Any, ...]:
        """All that the box is: equal for boxes that lie alike in two other shards."""
        return (self.size, *(side.content for side in (self.a, self.b)))


@lru_cache(maxsize=4096)
def shared_boxes(a: Cut, b: Cut, owned: bool) -> tuple[tuple[Coordinate, Coordinate, tuple[Box, ...]], ...]:
    """All pairs of coordinates whose shards share anything, with the boxes; `owned` as in `overlap`."""
    check_same_tensor(a, b)
    per_dim = [
        [(at_a, at_b, rows) for at_a in x.rows for at_b in y.rows if len(rows := dim_overlap(x, at_a, y, at_b, owned))]
        for x, y in zip(a.dims, b.dims, strict=True)
    ]
    found = []
    for combination in itertools.product(*per_dim):
        at_a = _assemble(a, [part for part, _, _ in combination])
        at_b = _assemble(b, [part for _, part, _ in combination])
        boxes = _boxes(a.shard_shape(at_a), b.shard_shape(at_b), [rows for _, _, rows in combination])
        found.append((at_a, at_b, boxes))
    return tuple(found)


def _assemble(cut: Cut, parts: Sequence[Coordinate]) -> Coordinate:
    """The coordinate on the cut's axes from those on its dims'."""
    place = {axis: k for dim, at in zip(cut.dims, parts, strict=True) for axis, k in zip(dim.axes, at, strict=True)}
    return cut.coordinate(place)


def _boxes(shape_a: tuple[int, ...], shape_b: tuple[int, ...], rows: Sequence[Rows]) -> tuple[Box, ...]:
    """One box where the rows of each dim ascend in both shards (as all notation does), else one a row."""
    found = []
    for combination in itertools.product(*(_ascending(dim) for dim in rows)):
        numbers = [int((dim[:, 2] * dim[:, 3]).sum()) for dim in combination]
        side_a = _side(shape_a, [_indices(dim, 0, 4) for dim in combination])
        side_b = _side(shape_b, [_indices(dim, 1, 5) for dim in combination])
        found.append(Box(side_a, side_b, math.prod(numbers)))
    return tuple(found)


def _ascending(rows: Rows) -> list[Rows]:
    if len(rows) == 1:
        return [rows]
    # intervals() reads its strides from columns 4 and 5 and moves columns 0 and 1 by them, as here
    plain = intervals(rows)
    plain = plain[np.argsort(plain[:, 0], kind="stable")]
    return [plain] if (np.diff(plain[:, 1]) > 0).all() else [rows[k : k + 1] for k in range(len(rows))]


def _indices(rows: Rows, start: int, stride: int) -> Run | Pieces:
    if len(rows) > 1:
        return Pieces(rows[:, start].copy(), rows[:, 2].copy())
    row = rows[0].tolist()
    return Run(row[start], row[2], row[3], row[stride])


def _side(shape: tuple[int, ...], indices: Sequence[Run | Pieces]) -> Side:
    """Levels of a box, from the inside out: while what is inside is whole, it belongs to the dim before."""
    levels: list[tuple[int, Run | Pieces, int]] = []
    step, weight = 1, 1  # elements of the shard and of the box in what the current level counts
    width = 1
    current: Run | Pieces = Run(0, 1, 1, 0)
    for n, dim in zip(reversed(shape), reversed(indices), strict=True):
        if current.is_all(width):
            current, width = dim.scaled(width), n * width
        else:
            levels.append((step, current, weight))
            step, weight = step * width, weight * _number(current)
            current, width = dim, n
    levels.append((step, current, weight))
    return Side(tuple(reversed(levels)))


def _number(indices: Run | Pieces) -> int:
    return indices.length * indices.count if isinstance(indices, Run) else int(indices.lengths.sum())
