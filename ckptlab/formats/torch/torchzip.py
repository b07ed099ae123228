"""The zip that a `.pt` file is: records, stored uncompressed under one root folder, aligned to 64 bytes.

The format of the headers is in PKWARE's APPNOTE (4.3.7 local header, 4.5.3 zip64); what torch makes of it is
in `caffe2/serialize/inline_container.cc`.
"""

import os
import struct
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import BinaryIO, NamedTuple

from ckptlab import paths
from ckptlab.errors import CheckpointError, UnsafeFileError, UnsupportedError
from ckptlab.formats.checksum import crc32
from ckptlab.formats.fileplan import Checksum, FilePlan, Literal, Part, merged
from ckptlab.formats.torch import directory
from ckptlab.formats.torch.directory import CENTRAL_HEADER, END, END64, END64_LOCATOR, FULL, Directory

_ALIGNMENT = 64
_LOCAL_HEADER = struct.Struct("<4sHHHHHIIIHH")
_PADDING = struct.Struct("<2sH")
_ZIP64_SIZES = struct.Struct("<HHQQ")
_CRC_IN_LOCAL, _CRC_IN_CENTRAL = 14, 16  # bytes into the header
_LIMIT = 0x7FFFFFFF  # from here on the directory has a zip64 field (in 32 bits without a sign, as Python's zipfile)
_MOST_RECORDS = 0xFFFF
_SMALL = 1 << 16  # bytes of records such as `byteorder`
_TAR = b"ustar", 257  # what stands where in a tar
_VERSION = 45  # of the format: with zip64
_UNIX, _MODE = 3, 0o600  # what made it; the mode of what is unpacked
_DATE = 1 << 5 | 1  # the first of January 1980
_LFS = b"version https://git-lfs"  # how a pointer begins that git-lfs left in the place of a file


class Record(NamedTuple):
    """Where a record's data lies: its first byte in the file, and how many there are."""

    offset: int
    size: int


class Summed(NamedTuple):
    """A record of `size` bytes, its first byte in the file, and the CRC-32 that was written beside it."""

    offset: int
    size: int
    crc: int
    name: str

    @property
    def end(self) -> int:
        return self.offset + self.size


def summed(path: str) -> list[Summed]:
    """The records of a file that carry checksums; none where it is no zip, or was saved without
    (`torch.serialization.set_crc32_options`: every one is 0 then). Of a near file that is several zips, one after the
    other (torch's `.distcp`), those of all."""
    with paths.open_binary(path) as file:
        if file.read(4) != b"PK\3\4":
            return []
        file.seek(0)
        reader = RecordReader(path, file)
        found = list(reader.summed())
        with suppress(CheckpointError):  # something else stands before a zip
            while reader.start > 0 and not paths.is_far(path):
                reader = RecordReader(path, file, 0, reader.start)
                found += reader.summed()
    return found if any(record.crc for record in found) else []


class RecordReader:
    """The records of an open `.pt` file, or of one that lies in a file from byte `base` on, `length` bytes long. Reads
    the zip's directory and no data. `root`: the folder that all records are in, which torch calls as the file was
    called (without `.pt`) when it was saved.

    Raises UnsafeFileError, UnsupportedError or CheckpointError where it is no such zip, or an ambiguous one.
    """

    def __init__(self, path: str, file: BinaryIO, base: int = 0, length: int | None = None) -> None:
        self.path = path
        self._file = file
        self._base = base
        self._directory = _directory(path, file, base, length)
        names = self._directory.entries
        if any(name.rpartition(b"/")[2] == b"constants.pkl" for name in names):
            raise UnsafeFileError(
                f"{path} is a TorchScript archive (it has a record constants.pkl), which holds code to run; "
                f"save the model's state_dict with torch.save instead"
            )
        self._root = next(iter(names), b"").partition(b"/")[0]
        self.root = self._root.decode(errors="backslashreplace")

    @property
    def start(self) -> int:
        """Where the zip begins in what was given of the file."""
        return min((entry.header for entry in self._directory.entries.values()), default=self._directory.start)

    def _encoded(self, name: str) -> bytes:
        return b"%b/%b" % (self._root, name.encode())

    def __contains__(self, name: str) -> bool:
        return self._encoded(name) in self._directory.entries

    def extent(self, name: str) -> Record:
        """Where the data of record `name` (without the root) lies in the file."""
        entry = self._directory.entries.get(self._encoded(name))
        if entry is None:
            raise CheckpointError(f"{self.path} has no record {name!r}: it is incomplete, or no file of torch.save")
        fixed = _LOCAL_HEADER.size
        header = self._at(entry.header, fixed + len(entry.name))
        if not header.startswith(b"PK\3\4") or header[fixed:] != entry.name:
            raise UnsafeFileError(f"{self.path}: record {name!r} is not where it is said to lie; get the file again")
        _, _, _, method, _, _, _, _, _, name_length, extra_length = _LOCAL_HEADER.unpack_from(header)
        if entry.method or method or entry.flags & 1 or entry.size != entry.packed:
            raise UnsafeFileError(
                f"{self.path}: record {name!r} is compressed or encrypted, which torch.save never does; "
                f"unpack it and zip it again without compression (zip -0)"
            )
        offset = entry.header + fixed + name_length + extra_length
        if offset + entry.size > self._directory.start:
            raise UnsafeFileError(
                f"{self.path}: record {name!r} is said to end at byte {offset + entry.size}, but the "
                f"records end at {self._directory.start}; the file is cut or forged, get it again"
            )
        return Record(self._base + offset, entry.size)

    def crc(self, name: str) -> int:
        """The CRC-32 that was written beside record `name`."""
        return self._directory.entries[self._encoded(name)].crc

    def bytes_of(self, name: str, most: int = _SMALL) -> bytes:
        """The data of a record of at most so many bytes."""
        offset, size = self.extent(name)
        if size > most:
            raise UnsafeFileError(
                f"{self.path}: record {name!r} has {size:,} bytes, more than the {most:,} that any checkpoint has "
                f"in it; do not use the file"
            )
        return self._at(offset - self._base, size)

    def summed(self) -> Iterator[Summed]:
        """Every record that lies where it is said to, with its checksum."""
        for encoded, entry in self._directory.entries.items():
            root, _, name = encoded.partition(b"/")
            if root == self._root and name:
                with suppress(UnsafeFileError, UnicodeDecodeError):  # nobody's
                    yield Summed(*self.extent(name.decode()), entry.crc, name.decode())

    def _at(self, offset: int, size: int) -> bytes:
        return paths.read_at(self._file, size, self._base + offset) if offset >= 0 else b""

    def places(self, most: int) -> Iterator[tuple[int, int]]:
        """First byte and end of what `extent` and `bytes_of` will look at: the headers of records, and the records
        that are no tensors and of at most so many bytes."""
        for encoded, entry in self._directory.entries.items():
            start = self._base + entry.header
            _, _, name = encoded.partition(b"/")
            small = not name.startswith(b"data/") and entry.size <= most
            yield start, start + _LOCAL_HEADER.size + len(encoded) + small * (entry.size + _ALIGNMENT)


def _directory(path: str, file: BinaryIO, base: int, length: int | None) -> Directory:
    start = paths.read_at(file, 16, base)
    if not start.startswith(b"PK\3\4"):
        raise _not_a_zip(path, file, start)
    size = file.seek(0, os.SEEK_END) - base if length is None else length
    return directory.read(path, lambda offset, count: paths.read_at(file, count, base + offset), size)


def _not_a_zip(path: str, file: BinaryIO, start: bytes) -> CheckpointError:
    magic, place = _TAR
    file.seek(place)
    if file.read(len(magic)) == magic:
        return UnsupportedError(f"{path} is a tar, torch's oldest format; save its tensors again with torch.save")
    if start and _LFS.startswith(start[: len(_LFS)]):
        return CheckpointError(
            f"{path}: a git-lfs pointer, not the file itself: fetch what it points to with `git lfs pull`, in the "
            "repository that it was cloned from"
        )
    return CheckpointError(f"{path} is not a file of torch.save: expected a zip, found {start!r} at its start")


class RecordPlanner:
    """Lays out records under the root `archive`, one after the other: what is to stand where, checksums too.

    A `.format_version` is left out on purpose: it tells torch to compute where storages lie from the sizes,
    as its own zip writer would have placed them, in place of reading it from the headers.
    """

    def __init__(self) -> None:
        self._parts: list[Part] = []
        self._size = 0
        self._entries: list[_Entry] = []

    def add(self, name: str, content: Sequence[Part]) -> None:
        """A record of these parts."""
        known = all(isinstance(part, Literal) for part in content)
        crc = crc32(b"".join(part.data for part in content if isinstance(part, Literal))) if known else None
        size = sum(part.nbytes for part in content)
        entry = _Entry(f"archive/{name}".encode(), self._size, size, crc)
        self._parts += [Literal(entry.local_header()), *content]
        self._entries.append(entry)
        self._size = entry.start + size

    def plan(self, name: str, nbytes: int) -> FilePlan:
        """The file `name`, with the zip's directory at its end. nbytes: of the model's tensors among the records."""
        directory, checksums = bytearray(), []
        for entry in self._entries:
            if entry.crc is None:
                places = (entry.offset + _CRC_IN_LOCAL, self._size + len(directory) + _CRC_IN_CENTRAL)
                checksums.append(Checksum(entry.start, entry.start + entry.size, places))
            directory += entry.central_header()
        directory += _end_of_directory(len(self._entries), len(directory), self._size)
        return FilePlan(name, (*merged([*self._parts, Literal(bytes(directory))]),), tuple(checksums), nbytes)


class _Entry(NamedTuple):
    """A record that is planned: its header's place, its bytes, its checksum unless that is known only when they are
    drawn. Sizes stand in a zip64 field in every local header, and in the directory where Python's zipfile has them."""

    name: bytes
    offset: int
    size: int
    crc: int | None

    @property
    def start(self) -> int:
        """Where its data begins."""
        least = self.offset + _LOCAL_HEADER.size + len(self.name) + _PADDING.size + _ZIP64_SIZES.size
        return least + -least % _ALIGNMENT

    def local_header(self) -> bytes:
        """What stands before its data."""
        extra = self.start - self.offset - _LOCAL_HEADER.size - len(self.name)
        padding = extra - _PADDING.size - _ZIP64_SIZES.size
        fields = (_VERSION, 0, 0, 0, _DATE, self.crc or 0, FULL, FULL, len(self.name), extra)
        padded = _PADDING.pack(b"FB", padding) + b"Z" * padding  # as torch fills it
        return _LOCAL_HEADER.pack(b"PK\3\4", *fields) + self.name + padded + _ZIP64_SIZES.pack(1, 16, *[self.size] * 2)

    def central_header(self) -> bytes:
        large = [self.size] * 2 * (self.size > _LIMIT) + [self.offset] * (self.offset > _LIMIT)
        extra = struct.pack(f"<HH{len(large)}Q", 1, 8 * len(large), *large) if large else b""
        size, offset = (FULL if n > _LIMIT else n for n in (self.size, self.offset))
        versions = (_VERSION, _UNIX, _VERSION, 0)
        lengths = (len(self.name), len(extra), 0)
        fields = (*versions, 0, 0, 0, _DATE, self.crc or 0, size, size, *lengths, 0, 0, _MODE << 16, offset)
        return CENTRAL_HEADER.pack(b"PK\1\2", *fields) + self.name + extra


def _end_of_directory(count: int, size: int, offset: int) -> bytes:
    end = b""
    if count > _MOST_RECORDS or offset > _LIMIT or size > _LIMIT:
        end = END64.pack(b"PK\6\6", 44, _VERSION, _VERSION, 0, 0, count, count, size, offset)
        end += END64_LOCATOR.pack(b"PK\6\7", 0, offset + size, 1)
    count = min(count, _MOST_RECORDS)
    return end + END.pack(b"PK\5\6", 0, 0, count, count, min(size, FULL), min(offset, FULL), 0)
