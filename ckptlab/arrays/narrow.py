"""Dtypes of 16 bits and fewer, and the wider one in which they are shown.

numpy adds up bfloat16 and fp8 (of ml_dtypes) in their own few bits, and float16 overflows: the sum of 2**20 bfloat16
ones is 256. xarray refuses much of the rest (`isnull`, `where`, means that skip NaN). So labelled arrays show these
dtypes decoded to float32, as xarray decodes packed netCDF data: every value is kept exactly and every operation is
right, dask's too. A duck array that keeps the dtype cannot do it: xarray asks `numpy.isdtype`, which raises on any
dtype that is not numpy's own. The bits are what `Gather` reads, and `array.astype(array.stored_dtype)` gives them back.
"""

from __future__ import annotations

from typing import Any

import numpy as np

WIDE = np.dtype(np.float32)  # holds every value of every narrow dtype


def is_narrow(dtype: Any) -> bool:
    """Whether numpy cannot be trusted to add up this dtype: float16, and all that ml_dtypes adds."""
    dtype = np.dtype(dtype)
    return dtype.itemsize <= 2 and dtype.kind in "fV" and dtype.type is not np.void


def shown(dtype: Any) -> np.dtype:
    """The dtype in which a stored one is shown: float32 for narrow ones, else the same."""
    return WIDE if is_narrow(dtype) else np.dtype(dtype)
