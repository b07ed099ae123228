"""The optimizer's flat buffers as labelled arrays."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr

from ckptlab.arrays import Partition, lazy
from ckptlab.arrays.backends import Backend
from ckptlab.arrays.coordinates import plain, ranks
from ckptlab.arrays.lazy import LazyArray, Padded, Stacked, nested, variable
from ckptlab.catalog import FlatGroup
from ckptlab.errors import UnknownNameError
from ckptlab.plan import Holder
from ckptlab.views.tensors import Look, converted, root_attributes
from ckptlab.views.tree import DataTree


@dataclass(frozen=True)
class Flat(Look):
    """The optimizer's flat buffers: /pp0/group0 (/pp0/group0/sub1 where ZeRO-3 has sub-groups), dims (*axes, dp, flat),
    axes being `tp` and whatever other axes the holders differ on.

    A variable for each state, padded with 0 to the longest partition, and `<state>_numel` (*axes, dp) with the true
    lengths. Of the source they are what the files hold, their padding included; a target's padding is 0.
    Fields: see View.
    """

    dtype: Any = None
    backend: Backend | None = None

    def tree(self) -> xr.DataTree:
        """All of them."""
        nodes = {"/": xr.Dataset(attrs=root_attributes(self.held))}
        for path, group in self._nodes():
            nodes[f"/{path}"] = self.dataset(group)
        return DataTree.from_dict(nodes)

    def node(self, path: str) -> xr.Dataset:
        """One of them, by its path. UnknownNameError, with the paths there are, if there is none."""
        found = dict(self._nodes())
        if path.strip("/") not in found:
            raise UnknownNameError(f"{self.source.path}: no flat buffer {path!r}: there are {', '.join(found)}")
        return self.dataset(found[path.strip("/")])

    def _nodes(self) -> Iterator[tuple[str, FlatGroup]]:
        together: dict[tuple[Holder, int], list[FlatGroup]] = {}
        for group in self.held.flat_groups:
            together.setdefault((group.at, group.group), []).append(group)
        for (at, index), groups in together.items():
            others = "".join(f"/{axis}{k}" for axis, k in at.items() if axis != "pp")
            path = f"pp{at['pp']}/group{index}{others}"
            for i, group in enumerate(groups):
                yield path if len(groups) == 1 else f"{path}/sub{i}", group

    def dataset(self, group: FlatGroup) -> xr.Dataset:
        """The buffers of one group."""
        variables: dict[str, Any] = {}
        rows = {s: [self._partitions(group, s, holder) for holder in group.holders] for s in group.dtypes}
        longest = max((a.shape[0] for by_holder in rows.values() for row in by_holder for a in row), default=0)
        degrees = [self.held.mesh_of(group)[axis] for axis in group.axes]
        for state, by_holder in rows.items():
            array = nested([Stacked([Padded(a, (longest,)) for a in row]) for row in by_holder], degrees)
            dims = (*group.axes, group.over, "flat")
            variables[state] = variable(dims, converted(array, self.dtype), backend=self.backend)
            lengths = np.array([[a.shape[0] for a in row] for row in by_holder])
            variables[f"{state}_numel"] = plain(dims[:-1], lengths.reshape(*degrees, -1))
        name = self.held.groups[group.group].name
        places = ranks({**dict(zip(group.axes, degrees, strict=True)), group.over: group.dp})
        coordinates = {**places, **{axis: plain((), k) for axis, k in group.at.without("pp").items()}}
        return xr.Dataset(variables, coordinates, {"group": group.group if name is None else str(name)})

    def _partitions(self, group: FlatGroup, state: str, holder: Holder) -> list[LazyArray]:
        if self.target is None:
            return [lazy.Flat(stored) for stored in self.source.stored.partitions[group.key, state][holder]]
        return [lazy.Flat(Partition(self.source, self.target, group, state, holder, dp)) for dp in range(group.dp)]
