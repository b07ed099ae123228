"""What the ranks of one catalog's mesh hold, drawn from where it is stored: their shards and their flat partitions.

`held` is the catalog that says what they hold: the source itself, or a target with nothing stored behind it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from ckptlab.arrays.gather import Gather, Tally
from ckptlab.catalog import MODULE, Catalog, FlatGroup, module_source
from ckptlab.layout import Cut


def shard_gathers(
    source: Catalog, held: Catalog, name: str, state: str, stage: int | None = None
) -> tuple[Gather, ...]:
    """For each tp rank of `held` what reads its shard, in the tensor's cut there.

    Of the source's own ranks each is read from itself, its copy of what is replicated included (`stage`: the copy of
    that pp stage); a target's are gathered from all. Buffers may differ between tp ranks: at an unchanged tp each
    keeps its own.
    """
    tensor, ranks = held.tensors[name], range(held.mesh.tp)
    if held is source:
        return tuple(Gather(source, name, state, stage=stage, replica=tp) for tp in ranks)
    drawn = module_source(source[name], tensor) if state == MODULE else state
    dtype = tensor.states[state]
    if tensor.kind == "buffer" and held.mesh.tp == source.mesh.tp:
        return tuple(Gather(source, name, drawn, dtype=dtype, replica=tp) for tp in ranks)
    return (Gather(source, name, drawn, dtype=dtype),) * len(ranks)


@dataclass(frozen=True)
class Shard:
    """What one coordinate of a cut holds of a tensor, drawn by `gather`."""

    gather: Gather
    cut: Cut
    at: tuple[int, ...]

    @staticmethod
    def whole(source: Catalog, name: str, state: str, dtype: np.dtype, tally: Tally | None = None) -> Shard:
        """All of a tensor of a catalog, converted to `dtype`."""
        return Shard(Gather(source, name, state, dtype=dtype, tally=tally), Cut.whole(source[name].shape), ())

    def chunks(self, lo: int, hi: int) -> Iterator[np.ndarray]:
        """Elements lo … hi-1 of the flattened shard, one-dimensional; a piece is valid until the next one is asked
        for."""
        yield from self.gather.chunks(self.cut, self.at, lo, hi)


@dataclass(frozen=True)
class _Part:
    """`count` elements from `start` of a flattened shard, which lie from `place` on in the partition."""

    gather: Gather
    cut: Cut
    at: tuple[int, ...]
    start: int
    place: int
    count: int


class Partition:
    """What a dp rank holds of one state of a flat buffer of `held`, gathered from `source`; its padding is 0.

    Pickled, it is the files' paths and offsets and the cuts, without the catalogs and the tally.
    """

    def __init__(
        self,
        source: Catalog,
        held: Catalog,
        group: FlatGroup,
        state: str,
        tp: int,
        dp: int,
        tally: Tally | None = None,
    ) -> None:
        self.source, self.held, self.group = source, held, group
        self.state, self.tp, self.dp = state, tp, dp
        self.tally = tally and tally.towards(held.mesh.rank(pp=group.stage, dp=dp, tp=tp))
        self.dtype = np.dtype(group.dtypes[state])
        self.size = group.flats[tp].size(dp)
        self._known_parts: list[_Part] | None = None

    def __getstate__(self) -> dict[str, Any]:
        dropped = dict.fromkeys(("source", "held", "group", "tally"))
        return {**self.__dict__, **dropped, "_known_parts": list(self._parts())}

    def chunks(self, lo: int, hi: int) -> Iterator[np.ndarray]:
        """Elements lo … hi-1 of the partition, one-dimensional; a piece is valid until the next one is asked for."""
        done = lo
        for part in self._parts():
            first, last = max(part.place, lo), min(part.place + part.count, hi)
            if first >= last:
                continue
            if first > done:
                yield np.zeros(first - done, self.dtype)
            shift = part.start - part.place
            yield from part.gather.chunks(part.cut, part.at, first + shift, last + shift)
            done = last
        if hi > done:
            yield np.zeros(hi - done, self.dtype)

    def _parts(self) -> Iterator[_Part]:
        """What the partition is made of, ascending: found anew each time, since most are read once."""
        if self._known_parts is not None:
            yield from self._known_parts
            return
        for index, start, place, count in self.group.flats[self.tp].within(self.dp).tolist():
            tensor = self.held.tensors[self.group.names[index]]
            gather = Gather(self.source, tensor.name, self.state, dtype=self.dtype, tally=self.tally)
            yield _Part(gather, tensor.cut, tensor.cut.coordinate({"tp": self.tp}), start, place, count)
