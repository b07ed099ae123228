"""What xarray is taught of our arrays, where it asks a dtype or an adapter of its own and not the array.

Each question is answered anew for `Duck`, for views that are not read yet and for dtypes that numpy has not (of which
xarray's answer is an error); of everything else xarray answers as ever. It has no protocol for any of them (xarray
2026.9).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, wraps
from typing import Any

import numpy as np
import xarray as xr
from xarray import conventions
from xarray.core import dtypes, indexing, nputils
from xarray.namedarray import daskmanager
from xarray.plot import accessor

from ckptlab.arrays.backends import Backend, resolve
from ckptlab.arrays.dtypes import WIDE, Narrow, is_kind, is_narrow, seen
from ckptlab.arrays.duck import Duck, refuse_dask


def _is_kind(before: Any, dtype: Any, kind: Any, *args: Any, **options: Any) -> bool:
    """Whether a dtype is of a kind ("real floating")."""
    return is_kind(dtype, kind) if isinstance(dtype, Narrow) else bool(before(dtype, kind, *args, **options))


def _promoted(before: Any, dtype: Any) -> Any:
    """The dtype that can hold what is missing, and that: NaN, which most narrow dtypes have."""
    dtype = seen(dtype) if isinstance(dtype, np.dtype) else dtype  # as a view says it that is not read yet
    if not isinstance(dtype, Narrow):
        return before(dtype)
    missing = np.array(np.nan).astype(dtype.dtype)
    if not np.isnan(missing.astype(np.float32)):
        raise TypeError(
            f"{dtype} has no NaN for what is missing: say what stands there (other=, fill_value=, constant_values=), "
            'or open the view with dtype="float32"'
        )
    return dtype, np.nan


def _vindex(before: Any, adapter: Any, indexer: Any) -> Any:
    """Elements at points, of several dims at once."""
    if not isinstance(adapter.array, Duck):
        return before(adapter, indexer)
    placed, wanted = nputils._advanced_indexer_subspaces(indexer.tuple)
    return np.moveaxis(adapter.array[indexer.tuple], tuple(map(int, placed)), tuple(map(int, wanted)))


def _chunked(before: Any, manager: Any, data: Any, *args: Any, **options: Any) -> Any:
    """An array of dask; refused where that would add up wrongly, or leave the device."""
    if (ours := _ours(data)[-1]) is not None:
        refuse_dask(ours.backend, ours.dtype)
    return before(manager, data, *args, **options)


def _encoded(before: Any, variable: xr.Variable, *args: Any, **options: Any) -> xr.Variable:
    """A variable as xarray's files hold it: numpy's, in a dtype that they know."""
    if _is_ours(variable) and isinstance(seen(np.dtype(variable.dtype)), Narrow):
        named = f"{options['name']}: " if options.get("name") else ""
        raise TypeError(
            f"{named}netCDF and zarr have no {np.dtype(variable.dtype)}: ckptlab.save_view(view, path) keeps its bits, "
            'or open the view with dtype="float32"'
        )
    return before(_numpys(variable), *args, **options)


def _reduced(
    before: Any, dataset: xr.Dataset, func: Any, dim: Any = None, *, numeric_only: bool = False, **options: Any
) -> Any:
    """Reductions of a Dataset take our narrow variables for the numbers that they are."""
    held = {name: array.variable for name, array in dataset.data_vars.items()} if numeric_only else {}
    numbers = {name for name, array in held.items() if _is_ours(array) and is_narrow(array.dtype)}
    if numbers:
        over = set(dataset.dims if dim is None or dim is ... else [dim] if isinstance(dim, str) else dim)
        left = [name for name, array in held.items() if name not in numbers and over & {*array.dims}]
        dataset = dataset.drop_vars([name for name in left if not is_kind(held[name].dtype, ("numeric", "bool"))])
    return before(dataset, func, dim, numeric_only=numeric_only and not numbers, **options)


def _plotted(before: Any, plots: Any, shown: Any) -> None:
    """What matplotlib is given."""
    before(plots, _widened(shown))


def _wide(before: Any, shown: Any, *args: Any, **options: Any) -> Any:
    """What leaves for numpy's masked arrays and for pandas, whose sums of narrow dtypes are wrong."""
    return before(_widened(shown), *args, **options)


def _widened(shown: Any) -> Any:
    """An array or Dataset on numpy and, where its dtype is narrow, in float32, as far as it is ours; read no sooner."""
    if isinstance(shown, xr.Dataset):
        return shown.assign({name: _widened(array) for name, array in shown.data_vars.items()})
    if not _is_ours(shown.variable):
        return shown
    return shown.copy(deep=False, data=_numpys(shown.variable, WIDE if is_narrow(shown.dtype) else None)._data)


def _numpys(variable: xr.Variable, dtype: np.dtype | None = None) -> xr.Variable:
    """A variable of ours on numpy, in another dtype if one is said; others as they are."""
    holder, ours = _ours(variable._data)
    if ours is None:
        return variable
    dtype = np.dtype(ours.dtype) if dtype is None else dtype
    if isinstance(ours, Duck):
        return variable.copy(deep=False, data=ours.to_numpy().astype(dtype, copy=False))
    return variable.copy(deep=False, data=type(holder)(ours.on(resolve(), dtype), holder.key))


def _is_ours(variable: xr.Variable) -> bool:
    return _ours(variable._data)[1] is not None


def _ours(data: Any) -> tuple[Any, Any]:
    """Our array under xarray's adapters (a `Duck`, or what a view delivers) and what holds it; (None, None) if there is
    none."""
    holder = None
    while data is not None and not isinstance(getattr(data, "backend", None), Backend):
        holder, data = data, getattr(data, "array", None)
    return (None, None) if data is None else (holder, data)


_TAUGHT: tuple[tuple[Any, str, Callable[..., Any]], ...] = (
    (dtypes, "isdtype", _is_kind),
    (dtypes, "maybe_promote", _promoted),
    (getattr(indexing, "ArrayApiIndexingAdapter", None), "_vindex_get", _vindex),
    (getattr(daskmanager, "DaskManager", None), "from_array", _chunked),
    (conventions, "encode_cf_variable", _encoded),
    (xr.Dataset, "reduce", _reduced),
    (getattr(accessor, "DataArrayPlotAccessor", None), "__init__", _plotted),
    (getattr(accessor, "DatasetPlotAccessor", None), "__init__", _plotted),
    *((xr.DataArray, name, _wide) for name in ("to_dataframe", "to_masked_array", "to_pandas", "to_series")),
    (xr.Dataset, "to_dataframe", _wide),
)


@cache
def teach() -> None:
    """Once, when the first of our arrays goes to xarray. An xarray that asks otherwise answers in its own words."""
    for owner, name, answer in _TAUGHT:
        if (before := getattr(owner, name, None)) is not None:
            setattr(owner, name, _answering(answer, before))


def _answering(answer: Callable[..., Any], before: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(before)
    def asked(*args: Any, **kwargs: Any) -> Any:
        return answer(before, *args, **kwargs)

    return asked
