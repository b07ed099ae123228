"""Arithmetic on rows: sets of indices along one dim, as intervals and regular runs of intervals.

A *row* has five columns, (start in the whole, start in the shard, length, count, stride): the k-th of `count`
repetitions lies at whole start + k * stride and shard start + k * length. A *run* has six: the strides of
both sides are said. A plain interval has count 1 and strides 0. All are int64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from ckptlab.aliases import Int64

Rows = Int64
Interval = tuple[int, int, int, int]
"""(start in the whole, length, count, stride): a row whose place in the shard follows from the others."""

_PAIRS = 4096
"""Pairs of regular runs that are intersected one by one; more are spelled out as intervals first."""


def rows_of(held: Sequence[Interval]) -> Rows:
    """Rows from intervals in the order of the shard, which they fill."""
    table = np.array(held, np.int64).reshape(-1, 4)
    table = _join(table[(table[:, 1] > 0) & (table[:, 2] > 0)])
    counts = table[:, 1] * table[:, 2]
    rows = np.column_stack([table[:, 0], np.cumsum(counts) - counts, table[:, 1:]])
    rows.setflags(write=False)
    return rows


def _join(table: Rows) -> Rows:
    """Intervals that continue one another become one; a run without gaps becomes an interval."""
    dense = (table[:, 2] == 1) | (table[:, 3] == table[:, 1])
    table = table.copy()
    table[dense, 1] *= table[dense, 2]
    table[dense, 2:] = (1, 0)
    if len(table) < 2:
        return table
    continues = dense[1:] & dense[:-1] & (table[1:, 0] == table[:-1, 0] + table[:-1, 1])
    first = np.flatnonzero(np.r_[True, ~continues])
    lengths = np.add.reduceat(table[:, 1], first)
    table = table[first]
    table[:, 1] = lengths
    return table


def nest(outer: Sequence[Interval], inner: Sequence[Interval], extent: int) -> list[Interval]:
    """The intervals of a product: `outer` chooses among blocks of `extent` elements, `inner` in each."""
    if len(inner) == 1 and inner[0][0] == 0 and inner[0][1] == extent and inner[0][2] == 1:
        return [(s * extent, n * extent, count, stride * extent) for s, n, count, stride in outer]
    if len(inner) == 1 and all(n == 1 for _, n, _, _ in outer) and inner[0][2] == 1:
        start, length = inner[0][0], inner[0][1]
        return [(s * extent + start, length, count, stride * extent) for s, _, count, stride in outer]
    nested: list[Interval] = []
    for s, n, count, stride in outer:
        for k in range(count):
            nested += _repeat((s + k * stride) * extent, n, inner, extent)
    return nested


def _repeat(at: int, times: int, inner: Sequence[Interval], extent: int) -> list[Interval]:
    """`inner` in `times` blocks of `extent` elements that follow one another from `at`."""
    if len(inner) == 1:
        start, length, count, stride = inner[0]
        if count == 1:
            return [(at + start, length, times, extent)]
        if count * stride == extent:
            return [(at + start, length, count * times, stride)]
    return [(at + k * extent + s, n, count, stride) for k in range(times) for s, n, count, stride in inner]


def runs(rows: Rows) -> Rows:
    """Rows as runs: (whole, shard, length, count, stride in the whole, stride in the shard)."""
    stride = np.where(rows[:, 3] > 1, rows[:, 2], 0)
    return np.column_stack([rows, stride])


def intervals(table: Rows) -> Rows:
    """Runs spelled out as plain intervals: the same six columns, every count 1."""
    if (table[:, 3] == 1).all():
        return table
    plain = np.repeat(table, table[:, 3], axis=0)
    plain[:, :2] += counted(table[:, 3])[:, None] * plain[:, 4:]
    plain[:, 3:] = (1, 0, 0)
    return plain


def counted(numbers: Rows) -> Rows:
    """0 … n-1 for each of some numbers n, one after the other."""
    return np.arange(numbers.sum()) - np.repeat(np.cumsum(numbers) - numbers, numbers)


def elements(starts: Rows, lengths: Rows) -> Rows:
    """Every index of intervals, one after the other."""
    return np.repeat(starts, lengths) + counted(lengths)


def positions(rows: Rows) -> Rows:
    """The index in the whole of each element of the shard, in the order of the shard."""
    plain = intervals(runs(rows))
    plain = plain[np.argsort(plain[:, 1], kind="stable")]
    return elements(plain[:, 0], plain[:, 2])


def intersect(a: Rows, b: Rows) -> Rows:
    """What two sets of runs share of the whole.

    Columns: start in a, start in b, length, count, stride in a, stride in b; sorted by the start in a.
    Neither side may hold an element of the whole twice.
    """
    if (a[:, 3] == 1).all() and (b[:, 3] == 1).all():
        return _sorted(_intersect_intervals(a, b))
    pairs = np.argwhere(
        (a[:, None, 0] < _end(b)[None, :]) & (b[None, :, 0] < _end(a)[:, None])  # their hulls meet
    )
    if sum(_pieces(a[i], b[j]) for i, j in pairs[:_PAIRS]) > _PAIRS or len(pairs) > _PAIRS:
        return _sorted(_intersect_intervals(intervals(a), intervals(b)))
    found: list[tuple[int, ...]] = []
    for i, j in pairs:
        found += _intersect_pair(tuple(a[i].tolist()), tuple(b[j].tolist()))
    return _sorted(np.array(found, np.int64).reshape(-1, 6))


def owners(holders: Sequence[Rows]) -> list[Rows]:
    """For each of several holders of one dim, the runs of what no earlier one holds."""
    spelled = [intervals(runs(rows)) for rows in holders]
    edges = np.unique(np.concatenate([np.r_[p[:, 0], p[:, 0] + p[:, 2]] for p in spelled]))
    owner = np.full(len(edges), -1)
    for k in reversed(range(len(spelled))):
        change = np.zeros(len(edges) + 1, np.int64)
        np.add.at(change, np.searchsorted(edges, spelled[k][:, 0]), 1)
        np.add.at(change, np.searchsorted(edges, spelled[k][:, 0] + spelled[k][:, 2]), -1)
        owner[np.cumsum(change)[:-1] > 0] = k
    owned = []
    for k, plain in enumerate(spelled):
        mine = np.flatnonzero(owner == k)  # between these edges and the next
        pieces = np.zeros((len(mine), 6), np.int64)
        pieces[:, 0], pieces[:, 2], pieces[:, 3] = edges[mine], edges[mine + 1] - edges[mine], 1
        order = np.argsort(plain[:, 0], kind="stable")
        source = order[np.searchsorted(plain[order, 0], pieces[:, 0], "right") - 1]
        pieces[:, 1] = plain[source, 1] + pieces[:, 0] - plain[source, 0]
        owned.append(_join_runs(pieces))
    return owned


def _join_runs(plain: Rows) -> Rows:
    """Neighbouring intervals, in the whole and in the shard alike, become one."""
    if len(plain) < 2:
        return plain
    end = plain[:-1, :2] + plain[:-1, 2:3]
    first = np.flatnonzero(np.r_[True, (plain[1:, :2] != end).any(axis=1)])
    joined = plain[first]
    joined[:, 2] = np.add.reduceat(plain[:, 2], first)
    return joined


def _sorted(table: Rows) -> Rows:
    table = table[np.argsort(table[:, 0], kind="stable")]
    table.setflags(write=False)
    return table


def _end(table: Rows) -> Rows:
    return table[:, 0] + (table[:, 3] - 1) * table[:, 4] + table[:, 2]


def _intersect_intervals(a: Rows, b: Rows) -> Rows:
    """`intersect` for plain intervals: a sorted merge."""
    a, b = a[np.argsort(a[:, 0], kind="stable")], b[np.argsort(b[:, 0], kind="stable")]
    first = np.searchsorted(b[:, 0] + b[:, 2], a[:, 0], "right")
    last = np.searchsorted(b[:, 0], a[:, 0] + a[:, 2], "left")
    counts = np.maximum(last - first, 0)
    i = np.repeat(np.arange(len(a)), counts)
    j = first[i] + counted(counts)
    low = np.maximum(a[i, 0], b[j, 0])
    high = np.minimum(a[i, 0] + a[i, 2], b[j, 0] + b[j, 2])
    zero, one = np.zeros_like(low), np.ones_like(low)
    return np.column_stack([a[i, 1] + low - a[i, 0], b[j, 1] + low - b[j, 0], high - low, one, zero, zero])


def _pieces(a: Rows, b: Rows) -> int:
    """How many pairs of equal stride two runs are split into."""
    if a[3] == 1 or b[3] == 1:
        return 1
    common = math.lcm(int(a[4]), int(b[4]))
    return min(common // int(a[4]), int(a[3])) * min(common // int(b[4]), int(b[3]))


def _intersect_pair(a: tuple[int, ...], b: tuple[int, ...]) -> list[tuple[int, ...]]:
    if a[3] == 1 and b[3] == 1:
        low, high = max(a[0], b[0]), min(a[0] + a[2], b[0] + b[2])
        return [(a[1] + low - a[0], b[1] + low - b[0], high - low, 1, 0, 0)] if low < high else []
    if b[3] == 1:
        return _intersect_run(a, b)
    if a[3] == 1:
        return [(p, q, n, count, v, u) for q, p, n, count, u, v in _intersect_run(b, a)]
    common = math.lcm(a[4], b[4])
    return [piece for x in _slower(a, common) for y in _slower(b, common) for piece in _intersect_strides(x, y)]


def _slower(run: tuple[int, ...], stride: int) -> list[tuple[int, ...]]:
    """A run as several whose stride in the whole is `stride`, a multiple of its own."""
    whole, shard, length, count, step, shard_step = run
    times = stride // step
    return [
        (
            whole + k * step,
            shard + k * shard_step,
            length,
            -(-(count - k) // times),
            stride,
            times * shard_step,
        )
        for k in range(min(times, count))
    ]


def _intersect_run(run: tuple[int, ...], plain: tuple[int, ...]) -> list[tuple[int, ...]]:
    """A regular run with an interval: the repetitions inside are one run, each end may have a part of one."""
    whole, shard, length, count, step, shard_step = run
    low, high = plain[0], plain[0] + plain[2]
    first = max(0, (low - whole - length) // step + 1)  # the first that ends after low
    last = min(count, -((whole - high) // step))  # past the last that begins before high
    inner_first = max(first, -((whole - low) // step))
    inner_last = min(last, (high - length - whole) // step + 1)
    if inner_first >= inner_last:
        inner_first = inner_last = last
    found: list[tuple[int, ...]] = []
    for k in [*range(first, inner_first), *range(inner_last, last)]:
        at = whole + k * step
        start, end = max(at, low), min(at + length, high)
        found.append((shard + k * shard_step + start - at, plain[1] + start - low, end - start, 1, 0, 0))
    if inner_first < inner_last:
        n, at = inner_last - inner_first, whole + inner_first * step
        strides = (shard_step, step) if n > 1 else (0, 0)
        found.append((shard + inner_first * shard_step, plain[1] + at - low, length, n, *strides))
    return found


def _intersect_strides(a: tuple[int, ...], b: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Two runs of one stride: repetition i of a meets repetition i + t of b, for at most two values of t."""
    step, offset = a[4], b[0] - a[0]
    found: list[tuple[int, ...]] = []
    for t in range(-((offset + b[2] - 1) // step), (a[2] - 1 - offset) // step + 1):
        low, high = max(0, offset + t * step), min(a[2], offset + t * step + b[2])
        first, last = max(0, -t), min(a[3], b[3] - t)
        if low < high and first < last:
            start_a, start_b = a[1] + first * a[5] + low, b[1] + (first + t) * b[5] + low - offset - t * step
            strides = (a[5], b[5]) if last - first > 1 else (0, 0)
            found.append((start_a, start_b, high - low, last - first, *strides))
    return found


def checked(table: ArrayLike) -> Rows:
    """Rows given from outside, with three or five columns, as five."""
    rows = np.asarray(table, np.int64)
    if rows.size == 0:
        rows = np.zeros((0, 5), np.int64)
    if rows.ndim == 2 and rows.shape[1] == 3:
        rows = np.column_stack([rows, np.ones(len(rows), np.int64), np.zeros(len(rows), np.int64)])
    if rows.ndim != 2 or rows.shape[1] != 5:
        raise ValueError(f"rows have 3 or 5 columns, not shape {rows.shape}")
    rows = rows[(rows[:, 2] > 0) & (rows[:, 3] > 0)]
    rows[rows[:, 3] == 1, 4] = 0
    rows.setflags(write=False)
    return rows
