"""What the ranks of one catalog's mesh hold, drawn from where it is stored: their shards and their flat partitions.

`held` is the catalog that says what they hold: the source itself, or a target with nothing stored behind it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from ckptlab.arrays.gather import Tally, reader
from ckptlab.arrays.readers import Reader, Share, is_sum
from ckptlab.catalog import Catalog, FlatGroup, drawn_from
from ckptlab.layout import Cut
from ckptlab.layout.cut import Coordinate
from ckptlab.plan import Holder, Placement, held_by


def shard_reader(
    source: Catalog, held: Catalog, name: str, state: str, holder: Holder, tally: Tally | None = None
) -> Reader:
    """What reads the shard of a holder of `held`, in the tensor's cut there.

    Of the source's own holders each is read from itself, its copy of what is replicated included; a target's is
    gathered from all. Buffers may differ between holders: on an unchanged mesh axis each keeps its own, unless its own
    is another part of the whole.
    """
    if held is source:
        return reader(source, name, state, holder=holder, tally=tally)
    tensor = held.tensors[name]
    drawn = drawn_from(source[name], tensor, state)
    placement = held.placement(name, state)
    own = own_copy(source, held, name, state, holder)
    one = reader(source, name, drawn, dtype=tensor.states[state], holder=own, tally=tally)
    return _shared(one, placement, state, holder)


def _shared(one: Reader, placement: Placement, state: str, holder: Holder) -> Reader:
    """What a holder of a target has of a whole: its part, where copies are parts of a sum."""
    if not is_sum(placement.replicas, state):
        return one
    at = placement.coordinate(holder)
    return Share(one, sum(placement.coordinate(h) == at for h in placement.on(placement.stages[0])))


def own_copy(source: Catalog, held: Catalog, name: str, state: str, holder: Holder) -> Holder | None:
    """Whose copy of a buffer a target's holder keeps: that of the source's at the same coordinates, where the meshes
    have the same degrees on all of the axes. None: it has no copy of its own."""
    tensor = held.tensors[name]
    placement = source.placement(name, drawn_from(source[name], tensor, state))
    if tensor.kind != "buffer" or (placement.cut.axes and placement.cut.dims != held.placement(name, state).cut.dims):
        return None
    if any(source.mesh[axis] != held.mesh[axis] for axis in placement.axes if axis in held.mesh):
        return None
    at = {axis: holder.get(axis, 0) for axis in placement.axes}
    return next((h for h in placement.on(placement.stages[0]) if Holder(**at).within(h)), None)


def rank_arrays(source: Catalog, held: Catalog, rank: int) -> dict[tuple[str, str], np.ndarray]:
    """(name, state) → what a rank of `held` has of it, drawn from the source: its shard, or the part of the flattened
    shard that is its own (flat)."""
    found: dict[tuple[str, str], np.ndarray] = {}
    for (name, state), copies in held.placements.items():
        for placement in copies:
            if (name, state) in found or (mine := held_by(placement, rank)) is None:
                continue
            shape, lo, hi = mine
            holder = next(h for h in placement.holders if rank in placement.ranks(h))
            one = shard_reader(source, held, name, state, holder)
            parts = [part.copy() for part in one.chunks(placement.cut, placement.coordinate(holder), lo, hi)]
            flat = np.concatenate([np.zeros(0, one.dtype), *parts])
            found[name, state] = flat.reshape(shape) if flat.size == math.prod(shape) else flat
    return found


@dataclass(frozen=True)
class Drawn:
    """What one coordinate of a cut holds of a tensor, drawn through a reader."""

    reader: Reader
    cut: Cut
    at: Coordinate

    @staticmethod
    def whole(source: Catalog, name: str, state: str, dtype: np.dtype, tally: Tally | None = None) -> Drawn:
        """All of a tensor of a catalog, converted to `dtype`."""
        return Drawn(reader(source, name, state, dtype=dtype, tally=tally), Cut.whole(source[name].shape), ())

    def chunks(self, lo: int, hi: int) -> Iterator[np.ndarray]:
        """Elements lo … hi-1 of the flattened shard, one-dimensional; a piece is valid until the next one is asked
        for."""
        yield from self.reader.chunks(self.cut, self.at, lo, hi)

    def label(self, index: int) -> str:
        """The tensor and its state."""
        return f"{self.reader.name}: {self.reader.state}"


@dataclass(frozen=True)
class _Part:
    """`count` elements from `start` of a flattened shard, which lie from `place` on in the partition."""

    reader: Reader
    cut: Cut
    at: Coordinate
    start: int
    place: int
    count: int


class Partition:
    """What a dp rank of a holder has of one state of a flat buffer of `held`, gathered from `source`; its padding is 0.

    Pickled, it is the files' paths and offsets and the cuts, without the catalogs and the tally.
    """

    def __init__(
        self,
        source: Catalog,
        held: Catalog,
        group: FlatGroup,
        state: str,
        holder: Holder,
        dp: int,
        tally: Tally | None = None,
    ) -> None:
        self.source, self.held, self.group = source, held, group
        self.state, self.holder, self.dp, self.tally = state, holder, dp, tally
        self.dtype = np.dtype(group.dtypes[state])
        self.size = group.flats[holder].size(dp)
        self._known_parts: list[_Part] | None = None

    def __getstate__(self) -> dict[str, Any]:
        dropped = dict.fromkeys(("source", "held", "group", "tally"))
        return {**self.__dict__, **dropped, "_known_parts": list(self._parts(0, self.size))}

    def chunks(self, lo: int, hi: int) -> Iterator[np.ndarray]:
        """Elements lo … hi-1 of the partition, one-dimensional; a piece is valid until the next one is asked for."""
        done = lo
        for part in self._parts(lo, hi):
            first, last = max(part.place, lo), min(part.place + part.count, hi)
            if first > done:
                yield np.zeros(first - done, self.dtype)
            shift = part.start - part.place
            yield from part.reader.chunks(part.cut, part.at, first + shift, last + shift)
            done = last
        if hi > done:
            yield np.zeros(hi - done, self.dtype)

    def label(self, index: int) -> str:
        """The tensor at an element of the partition, and the state."""
        return next((f"{part.reader.name}: {self.state}" for part in self._parts(index, index + 1)), "padding")

    def _parts(self, lo: int, hi: int) -> Iterator[_Part]:
        """What lies in elements lo … hi-1, ascending: found anew each time, since most are read once."""
        if self._known_parts is not None:
            yield from (part for part in self._known_parts if part.place < hi and lo < part.place + part.count)
            return
        held = self.group.flats[self.holder].within(self.dp)
        held = held[(held[:, 2] < hi) & (lo < held[:, 2] + held[:, 3])]
        for index, start, place, count in held.tolist():
            tensor = self.held.tensors[self.group.names[index]]
            placement = self.held.placement(tensor.name, self.state)
            tally = self.tally and self.tally.towards(int(placement.ranks(self.holder)[self.dp]))
            one = reader(self.source, tensor.name, self.state, dtype=self.dtype, tally=tally)
            one = _shared(one, placement, self.state, self.holder)
            yield _Part(one, tensor.cut, placement.coordinate(self.holder), start, place, count)
