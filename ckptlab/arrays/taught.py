"""What xarray is taught of our arrays, where it asks a dtype or an adapter of its own and not the array.

Both questions are answered anew for `Duck` and for dtypes that numpy has not (of which xarray's answer is an error); of
everything else xarray answers as ever. It has no protocol for either (xarray 2026.9, `core/dtypes.py`,
`core/indexing.py`).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from xarray.core import dtypes, indexing, nputils

from ckptlab.arrays.dtypes import Narrow, seen
from ckptlab.arrays.duck import Duck

_PROMOTED: Any = getattr(dtypes, "maybe_promote", None)
_ADAPTER: Any = getattr(indexing, "ArrayApiIndexingAdapter", None)
_VINDEX: Any = getattr(_ADAPTER, "_vindex_get", None)


def _promoted(dtype: Any) -> Any:
    """The dtype that can hold what is missing, and that: NaN, which most narrow dtypes have."""
    dtype = seen(dtype) if isinstance(dtype, np.dtype) else dtype  # as a view says it that is not read yet
    if not isinstance(dtype, Narrow):
        return _PROMOTED(dtype)
    missing = np.array(np.nan).astype(dtype.dtype)
    if not np.isnan(missing.astype(np.float32)):
        raise TypeError(
            f"{dtype} has no NaN for what is missing: say what stands there (other=, fill_value=, constant_values=), "
            'or open the view with dtype="float32"'
        )
    return dtype, np.nan


def _vindex(adapter: Any, indexer: Any) -> Any:
    """Elements at points, of several dims at once."""
    if not isinstance(adapter.array, Duck):
        return _VINDEX(adapter, indexer)
    placed, wanted = nputils._advanced_indexer_subspaces(indexer.tuple)
    return np.moveaxis(adapter.array[indexer.tuple], tuple(map(int, placed)), tuple(map(int, wanted)))


def teach() -> None:
    """Once, when the first of our arrays goes to xarray. An xarray that asks otherwise answers in its own words."""
    if _PROMOTED is not None:
        setattr(dtypes, "maybe_promote", _promoted)  # noqa: B010 - theirs, as far as types go
    if _VINDEX is not None:
        setattr(_ADAPTER, "_vindex_get", _vindex)  # noqa: B010 - the same
