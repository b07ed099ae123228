"""Arrays under xarray that are read when their values are asked for, and no more of them than was asked for.

Each class is small and read-only. What it holds, and what is pickled, are paths, offsets and cuts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

import numpy as np
import xarray as xr
from numpy.typing import NDArray
from xarray.backends import BackendArray
from xarray.core import indexing

from ckptlab.arrays.gather import Gather
from ckptlab.arrays.held import Partition
from ckptlab.arrays.narrow import is_narrow, narrow
from ckptlab.layout import Cut
from ckptlab.stored import Stored

Index = int | slice | NDArray[np.int64]  # what is wanted along one dim


class LazyArray(BackendArray):
    """A lazy array of a given shape and dtype; what is read of a narrow one adds up rightly (see `narrow`)."""

    def __init__(self, shape: Sequence[int], dtype: np.dtype) -> None:
        self.shape = tuple(int(n) for n in shape)
        self.dtype = np.dtype(dtype)

    def read(self, index: tuple[Index, ...]) -> np.ndarray:
        """The wanted part, each dim indexed by itself: integers drop theirs."""
        raise NotImplementedError

    def __getitem__(self, key: indexing.ExplicitIndexer) -> Any:
        return narrow(indexing.explicit_indexing_adapter(key, self.shape, indexing.IndexingSupport.OUTER, self.read))


class Gathered(LazyArray):
    """The shard at a coordinate of a cut, gathered from wherever its elements are stored: only the box needed."""

    def __init__(self, gather: Gather, cut: Cut, at: tuple[int, ...] = ()) -> None:
        super().__init__(cut.shard_shape(at), gather.dtype)
        self.gather, self.cut, self.at = gather, cut, at

    def read(self, index: tuple[Index, ...]) -> np.ndarray:
        windows = [_window(k, n) for k, n in zip(index, self.shape, strict=True)]
        sizes = tuple(size for _, size, _ in windows)
        if 0 in sizes:
            box = np.empty(sizes, self.dtype)
        else:
            box = self.gather.box(self.cut, self.at, [start for start, _, _ in windows], sizes)
        return _orthogonal(box.astype(self.dtype, copy=False), [rest for _, _, rest in windows])


class Flat(LazyArray):
    """A flat partition, one-dimensional: as a file holds it, or as a target's would."""

    def __init__(self, partition: Stored | Partition) -> None:
        super().__init__((_numel(partition),), partition.dtype)
        self.partition = partition

    def read(self, index: tuple[Index, ...]) -> np.ndarray:
        start, size, rest = _window(index[0], self.shape[0])
        out = np.empty(size, self.dtype)
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

    def read(self, index: tuple[Index, ...]) -> np.ndarray:
        first, rest = index[0], index[1:]
        if _is_integer(first):
            return self.arrays[first].read(rest)
        wanted = np.arange(len(self.arrays))[first]
        lengths = (_length(k, n) for k, n in zip(rest, self.shape[1:], strict=True) if not _is_integer(k))
        out = np.empty((len(wanted), *lengths), self.dtype)
        for place, i in enumerate(wanted):
            out[place] = self.arrays[i].read(rest)
        return out


class Padded(LazyArray):
    """An array in the corner of a wider one; the rest is 0."""

    def __init__(self, array: LazyArray, shape: Sequence[int]) -> None:
        super().__init__(shape, array.dtype)
        self.array = array

    def read(self, index: tuple[Index, ...]) -> np.ndarray:
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

    def read(self, index: tuple[Index, ...]) -> np.ndarray:
        return self.array.read(index).astype(self.dtype)


class _Permuted(LazyArray):
    """An array with its dims in another order."""

    def __init__(self, array: LazyArray, order: Sequence[int]) -> None:
        super().__init__([array.shape[i] for i in order], array.dtype)
        self.array, self.order = array, tuple(order)

    def read(self, index: tuple[Index, ...]) -> np.ndarray:
        by_dim = dict(zip(self.order, index, strict=True))
        part = self.array.read(tuple(by_dim[dim] for dim in range(self.ndim)))
        kept = [dim for dim, k in by_dim.items() if not _is_integer(k)]
        return part.transpose([sorted(kept).index(dim) for dim in kept])


class _Lazily(indexing.LazilyIndexedArray):
    """xarray's lazy indexing, but transposing stays basic indexing (xarray makes it vectorised: much slower)."""

    __slots__ = ()

    def _oindex_get(self, indexer: indexing.OuterIndexer) -> Any:
        """Slices alone come from dask, whose blocks would be plain arrays: refused for what those add up wrongly."""
        if is_narrow(self.dtype) and all(isinstance(k, slice) for k in indexer.tuple):
            raise TypeError(
                f'dask would add up {self.dtype} in its own few bits: open the view with dtype="float32" first'
            )
        return super()._oindex_get(indexer)

    def transpose(self, order: Sequence[int]) -> _Lazily:
        dims = [i for i, k in enumerate(self.key.tuple) if not _is_integer(k)]
        dropped = [i for i in range(self.array.ndim) if i not in dims]
        permuted = [dims[i] for i in order] + dropped
        key = type(self.key)(tuple(self.key.tuple[i] for i in permuted))
        return type(self)(_Permuted(self.array, permuted), key)


def variable(dims: Sequence[str], array: LazyArray, attrs: Mapping[str, Any] | None = None) -> xr.Variable:
    """A lazy xarray Variable. `open_dataset(chunks={})` cuts it by layers, where it has them."""
    encoding = {"preferred_chunks": {"layer": 1}} if "layer" in dims else {}
    return xr.Variable(tuple(dims), _Lazily(array), attrs, encoding)


def under(variable: xr.Variable) -> LazyArray | None:
    """The lazy array that a variable of a view shows, whole or at integers of its first dims; None if it shows another
    part of it, or an array of another kind."""
    found: Any = variable._data
    while not isinstance(found, _Lazily) and hasattr(found, "array"):  # xarray's copies on write, and caches
        found = found.array
    return _at(found.array, found.key.tuple) if isinstance(found, _Lazily) else None


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
