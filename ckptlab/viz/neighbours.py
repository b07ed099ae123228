"""Shardings of torch and jax as cuts: a DTensor or its spec, a jax array, a NamedSharding, a PartitionSpec; their
meshes. None of the two is imported: they are known by what they have.

torch cuts a dim over several axes in the order of the mesh, the first outermost, in chunks of ceil(n / degree); a
`_StridedShard` comes after as many later axes as its split factor is the product of. jax cuts in the order of the spec.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ckptlab.aliases import Int64
from ckptlab.errors import LayoutError, MeshError
from ckptlab.layout import Cut
from ckptlab.layout.blocks import strided_behind
from ckptlab.mesh import Mesh


@dataclass(frozen=True)
class Neighbour:
    """A sharding of torch's or jax's in our words: a cut, and the notation of it where it is even.

    `partial`: axes over which ranks hold parts of a sum, with how they are put together.
    """

    cut: Cut
    dims: list[str]
    notation: str
    partial: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, eq=False)
class Devices:
    """A mesh of torch's or jax's: axes in its own order, and which rank (or device) is where."""

    degrees: dict[str, int]
    numbers: Int64

    @staticmethod
    def of(devices: Any) -> Devices:
        """Of a DeviceMesh, or a `jax.sharding.Mesh`. MeshError where it has no names of axes."""
        names = getattr(devices, "axis_names", None) or getattr(devices, "mesh_dim_names", None)
        if not names:
            Mesh.from_device_mesh(devices)  # says what is missing
            raise MeshError(f"{type(devices).__name__} has no names of axes")
        if hasattr(devices, "mesh_dim_names"):
            numbers = np.array(devices.mesh.tolist(), np.int64)
        elif hasattr(devices, "devices"):
            numbers = np.vectorize(lambda device: device.id, otypes=[np.int64])(devices.devices)
        else:  # jax's AbstractMesh: of shapes alone
            numbers = np.arange(math.prod(devices.shape.values())).reshape(tuple(devices.shape.values()))
        return Devices(dict(zip(map(str, names), numbers.shape, strict=True)), numbers)


def sharded(thing: Any, shape: Sequence[int] | None, mesh: Any) -> Neighbour | None:
    """What torch or jax says of a tensor; None where it is neither's. LayoutError where it cannot be drawn.

    shape, mesh: needed where the thing does not say them: of a PartitionSpec both, of a NamedSharding the shape.
    """
    if hasattr(thing, "placements") and not callable(thing.placements):  # a DTensor, or its spec
        devices = Devices.of(thing.device_mesh if hasattr(thing, "device_mesh") else thing.mesh)
        meta = getattr(thing, "tensor_meta", None)
        found = shape if shape is not None else getattr(meta, "shape", None) or getattr(thing, "shape", None)
        return _torch(thing.placements, _shape(found, thing), devices)
    if hasattr(thing, "sharding") and hasattr(thing, "shape"):  # a jax array
        return sharded(thing.sharding, tuple(thing.shape), mesh)
    if hasattr(thing, "spec") and hasattr(thing, "mesh"):  # NamedSharding
        return _jax(thing.spec, _shape(shape, thing), Devices.of(thing.mesh).degrees)
    jax = sys.modules.get("jax")
    if jax is not None and isinstance(thing, jax.sharding.PartitionSpec):
        if mesh is None:
            raise LayoutError("a PartitionSpec does not say its mesh: give one, viz.tensor(spec, shape, mesh)")
        degrees = mesh.degrees if isinstance(mesh, Mesh) else Devices.of(mesh).degrees
        return _jax(thing, _shape(shape, thing), degrees)
    if type(thing).__name__ == "SingleDeviceSharding":
        return _jax((), _shape(shape, thing), {})
    return None


def _shape(shape: Sequence[int] | None, thing: Any) -> tuple[int, ...]:
    if shape is None:
        raise LayoutError(f"a {type(thing).__name__} does not say a shape: give one")
    return tuple(int(n) for n in shape)


def _torch(placements: Sequence[Any], shape: tuple[int, ...], devices: Devices) -> Neighbour:
    names, degrees = list(devices.degrees), devices.degrees
    order: list[list[str]] = [[] for _ in shape]
    strided: set[int] = set()
    partial = []
    for axis, placed in reversed(list(zip(names, placements, strict=True))):
        if placed.is_partial():
            partial.append((axis, str(getattr(placed, "reduce_op", "sum"))))
        dim = getattr(placed, "dim", None)
        if dim is None:
            continue
        dim, factor = dim % max(len(shape), 1), getattr(placed, "split_factor", 1)
        after = strided_behind((degrees[later] for later in order[dim]), factor)
        if after is None:
            raise LayoutError(f"{axis} cuts dim {dim} strided by {factor}, which no other axis does")
        strided |= {dim} if after else set()
        order[dim].insert(after, axis)
    for dim in strided:
        if shape[dim] % math.prod(degrees[axis] for axis in order[dim]):
            raise LayoutError(
                f"dim {dim} of {shape} is cut strided over {', '.join(order[dim])}, which do not divide it"
            )
    return _neighbour(order, shape, degrees, tuple(reversed(partial)))


def _jax(spec: Sequence[Any], shape: tuple[int, ...], degrees: Mapping[str, int]) -> Neighbour:
    entries = [*spec, *[None] * (len(shape) - len(spec))]
    if len(entries) != len(shape):
        raise LayoutError(f"{spec} has {len(spec)} entries for shape {shape}")
    order: list[list[str]] = []
    for entry in entries:
        axes = () if entry is None else (entry,) if isinstance(entry, str) else entry
        if not isinstance(axes, tuple):
            raise LayoutError(
                f"{entry!r} in {spec} leaves it to the compiler how a dim is cut: there is nothing to draw"
            )
        order.append([str(axis) for axis in axes])
    partial = tuple((str(axis), "sum") for axis in getattr(spec, "unreduced", None) or ())
    return _neighbour(order, shape, degrees, partial)


def _neighbour(
    order: Sequence[Sequence[str]],
    shape: tuple[int, ...],
    degrees: Mapping[str, int],
    partial: tuple[tuple[str, str], ...],
) -> Neighbour:
    unknown = [axis for axes in order for axis in axes if axis not in degrees]
    if unknown:
        raise LayoutError(f"no axis {unknown[0]!r} is on the mesh: its axes are {', '.join(degrees)}")
    if not shape:
        shape, order = (1,), [()]
    mesh = Mesh(**degrees)
    dims = [f"dim{i}" for i in range(len(shape))]
    text = " ".join(f"({' '.join([*axes, dim])})" if axes else dim for dim, axes in zip(dims, order, strict=True))
    cut = Cut.from_rows(shape, mesh, [_rows(n, axes, mesh) for n, axes in zip(shape, order, strict=True)])
    return Neighbour(cut, dims, text, partial)


def _rows(n: int, axes: Sequence[str], mesh: Mesh) -> tuple[tuple[str, ...], dict[tuple[int, ...], Int64]]:
    """The axes of a dim in mesh order, and what each coordinate on them has of its n elements: axis after axis, the
    first outermost, in chunks of ceil(n / degree), the last ones less."""
    spans = [(0, n)]
    for axis in axes:
        parts = [(start, length, -(-length // mesh[axis])) for start, length in spans]
        spans = [
            (start + min(k * part, length), max(min(part, length - k * part), 0))
            for start, length, part in parts
            for k in range(mesh[axis])
        ]
    ordered = tuple(axis for axis in mesh.axes if axis in axes)
    held = {}
    for at, (start, length) in zip(np.ndindex(*(mesh[axis] for axis in axes)), spans, strict=True):
        place = dict(zip(axes, at, strict=True))
        rows = [(start, 0, length)] if length else []
        held[tuple(place[axis] for axis in ordered)] = np.array(rows, np.int64).reshape(-1, 3)
    return ordered, held
