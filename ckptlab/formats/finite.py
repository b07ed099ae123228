"""Counting NaN and infinity in numbers that are on their way, at the cost of looking at their largest bits.

Every bit of a float's exponent is set in what is not finite: as integers, with and without a sign, these are the
largest there are, so that two maxima, which are as fast as memory, tell that there is none.
"""

from __future__ import annotations

import numpy as np

_INFINITY = {"float16": 0x7C00, "bfloat16": 0x7F80, "float32": 0x7F800000, "float64": 0x7FF0000000000000}
_INFINITY |= {"float8_e5m2": 0x7C, "float8_e4m3fn": 0x7F}  # the second has no infinity: its one NaN
_PARTS: dict[str, np.dtype] = {"complex64": np.dtype(np.float32), "complex128": np.dtype(np.float64)}


def not_finite(values: np.ndarray) -> int:
    """How many elements of a contiguous 1-D array are NaN or infinite (of complex ones, how many of their parts)."""
    if values.dtype.name in _PARTS:
        values = values.view(_PARTS[values.dtype.name])
    infinity = _INFINITY.get(values.dtype.name)
    if infinity is None or not values.size:
        return 0
    unsigned = values.view(f"u{values.itemsize}")
    sign = 1 << (8 * values.itemsize - 1)
    if unsigned.max() < infinity + sign and values.view(f"i{values.itemsize}").max() < infinity:
        return 0
    return int(np.count_nonzero((unsigned & unsigned.dtype.type(sign - 1)) >= infinity))
