"""DTensors as they are pickled: `_rebuild_from_type_v2(_rebuild_wrapper_subclass, DTensor, …, (None, {_local_tensor,
_spec}))` (torch/_tensor.py, torch/distributed/tensor/_api.py); seen in torch 2.13, older ones by their source."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from ckptlab.errors import CheckpointError, UnsupportedError
from ckptlab.formats.dcp.axes import NEUTRAL, DimAxes
from ckptlab.formats.dcp.metadata import MOST_RANKS, natural
from ckptlab.formats.torch.pickles import Foreign
from ckptlab.layout.blocks import strided_behind
from ckptlab.stored import Stored
from ckptlab.words import brief


class Axis(NamedTuple):
    """An axis of a pickled mesh: its name, its degree, and by how much the numbers of neighbours on it differ."""

    name: str
    degree: int
    stride: int


@dataclass(frozen=True)
class Sharded:
    """A DTensor: what a rank has of it, the whole's shape, the axes of its mesh, where the rank is on them, and how
    they cut each dim."""

    local: Stored
    shape: tuple[int, ...]
    axes: tuple[Axis, ...] = ()
    at: tuple[int, ...] = ()
    ways: tuple[DimAxes, ...] = ()


class Cutting(NamedTuple):
    """How one mesh axis cuts a tensor: the class of its placement, the dim, and by how many parts it is strided."""

    kind: str
    dim: int
    factor: int


def sharded(value: Foreign, rank: int) -> Sharded:
    """A DTensor's placeholder, in the file of a rank. UnsupportedError for another class of tensor."""
    try:
        _, _, made, (_, state) = value.args
        local, spec = state["_local_tensor"], state["_spec"].attributes
        shape, placements, mesh = tuple(made[2]), spec["placements"], spec["mesh"].attributes
        degrees, at, strides = _axes(mesh, rank)
        names = mesh.get("_mesh_dim_names") or mesh.get("mesh_dim_names")
        names = tuple(names or (f"{NEUTRAL}{i}" for i in range(len(degrees))))
        cuts = [Cutting(p.name, p.attributes.get("dim", 0), p.attributes.get("split_factor", 1)) for p in placements]
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, ArithmeticError, RecursionError):
        raise UnsupportedError(
            f"it is a {value.module}.{value.name}, expected a tensor or a DTensor as torch 2.5 to 2.13 pickle it: save "
            "with torch.distributed.checkpoint"
        ) from None
    if (
        type(local) is not Stored
        or not all(type(name) is str and name.isidentifier() and len(name) < 64 for name in names)
        or not len(cuts) == len(names) == len(degrees) == len(set(names))
        or not all(type(n) is int and 0 < n <= MOST_RANKS for n in degrees)
        or not all(map(natural, shape))
        or not all(type(c.dim) is int and -len(shape) <= c.dim < max(len(shape), 1) for c in cuts)
        or not all(type(c.factor) is int and 0 < c.factor <= MOST_RANKS for c in cuts)
    ):
        raise CheckpointError(
            f"a DTensor of shape {brief(shape)} that is placed {brief(cuts)} on {brief(names)} of degrees "
            f"{brief(degrees)}, its part {brief(local)}: the file is damaged or forged; copy it again"
        )
    axes = tuple(map(Axis, names, degrees, strides))
    return Sharded(local, shape, axes, at, _ways(shape, names, degrees, cuts))


def _axes(mesh: Mapping[str, Any], rank: int) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Of each axis of a pickled DeviceMesh the degree, where a rank is on it, and by how much the ranks differ: by what
    each torch keeps, `mesh`, a tensor of ranks (of a part of a mesh, those that have the rank's part), later
    `_layout`."""
    ranks = mesh.get("mesh", mesh.get("_mesh"))
    if isinstance(ranks, Stored):
        if ranks.numel > MOST_RANKS or not ranks.numel:
            raise ValueError(ranks.shape)
        table = np.array(ranks.map()).reshape(ranks.shape)
        here = np.argwhere(table == rank)
        at = here[0] if len(here) == 1 else np.unravel_index(rank % table.size, table.shape)
        first = table[(0,) * table.ndim]
        next_ = (table.take(min(1, n - 1), d)[(0,) * (table.ndim - 1)] for d, n in enumerate(table.shape))
        return table.shape, tuple(map(int, at)), tuple(abs(int(there - first)) for there in next_)
    layout = mesh["_layout"].attributes
    axes = [axis.attributes for axis in layout["axes"]] if "axes" in layout else []
    shapes = [_flat(axis["shape"]) for axis in axes] or [_flat(n) for n in _listed(layout["shape"])]
    strides = [_flat(axis["stride"]) for axis in axes] or [_flat(n) for n in _listed(layout["stride"])]
    places = []
    for shape, stride in zip(shapes, strides, strict=True):
        place = 0
        for n, step in zip(shape, stride, strict=True):
            place = place * n + rank // max(step, 1) % n
        places.append(place)
    return tuple(map(math.prod, shapes)), tuple(places), tuple(min(stride, default=0) for stride in strides)


def _listed(value: Any) -> Any:
    return (value,) if isinstance(value, int) else value


def _flat(shape: Any) -> list[int]:
    return [shape] if isinstance(shape, int) else [n for part in shape for n in _flat(part)]


def _ways(
    shape: tuple[int, ...], names: tuple[str, ...], degrees: tuple[int, ...], cuts: list[Cutting]
) -> tuple[DimAxes, ...]:
    """How each dim is cut. Axes of a dim cut it in mesh order, the first outermost; one that is strided comes after
    those of later axes whose degrees make up its split factor."""
    order: list[list[int]] = [[] for _ in shape]
    for axis in reversed(range(len(cuts))):
        kind, dim, factor = cuts[axis]
        if kind == "Replicate":
            continue
        if kind not in ("Shard", "_StridedShard"):
            raise UnsupportedError(
                f"it is placed as {kind} on {names[axis]}, which says nothing of where its elements are"
            )
        if not shape:
            raise UnsupportedError(f"it has no dims, and {names[axis]} is said to cut one")
        dim = dim % len(shape)
        after = strided_behind((degrees[later] for later in order[dim]), factor)
        if after is None:
            raise UnsupportedError(f"{names[axis]} cuts dim {dim} strided by {factor}, which no other axis does")
        order[dim].insert(after, axis)
    return tuple(DimAxes(tuple(names[axis] for axis in axes)) for axes in order)
