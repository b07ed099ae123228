"""Which process is best made which rank of a plan's target, so that the fewest bytes move: an assignment problem.

The figures are a plan's matrix (bytes from source rank to target rank) and nothing else. Solved by scipy's
`linear_sum_assignment` (Crouse, "On implementing 2D rectangular assignment algorithms", 2016), exactly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ckptlab.aliases import Int64
from ckptlab.errors import BackendError, ReshapeError
from ckptlab.words import size


@dataclass(frozen=True)
class Ranks:
    """`order[k]` is the process (the source's rank; from the source's size on, a new one) that best becomes rank k of
    the target, so that devices in this order make its mesh. moved_before: bytes that change process where numbers are
    kept; moved: those that still do; bound: what no numbering goes below, since of each target rank's bytes at most
    those of one source rank can stay, and of each source rank's those for one target rank."""

    order: tuple[int, ...]
    moved_before: int
    moved: int
    bound: int

    @property
    def saved(self) -> int:
        """Bytes that need not move."""
        return self.moved_before - self.moved

    def __str__(self) -> str:
        share = f" ({self.saved / self.moved_before:.0%})" if self.moved_before else ""
        return (
            f"moves {size(self.moved)} instead of {size(self.moved_before)}: saves {size(self.saved)}{share}; no "
            f"numbering moves less than {size(self.bound)}"
        )


def best_ranks(matrix: Int64, together: int | Sequence[Sequence[int]] = 1) -> Ranks:
    """The best numbering for a matrix (source ranks, target ranks) of bytes: see `Plan.best_ranks`."""
    total = int(matrix.sum())
    sources, targets = matrix.shape
    groups = _groups(together, targets)
    width = len(groups[0])
    count = -(-max(sources, targets) // width)
    square = np.zeros((count * width, count * width), np.int64)
    square[:sources, :targets] = matrix
    columns = [list(group) for group in groups]
    columns += [list(range(k, k + width)) for k in range(targets, count * width, width)]
    order = np.arange(count * width)
    kept, inner = np.zeros((count, count), np.int64), {}
    for a in range(count):
        rows = np.arange(a * width, (a + 1) * width)
        for b, members in enumerate(columns):
            block = square[np.ix_(rows, np.array(members))]
            if block.any():
                inner[a, b], kept[a, b] = _assigned(block)
    blocks, stays = _assigned(kept)
    for b, a in enumerate(blocks):
        within = inner.get((int(a), b), np.arange(width))
        order[columns[b]] = a * width + within
    before = total - int(np.trace(square))
    if total - stays >= before:  # nothing to gain: numbers are kept
        order, stays = np.arange(count * width), total - before
    best = min(int(square.max(axis=0).sum()), int(square.max(axis=1).sum()))
    return Ranks(tuple(order[:targets].tolist()), before, total - stays, total - best)


def _groups(together: int | Sequence[Sequence[int]], targets: int) -> list[list[int]]:
    """The target's ranks in groups of one size. ReshapeError where they are no such groups."""
    if isinstance(together, int):
        if together < 1 or targets % together:
            raise ReshapeError(
                f"together={together}: {targets} ranks are not divisible into groups of {together}: give a divisor, or "
                'the groups themselves, mesh.groups("tp")'
            )
        return [list(range(k, k + together)) for k in range(0, targets, together)]
    try:
        groups = [[int(rank) for rank in group] for group in together]
    except (TypeError, ValueError):
        raise ReshapeError(
            f"together={together!r}: expected a number of ranks, or groups of ranks as mesh.groups gives them"
        ) from None
    if sorted(rank for group in groups for rank in group) != list(range(targets)) or len({*map(len, groups)}) != 1:
        raise ReshapeError(f"together: expected groups of one size in which each of the {targets} ranks stands once")
    return groups


def _assigned(table: Int64) -> tuple[Any, int]:
    """(row of each column, sum of the entries) with the largest sum; of a square table."""
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError:
        raise BackendError("best_ranks needs scipy, which is not installed: pip install scipy") from None
    columns, rows = linear_sum_assignment(table.T, maximize=True)
    return rows[np.argsort(columns)], int(table[rows, columns].sum())
