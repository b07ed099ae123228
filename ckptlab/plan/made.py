"""The plan of a tensor that is put together from pieces of stored ones: joined, taken apart, in another order.

A stored tensor's fragments are ranges of flattened shards, which order nothing in the tensor that is seen: each is
taken as a few boxes, and each box as the indices that it has on every dim. What a rank of the source and one of the
target share of two boxes is then the product, over dims, of how many indices both have.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ckptlab.aliases import Int64
from ckptlab.layout.boxes import flat_boxes
from ckptlab.layout.cut import Coordinate, Cut
from ckptlab.mesh import Mesh
from ckptlab.plan.placement import Placement

Indices = tuple[Int64, ...]
WIDE = 1 << 12  # indices that are compared at once: their number stays exact in float32


class Piece(Protocol):
    """See `ckptlab.catalog.seen.Piece`."""

    @property
    def dims(self) -> tuple[int | tuple[int, Int64], ...]: ...

    @property
    def at(self) -> tuple[tuple[int, int], ...]: ...


@dataclass(frozen=True, eq=False)
class Made:
    """Where the elements of a tensor of this shape lie: pieces of others, and where those lie."""

    shape: tuple[int, ...]
    parts: tuple[tuple[Piece, Placement | Made], ...]

    @property
    def mesh(self) -> Mesh:
        return self.parts[0][1].mesh

    def regions(self) -> Iterator[tuple[int, Indices]]:
        """(rank, indices on every dim) of boxes, which together are every element, once where none is averaged."""
        for piece, source in self.parts:
            for rank, held in source.regions() if isinstance(source, Made) else _regions(source, True):
                found: list[Int64] = [np.zeros(0, np.int64)] * len(self.shape)
                for dim, index in piece.at:
                    found[dim] = np.array([index], np.int64)
                there = True
                for of, indices in zip(piece.dims, held, strict=True):
                    if isinstance(of, int):
                        there = there and bool((indices == of).any())
                    else:
                        found[of[0]] = _seen(of[1], indices)
                if there and all(len(indices) for indices in found):
                    yield rank, tuple(found)

    def to(self, target: Placement) -> tuple[Int64, Int64, Int64, int]:
        """(source rank, target rank, count), each pair of ranks once, and how many elements are read."""
        source, others = list(self.regions()), list(_regions(target, False))
        read = sum(math.prod(map(len, indices)) for _, indices in source)
        shared = np.ones((len(source), len(others)), np.int64)
        for dim, size in enumerate(self.shape):
            shared *= _shared([i[dim] for _, i in source], [i[dim] for _, i in others], size)
        a, b = np.nonzero(shared)
        ranks = [np.array([rank for rank, _ in side], np.int64) for side in (source, others)]
        pairs, place = np.unique(
            np.stack([ranks[0][a], ranks[1][b]]) if len(a) else np.zeros((2, 0), np.int64), axis=1, return_inverse=True
        )
        count = np.zeros(pairs.shape[1], np.int64)
        np.add.at(count, place.reshape(-1), shared[a, b])
        return pairs[0], pairs[1], count, read


def _regions(placement: Placement, first: bool) -> Iterator[tuple[int, Indices]]:
    """What ranks hold, as boxes of the whole without its padding.

    first: of the canonical stage, and of what several hold only the first; where replicas are averaged, all."""
    mean, shape = placement.replicas in ("mean", "sum"), placement.cut.logical
    for at, shards in placement.shards(placement.stages[:1] if first else placement.stages).items():
        held = _held(placement.cut, at, first and not mean)
        width = placement.cut.shard_shape(at)
        for shard in shards[:1] if first and not mean else shards:
            for j, (lo, hi) in enumerate(zip(shard.edges[:-1].tolist(), shard.edges[1:].tolist(), strict=True)):
                for starts, sizes in flat_boxes(width, lo, hi):
                    spans = (one[a : a + n] for one, a, n in zip(held, starts, sizes, strict=True))
                    indices = tuple(i[(i >= 0) & (i < n)] for i, n in zip(spans, shape, strict=True))
                    if all(map(len, indices)):
                        yield int(shard.ranks[shard.first + j]), indices


def _held(cut: Cut, at: Coordinate, owned: bool) -> list[Int64]:
    """For each dim where in the whole the indices of a shard are; owned: -1 for those that a lower coordinate has."""
    found = []
    for dim, mine in zip(cut.dims, cut.per_dim(at), strict=True):
        positions = dim.positions(mine)
        lower = [dim.positions(other) for other in sorted(dim.rows) if other < mine] if owned else []
        if sum(dim.widths.values()) != dim.size and lower:
            positions = np.where(np.isin(positions, np.concatenate(lower)), -1, positions)
        found.append(positions)
    return found


def _seen(runs: Int64, stored: Int64) -> Int64:
    """Where in the seen dim stored indices are, of those that the runs (n, 6) have: start in the seen dim, start in the
    stored one, length, count, the strides of both."""
    found = []
    for start, at, length, count, stride, step in runs.tolist():
        number, inside = np.divmod(stored - at, step) if step else (np.zeros_like(stored), stored - at)
        there = (number >= 0) & (number < count) & (inside >= 0) & (inside < length)
        found.append(start + number[there] * stride + inside[there])
    return np.concatenate(found) if found else np.zeros(0, np.int64)


def _shared(a: Sequence[Int64], b: Sequence[Int64], size: int) -> Int64:
    """(sets of a, sets of b): how many of the indices 0 … size-1 both have."""
    (mine, of_a), (others, of_b) = _different(a), _different(b)
    total = np.zeros((len(mine), len(others)), np.int64)
    for lo in range(0, size, WIDE):
        inside = [np.stack([_mask(s, lo, min(size, lo + WIDE)) for s in sets]) for sets in (mine, others) if sets]
        if len(inside) == 2:
            total += (inside[0] @ inside[1].T).astype(np.int64)
    return total[np.ix_(of_a, of_b)]


def _different(sets: Sequence[Int64]) -> tuple[list[Int64], list[int]]:
    known: dict[bytes, int] = {}
    numbers = [known.setdefault(np.sort(s).tobytes(), len(known)) for s in sets]
    return [np.frombuffer(content, np.int64) for content in known], numbers


def _mask(indices: Int64, lo: int, hi: int) -> NDArray[np.float32]:
    found = np.zeros(hi - lo, np.float32)
    found[indices[(indices >= lo) & (indices < hi)] - lo] = 1
    return found
