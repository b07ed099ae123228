"""The three labelled views of a checkpoint: full tensors, shards and flat buffers. Nothing is read to make them.

`source` is the catalog of what is stored; `held` says what the ranks hold: the source itself, or the catalog of a
target, for which everything is gathered from the source. Dtypes are those that are stored, or `dtype` for all that are
floating-point. What is read arrives on the backend (None: numpy's); sums are right or refused (see `arrays.duck`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Generic, TypeVar

import numpy as np
import xarray as xr

from ckptlab.arrays import Gather, Partition, shard_gathers
from ckptlab.arrays import operations as operations  # with the accessor of what is made here
from ckptlab.arrays.backends import Backend
from ckptlab.arrays.lazy import Converted, Flat, Gathered, LazyArray, Padded, Stacked, variable
from ckptlab.catalog import Catalog, FlatGroup, Tensor
from ckptlab.errors import CheckpointError, UnknownNameError
from ckptlab.layout import Cut
from ckptlab.stacks import Stack, stacks

T = TypeVar("T", covariant=True)
Coordinates = dict[str, Any]


def full(
    source: Catalog, states: Sequence[str] | None = None, dtype: Any = None, backend: Backend | None = None
) -> xr.DataTree:
    """Whole tensors, vocabulary padding cut off: one node a tensor, dims ([layer,] *tensor dims), states as variables.

    Same-shaped layers are one node, named without the layer's number, with the numbers as coordinate `layer` and the
    stage that holds each as `pp`; a tensor that stands alone keeps its name, and its stage is a scalar.
    """
    return _tree(_Full(source, states, dtype, backend))


def full_by_name(
    source: Catalog, state: str | None = None, dtype: Any = None, backend: Backend | None = None
) -> Mapping[str, Any]:
    """Whole tensors by the model's own names and aliases: DataArrays of one state, or Datasets of all."""
    return _by_name(_Full(source, None if state is None else (state,), dtype, backend), state)


def shards(
    source: Catalog,
    held: Catalog,
    states: Sequence[str] | None = None,
    dtype: Any = None,
    backend: Backend | None = None,
) -> xr.DataTree:
    """Tensors as the model-parallel ranks of `held` hold them, padding included: dims ([layer,] tp, *tensor dims).

    What is replicated stands there once for each tp rank. States that every stage of a tied tensor stores have a dim
    `pp` before `tp`. Shards of unequal width are padded with 0 to the widest; `<dim>_extent` (tp) is their true width.
    """
    return _tree(_Shards(source, held, states, dtype, backend))


def shards_by_name(
    source: Catalog, held: Catalog, state: str | None = None, dtype: Any = None, backend: Backend | None = None
) -> Mapping[str, Any]:
    """Shards by the model's own names and aliases: DataArrays of one state, or Datasets of all."""
    return _by_name(_Shards(source, held, None if state is None else (state,), dtype, backend), state)


def buffers(source: Catalog, held: Catalog, dtype: Any = None, backend: Backend | None = None) -> xr.DataTree:
    """The optimizer's flat buffers: /pp0/group0 (/pp0/group0/sub1 where ZeRO-3 has sub-groups), dims (tp, dp, flat).

    A variable for each state, padded with 0 to the longest partition, and `<state>_numel` (tp, dp) with the true
    lengths. Of the source they are what the files hold, their padding included; a target's padding is 0.
    """
    together: dict[tuple[int, int], list[FlatGroup]] = {}
    for group in held.flat_groups:
        together.setdefault((group.stage, group.group), []).append(group)
    nodes = {"/": xr.Dataset(attrs=_root_attributes(held))}
    for (stage, index), groups in together.items():
        path = f"/pp{stage}/group{index}"
        for i, group in enumerate(groups):
            nodes[path if len(groups) == 1 else f"{path}/sub{i}"] = _buffer(source, held, group, dtype, backend)
    return xr.DataTree.from_dict(nodes)


def dataset(
    view: str,
    source: Catalog,
    name: str,
    states: Sequence[str] | None = None,
    dtype: Any = None,
    backend: Backend | None = None,
) -> xr.Dataset:
    """One node of a view ("full", "shards" or "buffers"): a tensor or stack by its name, a flat buffer by its path.

    UnknownNameError, with the nearest names, if there is none.
    """
    if view == "buffers":
        found = {node.path.lstrip("/"): node for node in buffers(source, source, dtype, backend).leaves}
        if name.strip("/") not in found:
            raise UnknownNameError(f"{source.path}: no flat buffer {name!r}: there are {', '.join(found)}")
        return found[name.strip("/")].to_dataset()
    of_view = (
        _Full(source, states, dtype, backend) if view == "full" else _Shards(source, source, states, dtype, backend)
    )
    for stack in of_view.stacks:
        if stack.name == name:
            return of_view.dataset(stack)
    return _by_name(of_view, None)[name]


# -------------------------------------------------------------------------------- tensors


class _View:
    """How the tensors of `held` are shown, in some of their states (None: all), in a dtype (None: as stored), and on
    which backend."""

    def __init__(self, held: Catalog, states: Sequence[str] | None, dtype: Any, backend: Backend | None) -> None:
        self.held, self.states, self.dtype, self.backend = held, states, dtype, backend

    def array(self, tensor: Tensor, state: str) -> tuple[tuple[str, ...], LazyArray]:
        """A state of a tensor, with its dims."""
        raise NotImplementedError

    def coordinates(self, tensor: Tensor, dims: set[str]) -> Coordinates:
        """The coordinates that a tensor's variables have in common; `dims` are all that they have."""
        raise NotImplementedError

    def stored(self, tensor: Tensor) -> list[str]:
        """The states that are asked for and that the ranks hold."""
        return [s for s in self.states or tensor.states if s in tensor.states and self._holds(tensor, s)]

    def _holds(self, tensor: Tensor, state: str) -> bool:
        return (tensor.name, state) in self.held.pieces or state in self._flat_states.get(tensor.name, ())

    @cached_property
    def _flat_states(self) -> dict[str, Mapping[str, np.dtype]]:
        return {name: group.dtypes for group in self.held.flat_groups for name in group.names}

    @cached_property
    def stacks(self) -> list[Stack]:
        return stacks(t for t in self.held.tensors.values() if self.stored(t))

    def dataset(self, stack: Stack) -> xr.Dataset:
        """The states of a tensor, or of same-shaped layers along `layer`."""
        first = stack.tensors[0]
        variables = {}
        for state in self.stored(first):
            found = [self.array(t, state) for t in stack.tensors]
            dims, array = found[0]
            if stack.numbers is not None:
                dims, array = ("layer", *dims), Stacked([a for _, a in found])
            told = {"layout": first.layout.text}
            variables[state] = variable(dims, _converted(array, self.dtype), told, self.backend)
        coordinates = self.coordinates(first, {str(dim) for v in variables.values() for dim in v.dims})
        if stack.numbers is not None:
            coordinates["layer"] = list(stack.numbers)
            coordinates["pp"] = ("layer", [t.stages[0] for t in stack.tensors])
        return xr.Dataset(variables, coordinates, self._attributes(stack))

    def _attributes(self, stack: Stack) -> dict[str, Any]:
        first = stack.tensors[0]
        attributes: dict[str, Any] = {"name": stack.pattern, "kind": first.kind, "layout": first.layout.text}
        aliases = [alias for t in stack.tensors for alias in t.aliases]
        if aliases:
            attributes["aliases"] = aliases
        if first.group is not None and len({t.group for t in stack.tensors}) == 1:
            name = self.held.groups[first.group].name
            attributes["group"] = first.group if name is None else str(name)
        return attributes


class _Full(_View):
    def array(self, tensor: Tensor, state: str) -> tuple[tuple[str, ...], LazyArray]:
        return tensor.dims, Gathered(Gather(self.held, tensor.name, state), Cut.whole(tensor.shape))

    def coordinates(self, tensor: Tensor, dims: set[str]) -> Coordinates:
        return {"pp": tensor.stages[0]}


class _Shards(_View):
    def __init__(
        self, source: Catalog, held: Catalog, states: Sequence[str] | None, dtype: Any, backend: Backend | None
    ) -> None:
        super().__init__(held, states, dtype, backend)
        self.source = source

    def array(self, tensor: Tensor, state: str) -> tuple[tuple[str, ...], LazyArray]:
        copies = self._copies(tensor, state)
        if len(copies) == 1:
            return ("tp", *tensor.dims), self._of_stage(tensor, state, copies[0])
        array = Stacked([self._of_stage(tensor, state, stage) for stage in copies])
        return ("pp", "tp", *tensor.dims), array

    def coordinates(self, tensor: Tensor, dims: set[str]) -> Coordinates:
        tp = range(self.held.mesh.tp)
        shapes = np.array([tensor.cut.shard_shape(tensor.cut.coordinate({"tp": t})) for t in tp])
        extents = {
            f"{dim}_extent": ("tp", widths)
            for dim, widths in zip(tensor.dims, shapes.T, strict=True)
            if len(set(widths)) > 1
        }
        stages = list(tensor.stages) if "pp" in dims else tensor.stages[0]
        return {"tp": list(tp), "pp": stages, **extents}

    def _copies(self, tensor: Tensor, state: str) -> tuple[int, ...]:
        """The stages whose copies are shown: all of them, or the canonical one where not all store the state."""
        holders = self.held.holders(tensor.name, state)
        return holders if holders == tensor.stages else holders[:1]

    def _of_stage(self, tensor: Tensor, state: str, stage: int) -> LazyArray:
        gathers = shard_gathers(self.source, self.held, tensor.name, state, stage)
        at = [tensor.cut.coordinate({"tp": tp}) for tp in range(len(gathers))]
        return _stacked([Gathered(gather, tensor.cut, place) for gather, place in zip(gathers, at, strict=True)])


def _converted(array: LazyArray, dtype: Any) -> LazyArray:
    """A floating-point array in another dtype; whole numbers keep theirs."""
    keeps = dtype is None or array.dtype == np.dtype(dtype) or array.dtype.kind in "iub"
    return array if keeps else Converted(array, np.dtype(dtype))


def _stacked(arrays: Sequence[LazyArray]) -> LazyArray:
    """Arrays along a new dim, padded to the widest."""
    widest = tuple(max(sizes) for sizes in zip(*(a.shape for a in arrays), strict=True))
    return Stacked([a if a.shape == widest else Padded(a, widest) for a in arrays])


def _tree(view: _View) -> xr.DataTree:
    children = {stack.name.replace("/", "∕"): xr.DataTree(view.dataset(stack)) for stack in view.stacks}
    return xr.DataTree(xr.Dataset(attrs=_root_attributes(view.held)), children)


def _root_attributes(catalog: Catalog) -> dict[str, str]:
    return {"path": catalog.path, "format": catalog.format, "mesh": str(catalog.mesh)}


# -------------------------------------------------------------------------------- by name


@dataclass(frozen=True)
class ByName(Mapping[str, T], Generic[T]):
    """Tensors by the model's own names; an alias finds its tensor. Each is made when it is asked for."""

    catalog: Catalog
    names: tuple[str, ...]
    make: Callable[[Tensor], T]

    def __getitem__(self, name: str) -> T:
        try:
            tensor = self.catalog[name]
        except CheckpointError as e:
            raise UnknownNameError(str(e)) from None
        if tensor.name not in self._known:
            raise UnknownNameError(f"{self.catalog.path}: {name} has no such state: it has {', '.join(tensor.states)}")
        return self.make(tensor)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def __repr__(self) -> str:
        shown = ", ".join(self.names[:3]) + (", …" if len(self.names) > 3 else "")
        return f"<{len(self.names)} tensors by name: {shown}>"

    @cached_property
    def _known(self) -> frozenset[str]:
        return frozenset(self.names)


def _by_name(view: _View, state: str | None) -> Mapping[str, Any]:
    def one_dataset(tensor: Tensor) -> xr.Dataset:
        return view.dataset(Stack.lone(tensor))

    def one_array(tensor: Tensor) -> xr.DataArray:
        whole = one_dataset(tensor)
        array = whole[state]
        array.name = tensor.name
        array.attrs = {**whole.attrs, "state": state, **array.attrs}
        return array

    names = tuple(t.name for t in view.held.tensors.values() if view.stored(t))
    return ByName(view.held, names, one_dataset if state is None else one_array)


# -------------------------------------------------------------------------------- buffers


def _buffer(source: Catalog, held: Catalog, group: FlatGroup, dtype: Any, backend: Backend | None) -> xr.Dataset:
    variables: dict[str, Any] = {}
    ranks: Iterable[int] = range(held.mesh.dp)
    rows = {s: [_partitions(source, held, group, s, tp, ranks) for tp in range(held.mesh.tp)] for s in group.dtypes}
    longest = max((a.shape[0] for by_tp in rows.values() for row in by_tp for a in row), default=0)
    for state, by_tp in rows.items():
        array = Stacked([Stacked([Padded(a, (longest,)) for a in row]) for row in by_tp])
        variables[state] = variable(("tp", "dp", "flat"), _converted(array, dtype), backend=backend)
        variables[f"{state}_numel"] = (("tp", "dp"), [[a.shape[0] for a in row] for row in by_tp])
    name = held.groups[group.group].name
    coordinates = {"tp": list(range(held.mesh.tp)), "dp": list(ranks)}
    return xr.Dataset(variables, coordinates, {"group": group.group if name is None else str(name)})


def _partitions(
    source: Catalog, held: Catalog, group: FlatGroup, state: str, tp: int, ranks: Iterable[int]
) -> list[LazyArray]:
    if held is source:
        return [Flat(stored) for stored in group.partitions[state][tp]]
    return [Flat(Partition(source, held, group, state, tp, dp)) for dp in ranks]
