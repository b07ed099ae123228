"""Arrays under xarray that are read when their values are asked for, and no more of them than was asked for.

Each class is small and read-only. What it holds, and what is pickled, are paths, offsets and cuts. What is read arrives
on a backend (`Delivered`), the last step of all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

import numpy as np
import xarray as xr
from numpy.typing import NDArray
from xarray.backends import BackendArray
from xarray.core import indexing

from ckptlab.arrays.backends import Backend, resolve
from ckptlab.arrays.backends.base import Empty
from ckptlab.arrays.duck import duck, refuse_dask
from ckptlab.arrays.gather import Gather
from ckptlab.arrays.held import Partition
from ckptlab.layout import Cut
from ckptlab.stored import Stored

Index = int | slice | NDArray[np.int64]  # what is wanted along one dim


class LazyArray:
    """A lazy array of a given shape and dtype, read into numpy's."""

    def __init__(self, shape: Sequence[int], dtype: np.dtype) -> None:
        self.shape = tuple(int(n) for n in shape)
        self.dtype = np.dtype(dtype)

    def read(self, index: tuple[Index, ...], empty: Empty = np.empty) -> np.ndarray:
        """The wanted part, each dim indexed by itself: integers drop theirs. Memory for it comes from `empty`."""
        raise NotImplementedError


class Gathered(LazyArray):
    """The shard at a coordinate of a cut, gathered from wherever its elements are stored: only the box needed."""

    def __init__(self, gather: Gather, cut: Cut, at: tuple[int, ...] = ()) -> None:
        super().__init__(cut.shard_shape(at), gather.dtype)
        self.gather, self.cut, self.at = gather, cut, at

    def read(self, index: tuple[Index, ...], empty: Empty = np.empty) -> np.ndarray:
        windows = [_window(k, n) for k, n in zip(index, self.shape, strict=True)]
        sizes = tuple(size for _, size, _ in windows)
        if 0 in sizes:
            box = np.empty(sizes, self.dtype)
        else:
            box = self.gather.box(self.cut, self.at, [start for start, _, _ in windows], sizes, empty)
        return _orthogonal(box.astype(self.dtype, copy=False), [rest for _, _, rest in windows])


class Flat(LazyArray):
    """A flat partition, one-dimensional: as a file holds it, or as a target's would."""

    def __init__(self, partition: Stored | Partition) -> None:
        super().__init__((_numel(partition),), partition.dtype)
        self.partition = partition

    def read(self, index: tuple[Index, ...], empty: Empty = np.empty) -> np.ndarray:
        start, size, rest = _window(index[0], self.shape[0])
        out = empty((size,), self.dtype)
        if isinstance(self.partition, Stored):
            out[...] = self.partition.elements(start, size).map()
        else:
            done = 0
            for chunk in self.partition.chunks(start, start + size):
                out[done : done + len(chunk)] = chunk
                done += len(chunk)
        return _orthogonal(out, [rest])


class Stacked(LazyArray):
    """Arrays of one shape and dtype along a new first dim; only those that are asked for are read."""

    def __init__(self, arrays: Sequence[LazyArray]) -> None:
        super().__init__((len(arrays), *arrays[0].shape), arrays[0].dtype)
        self.arrays = tuple(arrays)

    def read(self, index: tuple[Index, ...], empty: Empty = np.empty) -> np.ndarray:
        first, rest = index[0], index[1:]
        if _is_integer(first):
            return self.arrays[first].read(rest, empty)
        wanted = np.arange(len(self.arrays))[first]
        lengths = (_length(k, n) for k, n in zip(rest, self.shape[1:], strict=True) if not _is_integer(k))
        out = empty((len(wanted), *lengths), self.dtype)
        for place, i in enumerate(wanted):
            out[place] = self.arrays[i].read(rest)
        return out


class Padded(LazyArray):
    """An array in the corner of a wider one; the rest is 0."""

    def __init__(self, array: LazyArray, shape: Sequence[int]) -> None:
        super().__init__(shape, array.dtype)
        self.array = array

    def read(self, index: tuple[Index, ...], empty: Empty = np.empty) -> np.ndarray:
        wanted = [np.atleast_1d(np.arange(n)[k]) for k, n in zip(index, self.shape, strict=True)]
        held = [w < n for w, n in zip(wanted, self.array.shape, strict=True)]
        out = np.zeros([len(w) for w in wanted], self.dtype)
        if all(h.any() for h in held):
            out[np.ix_(*held)] = self.array.read(tuple(w[h] for w, h in zip(wanted, held, strict=True)))
        return out.reshape([len(w) for w, k in zip(wanted, index, strict=True) if not _is_integer(k)])


class Converted(LazyArray):
    """An array in another dtype."""

    def __init__(self, array: LazyArray, dtype: np.dtype) -> None:
        super().__init__(array.shape, dtype)
        self.array = array

    def read(self, index: tuple[Index, ...], empty: Empty = np.empty) -> np.ndarray:
        return self.array.read(index).astype(self.dtype)


class _Permuted(LazyArray):
    """An array with its dims in another order."""

    def __init__(self, array: LazyArray, order: Sequence[int]) -> None:
        super().__init__([array.shape[i] for i in order], array.dtype)
        self.array, self.order = array, tuple(order)

    def read(self, index: tuple[Index, ...], empty: Empty = np.empty) -> np.ndarray:
        by_dim = dict(zip(self.order, index, strict=True))
        part = self.array.read(tuple(by_dim[dim] for dim in range(len(self.shape))), empty)
        kept = [dim for dim, k in by_dim.items() if not _is_integer(k)]
        return part.transpose([sorted(kept).index(dim) for dim in kept])


class Delivered(BackendArray):
    """What xarray asks for elements: they are read, and arrive as arrays of the backend."""

    def __init__(self, array: LazyArray, backend: Backend) -> None:
        self.array, self.backend = array, backend
        self.shape, self.dtype = array.shape, array.dtype

    def __getitem__(self, key: indexing.ExplicitIndexer) -> Any:
        if isinstance(key, indexing.VectorizedIndexer):
            support = indexing.IndexingSupport.OUTER
            read = indexing.explicit_indexing_adapter(key, self.shape, support, self.array.read)
            return duck(self.backend.from_numpy(read, owned=True), self.backend)
        return duck(self._receive(key.tuple), self.backend)

    def _receive(self, index: tuple[Index, ...]) -> Any:
        kept = [dim for dim, k in enumerate(index) if not _is_integer(k)]
        shape = [_length(index[dim], self.shape[dim]) for dim in kept]

        def read(rows: slice, empty: Empty) -> np.ndarray:
            if not kept or rows == slice(None):
                return self.array.read(index, empty)
            first = np.arange(self.shape[kept[0]])[index[kept[0]]][rows]
            return self.array.read((*index[: kept[0]], first, *index[kept[0] + 1 :]), empty)

        return self.backend.receive(read, shape, self.dtype)

    def __setitem__(self, key: Any, value: Any) -> None:
        raise TypeError("what a view shows is not read yet and cannot be written to: .load() or .copy() it first")

    def permuted(self, order: Sequence[int]) -> Delivered:
        return Delivered(_Permuted(self.array, order), self.backend)


class _Lazily(indexing.LazilyIndexedArray):
    """xarray's lazy indexing, but transposing stays basic indexing (xarray makes it vectorised: much slower)."""

    __slots__ = ()

    def _oindex_get(self, indexer: indexing.OuterIndexer) -> Any:
        """Slices alone come from dask, whose blocks would be plain arrays: refused where those add up wrongly, or would
        leave the device."""
        if all(isinstance(k, slice) for k in indexer.tuple):
            refuse_dask(self.array.backend, self.dtype)
        return super()._oindex_get(indexer)

    def transpose(self, order: Sequence[int]) -> _Lazily:
        dims = [i for i, k in enumerate(self.key.tuple) if not _is_integer(k)]
        dropped = [i for i in range(self.array.ndim) if i not in dims]
        permuted = [dims[i] for i in order] + dropped
        key = type(self.key)(tuple(self.key.tuple[i] for i in permuted))
        return type(self)(self.array.permuted(permuted), key)


def variable(
    dims: Sequence[str], array: LazyArray, attrs: Mapping[str, Any] | None = None, backend: Backend | None = None
) -> xr.Variable:
    """A lazy xarray Variable on a backend (numpy's). `open_dataset(chunks={})` cuts it by layers, where it has them."""
    encoding = {"preferred_chunks": {"layer": 1}} if "layer" in dims else {}
    return xr.Variable(tuple(dims), _Lazily(Delivered(array, backend or resolve())), attrs, encoding)


def under(variable: xr.Variable) -> LazyArray | None:
    """The lazy array that a variable of a view shows, whole or at integers of its first dims; None if it shows another
    part of it, or an array of another kind."""
    found: Any = variable._data
    while not isinstance(found, _Lazily) and hasattr(found, "array"):  # xarray's copies on write, and caches
        found = found.array
    return _at(found.array.array, found.key.tuple) if isinstance(found, _Lazily) else None


def _at(array: LazyArray, key: tuple[Index, ...]) -> LazyArray | None:
    """The member of a stack at the integers that a key begins with, if the key takes all of it (but its padding)."""
    if isinstance(array, Converted):
        member = _at(array.array, key)
        return None if member is None else Converted(member, array.dtype)
    if isinstance(array, Stacked) and key and _is_integer(key[0]):
        return _at(array.arrays[int(key[0])], key[1:])
    held = array.array if isinstance(array, Padded) else array
    taken = [k.indices(n) if isinstance(k, slice) else None for k, n in zip(key, array.shape, strict=True)]
    return next((a for a in (array, held) if taken == [(0, n, 1) for n in a.shape]), None)


def _numel(partition: Stored | Partition) -> int:
    return partition.numel if isinstance(partition, Stored) else partition.size


def _is_integer(index: Index) -> TypeGuard[int]:
    return isinstance(index, int | np.integer)


def _length(index: Index, n: int) -> int:
    """How many of `n` elements an index that is no integer takes."""
    return len(range(*index.indices(n))) if isinstance(index, slice) else np.arange(n)[index].size


def _window(index: Index, n: int) -> tuple[int, int, Index]:
    """The part of a dim of length `n` that an index needs: start and size, and the index within it."""
    if _is_integer(index):
        return range(n)[index], 1, 0
    if isinstance(index, slice):
        wanted = range(*index.indices(n))
        if not wanted:
            return 0, 0, slice(None)
        lo, hi = min(wanted[0], wanted[-1]), max(wanted[0], wanted[-1])
        return lo, hi - lo + 1, slice(None, None, wanted.step)
    places = np.arange(n)[index]
    if not places.size:
        return 0, 0, places
    lo = int(places.min())
    return lo, int(places.max()) - lo + 1, places - lo


def _orthogonal(box: np.ndarray, index: Sequence[Index]) -> np.ndarray:
    """Each dim of the box indexed by itself."""
    for dim in reversed(range(box.ndim)):
        box = box[(slice(None),) * dim + (index[dim],)]
    return box
