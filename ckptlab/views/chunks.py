"""Views as arrays of dask, for dtypes and libraries for which dask gives the numbers that the view gives."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import xarray as xr

from ckptlab.arrays.backends.base import Backend
from ckptlab.arrays.duck import refuse_dask
from ckptlab.catalog import Tensor
from ckptlab.errors import InputError
from ckptlab.views.tensors import ByName
from ckptlab.views.tree import DataTree


def chunked(tree: xr.DataTree, backend: Backend, chunks: Any) -> xr.DataTree:
    """A tree cut into chunks (see xarray's `chunk`); {} is a layer each. InputError, with the node, where dask would
    give other numbers."""
    nodes = {node.path: node.to_dataset(inherit=False) for node in tree.subtree}
    return DataTree.from_dict({path: _cut(path.strip("/"), node, backend, chunks) for path, node in nodes.items()})


def each_chunked(tensors: ByName[Any], backend: Backend, chunks: Any) -> ByName[Any]:
    """The same of tensors by name, each when it is asked for."""
    return replace(tensors, make=partial(_made, tensors.make, backend, chunks))


def _made(make: Any, backend: Backend, chunks: Any, tensor: Tensor) -> Any:
    return _cut(tensor.name, make(tensor), backend, chunks)


def _cut(name: str, found: Any, backend: Backend, chunks: Any) -> Any:
    arrays = found.data_vars.values() if isinstance(found, xr.Dataset) else [found]
    for array in arrays:
        try:
            refuse_dask(backend, array.dtype)
        except TypeError as error:
            raise InputError(f"{name}: {array.name}: {error}") from None
    if isinstance(chunks, Mapping):
        chunks = {dim: size for dim, size in (chunks or {"layer": 1}).items() if dim in found.dims}
    try:
        return found.chunk(chunks)
    except (ValueError, TypeError) as error:
        raise InputError(f'{name}: chunks={chunks!r}: {error}: expected a size for each dim, {{"layer": 1}}') from None
