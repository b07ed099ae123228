"""Cuts: a layout resolved for one shape and mesh, as rows along each dim; and what two cuts share."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ckptlab.arguments import explained
from ckptlab.errors import LayoutError
from ckptlab.layout.rows import Rows, checked, intersect, intervals, owners, positions, runs
from ckptlab.mesh import Mesh
from ckptlab.shown import Shown

Coordinate = tuple[int, ...]
_ALONE = Mesh()  # of one rank


class Lean:
    """A dataclass that remembers what it works out: pickled, it is what it was made of alone."""

    def __getstate__(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(self)}  # type: ignore[arg-type]


@dataclass(frozen=True, eq=False)
class DimCut(Lean):
    """One dim of a cut.

    `rows[coordinate]`, the coordinate being on `axes` alone, are int64 of shape (n, 5): start in the whole,
    start in the shard, length, count, stride; the k-th of `count` repetitions lies at whole start + k *
    stride, shard start + k * length; a plain row has count 1 and stride 0. `size` and `widths` are the
    lengths of the dim in the (padded) whole and in each shard.
    """

    size: int
    axes: tuple[str, ...]
    rows: Mapping[Coordinate, Rows]
    widths: Mapping[Coordinate, int]

    @cached_property
    def _content(self) -> bytes:
        import hashlib  # OpenSSL's, which takes a while

        digest = hashlib.blake2b(repr((self.size, self.axes, sorted(self.widths.items()))).encode(), digest_size=16)
        for coordinate in sorted(self.rows):
            digest.update(self.rows[coordinate].tobytes())
            digest.update(b"|")
        return digest.digest()

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, DimCut) and self._content == other._content)

    def __hash__(self) -> int:
        return hash(self._content)

    def positions(self, coordinate: Coordinate) -> Rows:
        """(width,) int64: the index in the whole of each element of the shard."""
        return positions(self.rows[coordinate])

    @cached_property
    def owned(self) -> Mapping[Coordinate, Rows]:
        """Coordinate → runs (n, 6) of what no lexicographically lower coordinate also holds."""
        if sum(self.widths.values()) == self.size:  # every element is held, so each is held once
            return self.runs
        order = sorted(self.rows)
        return dict(zip(order, owners([self.rows[c] for c in order]), strict=True))

    @cached_property
    def runs(self) -> Mapping[Coordinate, Rows]:
        """`rows` with a sixth column, the stride in the shard."""
        return {coordinate: runs(rows) for coordinate, rows in self.rows.items()}


@explained
@dataclass(frozen=True)
class Cut(Lean, Shown):
    """What every coordinate of a mesh holds of one tensor.

    `logical` is the true shape; rows address the whole of shape `shape`, which is larger where a dim is
    padded, and cover it, padding included. Coordinates are tuples on `axes`, the mesh axes that cut a dim,
    in mesh order (an axis of degree 1 that the layout names is one of them). Equal by content, hashable,
    picklable; not to be written to.
    """

    logical: tuple[int, ...]
    mesh: Mesh
    dims: tuple[DimCut, ...]

    @classmethod
    def whole(cls, shape: Sequence[int], mesh: Mesh | None = None) -> Cut:
        """The cut of a tensor that every rank holds whole."""
        shape = tuple(int(n) for n in shape)
        return _whole(shape, _ALONE if mesh is None else mesh)

    @classmethod
    def from_rows(
        cls,
        shape: Sequence[int],
        mesh: Mesh,
        dims: Sequence[tuple[Sequence[str], Mapping[Coordinate, ArrayLike]]],
        logical: Sequence[int] | None = None,
    ) -> Cut:
        """A cut from explicit rows: for each dim its axes, and coordinate on them → rows of 3 or 5 columns.

        The axes of a dim stand in mesh order. Raises LayoutError where a coordinate is missing, rows leave
        the whole or overlap in it or in the shard, the shard has a gap, or an element of the whole is held
        by nobody.
        """
        shape = tuple(int(n) for n in shape)
        if len(dims) != len(shape):
            raise LayoutError(f"rows of {len(dims)} dims for shape {shape}")
        cut = tuple(
            _dim_from_rows(f"dim {i}", n, mesh, tuple(axes), held)
            for i, (n, (axes, held)) in enumerate(zip(shape, dims, strict=True))
        )
        used = [axis for dim in cut for axis in dim.axes]
        twice = [axis for axis in used if used.count(axis) > 1]
        if twice:
            raise LayoutError(f"mesh axis {twice[0]} cuts two dims; it may cut one")
        return cls(shape if logical is None else tuple(int(n) for n in logical), mesh, cut)

    def beneath(self, sizes: Sequence[int]) -> Cut:
        """The cut of many such tensors, stacked along dims of these sizes that stand before their own."""
        sizes = tuple(sizes)
        return Cut((*sizes, *self.logical), self.mesh, (*Cut.whole(sizes).dims, *self.dims))

    @cached_property
    def shape(self) -> tuple[int, ...]:
        """The whole that rows address: padded sizes."""
        return tuple(dim.size for dim in self.dims)

    @cached_property
    def axes(self) -> tuple[str, ...]:
        """The mesh axes that cut a dim, in mesh order."""
        used = {axis for dim in self.dims for axis in dim.axes}
        return tuple(axis for axis in self.mesh.axes if axis in used)

    @cached_property
    def repeats(self) -> bool:
        """Several coordinates hold a part of the whole: the k and v of `((tp q) + k + v)`."""
        return any(sum(dim.widths.values()) > dim.size for dim in self.dims)

    @property
    def is_whole(self) -> bool:
        """No mesh axis cuts a dim."""
        return not self.axes

    def coordinates(self) -> Iterator[Coordinate]:
        """Every coordinate on `axes`, in lexicographic order."""
        return itertools.product(*(range(self.mesh[axis]) for axis in self.axes))

    def coordinate(self, position: Mapping[str, int]) -> Coordinate:
        """The coordinate on `axes` out of a mesh coordinate (which may have more axes)."""
        try:
            return tuple(position[axis] for axis in self.axes)
        except KeyError:
            missing = ", ".join(axis for axis in self.axes if axis not in position)
            raise LayoutError(f"the cut is over {self.axes}: {dict(position)} has no {missing}") from None

    def shard_shape(self, coordinate: Coordinate) -> tuple[int, ...]:
        """Shape of the shard at a coordinate, padding included."""
        if coordinate not in self._shapes:
            places = zip(self.dims, self.per_dim(coordinate), strict=True)
            self._shapes[coordinate] = tuple(dim.widths[at] for dim, at in places)
        return self._shapes[coordinate]

    @cached_property
    def _shapes(self) -> dict[Coordinate, tuple[int, ...]]:
        """Shapes that were asked for: of many layers it is the same few."""
        return {}

    def rows(self, coordinate: Coordinate) -> tuple[Rows, ...]:
        """For each dim the rows (n, 5) that the coordinate holds (see DimCut)."""
        return tuple(dim.rows[at] for dim, at in zip(self.dims, self.per_dim(coordinate), strict=True))

    def per_dim(self, coordinate: Coordinate) -> tuple[Coordinate, ...]:
        """The coordinate taken apart: for each dim the part on the dim's own axes."""
        if len(coordinate) != len(self.axes):
            raise LayoutError(f"coordinate {coordinate} for a cut over {self.axes}")
        return tuple(tuple(coordinate[i] for i in places) for places in self._places)

    @cached_property
    def _places(self) -> tuple[tuple[int, ...], ...]:
        return tuple(tuple(self.axes.index(axis) for axis in dim.axes) for dim in self.dims)

    def take(self, whole: NDArray, coordinate: Coordinate) -> NDArray:
        """The shard at a coordinate, of an array of shape `shape`: the reference, element by element."""
        self._check_shape("the whole", whole.shape, self.shape)
        return np.array(whole[self.index(coordinate)])

    def put(self, shard: NDArray, coordinate: Coordinate, whole: NDArray) -> None:
        """Write a shard to its place in an array of shape `shape`: the reference, element by element."""
        self._check_shape("the whole", whole.shape, self.shape)
        self._check_shape(f"shard {coordinate}", shard.shape, self.shard_shape(coordinate))
        whole[self.index(coordinate)] = shard

    def index(self, coordinate: Coordinate) -> tuple[NDArray, ...]:
        """What indexes an array of shape `shape` for the elements that a coordinate holds, spelled out."""
        places = zip(self.dims, self.per_dim(coordinate), strict=True)
        return np.ix_(*(dim.positions(at) for dim, at in places))

    @staticmethod
    def _check_shape(what: str, found: tuple[int, ...], expected: tuple[int, ...]) -> None:
        if found != expected:
            raise LayoutError(f"{what} has shape {found}, expected {expected}")

    def __repr__(self) -> str:
        padded = f" padded to {self.shape}" if self.shape != self.logical else ""
        over = f"cut over {', '.join(self.axes)}" if self.axes else "whole"
        return f"<Cut of {self.logical}{padded}, {over}, {self.mesh!r}>"


def overlap(a: Cut, at_a: Coordinate, b: Cut, at_b: Coordinate, *, owned: bool = True) -> tuple[Rows, ...]:
    """What shard `at_a` of `a` and shard `at_b` of `b` both hold of the whole.

    For each dim int64 (n, 6): start in a's shard, start in b's shard, length, count, stride in a's shard,
    stride in b's; sorted by the first; a plain row has count 1 and strides 0. The boxes are the product
    over dims. Padded sizes may differ: what only one whole has is left out. With `owned`, so is what a
    lower coordinate of `a` also holds (per dim, lexicographic on its axes): over all coordinates of `a`,
    each element of b's shard is then given once. Cached.
    """
    check_same_tensor(a, b)
    return tuple(
        dim_overlap(dim_a, part_a, dim_b, part_b, owned)
        for dim_a, part_a, dim_b, part_b in zip(a.dims, a.per_dim(at_a), b.dims, b.per_dim(at_b), strict=True)
    )


def check_same_tensor(a: Cut, b: Cut) -> None:
    """Raises LayoutError unless two cuts have the same true shape."""
    if a.logical != b.logical:
        raise LayoutError(f"the cuts are of different tensors: shapes {a.logical} and {b.logical}")


@lru_cache(maxsize=1 << 16)
def dim_overlap(a: DimCut, at_a: Coordinate, b: DimCut, at_b: Coordinate, owned: bool) -> Rows:
    """`overlap` along one dim; coordinates on the dims' own axes."""
    return intersect((a.owned if owned else a.runs)[at_a], b.runs[at_b])


@lru_cache(maxsize=4096)
def _whole(shape: tuple[int, ...], mesh: Mesh) -> Cut:
    return Cut(shape, mesh, tuple(DimCut(n, (), {(): checked([[0, 0, n]])}, {(): n}) for n in shape))


def _dim_from_rows(
    what: str, size: int, mesh: Mesh, axes: tuple[str, ...], held: Mapping[Coordinate, ArrayLike]
) -> DimCut:
    if axes != tuple(axis for axis in mesh.axes if axis in axes):
        raise LayoutError(f"{what} is cut over {axes}, expected axes of {mesh!r} in mesh order")
    expected = set(itertools.product(*(range(mesh[axis]) for axis in axes)))
    if expected != set(held):
        raise LayoutError(f"{what}: rows for {len(held)} coordinates, expected exactly the {len(expected)} on {axes}")
    rows, widths = {}, {}
    for at in sorted(held):
        try:
            rows[at] = checked(held[at])
        except ValueError as error:
            raise LayoutError(f"{what} at {at}: {error}") from None
        spelled = intervals(runs(rows[at]))
        widths[at] = int(spelled[:, 2].sum())
        _check_disjoint(f"{what} at {at}, in the whole", spelled[:, [0, 2]], size)
        _check_disjoint(f"{what} at {at}, in the shard", spelled[:, [1, 2]], widths[at])
    covered = sum(int(mine[:, 2].sum()) for mine in owners(list(rows.values())))
    if covered != size:
        raise LayoutError(f"{what}: {size - covered} of {size} elements are held by no coordinate")
    return DimCut(size, axes, rows, widths)


def _check_disjoint(what: str, spans: Rows, size: int) -> None:
    spans = spans[np.argsort(spans[:, 0])]
    ends = spans.sum(axis=1)
    if len(spans) and (spans[0, 0] < 0 or ends[-1] > size):
        raise LayoutError(f"{what}: rows reach from {spans[0, 0]} to {ends[-1]}, expected 0 to {size}")
    if (spans[1:, 0] < ends[:-1]).any():
        raise LayoutError(f"{what}: rows overlap")
