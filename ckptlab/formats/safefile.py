"""A file of safetensors: what stands in its header.

The format: eight bytes of length, a JSON header, then the data (https://github.com/huggingface/safetensors).
"""

from __future__ import annotations

import json
import math
import struct
from functools import lru_cache
from typing import Any

import ml_dtypes
import numpy as np

from ckptlab import paths
from ckptlab.errors import CheckpointError
from ckptlab.stored import Stored, row_major_strides
from ckptlab.words import brief, shorten

SHARDING = "DCP_SHARDING_INFO"  # the key under which torch's distributed writer says where boxes begin

DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "F8_E4M3FNUZ": np.dtype(ml_dtypes.float8_e4m3fnuz),
    "F8_E5M2FNUZ": np.dtype(ml_dtypes.float8_e5m2fnuz),
    "C64": np.dtype(np.complex64),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
"""Those that numpy can say: of F4, F6_E2M3 and F6_E3M2 several elements share a byte."""
NAMES = {dtype: name for name, dtype in DTYPES.items()}


_INTEGER = frozenset((int,))
_strides = lru_cache(maxsize=4096)(row_major_strides)
_MOST_DIMS = 64  # numpy's
_SHOWN = 200  # characters of a name that an error shows
_LARGEST_HEADER = 100_000_000


class Header(dict[str, Stored]):
    """Where each tensor of a file lies. `offsets`: of those that are boxes of larger ones, where they begin there.
    `unknown`: the dtypes of tensors that are left out, since numpy cannot say them."""

    def __init__(self) -> None:
        super().__init__()
        self.offsets: dict[str, tuple[int, ...]] = {}
        self.unknown: dict[str, str] = {}


def read_header(path: str) -> Header:
    """What stands in a file's header. CheckpointError if it is damaged or points outside the file."""
    size = paths.size(path)
    with paths.open_binary(path) as f:
        head = f.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else size
        if length > size - 8:
            raise CheckpointError(
                f"{path}: the header claims {length:,} bytes, the file has {size:,}: truncated, or no safetensors file"
            )
        if length > _LARGEST_HEADER:
            raise CheckpointError(
                f"{path}: the header claims {length:,} bytes, more than the {_LARGEST_HEADER:,} that the format "
                "allows: no safetensors file, or a forged one"
            )
        header = _json(path, f.read(length))
    found = Header()
    _see_apart(
        path,
        [
            (*_enter(found, path, name, entry, 8 + length, size), name)
            for name, entry in header.items()
            if name != "__metadata__"
        ],
    )
    told = header.get("__metadata__")
    if isinstance(told, dict) and SHARDING in told:
        _enter_offsets(found, path, _json(path, told[SHARDING]))
    return found


def _json(path: str, text: Any) -> dict[str, Any]:
    """An object in a header. CheckpointError if it is none."""
    try:
        value = json.loads(text, object_pairs_hook=_once)
    except (ValueError, TypeError, RecursionError) as e:
        raise CheckpointError(f"{path}: the header is not JSON ({e}): damaged, or no safetensors file") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: the header is a {type(value).__name__}: damaged, or no safetensors file")
    return value


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of a header, in which no name may stand twice: programs differ in which they take."""
    made = dict(pairs)
    if len(made) < len(pairs):
        raise ValueError("it has two entries of one name")
    return made


def _see_apart(path: str, places: list[tuple[int, int, str]]) -> None:
    """CheckpointError where tensors, each with its first byte and its end, share bytes, which the format forbids."""
    end, before = 0, ""
    for lo, hi, name in sorted(places):
        if lo < end and lo < hi:
            both = f"{shorten(before, _SHOWN)} and {shorten(name, _SHOWN)}"
            raise CheckpointError(f"{path}: {both} lie in the same bytes: the header is damaged or forged")
        end, before = max(end, hi), name


def _enter(found: Header, path: str, name: str, entry: Any, begin: int, size: int) -> tuple[int, int]:
    """Take a tensor's entry in the header; the data part begins at `begin` of `size` bytes. Returns where the tensor
    begins and ends there."""
    try:  # there may be very many: a match statement takes as long as all the rest
        shape, (lo, hi), kind = entry["shape"], entry["data_offsets"], entry["dtype"]
        told = type(shape) is list and type(lo) is type(hi) is int and type(kind) is str
    except (KeyError, TypeError, ValueError):
        told = False
    if not told:
        said = shorten(name, _SHOWN)
        raise CheckpointError(f"{path}: {said}: expected shape, data_offsets and dtype: the header is damaged")
    if len(shape) > _MOST_DIMS or not _INTEGER.issuperset(map(type, shape)) or (shape and min(shape) < 0):
        raise CheckpointError(f"{path}: {shorten(name, _SHOWN)}: shape {brief(shape)}: the header is damaged")
    dtype = DTYPES.get(kind)
    expected = hi - lo if dtype is None else math.prod(shape) * dtype.itemsize
    far = not expected and shape and max(shape) >= 1 << 63  # of what has elements the file's size is the bound
    if not 0 <= lo <= hi <= size - begin or hi - lo != expected or far:
        raise CheckpointError(
            f"{path}: {shorten(name, _SHOWN)}: bytes {lo:,} to {hi:,} of a {size - begin:,} byte data part, expected "
            f"{expected:,} bytes for {brief(tuple(shape))}: the file is truncated or damaged"
        )
    if dtype is None:
        found.unknown[name] = shorten(kind, 40)
    else:
        sizes = tuple(shape)
        found[name] = Stored(path, begin + lo, dtype, sizes, _strides(sizes))
    return lo, hi


def _enter_offsets(found: Header, path: str, told: dict[str, Any]) -> None:
    """Take what torch's distributed writer says of where boxes begin (`torch/distributed/checkpoint/_hf_utils.py`)."""
    for name, stored in found.items():
        match told.get(name):
            case {"saved_offsets": [*starts]} if len(starts) == len(stored.shape):
                if all(type(n) is int and 0 <= n < 1 << 62 for n in starts):
                    found.offsets[name] = tuple(starts)
                    continue
            case None:
                continue
        said, shape = shorten(name, _SHOWN), brief(stored.shape)
        raise CheckpointError(f"{path}: {said}: {SHARDING} {brief(told[name])} for shape {shape}: damaged")
