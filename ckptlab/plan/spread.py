"""How tensors that lie alike are spread over ranks, all at once: who holds which shard, and where dp cuts each.

Layers of a model differ in their stage and in their place in flat buffers, in nothing else. So what their shards share
with other shards is worked out once, and where dp cuts them as arrays over tensors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ckptlab.aliases import Int64
from ckptlab.errors import LayoutError
from ckptlab.layout.cut import Coordinate
from ckptlab.layout.rows import counted
from ckptlab.plan.placement import InBuffers, Placement


@dataclass(frozen=True, eq=False)
class Edges:
    """Where dp cuts one shard of many tensors: `places` in the flattened shard, from 0 to its length, tensor after
    tensor; `tensor` says whose each is, `first` where a tensor's begin, `rank` at which data rank its first fragment
    lies."""

    places: Int64
    tensor: Int64
    first: Int64
    rank: Int64

    @staticmethod
    def of(counts: Int64, starts: Int64, parts: Int64) -> Edges:
        """Shards of `counts` elements that begin at `starts` of a line which is cut every `parts` elements."""
        rank = starts // parts
        fragments = np.where(counts > 0, (starts + counts - 1) // parts - rank + 1, 0)
        edges = fragments + 1
        first = np.cumsum(edges) - edges
        tensor = np.repeat(np.arange(len(counts)), edges)
        places = np.clip(counted(edges) * parts[tensor] - (starts - rank * parts)[tensor], 0, counts[tensor])
        return Edges(places, tensor, first, rank)


@dataclass(frozen=True)
class Place:
    """A holder among those of one stage: the how-manieth of the tensor's stages, and of a stage's holders; `slot` is
    which flat buffer of the tensor its shard lies in."""

    stage: int
    holder: int
    slot: int


@dataclass(frozen=True, eq=False)
class Spread:
    """Many placements of one kind (see `Placement.kind`): the holders of each coordinate of the cut, the edges of each
    slot, and the ranks (tensor, stage, holder, data rank)."""

    holders: dict[Coordinate, list[Place]]
    edges: list[Edges]
    table: Int64
    stages: Int64

    @staticmethod
    def of(placements: Sequence[Placement], first: bool = False) -> Spread:
        """first: of the canonical stage alone. LayoutError where flat buffers do not fit the cut."""
        one = placements[0]
        number = 1 if first else len(one.stages)
        stages = np.array([p.stages[:number] for p in placements], np.int64)
        slots = one.slots(first)
        holders: dict[Coordinate, list[Place]] = {}
        lengths: dict[int, int] = {}
        for k, slot in enumerate(slots):
            stage, place = divmod(k, len(slots) // number)
            holder = one.on(one.stages[stage])[place]
            length = math.prod(one.shape(holder))
            if lengths.setdefault(slot, length) != length:
                one.shard(holder)  # says which
            holders.setdefault(one.coordinate(holder), []).append(Place(stage, place, slot))
        edges = [Spread._edges(placements, slot, length) for slot, length in lengths.items()]
        return Spread(holders, edges, one.table, stages)

    @staticmethod
    def _edges(placements: Sequence[Placement], slot: int, length: int) -> Edges:
        """Of one shard of every tensor, all of the same length."""
        counts = np.full(len(placements), length, np.int64)
        if not placements[0].flats:
            return Edges.of(counts, np.zeros_like(counts), np.maximum(counts, 1))
        cuts = Spread._cuts(placements, slot)
        if (wrong := np.flatnonzero(cuts[:, 0] != length)).size:
            bad = placements[int(wrong[0])]
            for stage in bad.stages:
                for holder in bad.on(stage):
                    bad.shard(holder)
            raise LayoutError(f"a flat buffer holds {cuts[wrong[0], 0]} elements of a shard of {length}")
        return Edges.of(counts, cuts[:, 1], np.maximum(cuts[:, 2], 1))

    @staticmethod
    def _cuts(placements: Sequence[Placement], slot: int) -> Int64:
        """(tensor, 3), see `FlatBuffer.cuts`: of those in the buffers of a group all at once."""
        found = np.empty((len(placements), 3), np.int64)
        groups: dict[int, tuple[list[int], list[int]]] = {}
        for i, placement in enumerate(placements):
            flats = placement.flats
            if isinstance(flats, InBuffers) and len(placement.stages) == 1:
                here, index = groups.setdefault(id(flats.group), ([], []))
                here.append(i)
                index.append(flats.index)
            else:
                found[i] = placement.buffers()[slot]
        for here, index in groups.values():
            shared = placements[here[0]].shared
            if shared is None:
                found[here] = [placements[i].buffers()[slot] for i in here]
            else:
                found[here] = shared[1][slot].cuts[index]
        return found

    def ranks(self, place: Place, tensor: Int64, fragment: Int64) -> Int64:
        """The ranks that have the fragments of a place's shard."""
        edges = self.edges[place.slot]
        found: Int64 = self.table[self.stages[tensor, place.stage], place.holder, edges.rank[tensor] + fragment]
        return found
