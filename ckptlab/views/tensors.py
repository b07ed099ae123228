"""Tensors of a checkpoint as labelled arrays: whole, or as the model-parallel ranks hold them. Nothing is read to make
them.

What is read arrives on a backend (None: numpy's); sums are right or refused (see `arrays.duck`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Generic, TypeVar

import numpy as np
import xarray as xr

from ckptlab.arguments import explained
from ckptlab.arrays import operations, reader, shard_reader
from ckptlab.arrays.backends import Backend
from ckptlab.arrays.coordinates import plain, ranks
from ckptlab.arrays.lazy import Converted, Gathered, LazyArray, Made, Padded, Stacked, nested, variable
from ckptlab.arrays.readers import is_sum
from ckptlab.catalog import Catalog, Tensor
from ckptlab.catalog.stacks import Stack, stacks
from ckptlab.errors import CheckpointError, UnknownNameError
from ckptlab.layout import Cut, Layout
from ckptlab.plan import Placement
from ckptlab.views import accessor  # noqa: F401  (of what is made here)
from ckptlab.views.tree import DataTree

T = TypeVar("T", covariant=True)


@dataclass(frozen=True)
class Look:
    """What is looked at: `source` is the catalog of what is stored; `target` says what the ranks hold, None: the source
    itself. Of a target everything is gathered from the source."""

    source: Catalog
    target: Catalog | None = None

    def __post_init__(self) -> None:
        _ = self.source.stored  # or an error, at once

    @property
    def held(self) -> Catalog:
        """The catalog whose tensors or flat buffers are shown."""
        return self.source if self.target is None else self.target


@dataclass(frozen=True)
class View(Look, ABC):
    """How tensors are shown: in some of their states (None: all), in a dtype for what is floating-point (None: as
    stored), and on which backend."""

    states: Sequence[str] | None = None
    dtype: Any = None
    backend: Backend | None = None

    @abstractmethod
    def _variable(self, stack: Stack, state: str) -> xr.Variable:
        """A state of a tensor, or of same-shaped layers along `layer`."""

    @abstractmethod
    def _coordinates(self, tensor: Tensor, dims: set[str]) -> dict[str, xr.Variable]:
        """The coordinates that a tensor's variables have in common; `dims` are all that they have."""

    def shown(self, tensor: Tensor) -> list[str]:
        """The states that are asked for and that ranks hold."""
        held = self.held.held(tensor.name)
        return [s for s in self.states or held if s in held]

    @cached_property
    def stacks(self) -> list[Stack]:
        """The nodes of the tree: tensors, and same-shaped layers together."""
        return stacks(t for t in self.held.tensors.values() if self.shown(t))

    def tree(self) -> xr.DataTree:
        """One node a tensor, its states as variables. Same-shaped layers are one node, named without the layer's
        number, with the numbers as coordinate `layer` and the stage that holds each as `pp`; a tensor that stands alone
        keeps its name, and its stage is a scalar."""
        children = {node_name(stack): DataTree(self.dataset(stack)) for stack in self.stacks}
        return DataTree(xr.Dataset(attrs=root_attributes(self.held)), children)

    def by_name(self, state: str | None = None) -> Mapping[str, Any]:
        """Tensors by the model's own names and aliases: DataArrays of one state, or Datasets of all."""
        view = self if state is None else self.of(state)
        names = tuple(t.name for t in self.held.tensors.values() if view.shown(t))
        return ByName(self.held, names, view._one if state is None else view._array)

    def of(self, *states: str) -> View:
        """The same view of these states alone."""
        return replace(self, states=states)

    def node(self, name: str) -> xr.Dataset:
        """One node: a tensor by the model's name, or a stack by its node's. UnknownNameError, with the nearest names,
        if there is none."""
        for stack in self.stacks:
            if stack.name == name:
                return self.dataset(stack)
        found: xr.Dataset = self.by_name()[name]
        return found

    def dataset(self, stack: Stack) -> xr.Dataset:
        """The states of a tensor, or of same-shaped layers along `layer`."""
        first = stack.tensors[0]
        variables = {state: self._variable(stack, state) for state in self.shown(first)}
        coordinates = self._coordinates(first, {str(dim) for v in variables.values() for dim in v.dims})
        if stack.numbers is not None:
            coordinates["layer"] = plain(("layer",), stack.numbers)
            coordinates["pp"] = plain(("layer",), [t.stages[0] for t in stack.tensors])
        return xr.Dataset(variables, coordinates, self._attributes(stack))

    def _one(self, tensor: Tensor) -> xr.Dataset:
        return self.dataset(Stack.lone(tensor))

    def _array(self, tensor: Tensor) -> xr.DataArray:
        whole = self._one(tensor)
        ((state, array),) = whole.data_vars.items()
        array.name = tensor.name
        array.attrs = {**whole.attrs, "state": state, **array.attrs}
        return array

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


@dataclass(frozen=True)
class Full(View):
    """Whole tensors, vocabulary padding cut off: dims ([layer,] *tensor dims)."""

    def _variable(self, stack: Stack, state: str) -> xr.Variable:
        def whole(tensor: Tensor) -> LazyArray:
            return Gathered(reader(self.held, tensor.name, state), Cut.whole(tensor.shape))

        return layered(stack, state, stack.tensors[0].dims, whole, self)

    def _coordinates(self, tensor: Tensor, dims: set[str]) -> dict[str, xr.Variable]:
        return {"pp": plain((), tensor.stages[0])}


@dataclass(frozen=True)
class Shards(View):
    """Tensors as the model-parallel ranks hold them, padding included: dims ([layer,] *axes, *tensor dims), axes being
    `tp` and whatever other axes the holders differ on.

    What is replicated stands there once for each holder. States that every stage of a tied tensor stores have a dim
    `pp` before. Shards of unequal width are padded with 0 to the widest; `<dim>_extent` (axes) is their true width.
    """

    def _variable(self, stack: Stack, state: str) -> xr.Variable:
        placement = self.held.placement(stack.tensors[0].name, state)
        dims = (*placement.axes, *stack.tensors[0].dims)
        if len(self._copies(stack.tensors[0], placement)) > 1:
            dims = ("pp", *dims)
        return layered(stack, state, dims, lambda tensor: self._of(tensor, state), self)

    def _of(self, tensor: Tensor, state: str) -> LazyArray:
        placement = self.held.placement(tensor.name, state)
        by_stage = [self._of_stage(tensor, state, placement, s) for s in self._copies(tensor, placement)]
        return by_stage[0] if len(by_stage) == 1 else Stacked(by_stage)

    def _copies(self, tensor: Tensor, placement: Placement) -> tuple[int, ...]:
        """The stages whose copies are shown: all of them, or the canonical one where not all store the state."""
        return placement.stages if placement.stages == tensor.stages else placement.stages[:1]

    def _of_stage(self, tensor: Tensor, state: str, placement: Placement, stage: int) -> LazyArray:
        arrays: list[LazyArray] = [
            Gathered(
                shard_reader(self.source, self.held, tensor.name, state, holder),
                placement.cut,
                placement.coordinate(holder),
            )
            for holder in placement.on(stage)
        ]
        widest = tuple(max(sizes) for sizes in zip(*(a.shape for a in arrays), strict=True))
        arrays = [a if a.shape == widest else Padded(a, widest) for a in arrays]
        return nested(arrays, [placement.mesh[axis] for axis in placement.axes])

    def _coordinates(self, tensor: Tensor, dims: set[str]) -> dict[str, xr.Variable]:
        placement = self.held.placement(tensor.name, self.shown(tensor)[0])
        extents = operations.extents(placement.cut, tensor.layout)
        places = ranks({axis: placement.mesh[axis] for axis in placement.axes})
        stages = plain(("pp",), tensor.stages) if "pp" in dims else plain((), tensor.stages[0])
        alone = len(self.held.placements[tensor.name, self.shown(tensor)[0]]) == 1
        fixed = {axis: plain((), k) for axis, k in placement.at.items()} if alone else {}
        return {**places, **fixed, "pp": stages, **extents}


def layered(
    stack: Stack, state: str, dims: tuple[str, ...], array_of: Callable[[Tensor], LazyArray], view: View
) -> xr.Variable:
    """The array of a tensor, or those of layers along `layer`, in the view's dtype and on its backend."""
    arrays = Made(array_of, stack.tensors)
    array = arrays[0]
    if stack.numbers is not None:
        dims, array = ("layer", *dims), Stacked(arrays)
    return variable(dims, converted(array, view.dtype), _noted(stack.tensors[0].layout, state), view.backend)


def _noted(layout: Layout, state: str) -> dict[str, str]:
    """What an array says of its layout in its attributes, for `.ckptlab`."""
    noted = {"layout": layout.text}
    if layout.replicas == "mean" or is_sum(layout.replicas, state):
        noted["replicas"] = layout.replicas
    return noted


def converted(array: LazyArray, dtype: Any) -> LazyArray:
    """A floating-point array in another dtype; whole numbers keep theirs."""
    keeps = dtype is None or array.dtype == np.dtype(dtype) or array.dtype.kind in "iub"
    return array if keeps else Converted(array, np.dtype(dtype))


def node_name(stack: Stack) -> str:
    """A tree's paths are separated by slashes: one in a tensor's name is written as U+2215."""
    return stack.name.replace("/", "∕")


def root_attributes(catalog: Catalog) -> dict[str, str]:
    return {"path": catalog.path, "format": catalog.format, "mesh": str(catalog.mesh)}


@explained
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
