"""Views in xarray's own files, netCDF and zarr, whatever their dtype: what those lack is kept bit for bit as integers
that say what they are."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any, cast

import ml_dtypes
import numpy as np
import xarray as xr

from ckptlab.arguments import explained
from ckptlab.arrays.lazy import Index, LazyArray, under, variable
from ckptlab.errors import CheckpointError, DestinationError

BITS = "ckptlab_dtype"  # the attribute of integers that are the bits of another dtype: its name
KIND, NODES = "ckptlab_view", "ckptlab_nodes"  # attributes of a file's root: what was saved, and its nodes in order
_ENGINES = {"h5netcdf": ("h5netcdf", "h5py"), "netcdf4": ("netCDF4",)}  # xarray's name → the modules it needs
_JSON = "json: "
View = xr.DataTree | xr.Dataset | xr.DataArray


@explained
def save_view(view: View, path: str | os.PathLike[str]) -> None:
    """Write a view, a node of it or an array to a netCDF file (`.nc`), or to a zarr store where the name ends in
    `.zarr`. Values are read as they are written, a variable at a time; bfloat16 and the like are written as integers
    of their bits, and come back as themselves from `open_view`.

    DestinationError if it exists, or what writes such files is not installed.
    """
    path = os.fspath(path)
    if os.path.lexists(path):
        raise DestinationError(f"{path} exists already: remove it, or name another destination")
    if isinstance(view, xr.DataArray):
        kept = view.to_dataset(name=view.name or "value")
        tree = xr.DataTree(kept)
    else:
        tree = view if isinstance(view, xr.DataTree) else xr.DataTree(view)
    nodes = {node.path: _as_bits(node.to_dataset(inherit=False)) for node in tree.subtree}
    nodes = {os.path.relpath(p, tree.path): node for p, node in nodes.items()}
    nodes["."] = nodes["."].assign_attrs(_plain({KIND: _kind(view), NODES: list(nodes)}))
    made = xr.DataTree.from_dict(nodes)
    temporary = f"{path}.partial"
    try:
        if path.endswith(".zarr"):
            _needs("zarr", path)
            made.to_zarr(temporary, zarr_format=2)
        else:
            made.to_netcdf(temporary, engine=_engine(path))
        os.rename(temporary, path)
    except BaseException:
        if os.path.isfile(temporary):
            os.remove(temporary)
        raise


@explained
def open_view(path: str | os.PathLike[str]) -> View:
    """What `save_view` wrote, of the kind that it was (DataTree, Dataset or DataArray) and in its dtypes; values are
    read when they are asked for. CheckpointError for a file that it did not write."""
    path = os.fspath(path)
    if not os.path.exists(path):
        raise CheckpointError(f"{path}: no such file or folder")
    engine = "zarr" if path.endswith(".zarr") else _engine(path)
    try:
        tree = xr.open_datatree(path, engine=engine)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path}: no file of xarray's: {error}") from None
    kind = tree.attrs.get(KIND)
    if kind is None:
        raise CheckpointError(f"{path}: no view that ckptlab saved: it has no attribute {KIND}")
    order = _told(tree.attrs)[NODES]
    nodes = {path: _from_bits(cast(xr.DataTree, tree[path]).to_dataset(inherit=False)) for path in order}
    root = nodes["."]
    del root.attrs[KIND], root.attrs[NODES]
    if kind == "DataTree":
        return xr.DataTree.from_dict(nodes)
    return root if kind == "Dataset" else next(iter(root.data_vars.values()))


class _Viewed(LazyArray):
    """An array's bits as another dtype of the same size."""

    def __init__(self, array: LazyArray | xr.Variable, dtype: np.dtype) -> None:
        super().__init__(array.shape, dtype)
        self.array = array

    def read_into(self, out: np.ndarray, index: tuple[Index, ...]) -> None:
        part = self.array.read(index) if isinstance(self.array, LazyArray) else self.array[index].values
        np.copyto(out, np.asarray(part).view(self.dtype), casting="unsafe")


def _kind(view: View) -> str:
    return next(kind.__name__ for kind in (xr.DataTree, xr.Dataset, xr.DataArray) if isinstance(view, kind))


def _as_bits(dataset: xr.Dataset) -> xr.Dataset:
    held = {name: _bits(array.variable) for name, array in dataset.data_vars.items()}
    return dataset.assign(held).drop_attrs(deep=False).assign_attrs(_plain(dataset.attrs))


def _bits(held: xr.Variable) -> xr.Variable:
    """A variable as a file can hold it: integers for a dtype of ml_dtypes, its attributes as text and numbers."""
    attrs = _plain(held.attrs)
    dtype = np.dtype(getattr(held.dtype, "dtype", held.dtype))
    if dtype.isbuiltin == 1:
        return xr.Variable(held.dims, held._data, attrs)
    integers = np.dtype(f"i{dtype.itemsize}")
    lazy = under(held)
    attrs[BITS] = dtype.name
    if lazy is not None:
        return variable([str(dim) for dim in held.dims], _Viewed(lazy, integers), attrs)
    return xr.Variable(held.dims, np.ascontiguousarray(held.values).view(integers), attrs)


def _from_bits(dataset: xr.Dataset) -> xr.Dataset:
    found: dict[Any, xr.Variable] = {}
    for name, array in dataset.data_vars.items():
        attrs = _told(array.attrs)
        said = attrs.pop(BITS, None)
        dtype = array.dtype if said is None else np.dtype(getattr(ml_dtypes, str(said)))
        found[name] = variable([str(dim) for dim in array.dims], _Viewed(array.variable, dtype), attrs)
    return dataset.assign(found).drop_attrs(deep=False).assign_attrs(_told(dataset.attrs))


def _plain(attrs: Mapping[Any, Any]) -> dict[Any, Any]:
    """Attributes as a file can hold them: lists as JSON, of which files would forget that they have one member."""
    return {k: f"{_JSON}{json.dumps(list(v))}" if isinstance(v, list | tuple) else v for k, v in attrs.items()}


def _told(attrs: Mapping[Any, Any]) -> dict[Any, Any]:
    """Attributes as they were."""
    return {
        k: json.loads(v.removeprefix(_JSON)) if isinstance(v, str) and v.startswith(_JSON) else v
        for k, v in attrs.items()
    }


def _engine(path: str) -> Any:
    """What xarray reads and writes netCDF files of several groups with."""
    for engine, modules in _ENGINES.items():
        if all(find_spec(module) is not None for module in modules):
            return engine
    raise DestinationError(f"{path}: netCDF files need h5netcdf and h5py, or netCDF4: pip install h5netcdf h5py")


def _needs(module: str, path: str) -> None:
    if find_spec(module) is None:
        raise DestinationError(f"{path}: this needs {module}: pip install {module}")
