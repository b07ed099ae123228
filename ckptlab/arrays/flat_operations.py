"""In and out of ZeRO's flat buffers, as operations on labelled arrays in memory, alike on every backend.

`axes` are the mesh axes on which the holders of a group's buffers differ (`tp`, and `ep` where experts are cut over
it), `over` the one that cuts the buffers: `dp`, or `edp` of experts.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr

from ckptlab.arguments import explained
from ckptlab.arrays.backends import of
from ckptlab.arrays.coordinates import ranks
from ckptlab.arrays.duck import duck
from ckptlab.arrays.moves import Shapes, flat_merge, flat_split
from ckptlab.arrays.operations import extents, raw
from ckptlab.catalog import FlatGroup, Tensor
from ckptlab.errors import LayoutError
from ckptlab.plan import FlatBuffer, Holder


@explained
def merge_flat(
    buffers: xr.DataArray, flat: FlatGroup | FlatBuffer, tensors: Mapping[str, Tensor] | None = None
) -> dict[str, xr.DataArray]:
    """The shards that lie in flat buffers: dims ([axes,] over, flat) → name → ([axes,] *tensor dims).

    flat: where they lie: a checkpoint's group (with its `tensors`, by name), or one FlatBuffer, cut over dp, for a
    buffer without axes. Without tensors shards stay flat: dims ([axes,] element). LayoutError where buffers and flat do
    not fit; an axis of degree 1 may be missing.
    """
    grid, place = _Grid.of(flat, buffers.dims), of(buffers.data)
    longest = max(f.size(0) for f in grid.flats)
    dims = (*grid.axes, grid.over, "flat")
    sizes = tuple(buffers.sizes.get(dim, 1) for dim in dims)
    if sizes[:-1] != (*grid.degrees, grid.flats[0].dp) or sizes[-1] < longest:
        raise LayoutError(
            f"buffers of ({', '.join(dims)}) {sizes}: the flat buffers they are said to be have "
            f"{(*grid.degrees, grid.flats[0].dp, longest)}"
        )
    source = raw(buffers.transpose(*grid.shown, grid.over, "flat"), place)
    found = {}
    for i, name in enumerate(grid.flats[0].names):
        tensor = None if tensors is None else tensors[name]
        shapes = grid.flat_shapes(i) if tensor is None else grid.shapes(tensor)
        even = len(set(shapes)) == 1  # then shards are flat until they are all there: a box for each fragment
        held = grid.flat_shapes(i) if even else shapes
        moved = place.move(flat_merge(grid.flats, grid.shown_degrees, i, sizes[-1], held), [source])
        moved = duck(moved.reshape((*grid.shown_degrees, *shapes[0])) if even else moved, place)
        one = xr.DataArray(moved, dims=(*grid.shown, *(tensor.dims if tensor else ("element",))), name=name)
        if tensor is not None:
            places = ranks(dict(zip(grid.shown, grid.shown_degrees, strict=True)))
            one = one.assign_coords({**places, **extents(tensor.cut, tensor.layout)})
        found[name] = one
    return found


@explained
def split_flat(shards: Mapping[str, xr.DataArray], flat: FlatGroup | FlatBuffer, *, out: Any = None) -> xr.DataArray:
    """Flat buffers out of shards: name → ([axes,] *tensor dims) → dims ([axes,] over, flat). Padding is 0.

    flat: where they are to lie. LayoutError if a shard is missing or of another size.
    """
    grid = _Grid.of(flat, next((array.dims for array in shards.values()), ()))
    names = grid.flats[0].names
    missing = [n for n in names if n not in shards]
    if missing or not names:
        raise LayoutError(f"the flat buffer holds {len(names)} tensors; missing: {', '.join(missing[:3]) or 'all'}")
    place = of(shards[names[0]].data)
    sources, shapes = [], []
    for i, name in enumerate(names):
        array = shards[name]
        dims = [d for d in array.dims if d not in grid.axes]
        degrees = tuple(array.sizes.get(axis, 1) for axis in grid.axes)
        own = _shapes(array, dims, grid.axes, degrees)
        counts = [f.counts[i] for f in grid.flats]
        if degrees != grid.degrees or [math.prod(s) for s in own] != counts:
            raise LayoutError(f"{name}: shards of {', '.join(map(str, own))}, the flat buffers have room for {counts}")
        source = raw(array.transpose(*grid.shown, *dims), place)
        even = len(set(own)) == 1
        sources.append(source.reshape((*grid.shown_degrees, counts[0])) if even else source)
        shapes.append(grid.flat_shapes(i) if even else own)
    target = None if out is None else raw(out, place)
    moved = duck(place.move(flat_split(grid.flats, grid.shown_degrees, tuple(shapes)), sources, target), place)
    return xr.DataArray(moved, dims=(*grid.shown, grid.over, "flat"))


@dataclass(frozen=True)
class _Grid:
    """Flat buffers, one for each place of a grid of holders whose dims are `axes`; of these an array has those `shown`
    (the others are of degree 1)."""

    holders: tuple[Holder, ...]
    flats: tuple[FlatBuffer, ...]
    axes: tuple[str, ...]
    over: str
    shown: tuple[str, ...]

    @classmethod
    def of(cls, flat: FlatGroup | FlatBuffer, dims: Iterable[Hashable]) -> _Grid:
        if isinstance(flat, FlatBuffer):
            alone = Holder(tp=0)
            return cls((alone,), (flat,), ("tp",), "dp", tuple(axis for axis in ("tp",) if axis in dims))
        shown = tuple(axis for axis in flat.axes if axis in dims)
        return cls(flat.holders, tuple(flat.flats.values()), flat.axes, flat.over, shown)

    @property
    def degrees(self) -> tuple[int, ...]:
        return tuple(len({holder[axis] for holder in self.holders}) for axis in self.axes)

    @property
    def shown_degrees(self) -> tuple[int, ...]:
        return tuple(n for axis, n in zip(self.axes, self.degrees, strict=True) if axis in self.shown)

    def shapes(self, tensor: Tensor) -> Shapes:
        """Shapes of a tensor's shards by holder."""
        return tuple(tensor.cut.shard_shape(tensor.cut.coordinate(holder)) for holder in self.holders)

    def flat_shapes(self, index: int) -> Shapes:
        return tuple((flat.counts[index],) for flat in self.flats)


def _shapes(array: xr.DataArray, dims: list[Hashable], axes: tuple[str, ...], degrees: tuple[int, ...]) -> Shapes:
    """True shapes of the shards in an array, by their place on the axes: `<dim>_extent` says where a dim's differ."""
    told = [array.coords.get(f"{dim}_extent", xr.DataArray(array.sizes[dim])) for dim in dims]
    widths = [(extent.dims, np.asarray(extent.values)) for extent in told]
    found = []
    for place in itertools.product(*map(range, degrees)):
        at = dict(zip(axes, place, strict=True))
        found.append(tuple(int(width[tuple(at[str(axis)] for axis in along)]) for along, width in widths))
    return tuple(found)
