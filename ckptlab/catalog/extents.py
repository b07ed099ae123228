"""Where elements lie: in flat buffers and outside of them (geometry), and in which bytes of which files (extents)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from ckptlab.arguments import explained
from ckptlab.catalog.tensor import PARAM, Tensor
from ckptlab.errors import LayoutError, UnknownNameError
from ckptlab.mesh import Mesh
from ckptlab.plan import FlatBuffer, Holder, Placement
from ckptlab.plan.placement import Buffers, InBuffers
from ckptlab.stored import Stored


@dataclass(frozen=True)
class Fragment:
    """Consecutive elements of a flattened shard: `stored` begins at element `start` of it. `dp` is who of the holder's
    ranks stored it, counted in dp order (`Placement.ranks`)."""

    start: int
    stored: Stored
    dp: int = 0

    @property
    def count(self) -> int:
        return self.stored.numel


@explained
@dataclass(frozen=True)
class FlatGroup:
    """The flat buffers of one parameter group (at ZeRO-3: of one of its sub-groups): one for each holder.

    `at` is what the holders have in common: the pp stage, and where experts are spread the ep coordinate. `group`
    indexes the run's parameter groups, `sub` counts its sub-groups there. `flats` says where each holder's shards lie,
    `dtypes` which states there are; `over` names the axis that cuts the buffers ("dp", or "edp" of experts).
    """

    at: Holder
    group: int
    flats: Mapping[Holder, FlatBuffer]
    dtypes: Mapping[str, np.dtype]
    sub: int = 0
    over: str = "dp"

    @property
    def key(self) -> tuple[Holder, int, int]:
        """What tells it from the others of a catalog."""
        return self.at, self.group, self.sub

    @property
    def stage(self) -> int:
        """The pp stage."""
        return self.at["pp"]

    @property
    def names(self) -> tuple[str, ...]:
        return next(iter(self.flats.values())).names

    @property
    def dp(self) -> int:
        """How many ranks hold each buffer together."""
        return next(iter(self.flats.values())).dp

    @property
    def holders(self) -> tuple[Holder, ...]:
        return tuple(self.flats)

    def holder(self, at: Mapping[str, int]) -> Holder:
        """The first holder at these coordinates (those of a rank, say). UnknownNameError if there is none."""
        for holder in self.flats:
            if all(at.get(axis, k) == k for axis, k in holder.items()):
                return holder
        raise UnknownNameError(f"no flat buffer at {Holder(**at)}")

    @cached_property
    def axes(self) -> tuple[str, ...]:
        """The mesh axes on which the holders differ."""
        return tuple(axis for axis in next(iter(self.flats)) if axis not in self.at)

    @classmethod
    def laid_out(
        cls,
        at: Holder,
        group: int,
        names: Sequence[str],
        tensors: Mapping[str, Tensor],
        mesh: Mesh,
        zero_stage: int,
        sub: int = 0,
    ) -> FlatGroup:
        """The flat buffers that the named tensors make at a coordinate, in that order; nothing is stored of them."""
        make = FlatBuffer.per_tensor if zero_stage == 3 else FlatBuffer.contiguous
        made: dict[tuple[int, ...], FlatBuffer] = {}
        flats: dict[Holder, FlatBuffer] = {}
        fixed = at.without("pp")
        cuts = [tensors[name].cut for name in names]
        placements = {id(cut): Placement(cut, (at["pp"],), at=fixed) for cut in {id(cut): cut for cut in cuts}.values()}
        first = placements[id(cuts[0])]
        apart = next((n for n, cut in zip(names, cuts, strict=True) if placements[id(cut)].data != first.data), None)
        if apart is not None:
            other = placements[id(tensors[apart].cut)].data
            raise LayoutError(
                f"{names[0]} is shared by ranks along {first.data}, {apart} is not but along {other}: they are not in "
                "one flat buffer"
            )
        for holder in first.on(at["pp"]):
            sizes = {of: math.prod(placement.shape(holder)) for of, placement in placements.items()}
            different = tuple(sizes.values())
            if different not in made:
                counts = tuple(sizes[id(cut)] for cut in cuts)
                made[different] = make(tuple(names), counts, len(first.ranks(holder)))
            flats[holder] = made[different]
        data = first.data
        dtypes = {s: d for s, d in tensors[names[0]].states.items() if s != PARAM}
        return cls(at, group, flats, dtypes, sub, data[0] if data != mesh.leaves("dp") and len(data) == 1 else "dp")


Placements = Mapping[tuple[str, str], tuple[Placement, ...]]


def placements_of(
    tensors: Mapping[str, Tensor],
    flat_groups: Sequence[FlatGroup],
    outside: Mapping[tuple[str, str], tuple[int, ...]],
) -> dict[tuple[str, str], tuple[Placement, ...]]:
    """How every state lies: those of the flat groups in their buffers, those `outside` whole on the pp stages given."""
    places: dict[str, Mapping[Holder, tuple[FlatBuffer, int]]] = {}
    known: dict[str, list[FlatGroup]] = {}
    for group in flat_groups:
        shared = Buffers(group.flats)
        for i, name in enumerate(group.names):
            if name not in tensors:
                continue
            mine = InBuffers(shared, i)
            places[name] = {**places[name], **mine} if name in places else mine
            known.setdefault(name, []).append(group)
    found: dict[tuple[str, str], tuple[Placement, ...]] = {}
    states_of = {id(g): tuple(g.dtypes) for g in flat_groups}
    fixed = {id(g): g.at.without("pp") for g in flat_groups}
    for name, groups in known.items():
        tensor = tensors[name]
        for states in dict.fromkeys(states_of[id(g)] for g in groups):
            having = [g for g in groups if states_of[id(g)] == states]
            held = {g.at["pp"] for g in having}
            stages = tuple(s for s in tensor.stages if s in held)
            at = fixed[id(having[0])]
            one = (Placement(tensor.cut, stages, places[name], tensor.layout.replicas, at),)
            for state in states:
                found[name, state] = one
    alike: dict[tuple[int, tuple[int, ...], str], tuple[Placement]] = {}
    for (name, state), stages in outside.items():
        tensor = tensors[name]
        key = (id(tensor.cut), stages, tensor.layout.replicas)
        if key not in alike:
            alike[key] = (Placement(tensor.cut, stages, None, tensor.layout.replicas),)
        found[name, state] = alike[key]
    return found


ALONE = Holder(pp=0, tp=0)  # who holds everything, where whole tensors are stored, on a mesh of one rank


def whole_placements(tensors: Mapping[str, Tensor], states: Iterable[tuple[str, str]]) -> Placements:
    """How states lie that are stored as whole tensors: on the one rank of a mesh."""
    states = list(states)
    named = dict.fromkeys(name for name, _ in states)
    ones = {name: (Placement(tensors[name].cut, replicas=tensors[name].layout.replicas),) for name in named}
    return {(name, state): ones[name] for name, state in states}


@dataclass(frozen=True)
class Extents:
    """Which bytes hold the elements of every state; headers told it, no data was read.

    `pieces[name, state][holder]` are the fragments of a shard that lies outside flat buffers, in the order of its
    flattened elements. `partitions[group.key, state][holder]` is what each dp rank stored of a flat buffer.
    """

    pieces: Mapping[tuple[str, str], Mapping[Holder, tuple[Fragment, ...]]] = field(default_factory=dict)
    partitions: Mapping[tuple[tuple[Holder, int, int], str], Mapping[Holder, tuple[Stored, ...]]] = field(
        default_factory=dict
    )

    def __iter__(self) -> Iterator[Stored]:
        """Everything that is stored, flat partitions last."""
        for by_holder in self.pieces.values():
            for fragments in by_holder.values():
                yield from (fragment.stored for fragment in fragments)
        for by_rank in self.partitions.values():
            for partitions in by_rank.values():
                yield from partitions
