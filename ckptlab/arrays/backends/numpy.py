"""numpy: arrays in the process's own memory, or mapped from files."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ckptlab.arrays.backends.base import Backend
from ckptlab.arrays.dtypes import is_narrow
from ckptlab.errors import BackendError


class NumpyBackend(Backend):
    """numpy's arrays; those of narrow dtypes are wrapped, so that their sums are right."""

    name = "numpy"
    device = "cpu"
    takes_dask = True

    def __init__(self, device: Any = None) -> None:
        if device not in (None, "cpu"):
            raise BackendError(f"numpy's arrays are on the cpu, not on {device!r}: for that take torch or jax")

    def is_array(self, value: Any) -> bool:
        return isinstance(value, np.ndarray)

    def dtype_of(self, array: np.ndarray) -> np.dtype:
        return array.dtype

    def library_dtype(self, dtype: np.dtype) -> np.dtype:
        return dtype

    def from_numpy(self, array: np.ndarray, *, owned: bool = False) -> np.ndarray:
        return array

    def to_numpy(self, array: np.ndarray) -> np.ndarray:
        return array

    def empty(self, shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
        return np.empty(tuple(shape), dtype)

    def cast(self, array: np.ndarray, dtype: np.dtype) -> np.ndarray:
        return array.astype(dtype)

    def dlpack(self, array: np.ndarray, **options: Any) -> Any:
        """numpy itself exports no dtype of ml_dtypes: torch does, on the same memory where that may be written to."""
        if array.dtype.isbuiltin == 1:
            return array.__dlpack__(**options)
        from ckptlab.arrays.backends import resolve

        return resolve("torch").from_numpy(array, owned=True).__dlpack__(**options)

    def is_safe(self, array: np.ndarray) -> bool:
        return not is_narrow(array.dtype)

    def function(self, name: str) -> Callable[..., Any] | None:
        try:
            return operator.attrgetter(name)(np)
        except AttributeError:
            return None
