"""In and out of ZeRO's flat buffers, as operations on labelled arrays in memory, alike on every backend."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import xarray as xr

from ckptlab.arrays.backends import of
from ckptlab.arrays.duck import duck
from ckptlab.arrays.moves import flat_merge, flat_split
from ckptlab.arrays.operations import extents, raw
from ckptlab.catalog import FlatGroup, Tensor
from ckptlab.errors import LayoutError
from ckptlab.plan import FlatBuffer


def merge_flat(
    buffers: xr.DataArray, flat: FlatGroup | FlatBuffer, tensors: Mapping[str, Tensor] | None = None
) -> dict[str, xr.DataArray]:
    """The shards that lie in flat buffers: dims ([tp,] dp, flat) → name → ([tp,] *tensor dims).

    flat: where they lie: a checkpoint's group (with its `tensors`, by name), or one FlatBuffer for a buffer without a
    dim `tp`. Without tensors shards stay flat: dims ([tp,] element).
    """
    flats, place = _flats(flat), of(buffers.data)
    array = buffers if "tp" in buffers.dims else buffers.expand_dims("tp")
    source = raw(array.transpose("tp", "dp", "flat"), place)
    longest = max(f.size(0) for f in flats)
    if tuple(source.shape[:2]) != (len(flats), flats[0].dp) or source.shape[2] < longest:
        raise LayoutError(
            f"buffers of (tp, dp, flat) {tuple(source.shape)}: the flat buffers they are said to be have "
            f"{(len(flats), flats[0].dp, longest)}"
        )
    found = {}
    for i, name in enumerate(flats[0].names):
        tensor = None if tensors is None else tensors[name]
        shapes = _shard_shapes(flats, i, tensor)
        even = len(set(shapes)) == 1  # then shards are flat until they are all there: a box for each fragment
        moved = place.move(flat_merge(flats, i, source.shape[2], _flat_shapes(flats, i) if even else shapes), [source])
        moved = duck(moved.reshape((len(flats), *shapes[0])) if even else moved, place)
        one = xr.DataArray(moved, dims=("tp", *(tensor.dims if tensor else ("element",))), name=name)
        if tensor is not None:
            one = one.assign_coords(tp=list(range(len(flats))), **extents(tensor.cut, tensor.layout))
        found[name] = one if "tp" in buffers.dims else one.isel(tp=0, drop=True)
    return found


def split_flat(shards: Mapping[str, xr.DataArray], flat: FlatGroup | FlatBuffer, *, out: Any = None) -> xr.DataArray:
    """Flat buffers out of shards: name → ([tp,] *tensor dims) → dims ([tp,] dp, flat). Padding is 0.

    flat: where they are to lie. LayoutError if a shard is missing or of another size.
    """
    flats = _flats(flat)
    names = flats[0].names
    missing = [n for n in names if n not in shards]
    if missing or not names:
        raise LayoutError(f"the flat buffer holds {len(names)} tensors; missing: {', '.join(missing[:3]) or 'all'}")
    place, with_tp = of(shards[names[0]].data), "tp" in shards[names[0]].dims
    sources, shapes = [], []
    for i, name in enumerate(names):
        array = shards[name] if with_tp else shards[name].expand_dims("tp")
        dims = [d for d in array.dims if d != "tp"]
        held = [array.coords.get(f"{d}_extent", xr.DataArray(np.full(len(flats), array.sizes[d]))).values for d in dims]
        own = tuple(tuple(int(extent[tp]) for extent in held) for tp in range(array.sizes["tp"]))
        counts = [f.counts[i] for f in flats]
        if [math.prod(s) for s in own] != counts:
            raise LayoutError(f"{name}: shards of {', '.join(map(str, own))}, the flat buffers have room for {counts}")
        source = raw(array.transpose("tp", *dims), place)
        even = len(set(own)) == 1
        sources.append(source.reshape((len(flats), counts[0])) if even else source)
        shapes.append(_flat_shapes(flats, i) if even else own)
    target = None if out is None else raw(out, place)
    moved = duck(place.move(flat_split(flats, tuple(shapes)), sources, target), place)
    buffers = xr.DataArray(moved, dims=("tp", "dp", "flat"))
    return buffers if with_tp else buffers.isel(tp=0, drop=True)


def _flats(flat: FlatGroup | FlatBuffer) -> tuple[FlatBuffer, ...]:
    return (flat,) if isinstance(flat, FlatBuffer) else tuple(flat.flats.values())


def _shard_shapes(flats: tuple[FlatBuffer, ...], index: int, tensor: Tensor | None) -> tuple[tuple[int, ...], ...]:
    """Shapes of a tensor's shards by tp rank: flat ones where the tensor is not known."""
    if tensor is None:
        return _flat_shapes(flats, index)
    places = list(tensor.cut.coordinates()) if tensor.cut.axes else [()] * len(flats)
    return tuple(tensor.cut.shard_shape(at) for at in places)


def _flat_shapes(flats: tuple[FlatBuffer, ...], index: int) -> tuple[tuple[int, ...], ...]:
    return tuple((flat.counts[index],) for flat in flats)
