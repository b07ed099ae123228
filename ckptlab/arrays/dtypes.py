"""Dtypes of 16 bits and fewer, which must not be added up in their own few bits, and how xarray may see them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from ckptlab.errors import InputError

WIDE = np.dtype(np.float32)  # holds every value of every narrow dtype

_NUMPYS = "bool uint8 uint16 uint32 uint64 int8 int16 int32 int64 float16 float32 float64 complex64 complex128"
_OTHERS = "bfloat16 float8_e4m3fn float8_e5m2 float8_e4m3fnuz float8_e5m2fnuz float8_e8m0fnu"
TORCHS: Mapping[str, np.dtype] = {
    **{name: np.dtype(name) for name in _NUMPYS.split()},
    **{name: np.dtype(getattr(ml_dtypes, name)) for name in _OTHERS.split()},
}
"""Dtypes of tensors by torch's names for them, which are numpy's (and ml_dtypes') too."""

_KINDS = {
    "bool": np.bool_,
    "signed integer": np.signedinteger,
    "unsigned integer": np.unsignedinteger,
    "integral": np.integer,
    "real floating": np.floating,
    "complex floating": np.complexfloating,
    "numeric": np.number,
}


class Narrow:
    """A dtype of ml_dtypes that does not say so: equal to it, and taken for it by all of numpy.

    xarray asks `numpy.isdtype` about every numpy dtype before it reduces or masks, and that raises on dtypes that are
    not numpy's own; of any other object it asks the array's namespace (`is_kind`).
    """

    __slots__ = ("dtype",)

    kind = "f"

    def __init__(self, dtype: np.dtype) -> None:
        self.dtype = dtype

    @property
    def name(self) -> str:
        return self.dtype.name

    @property
    def itemsize(self) -> int:
        return self.dtype.itemsize

    @property
    def type(self) -> type:
        return self.dtype.type

    def __reduce__(self) -> tuple[Any, ...]:
        return Narrow, (self.dtype,)

    def __eq__(self, other: object) -> bool:
        try:
            return np.dtype(other) == self.dtype  # type: ignore[call-overload]
        except TypeError:
            return NotImplemented

    def __hash__(self) -> int:
        return hash(self.dtype)

    def __repr__(self) -> str:
        return repr(self.dtype)

    def __str__(self) -> str:
        return str(self.dtype)


def is_narrow(dtype: Any) -> bool:
    """Whether a dtype cannot be trusted to add up: float16 (which overflows), and all that ml_dtypes adds."""
    dtype = np.dtype(dtype)
    return dtype.itemsize <= 2 and dtype.kind in "fV" and dtype.type is not np.void


def seen(dtype: np.dtype) -> Any:
    """The dtype as xarray may see it: numpy's own as they are."""
    return Narrow(dtype) if is_narrow(dtype) and dtype.isbuiltin != 1 else dtype


def is_kind(dtype: Any, kind: str | tuple[str, ...]) -> bool:
    """The array API's `isdtype`, for narrow dtypes too, which are real floating ones; a dtype is a kind too."""
    dtype = np.dtype(dtype)
    held = WIDE if is_narrow(dtype) else dtype
    kinds = kind if isinstance(kind, tuple) else (kind,)
    return any(np.issubdtype(held, _KINDS[k]) if isinstance(k, str) else dtype == k for k in kinds)


def dtype_called(dtype: Any) -> np.dtype | None:
    """numpy's dtype of that name ("float32", "bfloat16"), type, or torch's dtype; None of None. InputError for what is
    none."""
    if dtype is None:
        return None
    text = str(dtype).removeprefix("torch.") if type(dtype).__module__ == "torch" else dtype
    try:
        return np.dtype(getattr(ml_dtypes, text, text) if isinstance(text, str) else text)
    except Exception:  # numpy raises whatever the object at hand does
        told = repr(dtype) if isinstance(dtype, str | int | float) else f"a {type(dtype).__name__}"
        raise InputError(f'a dtype is "float32", "bfloat16", … or numpy\'s own, not {told}') from None
