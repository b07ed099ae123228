"""Boxes: hyper-rectangles of a shard, and the flat ranges that they make up."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np

from ckptlab.layout.rows import intervals

Starts = tuple[int, ...]
Sizes = tuple[int, ...]


def flat_boxes(shape: Sequence[int], lo: int, hi: int) -> Iterator[tuple[Starts, Sizes]]:
    """The boxes that the elements lo … hi-1 of a row-major array of `shape` form, in order: at most two a dim and one
    more.

    Each box is itself contiguous.
    """
    if lo >= hi:
        return
    if not shape:
        yield (), ()
        return
    inner = math.prod(shape[1:])
    first, first_offset = divmod(lo, inner)
    last, last_offset = divmod(hi, inner)  # row `last` is entered as far as last_offset
    if first == last:
        for starts, sizes in flat_boxes(shape[1:], first_offset, last_offset):
            yield (first, *starts), (1, *sizes)
        return
    if first_offset:
        for starts, sizes in flat_boxes(shape[1:], first_offset, inner):
            yield (first, *starts), (1, *sizes)
        first += 1
    if last > first:
        yield (first, *(0 for _ in shape[1:])), (last - first, *shape[1:])
    if last_offset:
        for starts, sizes in flat_boxes(shape[1:], 0, last_offset):
            yield (last, *starts), (1, *sizes)


def flat_start(shape: Sequence[int], starts: Sequence[int | None], sizes: Sequence[int]) -> int | None:
    """Where a box of a row-major array begins in its flat order; None if it does not lie there in one piece."""
    begun, first = False, 0
    for n, start, size in zip(shape, starts, sizes, strict=True):
        assert start is not None
        if begun and size != n:
            return None
        begun = begun or size > 1
        first = first * n + start
    return first


def plain_rows(rows: np.ndarray) -> np.ndarray:
    """Rows of an overlap without runs of length > 1: those are spelled out, runs of single elements stay (a step says
    them)."""
    runs = (rows[:, 3] > 1) & (rows[:, 2] > 1)
    return np.concatenate([rows[~runs], intervals(rows[runs])]) if runs.any() else rows


def restrict(row: Sequence[int], a_at: int, a_size: int, b_at: int, b_size: int) -> tuple[slice, slice] | None:
    """A row of an overlap, cut to a window of each side: slices relative to the windows, None if nothing is left."""
    a, b, length, count, stride_a, stride_b = row
    if count == 1:
        lo = max(0, a_at - a, b_at - b)
        hi = min(length, a_at + a_size - a, b_at + b_size - b)
        if lo >= hi:
            return None
        return slice(a + lo - a_at, a + hi - a_at), slice(b + lo - b_at, b + hi - b_at)
    lo = max(0, -((a - a_at) // stride_a), -((b - b_at) // stride_b))
    hi = min(count, (a_at + a_size - 1 - a) // stride_a + 1, (b_at + b_size - 1 - b) // stride_b + 1)
    if lo >= hi:
        return None
    return (
        slice(a + lo * stride_a - a_at, a + (hi - 1) * stride_a - a_at + 1, stride_a),
        slice(b + lo * stride_b - b_at, b + (hi - 1) * stride_b - b_at + 1, stride_b),
    )
