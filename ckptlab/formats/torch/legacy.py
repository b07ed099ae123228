"""The form of torch's files before 1.6, which `_use_new_zipfile_serialization=False` still writes.

Five pickles, one after the other (a magic number, the protocol, what the machine was, the object, the keys of its
storages), then the storages, each with its number of elements before it (`torch/serialization.py`, `_legacy_save` and
`_legacy_load`).
"""

from __future__ import annotations

import io
import pickletools
import struct
from collections.abc import Mapping
from typing import Any, BinaryIO

from ckptlab import paths
from ckptlab.errors import CheckpointError, UnsafeFileError, UnsupportedError
from ckptlab.formats.torch import budget, pickles
from ckptlab.formats.torch.pickles import Global
from ckptlab.formats.torch.torchzip import Record
from ckptlab.words import brief

_MAGIC = b"\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19."  # the number, pickled, without its two bytes of protocol
_COUNT = struct.Struct("<q")
_OPCODES = 4_000_000  # of an object: some forty a tensor
_HEAD = 1 << 20  # bytes that are read at first: the pickles of most files


def is_legacy(file: BinaryIO) -> bool:
    """Whether an open file is of that form."""
    return paths.read_at(file, 2 + len(_MAGIC), 0)[2:] == _MAGIC


class LegacyRecords:
    """What is in such a file, under the names that it would have in a zip: `data.pkl`, and the storages, `data/KEY`.

    sizes: bytes an element of the storage classes. UnsafeFileError or CheckpointError where the file is cut, or lies.
    """

    root = "archive"

    def __init__(self, path: str, file: BinaryIO, sizes: Mapping[str, int]) -> None:
        self.path = path
        head, ends = _pickles(path, file)
        parts = [head[start:end] for start, end in zip([0, *ends], ends, strict=False)]
        _, _, machine, self._object, keys = parts
        told = pickles.loads(machine, path)
        if not isinstance(told, dict) or told.get("little_endian") is not True:
            raise UnsupportedError(f"{path}: its numbers are not little-endian; load it with torch and save it again")
        order = pickles.loads(keys, path)
        if not isinstance(order, list) or not all(isinstance(key, str) for key in order):
            raise UnsafeFileError(f"{path}: expected a list of storages, found {brief(order)}; do not use the file")
        kinds = _Kinds(self._object, path)
        kinds.load()
        self._places: dict[str, Record] = {}
        at, end = ends[-1], paths.size(path)
        for key in order:
            kind = kinds.found.get(key)
            if kind is None or key in self._places:
                raise UnsafeFileError(
                    f"{path}: storage {brief(key)} is no tensor's, or there twice; do not use the file"
                )
            if kind not in sizes:
                raise UnsupportedError(f"{path}: a tensor is kept in a torch.{kind}; convert it to a plain dtype")
            count = paths.read_at(file, _COUNT.size, at)
            size = _COUNT.unpack(count)[0] * sizes[kind] if len(count) == _COUNT.size else -1
            if not 0 <= size <= end - at - _COUNT.size:
                raise CheckpointError(
                    f"{path}: storage {key} goes beyond the end of the file: it was cut; copy it again"
                )
            self._places[key] = Record(at + _COUNT.size, size)
            at += _COUNT.size + size

    def __contains__(self, name: str) -> bool:
        return False

    def bytes_of(self, name: str, most: int = budget.PICKLE_BYTES) -> bytes:
        """The pickle of the object."""
        return self._object

    def extent(self, name: str) -> Record:
        """Where a storage lies."""
        key = name.removeprefix("data/")
        if key not in self._places:
            raise CheckpointError(f"{self.path} has no storage {brief(key)}: it is incomplete")
        return self._places[key]


class _Kinds(pickles.Unpickler):
    """Goes through the object for the classes of its storages: {key: class}."""

    def __init__(self, data: bytes, source: str) -> None:
        super().__init__(data, source)
        self.found: dict[str, str] = {}

    def persistent_load(self, pid: Any) -> None:
        match pid:
            case ("storage", Global(name=kind), str(key), *_):
                if self.found.setdefault(key, kind) != kind:
                    raise UnsafeFileError(f"storage {brief(key)} is of two classes; do not use the file")
                return
        raise UnsafeFileError(f"its pickle refers to {brief(pid)}, which is no storage; do not use it")


def _pickles(path: str, file: BinaryIO) -> tuple[bytes, list[int]]:
    """The beginning of a file, and where each of the five pickles in it ends."""
    size, wanted = paths.size(path), _HEAD
    while True:
        head = paths.read_at(file, min(wanted, size), 0)
        stream, ends = io.BytesIO(head), []
        try:
            for _ in range(5):
                for count, _ in enumerate(pickletools.genops(stream)):
                    if count > _OPCODES:
                        raise UnsafeFileError(
                            f"{path}: a pickle of more than {_OPCODES:,} opcodes; do not use the file"
                        )
                ends.append(stream.tell())
        except ValueError as error:  # that ends before a pickle does
            if len(head) == size or wanted >= budget.PICKLE_BYTES:
                raise CheckpointError(
                    f"{path}: its pickles cannot be read ({error}): it was cut; copy it again"
                ) from None
            wanted = min(wanted * 8, budget.PICKLE_BYTES)
            continue
        return head, ends
