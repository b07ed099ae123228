"""numpy's functions on torch's tensors: those of array-api-compat and torch that mean the same, the others made."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import array_api_compat.torch as xp
import numpy as np
import torch

# What array-api-compat makes of torch is as in the array API standard, and torch's own functions of these names are as
# numpy's; torch has others of numpy's names that do something else (its median is the lower one of two).
_NAMES = """
abs acos acosh add all any argmax argmin asin asinh atan atan2 atanh bitwise_and bitwise_invert
bitwise_left_shift bitwise_or bitwise_right_shift bitwise_xor broadcast_arrays
broadcast_to ceil clip concat conj copysign cos cosh diff divide einsum
empty_like equal exp expand_dims expm1 flip floor fmax fmin full_like greater greater_equal hypot imag
isfinite isinf isnan less less_equal log log10 log1p log2 logaddexp logical_and logical_not logical_or
logical_xor matmul max maximum mean meshgrid min minimum moveaxis multiply nan_to_num negative nextafter nonzero
not_equal ones_like permute_dims positive pow ravel real reciprocal repeat reshape roll round sign signbit sin
sinh sqrt square squeeze stack std subtract tan tanh tensordot tile tril triu trunc unique_counts
unique_inverse unique_values unstack var vecdot where zeros_like
linalg.cholesky linalg.cross linalg.det linalg.diagonal linalg.eigh linalg.eigvalsh linalg.inv linalg.matmul
linalg.matrix_norm linalg.matrix_power linalg.matrix_rank linalg.matrix_transpose linalg.outer linalg.pinv linalg.qr
linalg.slogdet linalg.solve linalg.svdvals linalg.tensordot linalg.vecdot linalg.vector_norm
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
    "left_shift": "bitwise_left_shift",
    "power": "pow",
    "right_shift": "bitwise_right_shift",
    "true_divide": "divide",
}


_UNSIGNED = (torch.uint8, torch.uint16, torch.uint32, torch.uint64)


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


def _var(
    array: torch.Tensor, axis: Any = None, ddof: float = 0, *, correction: float = 0, **options: Any
) -> torch.Tensor:
    """Mean square deviation, `ddof` (the array API's `correction`) taken from the number that it is divided by."""
    return xp.var(array, axis=axis, correction=ddof or correction, **options)


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
    flat = axis is None or not array.ndim
    return function(array.ravel() if flat else array, 0 if axis is None else int(axis), dtype=dtype)


def _of_a_line(function: Callable[..., Any], array: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    """What numpy does with a number as with a line of one."""
    return function(array if array.ndim else array.reshape(1), *args, **kwargs)


def _count_nonzero(array: torch.Tensor, axis: Any = None, keepdims: bool = False) -> torch.Tensor:
    return (array != 0).sum(_dims(array, axis), keepdim=keepdims)


def _sort(array: torch.Tensor, axis: int | None = -1, **options: Any) -> torch.Tensor:
    return xp.sort(array.ravel(), **options) if axis is None else xp.sort(array, axis=axis, **options)


def _take_along_axis(array: torch.Tensor, indices: torch.Tensor, axis: int | None = -1) -> torch.Tensor:
    return torch.take_along_dim(array, indices.to(torch.int64), axis)


def _take(array: torch.Tensor, indices: Any, axis: int | None = None) -> torch.Tensor:
    """numpy's: of the flattened array where no axis is said, with indices of any shape, from the end too."""
    array, axis = (array.ravel(), 0) if axis is None else (array, axis % array.ndim)
    at = torch.as_tensor(indices, device=array.device).to(torch.int64)
    at = torch.where(at < 0, at + array.shape[axis], at)
    found = torch.index_select(array, axis, at.ravel())
    return found.reshape(*array.shape[:axis], *at.shape, *array.shape[axis + 1 :])


def _added(function: Callable[..., Any], array: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    """Sums and products; torch's of unsigned numbers are int64, of the same bits as numpy's uint64."""
    if array.dtype in _UNSIGNED and kwargs.get("dtype") is None:
        wide = array.view(torch.int64) if array.dtype == torch.uint64 else array.to(torch.int64)
        return function(wide, *args, **kwargs).view(torch.uint64)
    return function(array, *args, **kwargs)


def _trace(array: torch.Tensor, *, offset: int = 0, dtype: Any = None) -> Any:
    return _added(xp.sum, torch.diagonal(array, offset, -2, -1), axis=-1, dtype=dtype)


def _filled(value: float, function: Callable[..., Any], array: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    """What is not NaN, and a value in the place of what is."""
    held = torch.where(array.isnan(), value, array) if array.is_floating_point() else array
    return _added(function, held, *args, **kwargs)


def _searchsorted(array: torch.Tensor, values: torch.Tensor, side: str = "left", sorter: Any = None) -> torch.Tensor:
    """numpy's: NaN are behind all numbers and equal to one another (torch puts each behind the others)."""
    values = torch.as_tensor(values, device=array.device)
    found = torch.searchsorted(array, values, side=side, sorter=sorter)
    if side == "left" and array.is_floating_point() and values.is_floating_point():
        found = torch.where(values.isnan(), (~array.isnan()).sum(), found)
    return found


def _divided(function: Callable[..., torch.Tensor], a: Any, b: Any) -> torch.Tensor:
    """Quotients and rests as numpy's: of a whole number and 0 both are 0 (torch raises; CUDA gives any number)."""
    first = a if isinstance(a, torch.Tensor) else b
    a, b = (
        x if isinstance(x, torch.Tensor) else torch.as_tensor(x, dtype=torch.result_type(first, x), device=first.device)
        for x in (a, b)
    )
    if torch.result_type(a, b).is_floating_point:
        return function(a, b)
    none = b == 0
    return function(a, b.masked_fill(none, 1)).masked_fill(none, 0)


def _rest(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """With the sign of b, the sign of 0 too."""
    found = xp.remainder(a, b)
    return torch.copysign(found, b) if found.is_floating_point() else found


_FLOOR_DIVIDE = partial(_divided, xp.floor_divide)
_REMAINDER = partial(_divided, _rest)


def _svd(array: torch.Tensor, full_matrices: bool = True, compute_uv: bool = True, hermitian: bool = False) -> Any:
    return torch.linalg.svd(array, full_matrices) if compute_uv else torch.linalg.svdvals(array)


def _lstsq(a: Any, b: Any, rcond: float | None = None) -> Any:
    """numpy's: b may be a vector; solution, squared residuals, rank, singular values. By singular values, as LAPACK's
    gelsd, since CUDA has none that takes a matrix of less than full rank."""
    device = next(t.device for t in (a, b) if isinstance(t, torch.Tensor))
    a, b = torch.as_tensor(a, device=device), torch.as_tensor(b, device=device)
    dtype = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
    a, columns = a.to(dtype), (b if b.ndim > 1 else b[:, None]).to(dtype)
    u, values, v = torch.linalg.svd(a, full_matrices=False)
    epsilon = torch.finfo(dtype).eps
    least = epsilon * max(a.shape) if rcond is None else rcond if rcond >= 0 else epsilon
    kept = values > least * values.amax()
    solution = v.mH @ ((u.mH @ columns) / torch.where(kept, values, torch.inf)[:, None])
    rank = kept.sum()
    apart = (columns - a @ solution).square().sum(0) if rank == a.shape[1] < a.shape[0] else columns.new_empty(0)
    return solution if b.ndim > 1 else solution[:, 0], apart, rank, values


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


def _moveaxis(array: torch.Tensor, source: Any, destination: Any) -> torch.Tensor:
    """Axes in whatever numpy takes: torch takes tuples."""
    before, after = (tuple(np.atleast_1d(np.asarray(axes, int)).tolist()) for axes in (source, destination))
    return torch.moveaxis(array, before, after)


_NUMPYS: Mapping[str, Callable[..., Any]] = {
    "argsort": partial(_of_a_line, xp.argsort),
    "cumulative_sum": partial(_of_a_line, partial(_added, xp.cumulative_sum)),
    "cumulative_prod": partial(_of_a_line, partial(_added, xp.cumulative_prod)),
    "count_nonzero": _count_nonzero,
    "fabs": torch.abs,
    "sort": _sort,
    "take": _take,
    "take_along_axis": _take_along_axis,
    "copy": torch.clone,
    "transpose": _transpose,
    "matrix_transpose": lambda array: array.mT,
    "swapaxes": torch.swapaxes,
    "pad": _pad,
    "round": _round,
    "var": _var,
    "std": lambda *args, **options: _var(*args, **options).sqrt(),
    "lib.stride_tricks.sliding_window_view": _windows,
    "sum": partial(_added, xp.sum),
    "prod": partial(_added, xp.prod),
    "nansum": partial(_filled, 0.0, partial(_reduced, torch.sum)),
    "nanmean": partial(_reduced, torch.nanmean),
    "nanvar": _nanvar,
    "nanstd": lambda *args, **options: _nanvar(*args, **options).sqrt(),
    "nanmax": _nanextreme(torch.amax, -torch.inf),
    "nanmin": _nanextreme(torch.amin, torch.inf),
    "nanargmax": _nanarg(torch.argmax, -torch.inf),
    "nanargmin": _nanarg(torch.argmin, torch.inf),
    "nanprod": partial(_filled, 1.0, xp.prod),
    "isin": lambda array, of, **options: torch.isin(array, torch.as_tensor(of, device=array.device), **options),
    "cumsum": partial(_added, partial(_cumulated, torch.cumsum)),
    "cumprod": partial(_added, partial(_cumulated, torch.cumprod)),
    "nancumsum": partial(_filled, 0.0, partial(_cumulated, torch.cumsum)),
    "nancumprod": partial(_filled, 1.0, partial(_cumulated, torch.cumprod)),
    "floor_divide": _FLOOR_DIVIDE,
    "remainder": _REMAINDER,
    "mod": _REMAINDER,
    "divmod": lambda a, b: (_FLOOR_DIVIDE(a, b), _REMAINDER(a, b)),
    "moveaxis": _moveaxis,
    "searchsorted": _searchsorted,
    "unravel_index": torch.unravel_index,
    "linalg.svd": _svd,
    "linalg.lstsq": _lstsq,
    "linalg.trace": _trace,
    "quantile": partial(_quantile, False),
    "nanquantile": partial(_quantile, True),
    "median": partial(_median, False),
    "nanmedian": partial(_median, True),
    "linalg.norm": _norm,
}


def find(name: str) -> Callable[..., Any] | None:
    """What numpy calls `name`, with numpy's arguments and results; None if there is none."""
    if name in _NUMPYS:
        return _NUMPYS[name]
    name = _CALLED.get(name, name)
    return operator.attrgetter(name)(xp) if name in _SAME else None
