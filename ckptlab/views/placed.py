"""Whole tensors placed over devices as their layouts say: the shards are where the run's ranks had them.

What can be said of it to a library, and what is refused, see `arrays.sharding`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr
from xarray.backends import BackendArray
from xarray.core import indexing

from ckptlab.arrays import reader, shard_reader
from ckptlab.arrays.backends import Backend
from ckptlab.arrays.coordinates import plain
from ckptlab.arrays.duck import duck
from ckptlab.arrays.lazy import Gathered, LazyArray, Stacked
from ckptlab.arrays.readers import is_sum
from ckptlab.arrays.sharding import Sharding
from ckptlab.catalog import Tensor, drawn_from
from ckptlab.catalog.stacks import Stack, stacks
from ckptlab.errors import BackendError, LayoutError
from ckptlab.layout.cut import Coordinate, Cut
from ckptlab.views.tensors import View, converted, node_name, root_attributes
from ckptlab.views.tree import DataTree


class OnDevices(BackendArray):
    """A lazy array whose elements are read shard by shard, each straight to the devices that hold it.

    `shards` are by the coordinate of the cut.
    """

    def __init__(
        self, shards: Mapping[Coordinate, LazyArray], cut: Cut, sharding: Sharding, backend: Backend, mesh: Any, pp: int
    ) -> None:
        self.shards, self.cut, self.sharding, self.backend = shards, cut, sharding, backend
        self.mesh, self.stage = mesh, pp
        self.shape, self.dtype = sharding.shape, next(iter(shards.values())).dtype

    def __getitem__(self, key: indexing.ExplicitIndexer) -> Any:
        placed = self.backend.place(self.mesh, self.stage, self.sharding, self.dtype, self._read)
        return indexing.apply_indexer(indexing.as_indexable(duck(placed, self.backend)), key)

    def _read(self, place: Mapping[str, int]) -> np.ndarray:
        shard = self.shards[self.cut.coordinate({**dict.fromkeys(self.cut.axes, 0), **place})]
        return shard.read((slice(None),) * len(shard.shape)).reshape(self.sharding.local)


@dataclass(frozen=True)
class Placed(View):
    """Whole tensors, padding included, on the devices of a mesh: dims ([layer,] *tensor dims).

    devices: the library's own mesh (a `jax.sharding.Mesh`, a torch `DeviceMesh`), whose axes are called as ours and
    have the degrees of the catalog's. Where it has an axis pp, nodes stand under /pp0, /pp1, …, on the devices of their
    stage. BackendError where the degrees differ, LayoutError for a tensor that equal blocks cannot say.
    """

    devices: Any = None

    def tree(self) -> xr.DataTree:
        degrees = self._degrees()
        nodes = {"/": xr.Dataset(attrs=root_attributes(self.held))}
        for stage in range(self.held.mesh.pp) if "pp" in degrees else (None,):
            of_stage = (t for t in self.held.tensors.values() if stage in (None, t.stages[0]) and self.shown(t))
            for stack in stacks(of_stage):
                path = f"/{node_name(stack)}"
                nodes[path if stage is None else f"/pp{stage}{path}"] = self.dataset(stack)
        return DataTree.from_dict(nodes)

    def dataset(self, stack: Stack) -> xr.Dataset:
        """See View; layers of one stage have it in common."""
        found, stages = super().dataset(stack), {t.stages[0] for t in stack.tensors}
        return found.assign_coords(pp=stages.pop()) if len(stages) == 1 else found

    def by_name(self, state: str | None = None) -> Mapping[str, Any]:
        self._degrees()
        return super().by_name(state)

    def _degrees(self) -> Mapping[str, int]:
        """The degrees of the library's mesh. BackendError if they are not those of the catalog's."""
        assert self.backend is not None
        held, degrees = self.held, self.backend.degrees(self.devices)
        needed = {axis: t.cut.mesh[axis] for t in held.tensors.values() for axis in t.cut.axes}
        needed |= {"pp": held.mesh.pp} if "pp" in degrees else {}
        wrong = [axis for axis, n in needed.items() if degrees.get(axis, 1) != n]
        if wrong:
            axis = sorted(wrong)[0]
            raise BackendError(
                f"the device mesh has {axis}({degrees.get(axis, 1)}), the checkpoint is on {held.mesh}: reshape it "
                f"first, ckpt.reshape(ckptlab.Mesh({', '.join(f'{a}={n}' for a, n in degrees.items())}))"
            )
        return degrees

    def _variable(self, stack: Stack, state: str) -> xr.Variable:
        assert self.backend is not None
        first = stack.tensors[0]
        try:
            sharding = Sharding.of(first.cut, first.dims)
        except LayoutError as e:
            raise LayoutError(f"{self.held.path}: {stack.name}: {e}") from None
        if stack.numbers is not None:
            sharding = sharding.beneath("layer", len(stack.tensors))
        by_tensor = [self._shards(t, state) for t in stack.tensors]
        shards = {
            at: by_tensor[0][at] if stack.numbers is None else Stacked([shard[at] for shard in by_tensor])
            for at in by_tensor[0]
        }
        array = OnDevices(shards, first.cut, sharding, self.backend, self.devices, first.stages[0])
        return xr.Variable(sharding.dims, indexing.LazilyIndexedArray(array))

    def _shards(self, tensor: Tensor, state: str) -> dict[Coordinate, LazyArray]:
        """What each coordinate of the cut holds: of several holders the first one's, of those that are to be summed or
        averaged what they make together."""
        placement, found = self.held.placement(tensor.name, state), {}
        if placement.replicas == "mean" or is_sum(placement.replicas, state):
            drawn = state if self.target is None else drawn_from(self.source[tensor.name], tensor, state)
            one = reader(self.source, tensor.name, drawn, dtype=tensor.states[state])
            return {at: converted(Gathered(one, tensor.cut, at), self.dtype) for at in tensor.cut.coordinates()}
        for holder in reversed(placement.on(placement.stages[0])):
            at = placement.coordinate(holder)
            one = shard_reader(self.source, self.held, tensor.name, state, holder)
            found[at] = converted(Gathered(one, tensor.cut, at), self.dtype)
        return found

    def _coordinates(self, tensor: Tensor, dims: set[str]) -> dict[str, xr.Variable]:
        return {"pp": plain((), tensor.stages[0])}
