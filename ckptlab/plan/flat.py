"""Flat buffers: where the shards of one parameter group lie behind one another, and where dp cuts them.

Formats: DeepSpeed's ZeRO-1/2 (`stage_1_and_2.py`, `bf16_optimizer.py`) flattens a group into one buffer,
padded to a multiple of 2 * dp, and gives each dp rank an equal partition, across the borders of tensors.
ZeRO-3 (`partition_parameters.py`) cuts each tensor by itself, every ceil(n / dp) elements; a rank's buffer
is its parts in order, each with room for ceil(n / dp).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np

from ckptlab.aliases import Int64
from ckptlab.arguments import constructed
from ckptlab.errors import CheckpointError


@constructed
@dataclass(frozen=True)
class FlatBuffer:
    """The flat buffer of one parameter group on one model-parallel rank. All figures are elements.

    `counts[i]` is the size of tensor i's shard. `partition` is what each dp rank holds of the buffer,
    `starts[i]` the tensor's start in it, all ranks' partitions one after the other (ZeRO-1/2). With
    `partition` None each tensor is cut by itself (ZeRO-3) and `starts[i]` is the start of a rank's part in
    that rank's own buffer, the same on all.
    """

    names: tuple[str, ...]
    counts: tuple[int, ...]
    starts: tuple[int, ...]
    dp: int
    partition: int | None

    def __post_init__(self) -> None:
        if not len(self.names) == len(self.counts) == len(self.starts):
            raise CheckpointError(
                f"flat buffer: {len(self.names)} names, {len(self.counts)} counts, {len(self.starts)} starts"
            )
        if self.partition is not None and self.used > self.total:
            raise CheckpointError(
                f"a flat buffer of dp({self.dp}) * partition({self.partition}) = {self.total} elements "
                f"cannot hold its {len(self.names)} tensors, which end at {self.used}"
            )

    @classmethod
    def contiguous(
        cls,
        names: Sequence[str],
        counts: Sequence[int],
        dp: int,
        alignment_paddings: Sequence[int] | None = None,
        partition: int | None = None,
    ) -> FlatBuffer:
        """ZeRO-1/2: tensors one after the other, `alignment_paddings[i]` elements of padding after tensor i.

        The total is padded to a multiple of 2 * dp unless a partition size is given. CheckpointError where
        that is too small.
        """
        paddings = alignment_paddings or [0] * len(counts)
        if len(paddings) != len(counts):
            raise CheckpointError(f"{len(paddings)} alignment paddings for {len(counts)} tensors")
        ends = np.cumsum(np.array([counts, paddings], np.int64).sum(axis=0))
        starts = np.r_[0, ends[:-1]] if len(ends) else ends
        if partition is None:
            used = int(ends[-1]) if len(ends) else 0
            partition = -(-used // (2 * dp)) * 2
        return cls(tuple(names), _ints(counts), _ints(starts), dp, int(partition))

    @classmethod
    def per_tensor(cls, names: Sequence[str], counts: Sequence[int], dp: int) -> FlatBuffer:
        """ZeRO-3: each tensor cut by itself, every ceil(n / dp) elements."""
        parts = np.array([-(-n // dp) for n in counts], np.int64)
        return cls(tuple(names), _ints(counts), _ints(np.cumsum(parts) - parts), dp, None)

    @property
    def total(self) -> int:
        """All dp ranks' buffers together, padding included."""
        return sum(self._parts) * self.dp if self.partition is None else self.partition * self.dp

    @property
    def used(self) -> int:
        """End of the last tensor that has elements; at ZeRO-3, in one rank's buffer (its room counted)."""
        lengths = self._parts if self.partition is None else self.counts
        return max((start + n for start, n in zip(self.starts, lengths, strict=True) if n), default=0)

    def size(self, d: int) -> int:
        """Length of dp rank d's buffer, padding included."""
        return self.total // self.dp

    def padding(self, d: int) -> int:
        """Elements of dp rank d's buffer that are padding.

        ZeRO-1/2: those at its end, clamp((d + 1) * partition - used, 0, partition), alignment between
        tensors not counted. ZeRO-3: all that are no tensor's, wherever they stand.
        """
        if self.partition is None:
            return self.size(d) - int(self.within(d)[:, 3].sum())
        return min(max((d + 1) * self.partition - self.used, 0), self.partition)

    @cached_property
    def cuts(self) -> Int64:
        """(tensor, 3): elements, start on the line, elements that each rank has of the line; at ZeRO-3 the line is the
        tensor's own."""
        found = np.zeros((len(self.counts), 3), np.int64)
        found[:, 0] = self.counts
        if self.partition:
            found[:, 1], found[:, 2] = self.starts, self.partition
        else:
            found[:, 2] = self._parts
        return found

    def index(self, name: str) -> int:
        """The place of a tensor in the buffer. CheckpointError if it has none."""
        found = self._index.get(name)
        if found is None:
            raise CheckpointError(f"tensor {name!r} is not in this flat buffer of {len(self.names)} tensors")
        return found

    def edges(self, i: int) -> tuple[Int64, int]:
        """Where dp cuts tensor i's flattened shard: edges (k+1,) from 0 to its count, and the first dp rank.

        Fragment j lies on edges[j] … edges[j+1], at dp rank first + j. A tensor without elements has the
        one edge 0.
        """
        n, start = self.counts[i], self.starts[i]
        if self.partition is None:
            return _even_edges(n, self.dp), 0
        if n == 0:
            return np.zeros(1, np.int64), 0
        first, last = start // self.partition, (start + n - 1) // self.partition
        edges = np.arange(first, last + 2, dtype=np.int64) * self.partition - start
        edges[0], edges[-1] = 0, n
        return edges, first

    def fragments(self, i: int) -> Int64:
        """Tensor i's fragments, ascending, (k, 4).

        Columns: dp rank, start in the flattened shard, start in that rank's buffer, count (never 0).
        """
        edges, first = self.edges(i)
        found = np.empty((len(edges) - 1, 4), np.int64)
        found[:, 0] = ranks = np.arange(first, first + len(found))
        found[:, 1] = edges[:-1]
        found[:, 2] = self.starts[i] + (0 if self.partition is None else edges[:-1] - ranks * self.partition)
        found[:, 3] = edges[1:] - edges[:-1]
        return found

    def within(self, d: int) -> Int64:
        """What dp rank d's buffer holds, sorted by the place there, (k, 4).

        Columns: tensor index, start in its flattened shard, start in the buffer, count (never 0).
        """
        counts, starts = self._arrays
        if self.partition is None:
            parts = np.array(self._parts, np.int64)
            low, high = np.minimum(d * parts, counts), np.minimum((d + 1) * parts, counts)
            place = starts
        else:
            low = np.maximum(d * self.partition - starts, 0)
            high = np.minimum((d + 1) * self.partition - starts, counts)
            place = starts + low - d * self.partition
        held = np.flatnonzero(high > low)
        held = held[np.argsort(place[held], kind="stable")]
        return np.column_stack([held, low[held], place[held], (high - low)[held]])

    @cached_property
    def _index(self) -> dict[str, int]:
        return {name: i for i, name in enumerate(self.names)}

    @cached_property
    def _parts(self) -> tuple[int, ...]:
        return tuple(-(-n // self.dp) for n in self.counts)

    @cached_property
    def _arrays(self) -> tuple[Int64, Int64]:
        return np.array(self.counts, np.int64), np.array(self.starts, np.int64)

    def __repr__(self) -> str:
        cut = "each tensor by itself" if self.partition is None else f"every {self.partition}"
        return f"<FlatBuffer of {len(self.names)} tensors, {sum(self.counts)} elements, {cut}, dp({self.dp})>"


@lru_cache(maxsize=1024)
def _even_edges(n: int, dp: int) -> Int64:
    part = max(-(-n // dp), 1)
    edges = np.minimum(np.arange(-(-n // part) + 1, dtype=np.int64) * part, n)
    edges.setflags(write=False)
    return edges


def _ints(values: Sequence[int] | Int64) -> tuple[int, ...]:
    return tuple(int(n) for n in values)
