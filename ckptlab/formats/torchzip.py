"""The zip that a `.pt` file is: records, stored uncompressed under one root folder, aligned to 64 bytes.

The format of the headers is in PKWARE's APPNOTE (4.3.7 local header, 4.5.3 zip64); what torch makes of it is
in `caffe2/serialize/inline_container.cc`.
"""

import io
import os
import struct
import tarfile
import zipfile
from collections import Counter
from collections.abc import Iterable
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from ckptlab.errors import CheckpointError, UnsafeFileError, UnsupportedError

_ALIGNMENT = 64
_PIECE = 1 << 20  # bytes that are checksummed and written at a time: they stay in the cache between the two
_LOCAL_HEADER = struct.Struct("<4sHHHHHIIIHH")
_ZIP64_EXTRA = 20  # bytes of it that Python's zipfile puts into a local header
_LEGACY_MAGIC = b"\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19"  # torch's number before the zip format


class Record(NamedTuple):
    """Where a record's data lies: its first byte in the file, and how many there are."""

    offset: int
    size: int


class Window(io.RawIOBase):
    """`length` bytes of an open file, from byte `base` on, as a file of their own."""

    def __init__(self, file: BinaryIO, base: int, length: int) -> None:
        self._file, self._base, self._length, self._at = file, base, length, 0

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}[whence]
        if start + offset < 0:
            raise OSError(f"there is no byte {start + offset}")
        self._at = start + offset
        return self._at

    def tell(self) -> int:
        return self._at

    def seekable(self) -> bool:
        return True

    def read(self, size: int | None = -1) -> bytes:
        left = max(self._length - self._at, 0)
        count = left if size is None or size < 0 else min(size, left)
        data = os.pread(self._file.fileno(), count, self._base + self._at)
        self._at += len(data)
        return data


class RecordReader:
    """The records of an open `.pt` file, or of one that lies in a file from byte `base` on, `length` bytes long. Reads
    the zip's directory and no data.

    Raises UnsafeFileError, UnsupportedError or CheckpointError where it is no such zip, or an ambiguous one.
    """

    def __init__(self, path: str, file: BinaryIO, base: int = 0, length: int | None = None) -> None:
        self.path = path
        self._file = file
        self._base = base
        window: Any = file if length is None else Window(file, base, length)
        self._directory = _directory(path, window)
        names = [info.filename for info in self._directory.infolist()]
        if len(set(names)) < len(names):
            double = Counter(names).most_common(1)[0][0]
            raise UnsafeFileError(
                f"{path}: two records are named {double!r}, so that programs differ in what they read; do not use it"
            )
        if any(name.rpartition("/")[2] == "constants.pkl" for name in names):
            raise UnsafeFileError(
                f"{path} is a TorchScript archive (it has a record constants.pkl), which holds code to run; "
                f"save the model's state_dict with torch.save instead"
            )
        self._root = names[0].partition("/")[0] if names else ""

    def __contains__(self, name: str) -> bool:
        return f"{self._root}/{name}" in self._directory.NameToInfo

    def extent(self, name: str) -> Record:
        """Where the data of record `name` (without the root) lies in the file."""
        info = self._directory.NameToInfo.get(f"{self._root}/{name}")
        if info is None:
            raise CheckpointError(f"{self.path} has no record {name!r}: it is incomplete, or no file of torch.save")
        encoded = info.orig_filename.encode("utf-8" if info.flag_bits & 0x800 else "cp437")
        header = self._at(info.header_offset, _LOCAL_HEADER.size + len(encoded))
        if not header.startswith(b"PK\3\4") or header[_LOCAL_HEADER.size :] != encoded:
            raise UnsafeFileError(f"{self.path}: record {name!r} is not where it is said to lie; get the file again")
        method, name_length, extra_length = (_LOCAL_HEADER.unpack_from(header)[field] for field in (3, 9, 10))
        if info.compress_type or method or info.flag_bits & 1 or info.file_size != info.compress_size:
            raise UnsafeFileError(
                f"{self.path}: record {name!r} is compressed or encrypted, which torch.save never does; "
                f"unpack it and zip it again without compression (zip -0)"
            )
        offset = info.header_offset + _LOCAL_HEADER.size + name_length + extra_length
        if offset + info.file_size > self._directory.start_dir:
            raise UnsafeFileError(
                f"{self.path}: record {name!r} is said to end at byte {offset + info.file_size}, but the "
                f"records end at {self._directory.start_dir}; the file is cut or forged, get it again"
            )
        return Record(self._base + offset, info.file_size)

    def bytes_of(self, name: str) -> bytes:
        """The data of a (small) record."""
        offset, size = self.extent(name)
        return self._at(offset - self._base, size)

    def _at(self, offset: int, size: int) -> bytes:
        return os.pread(self._file.fileno(), size, self._base + offset) if offset >= 0 else b""


def _directory(path: str, file: BinaryIO) -> zipfile.ZipFile:
    start = file.read(16)
    if not start.startswith(b"PK\3\4"):
        raise _not_a_zip(path, file, start)
    try:
        return zipfile.ZipFile(file)
    except (zipfile.BadZipFile, NotImplementedError, ValueError, EOFError, OSError, struct.error) as error:
        raise CheckpointError(
            f"{path} begins as a zip but has no usable directory at its end ({error}): it was cut short, "
            f"perhaps by an interrupted save or copy; copy it again"
        ) from error


def _not_a_zip(path: str, file: BinaryIO, start: bytes) -> CheckpointError:
    if start[2:].startswith(_LEGACY_MAGIC):
        return UnsupportedError(
            f"{path} is in torch's format from before 1.6; save it again where you trust it: "
            f"torch.save(torch.load({path!r}, weights_only=True), new_path)"
        )
    file.seek(0)
    if start and tarfile.is_tarfile(file):
        return UnsupportedError(f"{path} is a tar, torch's oldest format; save its tensors again with torch.save")
    return CheckpointError(f"{path} is not a file of torch.save: expected a zip, found {start!r} at its start")


class RecordWriter:
    """Writes records under the root `archive` to a seekable file, streamed; checksums are correct.

    A `.format_version` is left out on purpose: it tells torch to compute where storages lie from the sizes,
    as its own zip writer would have placed them, in place of reading it from the headers.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._zip = zipfile.ZipFile(file, "w", zipfile.ZIP_STORED)

    def write(self, name: str, arrays: Iterable[np.ndarray]) -> int:
        """Writes a record: arrays (1-D, of any dtype), one after the other. Returns its bytes."""
        info = zipfile.ZipInfo(f"archive/{name}")
        header = self._zip.start_dir + _LOCAL_HEADER.size + len(info.filename) + 4 + _ZIP64_EXTRA
        padding = -header % _ALIGNMENT
        info.extra = struct.pack("<2sH", b"FB", padding) + b"Z" * padding  # as torch fills it
        with self._zip.open(info, "w", force_zip64=True) as record:
            for array in arrays:
                data = np.ascontiguousarray(array).view(np.uint8)
                for start in range(0, data.size, _PIECE):
                    record.write(data[start : start + _PIECE].data)
        info.extra = b""  # the directory needs no padding
        return info.file_size

    def __enter__(self) -> "RecordWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Writes the directory, without which the file is no zip. After an error the file is left empty."""
        self._zip.close()
        if kind is not None:
            self._file.truncate(0)
