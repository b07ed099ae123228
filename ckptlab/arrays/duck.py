"""Arrays of any backend under xarray, whose numbers are right.

xarray takes an array that has numpy's protocols (NEP 13, NEP 18) or a namespace (the array API). torch has neither,
jax turns 64-bit numbers into 32-bit ones unless told not to, and numpy adds up bfloat16 and fp8 in their own few bits:
the sum of 2**20 bfloat16 ones is 256. `Duck` is an array of one of them with all of numpy's manners. What only moves
elements, compares them or works element by element keeps dtype and device; everything else on 16 bits and fewer is
computed in float32. So a number may be wider than expected, but not silently wrong. What a library cannot do raises,
and says what to do instead.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import ml_dtypes
import numpy as np
from numpy.lib.mixins import NDArrayOperatorsMixin

from ckptlab.arrays.backends import Backend, resolve
from ckptlab.arrays.dtypes import WIDE, Narrow, is_kind, is_narrow, seen

# numpy's functions (and the array API's) that move elements, or say where or which they are
_MOVING = """
append array_repr array_split array_str array2string atleast_1d atleast_2d atleast_3d block broadcast_arrays
broadcast_to can_cast column_stack compress concat concatenate copy copyto delete diag diagonal dsplit dstack
empty_like expand_dims extract flip fliplr flipud full_like hsplit hstack insert iscomplexobj isrealobj
lib.stride_tricks.sliding_window_view matrix_transpose may_share_memory min_scalar_type moveaxis ndim ones_like pad
permute_dims place put put_along_axis putmask ravel real repeat reshape resize result_type roll rollaxis rot90
select shape shares_memory size split squeeze stack swapaxes take take_along_axis tile transpose tril triu
unstack vsplit vstack where zeros_like
"""
_MOVES = frozenset(_MOVING.split())
_FRACTIONS = """
mean nanmean std nanstd var nanvar median nanmedian quantile nanquantile linalg.norm linalg.vector_norm
linalg.matrix_norm
"""
_FLOATING = frozenset(_FRACTIONS.split())  # what has fractions, of whole numbers too
_WHOLE = ("bool", "integral")
_PICKING = frozenset(  # elements, or what stands for those that are not finite: computed wide, they fit the dtype again
    ["amax", "amin", "max", "min", "nanmax", "nanmin", "sort", "nan_to_num"]
)
_PLACING = frozenset(["argmax", "argmin", "nanargmax", "nanargmin"])
_REDUCED = {  # what a ufunc's reduce and accumulate are called as functions
    **{"add.reduce": "sum", "multiply.reduce": "prod", "maximum.reduce": "max", "minimum.reduce": "min"},
    **{"logical_and.reduce": "all", "logical_or.reduce": "any", "add.accumulate": "cumsum"},
    **{"multiply.accumulate": "cumprod"},
}
_NAMED = """
all any argmax argmin argsort clip cumprod cumsum diagonal dot max mean min nonzero prod put ravel repeat reshape
round searchsorted squeeze std sum swapaxes take trace transpose var
"""
_METHODS = frozenset(_NAMED.split())
_MADE = frozenset(["arange", "empty", "eye", "full", "linspace", "ones", "zeros"])  # by numpy, and moved


class Duck(NDArrayOperatorsMixin):
    """An array of a backend, `array`. `numpy.asarray` gives a plain one, with whose dtype the caller must take care."""

    __slots__ = ("array", "backend")

    def __init__(self, array: Any, backend: Backend) -> None:
        self.array = np.asarray(array) if isinstance(array, np.generic) else array  # numpy's scalars are arrays here
        self.backend = backend

    def __reduce__(self) -> tuple[Callable[..., Duck], tuple[Any, ...]]:
        return _unpickled, (self.to_numpy(), self.backend.name, self.backend.device)

    # ---------------------------------------------------------------- an array

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.array.shape)

    @property
    def dtype(self) -> Any:
        """The dtype as numpy names it (see `dtypes.Narrow` for the narrow ones)."""
        return seen(self.backend.dtype_of(self.array))

    @property
    def device(self) -> str:
        return self.backend.device

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def itemsize(self) -> int:
        return int(self.dtype.itemsize)

    @property
    def nbytes(self) -> int:
        return self.size * self.itemsize

    @property
    def T(self) -> Any:  # noqa: N802 - numpy's name
        return self.transpose()

    @property
    def mT(self) -> Any:  # noqa: N802 - numpy's name
        return call(self.backend, "matrix_transpose", (self,), {})

    def to_numpy(self) -> np.ndarray:
        """The plain array in the process's memory."""
        return self.backend.to_numpy(self.array)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        plain = self.to_numpy()
        array = plain if dtype is None else plain.astype(dtype, copy=False)
        return array.copy() if copy and array is plain else array

    def __getitem__(self, key: Any) -> Any:
        with _places(self):
            return duck(self.backend.take(self.array, self._key(key)), self.backend)

    def __setitem__(self, key: Any, value: Any) -> None:
        held = _plain(value, self.backend)
        if self.backend.is_array(held) and self.backend.dtype_of(held) != self.backend.dtype_of(self.array):
            held = self.backend.cast(held, self.backend.dtype_of(self.array))
        with _places(self):
            self.backend.put(self.array, self._key(key), held)

    def _key(self, key: Any) -> tuple[Any, ...]:
        return tuple(self._index(k) for k in (key if isinstance(key, tuple) else (key,)))

    def _index(self, k: Any) -> Any:
        """What stands for one dim of a key; labelled arrays and others' arrays count as numpy's."""
        known = isinstance(k, Duck | np.ndarray | np.generic) or self.backend.is_array(k)
        return _plain(k if known or not hasattr(k, "__array__") else np.asarray(k), self.backend)

    def __len__(self) -> int:
        return self.shape[0]

    def __iter__(self) -> Iterator[Any]:
        return (self[i] for i in range(len(self)))

    def __dlpack__(self, **options: Any) -> Any:
        """The array's memory for another library: `torch.from_dlpack(array)`. BackendError where the dtype has no name
        in DLPack."""
        return self.backend.dlpack(self.array, **options)

    def __dlpack_device__(self) -> tuple[int, int]:
        device: tuple[int, int] = self.array.__dlpack_device__()
        return device

    def __bool__(self) -> bool:
        return bool(self.array)

    def __float__(self) -> float:
        return float(self.array)

    def __int__(self) -> int:
        return int(self.array)

    def __complex__(self) -> complex:
        return complex(self.array)

    def __index__(self) -> int:
        return operator.index(self.array)

    def __repr__(self) -> str:
        return repr(self.array)

    def _repr_inline_(self, max_width: int) -> str:
        """One line for xarray's tables."""
        first = self.to_numpy().reshape(-1)[:8] if self.size <= 8 else self._first(8)
        line = " ".join(f"{x:.4g}" for x in first.astype(np.float64)) + (" ..." if self.size > 8 else "")
        return line if len(line) <= max_width else line[: max_width - 3] + "..."

    def _first(self, count: int) -> np.ndarray:
        """The first elements, no more of them brought here than a row."""
        row = self
        while row.ndim > 1:
            row = row[0]
        return np.asarray(row[:count])

    def item(self, *index: int) -> Any:
        return self.to_numpy().item(*index)

    def tolist(self) -> Any:
        return self.to_numpy().tolist()

    def astype(self, dtype: Any, *, copy: bool = True, **options: Any) -> Any:
        """The array in another dtype; not in `object`, which Python would add up one narrow scalar at a time.

        copy: whether an array that has the dtype is copied.
        """
        if np.dtype(dtype) == np.dtype(object):
            raise TypeError(f"{self.dtype} has no place for missing values or objects: .astype('float32') first")
        if self.dtype == np.dtype(dtype):
            return self.copy() if copy else self
        return duck(self.backend.cast(self.array, np.dtype(dtype)), self.backend)

    def conj(self) -> Any:
        return call(self.backend, "conj", (self,), {}) if self.dtype.kind == "c" else self

    @property
    def real(self) -> Any:
        return call(self.backend, "real", (self,), {}) if self.dtype.kind == "c" else self

    @property
    def imag(self) -> Any:
        return call(self.backend, "imag" if self.dtype.kind == "c" else "zeros_like", (self,), {})

    def copy(self, order: Any = "C") -> Any:
        return call(self.backend, "copy", (self,), {})

    def __deepcopy__(self, memo: Any) -> Any:
        return self.copy()

    def view(self, dtype: Any) -> Any:
        """The same bytes as another dtype (the bits: `.view("uint16")`), as a numpy array."""
        return duck(self.to_numpy().view(dtype), resolve())

    def __getattr__(self, name: str) -> Any:
        """numpy's further methods (`.sum()`, `.mean()`, …): the function of that name, computed as said above."""
        if name not in _METHODS:
            raise AttributeError(f"{type(self).__name__} has no {name!r}: .array is {self.backend.name}'s own")
        if name in ("reshape", "transpose"):
            return lambda *args: call(self.backend, name, (self, *_shape(args)), {})
        return lambda *args, **kwargs: call(self.backend, name, (self, *args), kwargs)

    def __dask_tokenize__(self) -> Any:
        refuse_dask(self.backend, self.dtype)
        return self.__reduce__()

    # ---------------------------------------------------------------- computing

    def __array_namespace__(self, *, api_version: str | None = None) -> Namespace:
        return namespace(self.backend)

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any, **kwargs: Any) -> Any:
        name = ufunc.__name__ if method == "__call__" else _REDUCED.get(f"{ufunc.__name__}.{method}")
        if name is None:
            raise TypeError(f"{ufunc.__name__}.{method} has no place here: .to_numpy() first, or .astype('float32')")
        out = kwargs.pop("out", ())
        if method != "__call__" and isinstance(inputs[0], Duck) and inputs[0].ndim:
            kwargs.setdefault("axis", 0)  # numpy's functions reduce all dims, its ufuncs the first
        made = call(_shared((*inputs, *out)), name, inputs, kwargs)
        return _written(name, made, out) if out else made

    def __array_function__(self, function: Callable[..., Any], types: Any, args: Any, kwargs: Any) -> Any:
        home = function.__module__.removeprefix("numpy").lstrip(".")
        name = f"{home}.{function.__name__}" if home in ("linalg", "fft") else function.__name__
        if isinstance(kwargs.get("out"), Duck):
            raise TypeError(f"{name} makes a new array here: out= has no place")
        return call(self.backend, name, args, kwargs)


def _written(name: str, made: Any, out: tuple[Any, ...]) -> Any:
    """What was made, written to the array that is to hold it: a += b. TypeError where numpy finds no room for it."""
    held = out[0]
    if len(out) > 1 or not isinstance(held, Duck):
        raise TypeError(f"{name} writes to one array of its own kind: leave out= out, or .to_numpy() first")
    if made.shape != held.shape or not np.can_cast(np.dtype(made.dtype), np.dtype(held.dtype), "same_kind"):
        wanted, given = (f"{array.dtype} {array.shape}" for array in (made, held))
        raise TypeError(f"{name} makes {wanted}, for which {given} has no room: write a = a + b, not a += b")
    held[...] = made
    return held


@contextmanager
def _places(array: Duck) -> Iterator[None]:
    """Around what reads and writes places. TypeError where the library has no kernel for the dtype."""
    try:
        with array.backend.computing():
            yield
    except NotImplementedError as error:
        why = str(error).splitlines()[0]
        raise TypeError(f"{array.dtype} on {array.backend.name}: {why}; .to_numpy() first, or another dtype") from error


def refuse_dask(backend: Backend, dtype: Any) -> None:
    """TypeError for arrays that dask would bring back to numpy's, or add up in their own few bits."""
    if not backend.takes_dask:
        raise TypeError(f'dask works on numpy arrays, not {backend.name}\'s: open the view with backend="numpy"')
    if is_narrow(dtype):
        raise TypeError(f'dask would add up {dtype} in its own few bits: open the view with dtype="float32"')


def duck(array: Any, backend: Backend) -> Any:
    """An array of a backend as xarray is to hold it: a `Duck`, or itself where its numbers are right as they are."""
    return array if backend.is_safe(array) else Duck(array, backend)


def _unpickled(array: np.ndarray, backend: str, device: str) -> Any:
    known = resolve(backend, device)
    return duck(known.from_numpy(array, owned=True), known)


def _shape(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """`reshape(2, 3)` as `reshape((2, 3))`."""
    return args if len(args) <= 1 and not (args and isinstance(args[0], int)) else (args,)


def _shared(values: Any) -> Backend:
    """The one backend of all arrays. TypeError if there are two."""
    found = {value.backend for value in values if isinstance(value, Duck)}
    if len(found) > 1:
        raise TypeError(f"arrays of {' and '.join(sorted(map(repr, found)))} in one operation: move one to the other's")
    return found.pop()


def call(backend: Backend, name: str, args: Any, kwargs: Mapping[str, Any]) -> Any:
    """numpy's function `name` on arrays of a backend, as this module's head says. TypeError where it has none."""
    if name == "reciprocal" and is_kind(args[0].dtype, _WHOLE):
        raise TypeError("reciprocal of whole numbers is a whole number in numpy, mostly 0: write 1 / array")
    function = backend.function(name)
    if function is None:
        raise TypeError(f'{name} is not to be had on {backend.name}: .to_numpy() first, or backend="numpy"')
    keeps = name in _MOVES or _is_elementwise(name)
    dtype = None if keeps else WIDE
    if name == "isin" and isinstance(args[1], list | tuple | range):
        args = (args[0], np.asarray(args[1]))
    args = _promoted(name, args)
    narrow = [a.dtype for a in _ducks(args) if is_narrow(a.dtype)]
    if name == "nan_to_num" and narrow:
        largest = float(ml_dtypes.finfo(np.dtype(narrow[0])).max)
        kwargs = {"posinf": largest, "neginf": -largest, **{k: v for k, v in kwargs.items() if v is not None}}
    refusals: tuple[type[Exception], ...] = (TypeError, RuntimeError, *backend.refusals)
    try:
        with backend.computing():
            result = function(*_plain(args, backend, dtype), **_plain(dict(kwargs), backend, dtype))
    except refusals as error:
        hint = '.astype("float32") first' if narrow else '.to_numpy() first, or backend="numpy"'
        raise TypeError(f"{name} on {backend.name}: {str(error).splitlines()[0]}; {hint}") from error
    if name in _PLACING and backend.is_array(result) and not result.ndim:
        return backend.to_numpy(result)  # a place is no data; xarray takes it for an index only so
    if name in _PICKING and narrow:
        result = backend.cast(_array(backend, result), np.dtype(narrow[0]))
    return _wrapped(result, backend)


def _promoted(name: str, args: Any) -> Any:
    """The arguments in the dtypes in which numpy would compute: the same on all backends.

    torch would halve an int64 in float32, and multiply it with a float32 in float32. Python's numbers stay as they are,
    and so does what numpy knows no rule for.
    """
    if name in _FLOATING:
        return tuple(a.astype(np.float64) if isinstance(a, Duck) and is_kind(a.dtype, _WHOLE) else a for a in args)
    function = getattr(np, name, None)
    if not isinstance(function, np.ufunc) or function.signature is not None or len(args) != function.nin:
        return args
    given = [type(a) if type(a) in (int, float, complex) else getattr(a, "dtype", None) for a in args]
    if any(d is None for d in given):  # not `in`: numpy takes None for float64
        return args
    try:
        names = [d if isinstance(d, type) else np.dtype(d) for d in given]
        wanted = function.resolve_dtypes((*names, *(None for _ in range(function.nout))))
    except TypeError:
        return args
    pairs = zip(args, wanted[: function.nin], strict=True)
    return tuple(a.astype(d) if hasattr(a, "dtype") and np.dtype(a.dtype) != d else a for a, d in pairs)


def _is_elementwise(name: str) -> bool:
    function = getattr(np, name, None)
    return (isinstance(function, np.ufunc) and function.signature is None) or name in ("clip", "round")


def _ducks(values: Any) -> Iterator[Duck]:
    for value in values:
        if isinstance(value, Duck):
            yield value
        elif isinstance(value, tuple | list):
            yield from _ducks(value)


def _array(backend: Backend, value: Any) -> Any:
    return value if backend.is_array(value) else backend.from_numpy(np.asarray(value))


def _plain(value: Any, backend: Backend, dtype: np.dtype | None = None) -> Any:
    """The value with the backend's own arrays and dtypes in place of ours and numpy's, in containers too.

    dtype: what narrow arrays are converted to, and a narrow dtype to compute in becomes.
    """
    if isinstance(value, Duck):
        if value.backend is not backend:
            raise TypeError(f"arrays of {value.backend!r} and {backend!r} in one operation: move one to the other's")
        return value.array if dtype is None or not is_narrow(value.dtype) else backend.cast(value.array, dtype)
    if isinstance(value, np.ndarray) and value.dtype != object:
        value = value if value.dtype.isnative else value.astype(value.dtype.newbyteorder("="))  # numpy's alone
        value = value if dtype is None or not is_narrow(value.dtype) else value.astype(dtype)
        return backend.from_numpy(value)
    if isinstance(value, np.generic):
        return value.astype(dtype) if dtype is not None and is_narrow(value.dtype) else value
    if _is_dtype(value):
        return backend.library_dtype(np.dtype(dtype if dtype is not None and is_narrow(value) else value))
    if type(value) in (tuple, list):
        return type(value)(_plain(v, backend, dtype) for v in value)
    if type(value) is dict:
        return {
            k: _plain(np.dtype(v) if k == "dtype" and v is not None else v, backend, dtype) for k, v in value.items()
        }
    return value


def _is_dtype(value: Any) -> bool:
    named = isinstance(value, type) and (issubclass(value, np.generic) or value in (bool, int, float))
    return named or isinstance(value, np.dtype | Narrow)


def _wrapped(result: Any, backend: Backend) -> Any:
    if isinstance(result, tuple | list):  # named ones too: numpy's are made of their fields, torch's of a tuple
        parts = [_wrapped(r, backend) for r in result]
        return type(result)(*parts) if hasattr(type(result), "_make") else type(result)(parts)
    return duck(result, backend) if backend.is_array(result) else result


class Namespace:
    """The array API of a backend, and what else xarray asks of numpy, on `Duck`s."""

    bool_ = np.dtype(np.bool_)  # what xarray asks for first; the standard's `bool` is found as all dtypes are
    e, inf, nan, newaxis, pi = math.e, math.inf, math.nan, np.newaxis, math.pi

    def __init__(self, backend: Backend, prefix: str = "") -> None:
        self._backend, self._prefix = backend, prefix
        self.__name__ = f"{backend.name}{prefix and '.'}{prefix.rstrip('.')}"

    def asarray(self, value: Any, dtype: Any = None, *, device: Any = None, copy: bool | None = None) -> Any:
        if isinstance(value, Duck):
            return value.astype(value.dtype if dtype is None else dtype, copy=bool(copy))
        return self._held(np.array(value, dtype, copy=copy), device, owned=bool(copy))

    def astype(self, array: Any, dtype: Any, **options: Any) -> Any:
        return array.astype(dtype, **options)

    def isdtype(self, dtype: Any, kind: Any) -> bool:
        return is_kind(dtype, kind)

    def can_cast(self, given: Any, to: Any) -> bool:
        """numpy's rules on numpy's names: the same on all backends."""
        return np.can_cast(np.dtype(getattr(given, "dtype", given)), to)

    def finfo(self, of: Any) -> Any:
        return ml_dtypes.finfo(np.dtype(getattr(of, "dtype", of)))

    def iinfo(self, of: Any) -> Any:
        return ml_dtypes.iinfo(np.dtype(getattr(of, "dtype", of)))

    def result_type(self, *values: Any) -> Any:
        """numpy's rules on numpy's names, whatever the library's own are: the same on all backends."""
        told = [np.dtype(v.dtype) if hasattr(v, "dtype") else np.dtype(v) if isinstance(v, str) else v for v in values]
        return seen(np.result_type(*told))

    def _held(self, array: np.ndarray, device: Any, owned: bool) -> Any:
        if device is not None and str(device) != self._backend.device:
            raise TypeError(f"this namespace is of {self._backend!r}: ckptlab.to(array, …) moves an array to {device}")
        return duck(self._backend.from_numpy(array, owned=owned), self._backend)

    def __getattr__(self, name: str) -> Any:
        if f"{self._prefix}{name}" in ("lib", "lib.stride_tricks", "linalg") or (
            name == "fft" and not self._prefix and self._backend.function("fft.fft")
        ):
            return Namespace(self._backend, f"{self._prefix}{name}.")
        known: Any = getattr(np, name, None)
        if isinstance(known, type) and issubclass(known, np.generic):
            return np.dtype(known)
        if name in _MADE and not self._prefix:
            return lambda *args, device=None, **kwargs: self._held(known(*args, **kwargs), device, owned=True)
        if name.startswith("_") or self._backend.function(f"{self._prefix}{name}") is None:
            raise AttributeError(f"{self.__name__} has no function {name!r}: .to_numpy() first")
        return lambda *args, **kwargs: call(self._backend, f"{self._prefix}{name}", args, kwargs)


_NAMESPACES: dict[Backend, Namespace] = {}


def namespace(backend: Backend) -> Namespace:
    """The one namespace of a backend: xarray compares them by identity."""
    return _NAMESPACES.setdefault(backend, Namespace(backend))
