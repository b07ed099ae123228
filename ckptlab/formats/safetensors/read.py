"""Safetensors → a catalog of whole tensors.

The format: eight bytes of length, a JSON header, then the data (https://github.com/huggingface/safetensors).
"""

from __future__ import annotations

import json
import math
import os
import struct
from typing import Any

import ml_dtypes
import numpy as np

from ckptlab.catalog import ALONE, MASTER, PARAM, Catalog, Extents, Fragment, Tensor, whole_placements
from ckptlab.errors import CheckpointError
from ckptlab.findings import Faults, Finding, Where
from ckptlab.layout import Cut
from ckptlab.mesh import Mesh
from ckptlab.sharding.strategies import replicated
from ckptlab.stored import Stored, row_major_strides

INDEX = "model.safetensors.index.json"

_DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
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
NAMES = {dtype: name for name, dtype in _DTYPES.items()}


def read_header(path: str) -> dict[str, Stored]:
    """Where each tensor of a file lies. CheckpointError if the header is damaged or points outside the file."""
    size = os.path.getsize(path)
    with open(path, "rb") as f:
        head = f.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else size
        if length > size - 8:
            raise CheckpointError(
                f"{path}: the header claims {length:,} bytes, the file has {size:,}: truncated, or no safetensors file"
            )
        try:
            header = json.loads(f.read(length))
        except (ValueError, RecursionError) as e:
            raise CheckpointError(f"{path}: the header is not JSON ({e}): damaged, or no safetensors file") from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: the header is a {type(header).__name__}: damaged, or no safetensors file")
    return {
        name: _entry(path, name, entry, 8 + length, size) for name, entry in header.items() if name != "__metadata__"
    }


def _entry(path: str, name: str, entry: Any, begin: int, size: int) -> Stored:
    """Where a tensor lies by its entry in the header; the data part begins at `begin` of `size` bytes."""
    match entry:
        case {"shape": list(shape), "data_offsets": [int(lo), int(hi)], "dtype": str(kind)}:
            pass
        case _:
            raise CheckpointError(f"{path}: {name}: expected shape, data_offsets and dtype: the header is damaged")
    if not all(isinstance(n, int) and n >= 0 for n in shape):
        raise CheckpointError(f"{path}: {name}: shape {shape}: the header is damaged")
    dtype = _DTYPES.get(kind)
    if dtype is None:
        raise CheckpointError(f"{path}: {name}: dtype {kind!r} is unknown to ckptlab")
    expected = math.prod(shape) * dtype.itemsize
    if not 0 <= lo <= hi <= size - begin or hi - lo != expected:
        raise CheckpointError(
            f"{path}: {name}: bytes {lo:,} to {hi:,} of a {size - begin:,} byte data part, expected {expected:,} bytes "
            f"for {tuple(shape)}: the file is truncated or damaged"
        )
    return Stored(path, begin + lo, dtype, tuple(shape), row_major_strides(tuple(shape)))


def read_safetensors(path: str, faults: Faults) -> Catalog | None:
    """A file or folder of safetensors: whole tensors, no mesh, no optimizer; one state, fp32 or module by dtype.

    None where `faults` was told of files that are missing or damaged.
    """
    folder, names = (os.path.split(path)[0], [os.path.basename(path)]) if os.path.isfile(path) else (path, None)
    if names is None:
        names = _files(path, faults)
    tensors: dict[str, Tensor] = {}
    pieces = {}
    for file in names:
        for name, stored in (faults.read(folder, file, read_header) or {}).items():
            layout = replicated(len(stored.shape))
            state = MASTER if stored.dtype == np.float32 else PARAM
            tensors[name] = Tensor(
                name, stored.shape, layout, Cut.whole(stored.shape), "parameter", {state: stored.dtype}
            )
            pieces[name, state] = {ALONE: (Fragment(0, stored),)}
    if faults.failed:
        return None
    placements = whole_placements(tensors, pieces)
    return Catalog(path, "safetensors", Mesh(), tensors, placements, Extents(pieces), files=tuple(names))


def _files(path: str, faults: Faults) -> list[str]:
    """The names of a folder's files: those in its index, or all."""
    names = sorted(n for n in os.listdir(path) if n.endswith(".safetensors"))
    if os.path.isfile(os.path.join(path, INDEX)):
        names = sorted(set(faults.read(path, INDEX, _indexed) or names))
    missing = [n for n in names if not os.path.isfile(os.path.join(path, n))]
    if missing or not names:
        faults.report(_missing(path, missing))
    return [n for n in names if n not in missing]


def _indexed(path: str) -> list[str]:
    """The files that an index names. CheckpointError if it is no index, or names a file elsewhere."""
    with open(path, encoding="utf-8", errors="replace") as f:
        try:
            index = json.load(f)
        except (ValueError, RecursionError) as e:
            raise CheckpointError(f"{path}: not JSON ({e}): copy it again") from None
    files = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(files, dict) or not all(isinstance(n, str) and n == os.path.basename(n) for n in files.values()):
        raise CheckpointError(f"{path}: no weight_map of tensor names to files in this folder: copy it again")
    return list(files.values())


def _missing(path: str, names: list[str]) -> Finding:
    found = f"{', '.join(names) or 'no .safetensors file'} missing"
    todo = "copy the missing files from where the others were written"
    return Finding(
        "missing-file", "error", Where(tuple(names)), f"the files of {INDEX}", found, todo, "files", f"{path}: {found}"
    )
