"""The rows of a checkpoint, a view, a node of one or a single array, one by one: see row.py."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol, cast, runtime_checkable

import xarray as xr

from ckptlab.analysis.row import Row
from ckptlab.analysis.windows import array_of
from ckptlab.arrays import reader
from ckptlab.arrays.coordinates import rank_dims
from ckptlab.arrays.lazy import Gathered
from ckptlab.catalog import Catalog, asked
from ckptlab.catalog.stacks import places, without_number
from ckptlab.checkpoint import Checkpoint
from ckptlab.checkpoint import open as open_checkpoint
from ckptlab.errors import CheckpointError
from ckptlab.layout import Cut


@runtime_checkable
class HasRows(Protocol):
    """What lists its rows itself: a run, or anything else that holds tensors."""

    def tensor_rows(self) -> list[Row]:
        """What there is to take statistics of."""


View = (
    HasRows
    | Checkpoint
    | Catalog
    | xr.DataTree
    | xr.Dataset
    | xr.DataArray
    | Mapping[str, Any]
    | str
    | os.PathLike[str]
)


def rows_of(view: View, states: Sequence[str] | None = None) -> list[Row]:
    """Every row of a view, in the order of its tensors.

    CheckpointError where there is none, or for a state that no tensor has.
    """
    if isinstance(view, str | os.PathLike):
        view = open_checkpoint(view)
    if isinstance(view, Checkpoint | Catalog):
        found = list(_of_catalog(view if isinstance(view, Catalog) else view.catalog))
    elif isinstance(view, xr.DataTree):
        found = [row for node in view.subtree if node.data_vars for row in _of_dataset(node.to_dataset(), node.name)]
    elif isinstance(view, xr.Dataset):
        found = list(_of_dataset(view, None))
    elif isinstance(view, xr.DataArray):
        found = list(_of_array(view))
    elif isinstance(view, HasRows):
        found = view.tensor_rows()
    elif isinstance(view, Mapping):
        found = [row for one in view.values() for row in rows_of(cast(View, one))]
    else:
        raise CheckpointError(
            f"statistics are of a checkpoint, a view of one (full, shards), a node of it or an array, not of "
            f"{type(view).__name__}"
        )
    return _wanted(found, states)


def _wanted(rows: list[Row], states: Sequence[str] | None) -> list[Row]:
    if not rows:
        raise CheckpointError("there is no tensor to take statistics of")
    wanted = asked(states, dict.fromkeys(row.state for row in rows))
    return rows if wanted is None else [row for row in rows if row.state in wanted]


def _of_catalog(catalog: Catalog) -> Iterator[Row]:
    """Whole tensors, without the tree of them (which takes seconds for thousands)."""
    place = places(catalog.tensors.values())
    for tensor in catalog.tensors.values():
        stack, layer = place[tensor.name]
        group = "" if tensor.group is None else str(catalog.groups[tensor.group].name or tensor.group)
        for state in catalog.states:
            if (tensor.name, state) in catalog.placements:
                array = Gathered(reader(catalog, tensor.name, state), Cut.whole(tensor.shape))
                stage, cut = tensor.stages[0], tensor.layout.text
                yield Row(tensor.name, state, array, stack, layer, tensor.kind, group, stage, layout=cut)


def _of_dataset(dataset: xr.Dataset, node: str | None) -> Iterator[Row]:
    """The states of a node, tensor by tensor."""
    by_state = [list(_of_array(array, dataset.attrs, str(state), node)) for state, array in dataset.data_vars.items()]
    order = dict.fromkeys(row.name for rows in by_state for row in rows)
    for name in order:
        yield from (row for rows in by_state for row in rows if row.name == name)


def _of_array(
    array: xr.DataArray, attributes: Mapping[str, Any] | None = None, state: str | None = None, node: str | None = None
) -> Iterator[Row]:
    told = array.attrs if attributes is None else attributes
    pattern = str(told.get("name", node or array.name or "array"))
    state = str(told.get("state", array.name or "value")) if state is None else state
    axes = rank_dims(array)
    dims = [*(dim for dim in ("step", "layer") if dim in array.dims), *axes]
    if "flat" in array.dims:
        raise CheckpointError(f"{pattern}: flat buffers hold many tensors: take the statistics of full() or shards()")
    for index in itertools.product(*(range(array.sizes[dim]) for dim in dims)):
        part = array.isel(dict(zip(dims, index, strict=True)))
        at = {dim: _at(part, dim, i) for dim, i in zip(dims, index, strict=True)}
        layer = at.get("layer", _number(part, "layer"))
        name = pattern.replace("{layer}", str(layer)) if "layer" in part.coords else pattern
        if "layer" in dims and "{layer}" not in pattern:  # an array by itself: the node knows the model's names
            name = f"{pattern} (layer {layer})"
        if "pp" in dims and index[dims.index("pp")]:  # a further copy of what several stages hold
            name = f"{name} (pp {at['pp']})"
        yield Row(
            name,
            state,
            array_of(_without_padding(part).variable),
            node or without_number(*pattern.split("{layer}", 1)) if "{layer}" in pattern else node or pattern,
            layer,
            str(told.get("kind", "")),
            str(told.get("group", "")),
            _number(part, "pp"),
            {axis: at[axis] for axis in axes if axis != "pp"},
            at.get("step"),
            str(told.get("layout", "")),
        )


def _at(part: xr.DataArray, dim: str, index: int) -> int:
    return int(part[dim]) if dim in part.coords else index


def _number(part: xr.DataArray, coordinate: str) -> int:
    return int(part[coordinate]) if coordinate in part.coords and part[coordinate].ndim == 0 else -1


def _without_padding(part: xr.DataArray) -> xr.DataArray:
    """The true extents of a shard that was padded to the widest one."""
    extents = {dim: part.coords.get(f"{dim}_extent") for dim in part.dims}
    true = {dim: slice(0, int(e)) for dim, e in extents.items() if e is not None and e.ndim == 0}
    return part.isel(true)
