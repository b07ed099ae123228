"""Meshes of ranks: named axes with degrees, sub-axes, rank ↔ coordinate, process groups."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from ckptlab.arguments import explained, kind_of, whole_number
from ckptlab.errors import InputError, MeshError
from ckptlab.shown import Shown
from ckptlab.words import number_of, place_text

STANDARD = ("pp", "dp", "tp")
"""The axes that every mesh has, slowest first: DeepSpeed's rank is (pp * DP + dp) * TP + tp."""
_KNOWN = (*STANDARD, "ep", "cp")


@explained
@dataclass(frozen=True, init=False, repr=False)
class Mesh(Shown, Mapping[str, int]):
    """Named mesh axes with degrees; a rank is one coordinate, the last axis running fastest.

    `Mesh(pp=2, dp=4, tp=2)`: an axis that is not given has degree 1; axes other than pp, dp and tp come
    before them, in the order given. A Mapping of axis → degree: `mesh["tp"]`, `dict(mesh)`; an axis that was
    split answers with the product of its parts, in this and in all methods. Raises MeshError.
    """

    _degrees: tuple[tuple[str, int], ...]
    _parts: tuple[tuple[str, tuple[str, ...]], ...]

    def __init__(self, *unnamed: int, **degrees: int) -> None:
        if unnamed:
            raise MeshError(
                f"Mesh({', '.join(map(repr, unnamed))}) does not say whose degrees: name the axes, Mesh(tp=4)"
            )
        _meant(degrees)
        order = [axis for axis in degrees if axis not in STANDARD] + list(STANDARD)
        object.__setattr__(self, "_degrees", tuple((a, _degree(a, degrees.get(a, 1))) for a in order))
        object.__setattr__(self, "_parts", ())

    @classmethod
    def from_device_mesh(cls, devices: Any) -> Mesh:
        """The axes and degrees of a torch `DeviceMesh` or a `jax.sharding.Mesh`; ranks are numbered in our order.

        The other way is a line of theirs: `init_device_mesh("cuda", mesh.shape, mesh_dim_names=mesh.axes)`,
        `jax.make_mesh(mesh.shape, mesh.axes)`. MeshError where its axes have no names.
        """
        names = getattr(devices, "axis_names", None) or getattr(devices, "mesh_dim_names", None)
        if not names:
            raise MeshError(
                f"{kind_of(devices)} has no names of axes: give a Mesh(tp=2, dp=2), a jax.sharding.Mesh, or a "
                'DeviceMesh made with init_device_mesh(…, mesh_dim_names=("dp", "tp"))'
            )
        shape = devices.shape.values() if isinstance(devices.shape, Mapping) else devices.shape
        return cls(**dict(zip(names, shape, strict=True)))

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        return hash((self._degrees, self._parts))

    def __getstate__(self) -> dict[str, Any]:
        """What it was made of: hashes of text differ from one process to the next."""
        return {"_degrees": self._degrees, "_parts": self._parts}

    @cached_property
    def axes(self) -> tuple[str, ...]:
        """Names of the axes, slowest first; of an axis that was split, its parts."""
        return tuple(axis for axis, _ in self._degrees)

    @property
    def degrees(self) -> dict[str, int]:
        """Axis → degree, slowest first."""
        return dict(self._degrees)

    @cached_property
    def _known(self) -> dict[str, int]:
        """Every axis, those that were split too, and its degree: asked for very often."""
        whole = {axis: math.prod(self.degrees[leaf] for leaf in self.leaves(axis)) for axis, _ in self._parts}
        return {**self.degrees, **whole}

    @cached_property
    def shape(self) -> tuple[int, ...]:
        """The degrees alone, slowest first."""
        return tuple(degree for _, degree in self._degrees)

    @cached_property
    def size(self) -> int:
        """Number of ranks."""
        return math.prod(self.shape)

    @property
    def pp(self) -> int:
        """Pipeline-parallel degree."""
        return self._known["pp"]

    @property
    def dp(self) -> int:
        """Data-parallel degree."""
        return self._known["dp"]

    @property
    def tp(self) -> int:
        """Tensor-parallel degree."""
        return self._known["tp"]

    def __getitem__(self, axis: str) -> int:
        if axis not in self._known:
            self.leaves(axis)  # an error that says which there are
        return self._known[axis]

    def __contains__(self, axis: object) -> bool:
        return isinstance(axis, str) and axis in self._known

    def __iter__(self) -> Iterator[str]:
        return iter(self.axes)

    def __len__(self) -> int:
        return len(self._degrees)

    def get(self, axis: str, default: Any = None) -> Any:
        """The degree, or the default where there is no such axis."""
        try:
            return self[axis]
        except MeshError:
            return default

    def leaves(self, axis: str) -> tuple[str, ...]:
        """The axis itself, or all parts of an axis that was split, slowest first."""
        if axis in self.axes:
            return (axis,)
        parts = dict(self._parts)
        if axis not in parts:
            known = ", ".join([*self.axes, *parts])
            raise MeshError(f"this mesh has no axis {axis!r}; its axes are {known}")
        return tuple(leaf for part in parts[axis] for leaf in self.leaves(part))

    def rank(self, **coordinate: int) -> int:
        """The rank at a coordinate; axes of degree 1 may be left out, a split axis may be given as one."""
        place = self._leaf_coordinate(coordinate)
        missing = [f"{axis}({n})" for axis, n in self._degrees if axis not in place and n > 1]
        if missing:
            raise MeshError(f"a rank of {self!r} needs a coordinate on {', '.join(missing)}")
        found = 0
        for axis, degree in self._degrees:
            found = found * degree + place.get(axis, 0)
        return found

    def coordinate(self, rank: int) -> dict[str, int]:
        """Axis → coordinate of a rank, on `axes`."""
        if not 0 <= rank < self.size:
            raise MeshError(f"rank {rank} is not on {self!r}, which has {self.size} ranks")
        left, place = operator.index(rank), dict.fromkeys(self.axes, 0)
        for axis, degree in reversed(self._degrees):
            left, place[axis] = divmod(left, degree)
        return place

    def index(self, axis: str, coordinate: dict[str, int]) -> int:
        """The coordinate on one axis, taken out of a full one; on a split axis, its parts run together."""
        place = 0
        for leaf in self.leaves(axis):
            if leaf not in coordinate:
                raise MeshError(f"the coordinate {coordinate!r} does not say where on {leaf}")
            place = place * self.degrees[leaf] + coordinate[leaf]
        return place

    def ranks(self, **fixed: int) -> list[int]:
        """All ranks at the given coordinates, ascending: `mesh.ranks(pp=0, tp=1)`."""
        grid = np.arange(self.size).reshape(self.shape)
        found: list[int] = grid[self.where(**fixed)].ravel().tolist()
        return found

    def where(self, **fixed: int) -> tuple[int | slice, ...]:
        """What indexes an array with one entry a rank, of shape `shape`, for the ranks at the given coordinates."""
        place = self._leaf_coordinate(fixed)
        return tuple(place.get(axis, slice(None)) for axis in self.axes)

    def groups(self, *axes: str) -> list[list[int]]:
        """Process groups along one axis (or several together): the ranks that differ in nothing else."""
        along = [leaf for axis in axes for leaf in self.leaves(axis)]
        order = [a for a in self.axes if a not in along] + along
        grid = np.arange(self.size).reshape(self.shape).transpose([self.axes.index(a) for a in order])
        return [[int(r) for r in row] for row in grid.reshape(-1, math.prod(self[a] for a in along))]

    def split(self, axis: str, **parts: int) -> Mesh:
        """The same ranks with one axis as sub-axes, the first part slowest: `split("dp", edp=2, ep=2)`."""
        if axis not in self.degrees:
            raise MeshError(f"cannot split {axis!r}: the axes of {self!r} are {', '.join(self.axes)}")
        sizes = {part: _degree(part, n) for part, n in parts.items()}
        taken = [part for part in sizes if part in self]
        if taken:
            raise MeshError(f"cannot split {axis} into {', '.join(sizes)}: the mesh already has {taken[0]!r}")
        if not sizes or math.prod(sizes.values()) != self[axis]:
            raise MeshError(f"cannot split {axis}: {_equation(sizes) or '1'} != {axis}({self[axis]})")
        at = self.axes.index(axis)
        degrees = (*self._degrees[:at], *sizes.items(), *self._degrees[at + 1 :])
        return _mesh(degrees, (*self._parts, (axis, tuple(sizes))))

    def joined(self) -> Mesh:
        """The same ranks with every axis that was split as one again."""
        parts = {part for _, found in self._parts for part in found}
        whole = [axis for axis, _ in self._parts if axis not in parts]
        return Mesh(**{axis: self[axis] for axis in (*(a for a in self.axes if a not in parts), *whole)})

    def replace(self, **degrees: int) -> Mesh:
        """The mesh with other degrees; an axis that it lacks is added, slowest."""
        for axis in degrees:
            if axis in dict(self._parts):
                parts = _equation({leaf: self.degrees[leaf] for leaf in self.leaves(axis)})
                raise MeshError(f"{axis}({self[axis]}) is split into {parts}: replace those")
        _meant({axis: n for axis, n in degrees.items() if axis not in self})
        added = tuple((a, _degree(a, n)) for a, n in degrees.items() if a not in self)
        kept = tuple((a, _degree(a, degrees.get(a, n))) for a, n in self._degrees)
        return _mesh((*added, *kept), self._parts)

    def directions(self) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
        """How a picture of the block runs: the axes from grid to grid, down a grid (dp), across it (tp)."""
        down, across = self.leaves("dp"), self.leaves("tp")
        return tuple(axis for axis in self.axes if axis not in (*down, *across)), down, across

    def _leaf_coordinate(self, coordinate: dict[str, int]) -> dict[str, int]:
        place: dict[str, int] = {}
        for axis, k in coordinate.items():
            if not 0 <= whole_number(k) < self[axis]:
                raise MeshError(f"{axis} {k} is outside {axis}({self[axis]}) of {self!r}")
            leaves = self.leaves(axis)
            if leaves == (axis,):
                found: Any = (operator.index(k),)
            else:
                found = np.unravel_index(k, [self.degrees[leaf] for leaf in leaves])
            twice = [leaf for leaf in leaves if leaf in place]
            if twice:
                raise MeshError(f"{twice[0]} is given twice, by itself and as a part of a split axis")
            place.update((leaf, int(j)) for leaf, j in zip(leaves, found, strict=True))
        return place

    def __repr__(self) -> str:
        whole = [part for part, _ in self._parts]
        made = {leaf for _, parts in self._parts for leaf in parts}
        order = [axis for axis in self.axes if axis not in made]
        order = [axis for axis in order if axis not in STANDARD]
        order += [axis for axis in whole if axis not in made and axis not in STANDARD] + list(STANDARD)
        text = f"Mesh({', '.join(f'{axis}={self[axis]}' for axis in order)})"
        for axis, parts in self._parts:
            text += f".split({axis!r}, {', '.join(f'{part}={self[part]}' for part in parts)})"
        return text

    def title(self) -> str:
        """`tp 2 · pp 2 · dp 2 (8 ranks)`."""
        return f"{self} ({number_of(self.size, 'rank')})"

    def place(self, rank: int) -> str:
        """`tp 1 · pp 1 · dp 0`: where a rank stands, its axes in the order of `str(mesh)`."""
        coordinate = self.coordinate(rank)
        return place_text({axis: self.index(axis, coordinate) for axis in spoken((*STANDARD, *self.axes))})

    def __str__(self) -> str:
        return place_text({axis: self[axis] for axis in spoken((*STANDARD, *self.axes))})


def spoken(axes: Iterable[str]) -> tuple[str, ...]:
    """Axes in the order in which people name them: tp, pp, dp, then the others as they are given."""
    given = tuple(dict.fromkeys(axes))
    return (*(axis for axis in ("tp", "pp", "dp") if axis in given), *(a for a in given if a not in STANDARD))


def _mesh(degrees: tuple[tuple[str, int], ...], parts: tuple[tuple[str, tuple[str, ...]], ...]) -> Mesh:
    mesh = Mesh.__new__(Mesh)
    object.__setattr__(mesh, "_degrees", degrees)
    object.__setattr__(mesh, "_parts", parts)
    return mesh


def _degree(axis: str, degree: int) -> int:
    try:
        value = whole_number(degree)
    except InputError:
        value = 0
    if value < 1:
        raise MeshError(f"the degree of mesh axis {axis} must be an integer from 1, not {degree!r}")
    return value


def _meant(degrees: Mapping[str, int]) -> None:
    """MeshError for an axis that is a known one, spelled otherwise."""
    for axis, degree in degrees.items():
        meant = next((a for a in _KNOWN if axis not in _KNOWN and a in (axis.lower(), axis[::-1])), None)
        if meant:
            raise MeshError(f"Mesh has no axis {axis!r}: name the axes as notation does, Mesh({meant}={degree})")


def _equation(degrees: dict[str, int]) -> str:
    """`dp(3) * tp(2)`: how a failed check spells its numbers."""
    return " * ".join(f"{axis}({degree})" for axis, degree in degrees.items())
