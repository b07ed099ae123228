"""Arrays of 16 bits and fewer whose sums are right.

numpy adds up bfloat16 and fp8 (of ml_dtypes) in their own few bits, and float16 overflows: the sum of 2**20 bfloat16
ones is 256. `Narrow` is such an array as a duck array (NEP 13 and 18): what only moves elements, compares them or works
element by element keeps the dtype, and everything else, numpy functions that are not named here included, is computed
in float32. So a number may be wider than expected, but not silently wrong. What xarray itself refuses of such dtypes
(it asks `numpy.isdtype`, which raises on any that is not numpy's own: means that skip NaN, `isnull`, `where`) raises;
the views take `dtype="float32"` for that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from numpy.lib.mixins import NDArrayOperatorsMixin

WIDE = np.dtype(np.float32)  # holds every value of every narrow dtype

_MOVES = {
    *(np.append, np.array_split, np.atleast_1d, np.atleast_2d, np.atleast_3d, np.block, np.broadcast_arrays),
    *(np.broadcast_to, np.column_stack, np.compress, np.concatenate, np.copy, np.copyto, np.delete, np.diag),
    *(np.diagonal, np.dsplit, np.dstack, np.empty_like, np.expand_dims, np.extract, np.flip, np.fliplr, np.flipud),
    *(np.full_like, np.hsplit, np.hstack, np.insert, np.matrix_transpose, np.moveaxis, np.ndim, np.ones_like),
    *(np.permute_dims, np.place, np.put, np.put_along_axis, np.putmask, np.ravel, np.repeat, np.reshape, np.resize),
    *(np.roll, np.rollaxis, np.rot90, np.select, np.shape, np.size, np.sort, np.split, np.squeeze, np.stack),
    *(np.swapaxes, np.take, np.take_along_axis, np.tile, np.transpose, np.tril, np.triu, np.unstack, np.vsplit),
    *(np.vstack, np.where, np.zeros_like, np.result_type, np.can_cast, np.min_scalar_type, np.shares_memory),
    *(np.may_share_memory, np.array_repr, np.array_str, np.array2string, np.real, np.iscomplexobj, np.isrealobj),
}
_EXTREMES = {np.amax, np.amin, np.max, np.min, np.nanmax, np.nanmin}  # one of the elements: exact in any dtype
_EXTREME_UFUNCS = {np.maximum, np.minimum, np.fmax, np.fmin}


def is_narrow(dtype: Any) -> bool:
    """Whether numpy cannot be trusted to add up this dtype: float16, and all that ml_dtypes adds."""
    dtype = np.dtype(dtype)
    return dtype.itemsize <= 2 and dtype.kind in "fV" and dtype.type is not np.void


def narrow(array: Any) -> Any:
    """A `Narrow` around an array of a narrow dtype; anything else as it is (a 0-d array stays one)."""
    return Narrow(array) if isinstance(array, np.ndarray) and is_narrow(array.dtype) else array


class Narrow(NDArrayOperatorsMixin):
    """An array of a narrow dtype. `numpy.asarray` gives the plain one inside, with which the caller must take care."""

    __slots__ = ("_array",)

    def __init__(self, array: np.ndarray) -> None:
        self._array = array

    def __reduce__(self) -> tuple[Callable[..., Narrow], tuple[np.ndarray]]:
        return Narrow, (self._array,)

    # ---------------------------------------------------------------- an array

    @property
    def shape(self) -> tuple[int, ...]:
        return self._array.shape

    @property
    def dtype(self) -> np.dtype:
        return self._array.dtype

    @property
    def ndim(self) -> int:
        return self._array.ndim

    @property
    def size(self) -> int:
        return self._array.size

    @property
    def nbytes(self) -> int:
        return self._array.nbytes

    @property
    def itemsize(self) -> int:
        return self._array.itemsize

    @property
    def flags(self) -> Any:
        return self._array.flags

    @property
    def T(self) -> Narrow:  # noqa: N802 - numpy's name
        return Narrow(self._array.T)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        array = self._array if dtype is None else self._array.astype(dtype, copy=False)
        return array.copy() if copy and array is self._array else array

    def __getitem__(self, key: Any) -> Any:
        return narrow(self._array[_plain(key)])

    def __setitem__(self, key: Any, value: Any) -> None:
        self._array[_plain(key)] = _plain(value)

    def __len__(self) -> int:
        return len(self._array)

    def __iter__(self) -> Iterator[Any]:
        return (narrow(element) for element in self._array)

    def __bool__(self) -> bool:
        return bool(self._array)

    def __float__(self) -> float:
        return float(self._array)

    def __int__(self) -> int:
        return int(self._array)

    def __repr__(self) -> str:
        return repr(self._array)

    def _repr_inline_(self, max_width: int) -> str:
        """One line for xarray's tables."""
        ends = " ".join(f"{float(x):.4g}" for x in self._array.flat[:8])
        line = ends + (" ..." if self.size > 8 else "")
        return line if len(line) <= max_width else line[: max_width - 3] + "..."

    def item(self, *index: int) -> Any:
        return self._array.item(*index)

    def tolist(self) -> Any:
        return self._array.tolist()

    def astype(self, dtype: Any, **options: Any) -> Any:
        """The array in another dtype; not in `object`, which Python would add up one narrow scalar at a time."""
        if np.dtype(dtype) == np.dtype(object):
            raise TypeError(f"{self.dtype} has no place for missing values or objects: .astype('float32') first")
        return narrow(self._array.astype(dtype, **options))

    def copy(self, order: Any = "C") -> Narrow:
        return Narrow(self._array.copy(order))

    def ravel(self) -> Narrow:
        return Narrow(self._array.ravel())

    def reshape(self, *shape: Any, **options: Any) -> Narrow:
        return Narrow(self._array.reshape(*shape, **options))

    def squeeze(self, axis: Any = None) -> Narrow:
        return Narrow(self._array.squeeze(axis))

    def transpose(self, *axes: Any) -> Narrow:
        return Narrow(self._array.transpose(*axes))

    def view(self, dtype: Any) -> Any:
        """The same bytes as another dtype (the bits: `.view("uint16")`)."""
        return narrow(self._array.view(dtype))

    def __getattr__(self, name: str) -> Any:
        """numpy's further methods (`.sum()`, `.mean()`, …): the function of that name, computed as said above."""
        function = getattr(np, name, None) if name in _METHODS else None
        if function is None:
            raise AttributeError(f"{type(self).__name__} has no {name!r}: numpy.asarray gives the plain array")
        return lambda *args, **kwargs: function(self, *args, **kwargs)

    # ---------------------------------------------------------------- computing

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any, **kwargs: Any) -> Any:
        """Element by element in the arrays' own dtype; what adds up (reduce, accumulate, matmul) in float32."""
        if method == "at":
            raise TypeError(f"{ufunc.__name__}.at would add up in {inputs[0].dtype}: .astype('float32') first")
        elementwise = method in ("__call__", "outer") and ufunc.signature is None
        if not elementwise and ufunc not in _EXTREME_UFUNCS:
            return _in_float32(getattr(ufunc, method), inputs, kwargs)
        try:
            result = getattr(ufunc, method)(*_plain(inputs), **_plain(kwargs))
        except TypeError as e:
            raise TypeError(f"{e}; .astype('float32') first") from None
        if "out" in kwargs:
            return kwargs["out"][0] if len(kwargs["out"]) == 1 else kwargs["out"]
        return _wrapped(result)

    def __array_function__(self, function: Callable[..., Any], types: Any, args: Any, kwargs: Any) -> Any:
        """What moves elements keeps the dtype; the extremes are elements; all else is computed in float32."""
        if function in _MOVES:
            return _wrapped(function(*_plain(args), **_plain(kwargs)))
        result = _in_float32(function, args, kwargs)
        if function in _EXTREMES:
            return _wrapped(np.asarray(result).astype(self.dtype))
        return result


_METHODS = {
    *("all", "any", "argmax", "argmin", "argsort", "clip", "cumprod", "cumsum", "diagonal", "dot", "max", "mean"),
    *(
        "min",
        "nonzero",
        "prod",
        "put",
        "repeat",
        "round",
        "searchsorted",
        "std",
        "sum",
        "swapaxes",
        "take",
        "trace",
        "var",
    ),
}


def _in_float32(function: Callable[..., Any], args: Any, kwargs: Mapping[str, Any]) -> Any:
    """The function of the arrays in float32; a narrow `dtype` to add up in becomes float32 too."""
    if any(isinstance(out, Narrow) for out in _flat(kwargs.get("out"))):
        name = getattr(function, "__name__", "this")
        raise TypeError(f"{name} is computed in float32: its out= cannot be narrower")
    wide = {k: WIDE if k == "dtype" and v is not None and is_narrow(v) else _plain(v, WIDE) for k, v in kwargs.items()}
    return function(*_plain(args, WIDE), **wide)


def _flat(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)


def _plain(value: Any, dtype: Any = None) -> Any:
    """The value with the plain array in place of every `Narrow`, in containers too; converted if a dtype is given."""
    if isinstance(value, Narrow):
        return np.asarray(value, dtype)
    if dtype is not None and isinstance(value, np.ndarray | np.generic) and is_narrow(value.dtype):
        return value.astype(dtype)
    if type(value) in (tuple, list):
        return type(value)(_plain(v, dtype) for v in value)
    if type(value) is dict:
        return {k: _plain(v, dtype) for k, v in value.items()}
    return value


def _wrapped(result: Any) -> Any:
    return type(result)(map(_wrapped, result)) if type(result) in (tuple, list) else narrow(result)
