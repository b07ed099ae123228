"""Counting NaN and infinity in numbers that are on their way, at the cost of looking at their largest bits.

Every bit of a float's exponent is set in what is not finite: as integers, with and without a sign, these are the
largest there are, so that two maxima, which are as fast as memory, tell that there is none.
"""

from __future__ import annotations

from functools import cache

import numpy as np

_INFINITY = {"float16": 0x7C00, "bfloat16": 0x7F80, "float32": 0x7F800000, "float64": 0x7FF0000000000000}
_INFINITY |= {"float8_e5m2": 0x7C, "float8_e4m3fn": 0x7F}  # the second has no infinity: its one NaN
_PARTS = {"complex64": "float32", "complex128": "float64"}


def not_finite(values: np.ndarray) -> int:
    """How many elements of a contiguous 1-D array are NaN or infinite (of complex ones, how many of their parts)."""
    unsigned, signed, infinity = _as_integers(values.dtype)
    if infinity is None or not values.size:
        return 0
    bits, sign = values.view(unsigned), 1 << (8 * unsigned.itemsize - 1)
    largest = np.maximum.reduce  # .max() of an array goes through Python first
    if largest(bits) < infinity + sign and largest(values.view(signed)) < infinity:
        return 0
    return int(np.count_nonzero((bits & unsigned.type(sign - 1)) >= infinity))


@cache
def _as_integers(dtype: np.dtype) -> tuple[np.dtype, np.dtype, int | None]:
    name = _PARTS.get(dtype.name, dtype.name)
    size = dtype.itemsize // 2 if dtype.name in _PARTS else dtype.itemsize
    if name not in _INFINITY:
        return dtype, dtype, None
    return np.dtype(f"u{size}"), np.dtype(f"i{size}"), _INFINITY[name]
