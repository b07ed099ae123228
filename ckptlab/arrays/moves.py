"""From one cut of a tensor in memory to another, and in and out of flat buffers: which boxes go where, worked out once.

Shards are held in one array with a dim for each mesh axis that cuts the tensor, before the tensor's own; shards of
unequal width stand in the corner of the widest. Merging is moving to the whole, splitting is moving from it. Where a
layout is regular, all shards' parts of one kind are one box: a permuted view of the whole, `(3 tp out)` seen as
(tp, 3, out).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from ckptlab.layout import Cut, DimCut, overlap
from ckptlab.layout.boxes import flat_boxes, plain_rows
from ckptlab.layout.cut import check_same_tensor
from ckptlab.plan import FlatBuffer

Key = tuple[Any, ...]


@dataclass(frozen=True)
class View:
    """`array[key]`, then its dims taken apart into those of `shape` (None: left as they are), then permuted."""

    key: Key
    shape: tuple[int, ...] | None = None
    order: tuple[int, ...] | None = None

    def of(self, array: Any) -> Any:
        """The view of an array that has numpy's methods: nothing is copied."""
        array = array[(*self.key, ...)]  # with the ellipsis a 0-dim array stays an array
        array = array if self.shape is None else array.reshape(self.shape)
        return array if self.order is None else array.transpose(self.order)

    def inverse_order(self) -> tuple[int, ...] | None:
        """What undoes `order`."""
        return None if self.order is None else tuple(self.order.index(i) for i in range(len(self.order)))


@dataclass(frozen=True, eq=False)
class Moves:
    """`steps` are (view of the destination, which source, view of it), the views of equal shape.

    sources, shape: shapes of the sources and of the destination. blank: some elements of the destination are in no view
    (padding): they are 0. Two of the same cuts are one object.
    """

    steps: tuple[tuple[View, int, View], ...]
    sources: tuple[tuple[int, ...], ...]
    shape: tuple[int, ...]
    blank: bool


@lru_cache(maxsize=1024)
def moves(source: Cut, target: Cut) -> Moves:
    """The moves from shards of one cut to those of another; of replicas the lowest coordinate's is read.

    LayoutError if they are cuts of different tensors.
    """
    check_same_tensor(source, target)
    shape, sources = held_shape(target), (held_shape(source),)
    if target.is_whole and target.shape == source.shape and (regular := _regular(source)) is not None:
        return Moves(tuple((whole, 0, shards) for whole, shards in regular), sources, shape, False)
    if source.is_whole and target.shape == source.shape and (regular := _regular(target)) is not None:
        return Moves(tuple((shards, 0, whole) for whole, shards in regular), sources, shape, False)
    boxes = list(_boxes(source, target))
    reached = sum(math.prod(len(range(k.start, k.stop, k.step or 1)) for k in keys) for _, _, keys in boxes)
    steps = tuple((View(wanted), 0, View(held)) for wanted, held, _ in boxes)
    return Moves(steps, sources, shape, reached < math.prod(shape))


Shapes = tuple[tuple[int, ...], ...]  # of one tensor's shards, by holder


@lru_cache(maxsize=1024)
def flat_merge(
    flats: tuple[FlatBuffer, ...], degrees: tuple[int, ...], index: int, longest: int, shapes: Shapes
) -> Moves:
    """Tensor `index` out of flat buffers, one for each place of a grid of holders: (*degrees, dp, longest) →
    (*degrees, *widest shard)."""
    steps = tuple((shard, 0, flat) for shard, flat in _fragments(flats, degrees, index, shapes))
    source = (*degrees, flats[0].dp, longest)
    return Moves(steps, (source,), (*degrees, *_widest(shapes)), len(set(shapes)) > 1)


@lru_cache(maxsize=256)
def flat_split(flats: tuple[FlatBuffer, ...], degrees: tuple[int, ...], shapes: tuple[Shapes, ...]) -> Moves:
    """All tensors into flat buffers: one source a tensor, (*degrees, *widest shard) → (*degrees, dp, flat)."""
    places = ((i, *views) for i, own in enumerate(shapes) for views in _fragments(flats, degrees, i, own))
    steps = tuple((flat, i, shard) for i, shard, flat in places)
    target = (*degrees, flats[0].dp, max(flat.size(0) for flat in flats))
    used = sum(sum(flat.counts) for flat in flats)
    return Moves(steps, tuple((*degrees, *_widest(own)) for own in shapes), target, used < math.prod(target))


def _fragments(
    flats: tuple[FlatBuffer, ...], degrees: tuple[int, ...], index: int, shapes: Shapes
) -> Iterator[tuple[View, View]]:
    """(view of the array of shards, view of the array of buffers) of each box of each fragment of a tensor."""
    holders = itertools.product(*map(range, degrees))
    for holder, flat, shape in zip(holders, flats, shapes, strict=True):
        for d, start, place, count in flat.fragments(index).tolist():
            done = place
            for starts, sizes in flat_boxes(shape, start, start + count):
                key = (*holder, *(slice(at, at + n) for at, n in zip(starts, sizes, strict=True)))
                number = math.prod(sizes)
                yield View(key), View((*holder, d, slice(done, done + number)), tuple(sizes))
                done += number


def _widest(shapes: Shapes) -> tuple[int, ...]:
    return tuple(max(sizes) for sizes in zip(*shapes, strict=True))


def held_shape(cut: Cut) -> tuple[int, ...]:
    """Shape of the array that holds all shards of a cut: its axes' degrees, then the widest shard's."""
    degrees = tuple(cut.mesh[axis] for axis in cut.axes)
    return (*degrees, *(max(dim.widths.values()) for dim in cut.dims))


def _boxes(source: Cut, target: Cut) -> Iterator[tuple[Key, Key, tuple[slice, ...]]]:
    """(key into the target's array, into the source's, the former without the coordinate) of every box."""
    for at_target in target.coordinates():
        for at_source in source.coordinates():
            rows = [plain_rows(dim).tolist() for dim in overlap(source, at_source, target, at_target)]
            for box in itertools.product(*rows):
                held, wanted = (tuple(_slice(row, side) for row in box) for side in (0, 1))
                yield (*at_target, *wanted), (*at_source, *held), wanted


def _slice(row: Sequence[int], side: int) -> slice:
    """The indices of a row of an overlap on one side: a run of single elements is a step."""
    start, length, count, stride = row[side], row[2], row[3], row[4 + side]
    return slice(start, start + length) if count == 1 else slice(start, start + (count - 1) * stride + 1, stride)


@dataclass(frozen=True)
class Segment:
    """Part of a dim that every coordinate of an axis holds alike: `(repeats axis length)`, beginning at `whole` in the
    whole and at `shard` in each shard. Without an axis `degree` is None."""

    whole: int
    shard: int
    repeats: int
    degree: int | None
    length: int


def _regular(cut: Cut) -> list[tuple[View, View]] | None:
    """(view of the whole, view of the array of all shards) that cover a regular cut; None if it is not."""
    dims = [segments(dim) for dim in cut.dims]
    if None in dims:
        return None
    every = slice(None)
    found = []
    for combination in itertools.product(*(dim or () for dim in dims)):
        whole_key, shard_key = [], []
        whole_shape: list[int] = []
        shard_shape: list[int] = []
        axis_at: dict[str, int] = {}
        rest: list[int] = []
        for dim, part in zip(cut.dims, combination, strict=True):
            width = part.repeats * part.length
            whole_key.append(slice(part.whole, part.whole + width * (part.degree or 1)))
            shard_key.append(slice(part.shard, part.shard + width))
            if part.degree is None:
                rest.append(len(whole_shape))
                whole_shape.append(width)
                shard_shape.append(width)
                continue
            first = len(whole_shape)
            axis_at[dim.axes[0]] = first + 1
            rest += [first, first + 2]
            whole_shape += [part.repeats, part.degree, part.length]
            shard_shape += [part.repeats, part.length]
        degrees = [cut.mesh[axis] for axis in cut.axes]
        order = (*(axis_at[axis] for axis in cut.axes), *rest)
        whole = View(tuple(whole_key), tuple(whole_shape), order)
        found.append((whole, View((*(every for _ in degrees), *shard_key), (*degrees, *shard_shape))))
    return found


def segments(dim: DimCut) -> list[Segment] | None:
    """The segments of a dim, in the order of the shard; None where coordinates hold parts that are not alike."""
    if not dim.axes:
        return [Segment(0, 0, 1, None, dim.size)]
    if len(dim.axes) > 1:
        return None
    held = [dim.owned[at].tolist() for at in sorted(dim.owned)]
    degree, segments = len(held), []
    if len({len(rows) for rows in held}) > 1:
        return None
    for rows in zip(*held, strict=True):
        whole, shard, length, count, stride, _ = rows[0]
        expected = [[whole + k * length, shard, length, count, *rows[0][4:]] for k in range(degree)]
        if list(rows) != expected or (count > 1 and stride != degree * length):
            return None
        segments.append(Segment(whole, shard, count, degree, length))
    return segments
