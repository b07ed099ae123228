"""One dim of a tensor that is cut: its strips, each with those that hold it. Many are drawn as few, exactly in sum."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from ckptlab.aliases import Int64
from ckptlab.draw.axes import Axes
from ckptlab.draw.blocks import blocks

HOLDERS = 16  # coordinates along one dim that are told apart
STRIPS = 48  # strips along one dim that are drawn as they are
_WINDOWS = 16  # with more, in how many windows what each holds is drawn together


@dataclass(frozen=True)
class Strip:
    """Consecutive indices of a dim that the same blocks of coordinates hold; `part` indexes the dim's parts."""

    start: int
    length: int
    holders: tuple[int, ...]
    part: int | None
    padding: bool


@dataclass(frozen=True, eq=False)
class Edge:
    """One dim. `held[k]` are the intervals (start, length) of coordinate k on `axes`; from `true` on all is padding.

    `parts` are (name, length) of what lies one after the other in it, each cut on its own; empty if it is one thing.
    `inner` are (depth, name, start, length) of blocks that are not cut but lie in what one holds: heads.
    """

    name: str
    size: int
    true: int
    axes: Axes
    held: Sequence[Int64]
    parts: Sequence[tuple[str, int]] = ()
    inner: Sequence[tuple[int, str, int, int]] = ()

    @cached_property
    def blocks(self) -> list[range]:
        """The coordinates as they are told apart."""
        return blocks(len(self.held), HOLDERS)

    @cached_property
    def folded(self) -> int:
        """How many strips there really are, if they are not drawn as they are, else 0."""
        count = len(self._exact[0])
        return count if count > STRIPS else 0

    @cached_property
    def strips(self) -> list[Strip]:
        """What to draw, from 0 to `size`."""
        starts, lengths, codes = self._windowed if self.folded else self._exact
        return [self._strip(*row) for row in zip(starts.tolist(), lengths.tolist(), codes.tolist(), strict=True)]

    @property
    def windows(self) -> int:
        return _WINDOWS

    def _strip(self, start: int, length: int, code: int) -> Strip:
        padding, part, held = code >> 40, (code >> 16) & 0xFFFFFF, code & 0xFFFF
        holders = tuple(i for i in range(len(self.blocks)) if held >> i & 1)
        return Strip(start, length, holders, part if self.parts else None, bool(padding))

    @cached_property
    def _exact(self) -> tuple[Int64, Int64, Int64]:
        """(start, length, code) of every strip; a code says who holds it, of which part it is, if it is padding."""
        ends = np.cumsum([length for _, length in self.parts], dtype=np.int64)
        every = [np.concatenate([i[:, 0], i.sum(axis=1)]) for i in self.held]
        breaks = np.unique(np.concatenate([[0, self.true, self.size], ends, *every]).astype(np.int64))
        breaks = breaks[breaks <= self.size]
        low = breaks[:-1]
        code = np.where(low >= self.true, 1 << 40, 0) + (np.searchsorted(ends, low, "right") << 16)
        for i, block in enumerate(self.blocks):
            inside = np.zeros(len(low), bool)
            for k in block:
                inside |= _inside(self.held[k], low)
            code |= inside.astype(np.int64) << i
        return _joined(low, np.diff(breaks), code)

    @property
    def _windowed(self) -> tuple[Int64, Int64, Int64]:
        """In each window all that has one code together, in the order of appearance."""
        starts, _, codes = self._exact
        borders = np.linspace(0, self.size, _WINDOWS + 1).astype(np.int64)
        breaks = np.unique(np.concatenate([starts, borders]))
        at = np.searchsorted(starts, breaks[:-1], "right") - 1
        window = np.searchsorted(borders, breaks[:-1], "right") - 1
        kinds, kind = np.unique(codes, return_inverse=True)
        keys, first, place = np.unique(window * len(kinds) + kind[at], return_index=True, return_inverse=True)
        sums = np.bincount(place, np.diff(breaks)).astype(np.int64)
        order = np.argsort(first)
        sums, kept = sums[order], kinds[keys[order] % len(kinds)]
        return _joined(np.cumsum(sums) - sums, sums, kept)


def _inside(intervals: Int64, places: Int64) -> NDArray[np.bool_]:
    if not len(intervals):
        return np.zeros(len(places), bool)
    intervals = intervals[np.argsort(intervals[:, 0])]
    k = np.searchsorted(intervals[:, 0], places, "right") - 1
    return (k >= 0) & (places < intervals[np.maximum(k, 0)].sum(axis=1))


def _joined(starts: Int64, lengths: Int64, codes: Int64) -> tuple[Int64, Int64, Int64]:
    """Neighbours with one code become one."""
    if not len(starts):
        return starts, lengths, codes
    first = np.flatnonzero(np.r_[True, codes[1:] != codes[:-1]])
    return starts[first], np.add.reduceat(lengths, first), codes[first]
