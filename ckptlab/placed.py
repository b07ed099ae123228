"""Whole tensors placed over devices as their layouts say: the shards are where the run's ranks had them.

What can be said of it to a library, and what is refused, see `arrays.sharding`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr
from xarray.backends import BackendArray
from xarray.core import indexing

from ckptlab.arrays import shard_gathers
from ckptlab.arrays.backends import Backend
from ckptlab.arrays.lazy import Converted, Gathered, LazyArray, Stacked
from ckptlab.arrays.sharding import Sharding
from ckptlab.catalog import Catalog, Tensor
from ckptlab.errors import BackendError, LayoutError
from ckptlab.stacks import Stack, stacks
from ckptlab.views import ByName


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
