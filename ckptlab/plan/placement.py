"""Where one tensor lies on one mesh: who has which shard, and which flat buffers the shards lie in."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache

import numpy as np

from ckptlab.aliases import Int64
from ckptlab.arguments import constructed
from ckptlab.errors import LayoutError, MeshError
from ckptlab.layout.cut import Coordinate, Cut, Lean
from ckptlab.mesh import Mesh
from ckptlab.plan.flat import FlatBuffer


class Holder(Mapping[str, int]):
    """Who has a shard: its coordinates on mesh axes, `Holder(pp=1, tp=0)`. What is not named does not matter.

    A mapping of axis to coordinate that never changes; equal to every holder of the same coordinates, and hashable.
    """

    __slots__ = ("_at", "_hash")

    def __init__(self, **at: int) -> None:
        self._at = at
        self._hash = hash(frozenset(at.items()))

    def __getitem__(self, axis: str) -> int:
        return self._at[axis]

    def __iter__(self) -> Iterator[str]:
        return iter(self._at)

    def __len__(self) -> int:
        return len(self._at)

    def __contains__(self, axis: object) -> bool:
        return axis in self._at

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return self._at == other._at if isinstance(other, Holder) else NotImplemented

    def within(self, other: Mapping[str, int]) -> bool:
        """Whether `other` has all of these coordinates."""
        return all(other.get(axis) == k for axis, k in self._at.items())

    def with_(self, **at: int) -> Holder:
        """The same with further or other coordinates."""
        return Holder(**{**self._at, **at})

    def without(self, *axes: str) -> Holder:
        """The same, whatever its coordinates on these axes."""
        return Holder(**{axis: k for axis, k in self._at.items() if axis not in axes})

    def __reduce__(self) -> tuple[Callable[..., Holder], tuple[dict[str, int]]]:
        return _holder, (self._at,)

    def __repr__(self) -> str:
        return f"Holder({', '.join(f'{axis}={k}' for axis, k in self._at.items())})"

    def __str__(self) -> str:
        return " · ".join(f"{axis} {k}" for axis, k in self._at.items())


def _holder(at: dict[str, int]) -> Holder:
    return Holder(**at)


@dataclass(eq=False)
class Buffers:
    """The flat buffers of one group by holder, which the tensors in it share."""

    flats: Mapping[Holder, FlatBuffer]
    _slots: dict[tuple[int, int], tuple[tuple[int, ...] | None, list[FlatBuffer]]] = field(default_factory=dict)

    def __reduce__(self) -> tuple[type[Buffers], tuple[Mapping[Holder, FlatBuffer]]]:
        return Buffers, (self.flats,)

    def slots(self, grid: _Grid, stage: int) -> tuple[tuple[int, ...] | None, list[FlatBuffer]]:
        """For each holder of a stage which of the different buffers is its own, and those; None where one has none."""
        key = (id(grid), stage)
        if key not in self._slots:
            held = [self.flats.get(holder) for holder in grid.holders(stage)]
            different = {id(flat): flat for flat in held if flat is not None and flat.dp == grid.table.shape[2]}
            numbers = {name: k for k, name in enumerate(different)}
            whole = all(id(flat) in numbers for flat in held)
            self._slots[key] = (tuple(numbers[id(flat)] for flat in held) if whole else None, list(different.values()))
        return self._slots[key]


@dataclass(frozen=True, eq=False)
class InBuffers(Mapping[Holder, tuple[FlatBuffer, int]]):
    """Where the shards of one tensor lie: in its group's buffers, at one index."""

    group: Buffers
    index: int

    def __getitem__(self, holder: Holder) -> tuple[FlatBuffer, int]:
        return self.group.flats[holder], self.index

    def __iter__(self) -> Iterator[Holder]:
        return iter(self.group.flats)

    def __len__(self) -> int:
        return len(self.group.flats)


def _cut_of(flat: FlatBuffer, index: int) -> tuple[int, int, int]:
    """A row of `FlatBuffer.cuts`."""
    count, start, part = flat.cuts[index].tolist()
    return count, start, part


@constructed
@dataclass(frozen=True, eq=False)
class Placement(Lean):
    """Where one tensor (one of its states) lies on one mesh.

    `stages` are the pp stages that hold it, the first canonical. A stage's *holders* are the coordinates on all axes
    but pp and those of dp: on a mesh of pp, dp and tp a holder is a pp and a tp coordinate. `flats[holder]` is the flat
    buffer that its shard lies in, and its index there. Without flats (None or empty) a shard is not cut over dp: each
    dp rank has it; dp rank 0 is read, and writes.

    Where the cut is over dp itself, or over a part of it (dp split into `edp` and `ep`), that counts among the holders'
    axes, and flat buffers are cut over the rest. `at` fixes coordinates instead: a tensor that only ep rank 1 has says
    {"ep": 1}. `replicas`: see Layout; with "mean" every holder is read. LayoutError where cut, stages and flats do not
    fit.

    The mesh is that of the cut, and may be another than that of the tensor beside: the same ranks, numbered alike, as
    the coordinates of other axes. Experts that are dealt to ranks of dp and tp together lie on ep and edp of both.
    """

    cut: Cut
    stages: tuple[int, ...] = (0,)
    flats: Mapping[Holder, tuple[FlatBuffer, int]] | None = None
    replicas: str = "equal"
    at: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        at, cut = self.at, self.cut
        if "pp" in cut.axes or (at and any(axis in at for axis in cut.axes)):
            raise LayoutError(
                f"{self.cut!r} is cut over an axis on which it is fixed: pp {self.stages}, {dict(self.at)}"
            )
        if not self.stages or min(self.stages) < 0 or max(self.stages) >= cut.mesh.pp:
            raise LayoutError(f"stages {self.stages} are not all among the stages of pp({cut.mesh.pp})")

    @property
    def mesh(self) -> Mesh:
        return self.cut.mesh

    @cached_property
    def _grid(self) -> _Grid:
        return _grid(self.cut.mesh, self.cut.axes, tuple(sorted(self.at.items())) if self.at else ())

    @property
    def axes(self) -> tuple[str, ...]:
        """The axes on which a stage's holders differ, in mesh order: the leading dims of a view of shards."""
        return self._grid.axes

    @property
    def data(self) -> tuple[str, ...]:
        """The axes over which a holder's ranks have copies, or fragments, of its shard: dp, or what is left of it."""
        return self._grid.data

    @property
    def holders(self) -> tuple[Holder, ...]:
        """Everybody who has a shard: stage by stage, the canonical one first, in each in the order of `axes`."""
        return tuple(holder for stage in self.stages for holder in self.on(stage))

    def on(self, stage: int) -> tuple[Holder, ...]:
        """The holders of one stage."""
        return self._grid.holders(stage)

    def holder(self, rank: int) -> Holder | None:
        """Who has the shard of a rank; None where that rank has none."""
        at, stage = self.mesh.coordinate(rank), 0
        for axis in self.mesh.leaves("pp"):
            stage = stage * self.mesh[axis] + at[axis]
        if stage not in self.stages or any(at[axis] != k for axis, k in self.at.items()):
            return None
        return self.on(stage)[self._grid.place(at)]

    def coordinate(self, holder: Mapping[str, int]) -> Coordinate:
        """The cut's coordinate that a holder has."""
        return self.cut.coordinate(holder)

    def shape(self, holder: Mapping[str, int]) -> tuple[int, ...]:
        """Shape of a holder's shard, padding included."""
        return self.cut.shard_shape(self.cut.coordinate(holder))

    def ranks(self, holder: Mapping[str, int]) -> Int64:
        """The ranks that have a holder's shard together, or a copy each: in dp order."""
        return self._grid.ranks(holder)

    @cached_property
    def numel(self) -> int:
        """Elements that all holders have together, the padding of flat buffers included."""
        if self.flats:
            return sum(flat.total for flat, _ in self.flats.values())
        return len(self.stages) * _numel(self.cut, self._grid)

    def kind(self, first: bool = False) -> tuple[Hashable, ...]:
        """What two placements of one cut have in common that differ in nothing but their stages and their places in
        flat buffers.

        first: on the canonical stage alone.
        """
        number = 1 if first else len(self.stages)
        at = tuple(sorted(self.at.items())) if self.at else ()
        return at, self.replicas, number, bool(self.flats), self.slots(first)

    def slots(self, first: bool = False) -> tuple[int, ...]:
        """For each holder, stage by stage, which of the tensor's flat buffers its shard lies in (see `buffers`), or,
        where there are none, which of the different lengths it has."""
        return self._slots[0][: len(self._slots[0]) // (len(self.stages) if first else 1)]

    def buffers(self) -> list[tuple[int, int, int]]:
        """Of each different place in a flat buffer (elements there, start on the line, elements a rank has of it)."""
        return self._slots[1]

    @property
    def shared(self) -> tuple[tuple[int, ...], list[FlatBuffer]] | None:
        """What all tensors of its group that lie as this one does have in common: for each holder which of the flat
        buffers is its own, and those. None where it does not lie, on one stage, in the buffers of a group."""
        if not isinstance(self.flats, InBuffers) or len(self.stages) > 1:
            return None
        slots, flats = self.flats.group.slots(self._grid, self.stages[0])
        return None if slots is None else (slots, flats)

    @property
    def table(self) -> Int64:
        """The ranks [stage, holder, data rank], the pp stages and a stage's holders in their order."""
        return self._grid.table

    @cached_property
    def _slots(self) -> tuple[tuple[int, ...], list[tuple[int, int, int]]]:
        """LayoutError where a holder has no flat buffer, or one for another number of ranks."""
        if not self.flats:
            return _lengths(self.cut, self._grid) * len(self.stages), []
        if isinstance(self.flats, InBuffers) and (shared := self.shared) is not None:
            slots, flats = shared
            return slots, [_cut_of(flat, self.flats.index) for flat in flats]
        found: dict[tuple[int, int], int] = {}
        order, buffers = [], []
        for stage in self.stages:
            for holder in self.on(stage):
                held = self.flats.get(holder)
                if held is None or held[0].dp != self._grid.table.shape[2]:
                    self.shard(holder)  # says what is wrong
                    raise AssertionError(holder)
                key = (id(held[0]), held[1])
                if key not in found:
                    found[key] = len(found)
                    buffers.append(_cut_of(*held))
                order.append(found[key])
        return tuple(order), buffers

    def shards(self, stages: tuple[int, ...]) -> dict[Coordinate, list[Shard]]:
        """The cut's coordinate → the shards of all holders that have it, on the given stages in turn."""
        found: dict[Coordinate, list[Shard]] = {}
        for stage in stages:
            for holder in self.on(stage):
                found.setdefault(self.coordinate(holder), []).append(self.shard(holder))
        return found

    def shard(self, holder: Holder) -> Shard:
        """What dp makes of a holder's shard. LayoutError where it does not lie in its flat buffer."""
        ranks, shape = self.ranks(holder), self.shape(holder)
        count = math.prod(shape)
        if not self.flats:
            return Shard(ranks, np.array([0, count] if count else [0], np.int64), 0)
        if holder not in self.flats:
            raise LayoutError(f"no flat buffer is given for {holder} of {self.mesh!r}")
        flat, index = self.flats[holder]
        if flat.counts[index] != count:
            where = f"{holder} of {self.mesh!r}"
            raise LayoutError(f"{flat.counts[index]} elements in the flat buffer of {where}, {count} in shard {shape}")
        if flat.dp != len(ranks):
            where = f"{holder} of {self.mesh!r}"
            raise LayoutError(f"a flat buffer for dp({flat.dp}) at {where}, where {len(ranks)} ranks share a shard")
        edges, first = flat.edges(index)
        return Shard(ranks, edges, first)


@dataclass(frozen=True, eq=False)
class Shard:
    """What dp makes of one shard: fragment j lies on edges[j] … edges[j+1] of it, at ranks[first + j]."""

    ranks: Int64
    edges: Int64
    first: int


class _Grid:
    """The holders of a mesh for cuts over the same axes, and the ranks [stage, holder, dp] behind them."""

    def __init__(self, mesh: Mesh, cut: tuple[str, ...], fixed: dict[str, int]) -> None:
        try:
            self.data = tuple(axis for axis in mesh.leaves("dp") if axis not in cut and axis not in fixed)
            stages = mesh.leaves("pp")
            self.axes = tuple(axis for axis in mesh.axes if axis not in (*stages, *self.data, *fixed))
            ranks = np.arange(mesh.size, dtype=np.int64).reshape(mesh.shape)
            ranks = ranks[tuple(fixed.get(axis, slice(None)) for axis in mesh.axes)]
            unknown = [axis for axis in fixed if axis not in mesh.axes]
            if unknown:
                raise MeshError(f"there is no axis {unknown[0]!r}")
        except (IndexError, MeshError) as error:
            raise LayoutError(f"the placement at {fixed} does not exist on {mesh!r}: {error}") from None
        left = [axis for axis in mesh.axes if axis not in fixed]
        ranks = ranks.transpose([left.index(axis) for axis in (*stages, *self.axes, *self.data)])
        self._degrees = tuple(mesh[axis] for axis in self.axes)
        self.table = ranks.reshape(mesh.pp, math.prod(self._degrees), math.prod(mesh[axis] for axis in self.data))
        self._fixed = fixed
        self._holders: dict[int, tuple[Holder, ...]] = {}

    def holders(self, stage: int) -> tuple[Holder, ...]:
        if stage not in self._holders:
            places = (dict(zip(self.axes, k, strict=True)) for k in np.ndindex(*self._degrees))
            self._holders[stage] = tuple(Holder(pp=stage, **self._fixed, **place) for place in places)
        return self._holders[stage]

    def ranks(self, holder: Mapping[str, int]) -> Int64:
        return self.table[holder["pp"], self.place(holder)]

    def place(self, at: Mapping[str, int]) -> int:
        """Which of a stage's holders is at a coordinate."""
        place = 0
        for axis, degree in zip(self.axes, self._degrees, strict=True):
            place = place * degree + at[axis]
        return place


@lru_cache(maxsize=4096)
def _numel(cut: Cut, grid: _Grid) -> int:
    """Elements that the holders of one stage have together."""
    return sum(math.prod(cut.shard_shape(cut.coordinate(holder))) for holder in grid.holders(0))


@lru_cache(maxsize=4096)
def _lengths(cut: Cut, grid: _Grid) -> tuple[int, ...]:
    """For each holder of a stage which of the different lengths of shards, in the order in which they come, is its
    own."""
    holders = grid.holders(0)
    if all(len({*dim.widths.values()}) <= 1 for dim in cut.dims):
        return (0,) * len(holders)
    found: dict[int, int] = {}
    return tuple(found.setdefault(math.prod(cut.shard_shape(cut.coordinate(h))), len(found)) for h in holders)


@lru_cache(maxsize=1024)
def _grid(mesh: Mesh, cut: tuple[str, ...], at: tuple[tuple[str, int], ...]) -> _Grid:
    return _Grid(mesh, cut, dict(at))
