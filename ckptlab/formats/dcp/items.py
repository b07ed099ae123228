"""Items of `.distcp` files: a tensor or an object each, at a place that `.metadata` tells. Headers only.

An item is what torch.save writes, a whole zip at any offset; or the file is one of safetensors, its tensors by key.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from itertools import islice
from typing import Any, Protocol

import numpy as np

from ckptlab import paths
from ckptlab.errors import CheckpointError, UnsupportedError
from ckptlab.formats.dcp.metadata import Blob, Entry, Metadata
from ckptlab.formats.safefile import read_header
from ckptlab.formats.torch import torchfile
from ckptlab.formats.torch.torchfile import fetch_headers
from ckptlab.stored import Stored, row_major_strides

_ZSTD = b"\x28\xb5\x2f\xfd"
ZIP = b"PK\x03\x04"
_MOST = 1024  # items of a tensor whose headers are fetched at once, of far files
_SMALL = 4096  # bytes of an item that are kept, for objects that many items repeat


class Items(Protocol):
    """The stored boxes of one tensor, by number."""

    def __call__(self, index: int) -> Stored:
        """Box `index`, as it lies in its file: of the box's shape, with the strides that it was stored with."""


class EntryItems:
    """The items of an entry of `.metadata`, each looked up when it is asked for."""

    def __init__(self, metadata: Metadata, entry: Entry) -> None:
        self.metadata, self.entry = metadata, entry
        self._fetched = not paths.is_far(metadata.folder)

    def __call__(self, index: int) -> Stored:
        entry = self.entry
        if not self._fetched:
            places = zip(entry.file.tolist(), entry.offset.tolist(), entry.length.tolist(), strict=True)
            fetch_headers([(self.metadata.path(f), offset, length) for f, offset, length in islice(places, _MOST)])
            self._fetched = True
        file, shape = int(entry.file[index]), tuple(entry.sizes[index].tolist())
        path, offset, length = self.metadata.path(file), int(entry.offset[index]), int(entry.length[index])
        refuse_transforms(self.metadata, file, entry.key)
        stored = tensor_at(path, offset, length, entry.key)
        if stored.shape != shape or stored.dtype != entry.dtype:
            raise CheckpointError(
                f"{path}: {entry.key}: the item at byte {offset} holds {stored.dtype} of shape {stored.shape}, "
                f".metadata says {entry.dtype} of {shape}: the file is damaged, or of another save; put back this one"
            )
        return stored


def refuse_transforms(metadata: Metadata, file: int, key: str) -> None:
    """UnsupportedError for a file whose streams were compressed."""
    if file in metadata.transforms:
        raise UnsupportedError(
            f"{metadata.path(file)}: {key}: its items went through {metadata.transforms[file]}, which ckptlab does not "
            "read: load it with torch and save it again without extensions"
        )


def tensor_at(path: str, offset: int, length: int, key: str) -> Stored:
    """The tensor that a place in a file holds. CheckpointError, naming file and key, where it holds none."""
    with _naming(path, offset, length, key):
        if _is_safetensors(path, _version(path)):
            return _in_safetensors(path, key)
        found = torchfile.read_contents(path, offset, length).value
    if type(found) is not Stored:
        raise CheckpointError(
            f"{path}: {key}: the item at byte {offset} is a {type(found).__name__}, expected a tensor: the file is of "
            "another save, or damaged; put back this save's"
        )
    return found


def object_at(metadata: Metadata, blob: Blob) -> Any:
    """The object of a bytes entry: plain values, and placeholders of what is not imported."""
    path = metadata.path(blob.file)
    refuse_transforms(metadata, blob.file, blob.key)
    with _naming(path, blob.offset, blob.length, blob.key):
        if blob.length > _SMALL:
            return torchfile.read_contents(path, blob.offset, blob.length).value
        raw = paths.read(path, blob.offset, blob.length)
        if raw in _objects:
            return _objects[raw]
        found = torchfile.read_contents(path, blob.offset, blob.length).value
        if type(found) in (bool, int, float, str, type(None)) and len(_objects) < _SMALL:
            _objects[raw] = found  # equal objects are equal bytes: thousands of parameters have one learning rate
        return found


_objects: dict[bytes, Any] = {}


def number_at(metadata: Metadata, entry: Entry) -> Any:
    """The value of a tensor of one element."""
    if not len(entry.file):
        raise CheckpointError(f"{metadata.folder}: .metadata does not say where {entry.key} lies")
    file, offset, length = (int(of[0]) for of in (entry.file, entry.offset, entry.length))
    raw = b""
    with suppress(OSError):  # that it is missing is said where it is read as a tensor
        raw = paths.read(metadata.path(file), offset, min(length, _SMALL))
    key = raw, entry.dtype.str, entry.shape
    if key in _numbers:  # equal numbers are equal bytes: thousands of parameters have one step
        return _numbers[key]
    found = np.array(EntryItems(metadata, entry)(0).map()).reshape(()).item()
    if raw[:4] == ZIP and len(raw) == length and len(_numbers) < _SMALL:
        _numbers[key] = found
    return found


_numbers: dict[tuple[bytes, str, tuple[int, ...]], Any] = {}


@contextmanager
def _naming(path: str, offset: int, length: int, key: str) -> Iterator[None]:
    """Errors of what is read there name the file and the key."""
    try:
        yield
    except FileNotFoundError:
        raise CheckpointError(f"{path}: missing: {key} lies in it") from None
    except CheckpointError as error:
        raise type(error)(f"{_said(path, offset, length, key)}: {error}") from None


def _said(path: str, offset: int, length: int, key: str) -> str:
    start = paths.read(path, offset, 4)
    if start == _ZSTD:
        return f"{key}: a stream of zstd, which is not read: save again without extensions"
    size = paths.size(path)
    if offset + length > size:
        return f"{key}: the item is said to end at byte {offset + length:,}, the file has {size:,}"
    return f"{key}: the item of {length:,} bytes at byte {offset:,}"


def found_by_key(metadata: Metadata, file: int) -> bool:
    """Whether a file is one of safetensors, whose items are found by key: `.metadata` says byte 0 of all."""
    path = metadata.path(file)
    try:
        return _is_safetensors(path, _version(path))
    except OSError:  # that it is missing is said where it is read
        return False


def _version(path: str) -> int:
    """A number that changes with a file; of a far one, the size."""
    return paths.size(path) if paths.is_far(path) else os.stat(path).st_mtime_ns


@lru_cache(maxsize=4096)
def _is_safetensors(path: str, _version: int) -> bool:
    head = paths.read(path, 0, 9)
    return len(head) == 9 and head[8:] == b"{" and struct.unpack("<Q", head[:8])[0] < paths.size(path)


@lru_cache(maxsize=256)
def _header(path: str, _version: int) -> dict[str, Stored]:
    return read_header(path)


def _in_safetensors(path: str, key: str) -> Stored:
    header = _header(path, _version(path))
    found = header.get(key)
    if found is None:
        raise CheckpointError(f"{path}: has no tensor {key!r}: it is of another save; put back this save's")
    return found


class Window:
    """A part of every box of other items: of box `boxes[i]` the elements from `starts[i]` on, `sizes[i]` many, and
    without the dims `dropped`, on which it is one element long."""

    def __init__(self, items: Items, boxes: Any, starts: Any, sizes: Any, dropped: int = 0) -> None:
        self.items, self.boxes, self.starts, self.sizes, self.dropped = items, boxes, starts, sizes, dropped

    def __call__(self, index: int) -> Stored:
        stored = self.items(int(self.boxes[index]))
        return window(stored, self.starts[index].tolist(), self.sizes[index].tolist(), self.dropped)


class Known:
    """Boxes that were found when headers were read."""

    def __init__(self, stored: list[Stored]) -> None:
        self.stored = stored

    def __call__(self, index: int) -> Stored:
        return self.stored[index]


def window(stored: Stored, starts: list[int], sizes: list[int], dropped: int = 0) -> Stored:
    """A box of a stored tensor, without its first `dropped` dims, where it is not larger than 1."""
    first = sum(start * stride for start, stride in zip(starts, stored.strides, strict=True)) if all(sizes) else 0
    shape = tuple(sizes[dropped:])
    along = zip(shape, stored.strides[dropped:], row_major_strides(shape), strict=True)
    strides = tuple(plain if n == 1 else stride for n, stride, plain in along)
    return Stored(stored.path, stored.offset + first * stored.dtype.itemsize, stored.dtype, shape, strides)
