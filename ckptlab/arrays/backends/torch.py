"""torch: tensors on the CPU or on a CUDA device."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import array_api_compat.torch as xp
import ml_dtypes
import numpy as np
import torch

from ckptlab.arrays.backends.base import Backend, Coordinate, Empty
from ckptlab.arrays.moves import View
from ckptlab.errors import BackendError

if TYPE_CHECKING:
    from ckptlab.arrays.sharding import Sharding

_OWN = "bool uint8 uint16 uint32 uint64 int8 int16 int32 int64 float16 float32 float64 complex64 complex128"
_DTYPES: dict[np.dtype, torch.dtype] = {
    **{np.dtype(name): getattr(torch, name) for name in _OWN.split()},
    **{
        np.dtype(getattr(ml_dtypes, name)): getattr(torch, name)
        for name in ("bfloat16", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu")
        if hasattr(torch, name)
    },
}
STAGE = 1 << 26  # bytes of each pinned buffer
_NUMPY_DTYPES = {mine: theirs for theirs, mine in _DTYPES.items()}
_BITS = {1: torch.uint8, 2: torch.uint16}  # numpy and torch share no dtype of these sizes for floats of theirs

# What array-api-compat makes of torch is as in the array API standard, and torch's own functions of these names are as
# numpy's; torch has others of numpy's names that do something else (its median is the lower one of two).
_NAMES = """
abs acos acosh add all any argmax argmin argsort asin asinh atan atan2 atanh bitwise_and bitwise_invert bitwise_or
bitwise_xor broadcast_arrays broadcast_to ceil clip concat cos cosh count_nonzero cumulative_sum diff divide einsum
empty_like equal exp expand_dims expm1 fabs flip floor floor_divide fmax fmin full_like greater greater_equal
isfinite isin isinf isnan less less_equal log log10 log1p log2 logaddexp logical_and logical_not logical_or
logical_xor matmul max maximum mean min minimum moveaxis multiply nan_to_num negative not_equal ones_like
permute_dims positive pow prod ravel reciprocal remainder repeat reshape roll round searchsorted sign signbit sin
sinh sqrt square squeeze stack std subtract sum take tan tanh tensordot tile tril triu trunc unstack var vecdot
where zeros_like
"""
_SAME = frozenset(_NAMES.split())
_CALLED = {
    "absolute": "abs",
    "arccos": "acos",
    "arccosh": "acosh",
    "arcsin": "asin",
    "arcsinh": "asinh",
    "arctan": "atan",
    "arctan2": "atan2",
    "arctanh": "atanh",
    "amax": "max",
    "amin": "min",
    "concatenate": "concat",
    "invert": "bitwise_invert",
    "mod": "remainder",
    "power": "pow",
    "true_divide": "divide",
}


class TorchBackend(Backend):
    """torch's tensors on one device. Copies from files to a CUDA device are pinned and overlap with reading."""

    name = "torch"

    def __init__(self, device: Any = None) -> None:
        try:
            self._device = torch.device("cpu" if device is None else device)
            if self._device.type == "cuda" and self._device.index is None:
                self._device = torch.device("cuda", torch.cuda.current_device())
            torch.empty(0, device=self._device)
        except (RuntimeError, AssertionError) as e:
            have = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
            raise BackendError(
                f"torch has no device {device!r} here: it has {', '.join(have)} ({str(e).splitlines()[0]})"
            ) from None

    @property
    def device(self) -> str:
        return str(self._device)

    @staticmethod
    def device_of(array: torch.Tensor) -> str:
        return str(array.device)

    def is_array(self, value: Any) -> bool:
        return isinstance(value, torch.Tensor)

    def dtype_of(self, array: torch.Tensor) -> np.dtype:
        return _NUMPY_DTYPES[array.dtype]

    def library_dtype(self, dtype: np.dtype) -> torch.dtype:
        found = _DTYPES.get(np.dtype(dtype))
        if found is None:
            raise self.refuse_dtype(np.dtype(dtype))
        return found

    def from_numpy(self, array: np.ndarray, *, owned: bool = False) -> torch.Tensor:
        dtype = self.library_dtype(array.dtype)
        if not (owned and array.flags.writeable):  # torch would write through a tensor of a read-only array
            array = np.array(array)
        return _same_bits(array, dtype).to(self._device)

    def to_numpy(self, array: torch.Tensor) -> np.ndarray:
        array = array.full_tensor() if hasattr(array, "full_tensor") else array  # a DTensor: all ranks must ask
        here, dtype = array.detach().cpu(), self.dtype_of(array)
        if dtype.isbuiltin == 1:
            return here.numpy()
        return here.contiguous().view(_BITS[dtype.itemsize]).numpy().view(dtype)

    def empty(self, shape: Sequence[int], dtype: np.dtype) -> torch.Tensor:
        return torch.empty(tuple(shape), dtype=self.library_dtype(dtype), device=self._device)

    def cast(self, array: torch.Tensor, dtype: np.dtype) -> torch.Tensor:
        return array.to(self.library_dtype(dtype))

    def function(self, name: str) -> Callable[..., Any] | None:
        if name in _NUMPYS:
            return _NUMPYS[name]
        name = _CALLED.get(name, name)
        return getattr(xp, name) if name in _SAME else None

    def take(self, array: torch.Tensor, key: tuple[Any, ...]) -> torch.Tensor:
        return array[self._key(array, key)]

    def put(self, array: torch.Tensor, key: tuple[Any, ...], value: Any) -> None:
        array[self._key(array, key)] = value

    def _key(self, array: torch.Tensor, key: tuple[Any, ...]) -> tuple[Any, ...]:
        """The key without what torch lacks: steps backwards (indices instead), numpy's integers and arrays."""
        known = sum(k is not None and k is not Ellipsis for k in key)
        filled: list[Any] = []
        for k in key:
            filled += [slice(None)] * (array.ndim - known) if k is Ellipsis else [k]
        found, dim = [], 0
        for k in filled:
            if isinstance(k, slice) and k.step is not None and k.step < 0:
                k = torch.tensor(range(*k.indices(array.shape[dim])), dtype=torch.int64, device=self._device)
            elif isinstance(k, np.ndarray | np.generic):
                k = torch.as_tensor(np.asarray(k), device=self._device)
            found.append(k)
            dim += k is not None
        return tuple(found)

    def view(self, array: torch.Tensor, view: View) -> torch.Tensor:
        array = array[view.key] if view.key else array
        array = array if view.shape is None else array.view(view.shape)
        return array if view.order is None else array.permute(view.order)

    def assign(self, out: torch.Tensor, source: torch.Tensor) -> None:
        out.copy_(source)

    def receive(self, read: Callable[[Any, Empty], np.ndarray], shape: Sequence[int], dtype: np.dtype) -> torch.Tensor:
        if self._device.type != "cuda" or not shape:
            return self.from_numpy(read(slice(None), np.empty), owned=True)
        out = self.empty(shape, dtype)
        staging = Staging(self._device)
        rows = max(1, STAGE // max(1, math.prod(shape[1:]) * dtype.itemsize))
        for first in range(0, shape[0], rows):
            staging.send(read(slice(first, first + rows), staging.empty), out[first : first + rows])
        staging.finish()
        return out

    def degrees(self, mesh: Any) -> Mapping[str, int]:
        names, shape = getattr(mesh, "mesh_dim_names", None), getattr(mesh, "shape", ())
        if not names:
            raise BackendError("torch wants a DeviceMesh with mesh_dim_names, init_device_mesh(…, mesh_dim_names=(…))")
        return dict(zip(names, shape, strict=True))

    def place(
        self, mesh: Any, stage: int, sharding: Sharding, dtype: np.dtype, read: Callable[[Coordinate], np.ndarray]
    ) -> torch.Tensor:
        from torch.distributed.tensor import DTensor, Replicate, Shard

        at = dict(zip(mesh.mesh_dim_names, mesh.get_coordinate(), strict=True))
        if at.pop("pp", stage) != stage:
            raise BackendError(f"this process is not on pp stage {stage}: read the tensors of its own")
        local = self.from_numpy(read(at), owned=True)
        cut = {axis: Shard(dim) for dim, axis in enumerate(sharding.axes) if axis is not None}
        strides = tuple(math.prod(sharding.shape[i + 1 :]) for i in range(len(sharding.shape)))
        return DTensor.from_local(
            local,
            mesh[tuple(at)],
            [cut.get(axis, Replicate()) for axis in at],
            run_check=False,
            shape=torch.Size(sharding.shape),
            stride=strides,
        )


class Staging:
    """Two pinned buffers between files and a CUDA device: while one is copied, the other is read into."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.current_stream(device)
        self._buffers = [torch.empty(STAGE, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
        self._copied: list[Any] = [None, None]
        self._turn, self._taken = 0, 0

    def empty(self, shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
        """Memory of the buffer whose turn it is, for one array; what does not fit is allocated as usual."""
        nbytes = math.prod(shape) * dtype.itemsize
        if self._taken or nbytes > STAGE:
            return np.empty(tuple(shape), dtype)
        if self._copied[self._turn] is not None:
            self._copied[self._turn].synchronize()
        self._taken = nbytes
        return self._buffers[self._turn].numpy()[:nbytes].view(dtype).reshape(tuple(shape))

    def send(self, array: np.ndarray, out: torch.Tensor) -> None:
        """Start to copy an array to its place on the device."""
        pinned = self._buffers[self._turn]
        mine = self._taken and np.shares_memory(array, pinned.numpy()) and array.flags.c_contiguous
        source = pinned[: array.nbytes].view(out.dtype).view(out.shape) if mine else _same_bits(array, out.dtype)
        out.copy_(source, non_blocking=bool(mine))
        self._copied[self._turn] = self._stream.record_event()
        self._turn, self._taken = 1 - self._turn, 0

    def finish(self) -> None:
        """Wait until all is copied, so that the buffers may be freed."""
        self._stream.synchronize()


def _same_bits(array: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    """A tensor on a writeable array's memory."""
    if array.dtype.isbuiltin == 1:
        return torch.from_numpy(array)
    bits = torch.from_numpy(np.ascontiguousarray(array).view(f"u{array.dtype.itemsize}")).view(dtype)
    return bits.reshape(array.shape)


# ------------------------------------------------------------------ numpy's functions that torch has otherwise or lacks


def _transpose(array: torch.Tensor, axes: Sequence[int] | None = None) -> torch.Tensor:
    return array.permute(*(reversed(range(array.ndim)) if axes is None else axes))


def _pad(array: torch.Tensor, pad_width: Any, mode: str = "constant", constant_values: Any = 0) -> torch.Tensor:
    if mode != "constant":
        raise TypeError(f"pad has no mode {mode!r} on torch: .to_numpy() first")
    value = np.unique(np.asarray(constant_values))
    if value.size != 1:
        raise TypeError("pad takes one constant on torch: .to_numpy() first")
    widths = np.broadcast_to(np.asarray(pad_width), (array.ndim, 2))
    flat = [int(n) for pair in widths[::-1] for n in pair]
    return torch.nn.functional.pad(array, flat, value=value[0].item())


def _dims(array: torch.Tensor, axis: Any) -> Any:
    return tuple(range(array.ndim)) if axis is None else axis


def _nanextreme(extreme: Callable[..., torch.Tensor], instead: float) -> Callable[..., torch.Tensor]:
    """The extreme over what is not NaN; NaN where all is."""

    def nanextreme(array: torch.Tensor, axis: Any = None, keepdims: bool = False) -> torch.Tensor:
        if not array.is_floating_point():
            return extreme(array, _dims(array, axis), keepdims)
        missing = array.isnan()
        found = extreme(torch.where(missing, instead, array), _dims(array, axis), keepdims)
        return torch.where(missing.all(_dims(array, axis), keepdims), torch.nan, found)

    return nanextreme


def _nanarg(extreme: Callable[..., torch.Tensor], instead: float) -> Callable[..., torch.Tensor]:
    def nanarg(array: torch.Tensor, axis: Any = None) -> torch.Tensor:
        if not array.is_floating_point():
            return extreme(array, axis)
        if array.isnan().all(_dims(array, axis)).any():
            raise ValueError("All-NaN slice encountered")
        return extreme(array.nan_to_num(nan=instead, posinf=torch.inf, neginf=-torch.inf), axis)

    return nanarg


def _nanvar(array: torch.Tensor, axis: Any = None, dtype: Any = None, ddof: int = 0) -> torch.Tensor:
    """Mean square deviation from the mean over what is not NaN, divided by their number - ddof."""
    array = array if dtype is None else array.to(dtype)
    dims = _dims(array, axis)
    number = (~array.isnan()).sum(dims)
    apart = array - torch.nanmean(array, dims, keepdim=True)
    return torch.where(number > ddof, (apart * apart).nansum(dims) / (number - ddof), torch.nan)


def _var(array: torch.Tensor, axis: Any = None, ddof: int = 0, **options: Any) -> torch.Tensor:
    return xp.var(array, axis=axis, correction=ddof, **options)


def _round(array: torch.Tensor, decimals: int = 0) -> torch.Tensor:
    return torch.round(array, decimals=decimals)


def _windows(array: torch.Tensor, window_shape: Any, axis: Any = None, **options: Any) -> torch.Tensor:
    """numpy's sliding_window_view: the windows' dims stand last."""
    sizes = np.atleast_1d(window_shape).tolist()
    for size, dim in zip(sizes, np.atleast_1d(_dims(array, axis)).tolist(), strict=True):
        array = array.unfold(dim, size, 1)
    return array


def _reduced(function: Callable[..., torch.Tensor], array: torch.Tensor, axis: Any = None, dtype: Any = None) -> Any:
    return function(array, _dims(array, axis), dtype=dtype)


def _cumulated(function: Callable[..., torch.Tensor], array: torch.Tensor, axis: Any = None, dtype: Any = None) -> Any:
    return function(array.ravel() if axis is None else array, 0 if axis is None else int(axis), dtype=dtype)


def _nancumulated(filled: float, function: Callable[..., Any], array: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    return _cumulated(function, torch.where(array.isnan(), filled, array), *args, **kwargs)


def _nanprod(array: torch.Tensor, axis: Any = None, dtype: Any = None) -> torch.Tensor:
    filled = torch.where(array.isnan(), 1, array) if array.is_floating_point() else array
    return xp.prod(filled, axis=axis, dtype=dtype)


def _quantile(ignore_nan: bool, array: torch.Tensor, q: Any, axis: Any = None, **options: Any) -> torch.Tensor:
    """Linear between neighbours (numpy's default), over one dim, several together or all."""
    method = options.pop("method", "linear")
    if options.pop("keepdims", False) or options:
        raise TypeError(f"quantile takes no {', '.join(options) or 'keepdims'} on torch: .to_numpy() first")
    dims = sorted(d % array.ndim for d in np.atleast_1d(_dims(array, axis)).tolist())
    kept = [d for d in range(array.ndim) if d not in dims]
    flat = array.permute(*kept, *dims).reshape(*(array.shape[d] for d in kept), -1)
    at = torch.as_tensor(q, dtype=array.dtype, device=array.device)
    function = torch.nanquantile if ignore_nan else torch.quantile
    return function(flat, at, dim=-1, interpolation=method)


def _median(ignore_nan: bool, array: torch.Tensor, axis: Any = None) -> torch.Tensor:
    return _quantile(ignore_nan, array, 0.5, axis)


def _norm(array: torch.Tensor, ord: Any = None, axis: Any = None, keepdims: bool = False) -> torch.Tensor:
    if ord is None:
        return torch.linalg.vector_norm(array, 2, None if axis is None else axis, keepdim=keepdims)
    return torch.linalg.norm(array, ord, axis, keepdims)


_NUMPYS: Mapping[str, Callable[..., Any]] = {
    "copy": torch.clone,
    "transpose": _transpose,
    "matrix_transpose": lambda array: array.mT,
    "swapaxes": torch.swapaxes,
    "pad": _pad,
    "round": _round,
    "var": _var,
    "std": lambda *args, **options: _var(*args, **options).sqrt(),
    "lib.stride_tricks.sliding_window_view": _windows,
    "nansum": partial(_reduced, torch.nansum),
    "nanmean": partial(_reduced, torch.nanmean),
    "nanvar": _nanvar,
    "nanstd": lambda *args, **options: _nanvar(*args, **options).sqrt(),
    "nanmax": _nanextreme(torch.amax, -torch.inf),
    "nanmin": _nanextreme(torch.amin, torch.inf),
    "nanargmax": _nanarg(torch.argmax, -torch.inf),
    "nanargmin": _nanarg(torch.argmin, torch.inf),
    "nanprod": _nanprod,
    "cumsum": partial(_cumulated, torch.cumsum),
    "cumprod": partial(_cumulated, torch.cumprod),
    "nancumsum": partial(_nancumulated, 0.0, torch.cumsum),
    "nancumprod": partial(_nancumulated, 1.0, torch.cumprod),
    "quantile": partial(_quantile, False),
    "nanquantile": partial(_quantile, True),
    "median": partial(_median, False),
    "nanmedian": partial(_median, True),
    "linalg.norm": _norm,
}
