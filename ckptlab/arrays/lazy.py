"""Arrays under xarray that are read when their values are asked for, and no more of them than was asked for.

Each class is small and read-only. What it holds, and what is pickled, are paths, offsets and cuts. What is read arrives
on a backend (`Delivered`), the last step of all.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Generic, TypeGuard, TypeVar, overload

import numpy as np
import xarray as xr
from xarray.backends import BackendArray
from xarray.core import indexing

from ckptlab.aliases import Int64
from ckptlab.arrays.backends import Backend, resolve
from ckptlab.arrays.duck import duck
from ckptlab.arrays.held import Partition
from ckptlab.arrays.readers import Reader
from ckptlab.arrays.taught import teach
from ckptlab.layout import Cut
from ckptlab.stored import Stored

teach()
T = TypeVar("T")
Index = int | slice | Int64  # what is wanted along one dim


class LazyArray(ABC):
    """A lazy array of a given shape and dtype, read into numpy's."""

    def __init__(self, shape: Sequence[int], dtype: np.dtype) -> None:
        self.shape = tuple(int(n) for n in shape)
        self.dtype = np.dtype(dtype)

    @abstractmethod
    def read_into(self, out: np.ndarray, index: tuple[Index, ...]) -> None:
        """Write the wanted part, each dim indexed by itself (integers drop theirs), into `out`, of that part's shape
        and of any strides and dtype."""

    def read(self, index: tuple[Index, ...]) -> np.ndarray:
        """The wanted part as an array of its own."""
        out = np.empty(_lengths(index, self.shape), self.dtype)
        self.read_into(out, index)
        return out


class Gathered(LazyArray):
    """The shard at a coordinate of a cut, gathered from wherever its elements are stored: only the box needed."""

    def __init__(self, reader: Reader, cut: Cut, at: tuple[int, ...] = ()) -> None:
        super().__init__(cut.shard_shape(at), reader.dtype)
        self.reader, self.cut, self.at = reader, cut, at

    def read_into(self, out: np.ndarray, index: tuple[Index, ...]) -> None:
        windows = [_window(k, n) for k, n in zip(index, self.shape, strict=True)]
        if out.size == 0:
            return
        if any(isinstance(k, np.ndarray) or (isinstance(k, slice) and k.step not in (None, 1)) for k in index):
            np.copyto(out, self._box(windows), casting="unsafe")
            return
        dropped = tuple(dim for dim, k in enumerate(index) if _is_integer(k))
        self.reader.fill(np.expand_dims(out, dropped), self.cut, self.at, [start for start, _, _ in windows])

    def read(self, index: tuple[Index, ...]) -> np.ndarray:
        """As LazyArray's; a large box that lies in one piece in a file is mapped, not copied."""
        return self._box([_window(k, n) for k, n in zip(index, self.shape, strict=True)])

    def _box(self, windows: Sequence[tuple[int, int, Index]]) -> np.ndarray:
        sizes = tuple(size for _, size, _ in windows)
        if 0 in sizes:
            box = np.empty(sizes, self.dtype)
        else:
            box = self.reader.box(self.cut, self.at, [start for start, _, _ in windows], sizes)
        return _orthogonal(box, [rest for _, _, rest in windows])


class Flat(LazyArray):
    """A flat partition, one-dimensional: as a file holds it, or as a target's would."""

    def __init__(self, partition: Stored | Partition) -> None:
        super().__init__((_numel(partition),), partition.dtype)
        self.partition = partition

    def read_into(self, out: np.ndarray, index: tuple[Index, ...]) -> None:
        start, size, rest = _window(index[0], self.shape[0])
        if isinstance(self.partition, Stored):
            found = self.partition.elements(start, size).map()
        else:
            found, done = np.empty(size, self.dtype), 0
            for chunk in self.partition.chunks(start, start + size):
                found[done : done + len(chunk)] = chunk
                done += len(chunk)
        np.copyto(out, found[rest], casting="unsafe")


class Stacked(LazyArray):
    """Arrays of one shape and dtype along a new first dim; only those that are asked for are read."""

    def __init__(self, arrays: Sequence[LazyArray]) -> None:
        super().__init__((len(arrays), *arrays[0].shape), arrays[0].dtype)
        self.arrays = arrays

    def read_into(self, out: np.ndarray, index: tuple[Index, ...]) -> None:
        first, rest = index[0], index[1:]
        if _is_integer(first):
            self.arrays[first].read_into(out, rest)
            return
        for place, i in enumerate(np.arange(len(self.arrays))[first]):
            self.arrays[i].read_into(out[place, ...], rest)

    def read(self, index: tuple[Index, ...]) -> np.ndarray:
        return self.arrays[index[0]].read(index[1:]) if _is_integer(index[0]) else super().read(index)


class Made(Sequence[LazyArray], Generic[T]):
    """An array of each of several things, made when it is first asked for: of many layers few are looked at. Pickled,
    they are all made."""

    def __init__(self, make: Callable[[T], LazyArray], of: Sequence[T]) -> None:
        self._make, self._of = make, of
        self._known: dict[int, LazyArray] = {}

    @overload
    def __getitem__(self, index: int) -> LazyArray: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[LazyArray]: ...

    def __getitem__(self, index: int | slice) -> LazyArray | Sequence[LazyArray]:
        if isinstance(index, slice):
            return Made(self._make, self._of[index])
        if index not in self._known:
            self._known[index] = self._make(self._of[index])
        return self._known[index]

    def __len__(self) -> int:
        return len(self._of)

    def __reduce__(self) -> tuple[type, tuple[list[LazyArray]]]:
        return tuple, (list(self),)


def nested(arrays: Sequence[LazyArray], degrees: Sequence[int]) -> LazyArray:
    """Arrays of one shape along new first dims of these sizes, the last running fastest."""
    for degree in reversed(degrees):
        arrays = [Stacked(arrays[i : i + degree]) for i in range(0, len(arrays), degree)]
    return arrays[0]


class Padded(LazyArray):
    """An array in the corner of a wider one; the rest is 0."""

    def __init__(self, array: LazyArray, shape: Sequence[int]) -> None:
        super().__init__(shape, array.dtype)
        self.array = array

    def read_into(self, out: np.ndarray, index: tuple[Index, ...]) -> None:
        wanted = [np.atleast_1d(np.arange(n)[k]) for k, n in zip(index, self.shape, strict=True)]
        held = [w < n for w, n in zip(wanted, self.array.shape, strict=True)]
        out[...] = 0
        if all(h.any() for h in held):
            part = self.array.read(tuple(w[h] for w, h in zip(wanted, held, strict=True)))
            dropped = tuple(dim for dim, k in enumerate(index) if _is_integer(k))
            np.expand_dims(out, dropped)[np.ix_(*held)] = part


class Converted(LazyArray):
    """An array in another dtype."""

    def __init__(self, array: LazyArray, dtype: np.dtype) -> None:
        super().__init__(array.shape, dtype)
        self.array = array

    def read_into(self, out: np.ndarray, index: tuple[Index, ...]) -> None:
        if out.dtype == self.dtype:
            self.array.read_into(out, index)
        else:
            np.copyto(out, self.read(index), casting="unsafe")


class _Permuted(LazyArray):
    """An array with its dims in another order."""

    def __init__(self, array: LazyArray, order: Sequence[int]) -> None:
        super().__init__([array.shape[i] for i in order], array.dtype)
        self.array, self.order = array, tuple(order)

    def read_into(self, out: np.ndarray, index: tuple[Index, ...]) -> None:
        inner, order = self._inner(index)
        self.array.read_into(out.transpose(np.argsort(order)), inner)

    def read(self, index: tuple[Index, ...]) -> np.ndarray:
        inner, order = self._inner(index)
        return self.array.read(inner).transpose(order)

    def _inner(self, index: tuple[Index, ...]) -> tuple[tuple[Index, ...], list[int]]:
        """The index in the array's own order, and the order of the dims that are kept."""
        by_dim = dict(zip(self.order, index, strict=True))
        kept = [dim for dim, k in by_dim.items() if not _is_integer(k)]
        return tuple(by_dim[dim] for dim in range(len(self.shape))), [sorted(kept).index(dim) for dim in kept]


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
        shape = _lengths(index, self.shape)

        def read(rows: slice, out: np.ndarray | None) -> np.ndarray:
            wanted = index
            if kept and rows != slice(None):
                first = _rows(index[kept[0]], self.shape[kept[0]], rows)
                wanted = (*index[: kept[0]], first, *index[kept[0] + 1 :])
            if out is None:
                return self.array.read(wanted)
            self.array.read_into(out, wanted)
            return out

        return self.backend.receive(read, shape, self.dtype)

    def __setitem__(self, key: Any, value: Any) -> None:
        raise TypeError("what a view shows is not read yet and cannot be written to: .load() it first")

    def on(self, backend: Backend, dtype: np.dtype) -> Delivered:
        """The same, arriving on another backend in another dtype."""
        return Delivered(self.array if dtype == self.dtype else Converted(self.array, dtype), backend)

    def permuted(self, order: Sequence[int]) -> Delivered:
        return Delivered(_Permuted(self.array, order), self.backend)


class _Lazily(indexing.LazilyIndexedArray):
    """xarray's lazy indexing, but transposing stays basic indexing (xarray makes it vectorised: much slower)."""

    __slots__ = ()

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


def _lengths(index: Sequence[Index], shape: Sequence[int]) -> tuple[int, ...]:
    """The shape of what an index takes of an array of `shape`."""
    return tuple(_length(k, n) for k, n in zip(index, shape, strict=True) if not _is_integer(k))


def _rows(index: Index, n: int, rows: slice) -> Index:
    """Some of the rows that an index takes of a dim of length `n`."""
    if isinstance(index, slice):
        wanted = range(*index.indices(n))[rows]
        if wanted.step == 1:
            return slice(wanted.start, wanted.stop)
    return np.arange(n)[index][rows]


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
