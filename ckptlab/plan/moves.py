"""What a plan moves, piece by piece: which elements of a source rank's array go where in a target rank's.

A rank has of a placement one array, or nothing: the shard of its holder, or, where a flat buffer cuts the flattened
shard over dp, its consecutive part of that.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from ckptlab.aliases import Int64
from ckptlab.arguments import explained
from ckptlab.errors import ReshapeError
from ckptlab.plan.boxes import Box, shared_boxes
from ckptlab.plan.placement import Placement, Shard


@dataclass(frozen=True)
class Move:
    """One state of one tensor, from where it lies to where it is to. `key` names it, `drawn` what it is made of where
    that is called otherwise (a param that is rounded from the master); dtypes are None where nobody said so (then those
    that the ranks have)."""

    key: Hashable
    source: Placement
    target: Placement
    dtype: np.dtype | None = None
    becomes: np.dtype | None = None
    drawn: Hashable = None

    @property
    def of(self) -> Hashable:
        """What the source's ranks call it."""
        return self.key if self.drawn is None else self.drawn

    def pieces(self) -> Iterator[Piece]:
        """Everything that goes from a rank to a rank, or stays, in the order in which both sides know it."""
        a, b = self.source, self.target
        if a.replicas in ("mean", "sum"):
            done = {"mean": "averaged", "sum": "summed"}[a.replicas]
            raise ReshapeError(f"{self.key}: replicas that are to be {done} cannot be moved between live ranks")
        sources, targets = a.shards(a.stages[:1]), b.shards(b.stages)
        for at_a, at_b, boxes in shared_boxes(a.cut, b.cut, True):
            source = sources[at_a][0]
            for target in targets[at_b]:
                for box in boxes:
                    yield from _pieces(self, box, source, target)


class Later(Sequence[Move]):
    """Moves that are worked out when the first is looked at: who costs or draws a plan needs none."""

    def __init__(self, moves: Callable[[], Iterable[Move]]) -> None:
        self._make = moves

    @cached_property
    def _all(self) -> tuple[Move, ...]:
        return tuple(self._make())

    def __getitem__(self, index: Any) -> Any:
        return self._all[index]

    def __len__(self) -> int:
        return len(self._all)

    def __reduce__(self) -> tuple[type[tuple], tuple[tuple[Move, ...]]]:
        return tuple, (self._all,)


@dataclass(frozen=True, eq=False)
class Piece:
    """`count` elements from `first` on of what two shards share, in the order of the box, from a rank to a rank."""

    move: Move
    source: int
    target: int
    box: Box
    first: int
    count: int
    start_a: int
    start_b: int

    def drawn(self, lo: int, hi: int) -> Int64:
        """Where elements lo … hi-1 of the piece lie in the flattened array of the source's rank."""
        return self.box.a.places(np.arange(self.first + lo, self.first + hi)) - self.start_a

    def put(self, lo: int, hi: int) -> Int64:
        """Where they come to lie in that of the target's."""
        return self.box.b.places(np.arange(self.first + lo, self.first + hi)) - self.start_b


def _pieces(move: Move, box: Box, source: Shard, target: Shard) -> Iterator[Piece]:
    places_a, places_b = box.a.ordinals(source.edges), box.b.ordinals(target.edges)
    merged = np.union1d(places_a, places_b)
    low = merged[:-1]
    i, j = (np.searchsorted(places, low, "right") - 1 for places in (places_a, places_b))
    for first, count, at_a, at_b in zip(low.tolist(), np.diff(merged).tolist(), i.tolist(), j.tolist(), strict=True):
        ranks = int(source.ranks[source.first + at_a]), int(target.ranks[target.first + at_b])
        yield Piece(move, *ranks, box, first, count, int(source.edges[at_a]), int(target.edges[at_b]))


@explained
def held_by(placement: Placement, rank: int) -> tuple[tuple[int, ...], int, int] | None:
    """What a rank has: the shape of its holder's shard, and from where to where of it, flattened. None: nothing.

    Of copies that the ranks of a holder have without a flat buffer only the first counts, as in a plan.
    """
    for holder in placement.holders:
        place = np.flatnonzero(placement.ranks(holder) == rank)
        if len(place):
            shard = placement.shard(holder)
            j = int(place[0]) - shard.first
            has = 0 <= j < len(shard.edges) - 1
            return (placement.shape(holder), int(shard.edges[j]), int(shard.edges[j + 1])) if has else None
    return None
