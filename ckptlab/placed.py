"""Whole tensors placed over devices as their layouts say: the shards are where the run's ranks had them.

What a layout says is told to the library (jax's NamedSharding, torch's DTensor) where that can be: where an axis cuts a
dim into equal blocks. A fused dim, `(3 tp out)`, is placed through a reshape, as the two dims `<dim>_part` and `<dim>`.
What cannot be said (uneven, parts of unequal size, partly replicated) is refused with the reason.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr
from xarray.backends import BackendArray
from xarray.core import indexing

from ckptlab.arrays import shard_gathers
from ckptlab.arrays.backends import Backend
from ckptlab.arrays.lazy import Converted, Gathered, LazyArray, Stacked
from ckptlab.arrays.moves import segments
from ckptlab.catalog import Catalog, Tensor
from ckptlab.errors import BackendError, LayoutError
from ckptlab.layout import Cut
from ckptlab.stacks import Stack, stacks
from ckptlab.views import ByName


@dataclass(frozen=True)
class Sharding:
    """How a whole tensor lies on a mesh, dim by dim: names, sizes, and the mesh axis that cuts a dim into equal blocks
    (None: no axis). `local` is the shape of a shard in these dims."""

    dims: tuple[str, ...]
    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    local: tuple[int, ...]

    @staticmethod
    def of(cut: Cut, names: Sequence[str]) -> Sharding:
        """The sharding of a cut. LayoutError, with the reason, where equal blocks cannot say it."""
        found: list[tuple[str, int, str | None, int]] = []
        for name, dim in zip(names, cut.dims, strict=True):
            parts = segments(dim)
            if parts is None or len(parts) != 1:
                why = "into parts of unequal size" if parts else "unevenly, or leaves parts replicated"
                raise LayoutError(
                    f"dim {name!r} of {cut.logical} is cut {why} over {', '.join(dim.axes)}, which no sharding into "
                    "equal blocks says: take shards without mesh=, which have a dim for the axis"
                )
            part = parts[0]
            if part.degree is None:
                found.append((name, dim.size, None, dim.size))
                continue
            if part.repeats > 1:
                found.append((f"{name}_part", part.repeats, None, part.repeats))
            found.append((name, part.degree * part.length, dim.axes[0], part.length))
        dims, shape, axes, local = zip(*found, strict=True) if found else ((), (), (), ())
        return Sharding(dims, shape, axes, local)

    def beneath(self, dim: str, size: int) -> Sharding:
        """The sharding of many such tensors, stacked along a dim of their own."""
        return Sharding((dim, *self.dims), (size, *self.shape), (None, *self.axes), (size, *self.local))


class Placed(BackendArray):
    """A lazy array whose elements are read shard by shard, each straight to the devices that hold it."""

    def __init__(
        self, shards: Sequence[LazyArray], sharding: Sharding, backend: Backend, mesh: Any, stage: int
    ) -> None:
        self.shards, self.sharding, self.backend = tuple(shards), sharding, backend
        self.mesh, self.stage = mesh, stage
        self.shape, self.dtype = sharding.shape, shards[0].dtype

    def __getitem__(self, key: indexing.ExplicitIndexer) -> Any:
        array = self.backend.wrap(self.backend.place(self.mesh, self.stage, self.sharding, self.dtype, self._read))
        return indexing.apply_indexer(indexing.as_indexable(array), key)

    def _read(self, coordinate: Mapping[str, int]) -> np.ndarray:
        shard = self.shards[coordinate.get("tp", 0)]
        return shard.read((slice(None),) * len(shard.shape)).reshape(self.sharding.local)


def placed(
    source: Catalog, held: Catalog, mesh: Any, states: Sequence[str] | None, dtype: Any, backend: Backend
) -> xr.DataTree:
    """Whole tensors, padding included, on the devices of `mesh`: one node a tensor, dims ([layer,] *tensor dims).

    mesh: the library's own (a `jax.sharding.Mesh`, a torch `DeviceMesh`), whose axes are called as ours and have the
    degrees of `held`. Where it has an axis pp, nodes stand under /pp0, /pp1, …, on the devices of their stage.
    BackendError where the degrees differ, LayoutError for a tensor that equal blocks cannot say.
    """
    degrees = _checked(held, mesh, backend)
    nodes = {"/": xr.Dataset(attrs={"path": held.path, "format": held.format, "mesh": str(held.mesh)})}
    for stage in range(held.mesh.pp) if "pp" in degrees else (None,):
        of_stage = [t for t in held.tensors.values() if stage in (None, t.stages[0]) and _states(t, states)]
        for stack in stacks(of_stage):
            path = f"/{stack.name.replace('/', '∕')}"
            nodes[path if stage is None else f"/pp{stage}{path}"] = _dataset(
                source, held, stack, states, dtype, backend, mesh
            )
    return xr.DataTree.from_dict(nodes)


def placed_by_name(
    source: Catalog, held: Catalog, mesh: Any, state: str | None, dtype: Any, backend: Backend
) -> Mapping[str, Any]:
    """The same by the model's own names: DataArrays of one state, or Datasets of all."""
    _checked(held, mesh, backend)
    states = None if state is None else (state,)

    def one(tensor: Tensor) -> Any:
        found = _dataset(source, held, Stack.lone(tensor), states, dtype, backend, mesh)
        return found if state is None else found[state].rename(tensor.name)

    return ByName(held, tuple(t.name for t in held.tensors.values() if _states(t, states)), one)


def _checked(held: Catalog, mesh: Any, backend: Backend) -> Mapping[str, int]:
    """The degrees of a library's mesh. BackendError if they are not those of `held`."""
    degrees = backend.degrees(mesh)
    cut = {axis for t in held.tensors.values() for axis in t.cut.axes}
    wrong = [a for a in {*cut, *(a for a in ("pp",) if a in degrees)} if degrees.get(a, 1) != held.mesh[a]]
    if wrong:
        axis = sorted(wrong)[0]
        raise BackendError(
            f"the device mesh has {axis}({degrees.get(axis, 1)}), the checkpoint is on {held.mesh}: reshape it first, "
            f"ckpt.reshape(ckptlab.Mesh({', '.join(f'{a}={n}' for a, n in degrees.items())}))"
        )
    return degrees


def _states(tensor: Tensor, states: Sequence[str] | None) -> list[str]:
    return [s for s in tensor.states if states is None or s in states]


def _dataset(
    source: Catalog,
    held: Catalog,
    stack: Stack,
    states: Sequence[str] | None,
    dtype: Any,
    backend: Backend,
    mesh: Any,
) -> xr.Dataset:
    first, variables = stack.tensors[0], {}
    try:
        sharding = Sharding.of(first.cut, first.dims)
    except LayoutError as e:
        raise LayoutError(f"{held.path}: {stack.name}: {e}") from None
    if stack.numbers is not None:
        sharding = sharding.beneath("layer", len(stack.tensors))
    for state in _states(first, states):
        by_tensor = [_shards(source, held, t, state, dtype) for t in stack.tensors]
        by_rank = list(zip(*by_tensor, strict=True))
        shards = [Stacked(rank) if stack.numbers is not None else rank[0] for rank in by_rank]
        array = Placed(shards, sharding, backend, mesh, first.stages[0])
        variables[state] = xr.Variable(sharding.dims, indexing.LazilyIndexedArray(array))
    coordinates = {} if stack.numbers is None else {"layer": list(stack.numbers)}
    attributes = {"name": stack.pattern, "kind": first.kind, "layout": first.layout.text}
    return xr.Dataset(variables, {**coordinates, "pp": first.stages[0]}, attributes)


def _shards(source: Catalog, held: Catalog, tensor: Tensor, state: str, dtype: Any) -> list[LazyArray]:
    gathers = shard_gathers(source, held, tensor.name, state)
    arrays: list[LazyArray] = [
        Gathered(gather, tensor.cut, tensor.cut.coordinate({"tp": tp})) for tp, gather in enumerate(gathers)
    ]
    if dtype is None or arrays[0].dtype.kind in "iub":
        return arrays
    return [Converted(array, np.dtype(dtype)) for array in arrays]
