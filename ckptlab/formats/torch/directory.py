"""The directory at the end of a zip: which records there are, and where each is said to lie.

PKWARE's APPNOTE, 4.3.12 (a record's entry), 4.3.14 to 4.3.16 (the end, and its 64-bit form), 4.5.3 (numbers of 64
bits). Python's `zipfile` reads the same, three times as slowly.
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from ckptlab.errors import CheckpointError, UnsafeFileError

TAIL = 1 << 12  # bytes at the end of a file, among which its directory ends
FULL = 0xFFFFFFFF  # says that the number stands in the zip64 field
CENTRAL_HEADER = struct.Struct("<4sBBBBHHHHIIIHHHHHII")
END = struct.Struct("<4sHHHHIIH")
END64 = struct.Struct("<4sQHHIIQQQQ")
END64_LOCATOR = struct.Struct("<4sIQI")
_LARGEST_END = 1 << 17  # bytes after the directory, at most: a comment has 65,535
_LARGEST = 1 << 28  # bytes: some two million records


class Entry(NamedTuple):
    """What is said of a record: its name as stored, its bytes packed and unpacked, where its header begins."""

    name: bytes
    flags: int
    method: int
    crc: int
    packed: int
    size: int
    header: int


@dataclass(frozen=True)
class Directory:
    """`entries` by name, in the order in which they are listed; `start`: the first byte of the directory."""

    entries: dict[bytes, Entry]
    start: int


def read(path: str, read_at: Callable[[int, int], bytes], length: int) -> Directory:
    """The directory of a zip of `length` bytes, of which `read_at(offset, count)` gives some.

    CheckpointError where there is none, UnsafeFileError where it is too large or names a record twice.
    """
    try:
        start, data, shift = _found(path, read_at, length)
        listed = list(_entries(data, shift))
    except (struct.error, ValueError) as error:
        raise CheckpointError(
            f"{path} begins as a zip but has no usable directory at its end ({error}): it was cut short, "
            f"perhaps by an interrupted save or copy; copy it again"
        ) from error
    entries = {entry.name: entry for entry in listed}
    if len(entries) < len(listed):
        double, _ = Counter(entry.name for entry in listed).most_common(1)[0]
        raise UnsafeFileError(
            f"{path}: two records are named {double.decode(errors='backslashreplace')!r}, so that programs differ in "
            "what they read; do not use it"
        )
    return Directory(entries, start)


def _found(path: str, read_at: Callable[[int, int], bytes], length: int) -> tuple[int, bytes, int]:
    """Where the directory begins, its bytes, and how far behind the places that it says everything lies (something else
    stands before the zip then)."""
    tail, at = b"", -1
    for count in (TAIL, _LARGEST_END):
        if at < END64.size + END64_LOCATOR.size:  # torch's files end there; others may have a comment behind
            tail = read_at(max(length - count, 0), min(count, length))
            at = tail.rfind(b"PK\5\6")
    if at < 0:
        raise ValueError("no end of it")
    behind = length - len(tail)  # of the tail's first byte
    size, place = END.unpack_from(tail, at)[5:7]
    end = at
    at64 = at - END64_LOCATOR.size - END64.size
    if at64 >= 0 and tail.startswith(b"PK\6\6", at64) and tail.startswith(b"PK\6\7", at64 + END64.size):
        size, place = END64.unpack_from(tail, at64)[8:10]
        end = at64
    if size > _LARGEST:
        raise UnsafeFileError(
            f"{path}: the zip's directory is said to have {size:,} bytes, more than {_LARGEST:,}; do not use the file"
        )
    start = behind + end - size
    if start < 0:
        raise ValueError(f"of {size:,} bytes, more than there are before its end")
    data = tail[end - size : end] if start >= behind else read_at(start, size)
    if len(data) < size:
        raise ValueError(f"{len(data):,} of its {size:,} bytes are there")
    return start, data, start - place


def _entries(data: bytes, shift: int) -> Iterator[Entry]:
    unpack, fixed, at = CENTRAL_HEADER.unpack_from, CENTRAL_HEADER.size, 0
    while at < len(data):
        (magic, _, _, _, _, flags, method, _, _, crc, packed, size, named, more, comment, _, _, _, header) = unpack(
            data, at
        )
        if magic != b"PK\1\2":
            raise ValueError("an entry that is none")
        names_end = at + fixed + named
        name = data[at + fixed : names_end]
        if size == FULL or packed == FULL or header == FULL:
            size, packed, header = _of_64_bits(data[names_end : names_end + more], size, packed, header)
        at = names_end + more + comment
        yield Entry(name, flags, method, crc, packed, size, header + shift)


def _of_64_bits(extra: bytes, *numbers: int) -> list[int]:
    """Numbers of a record, those that are FULL taken from its zip64 field, where it has them in this order."""
    at = 0
    while at + 4 <= len(extra):
        tag, count = struct.unpack_from("<HH", extra, at)
        if tag == 1:
            wide = struct.iter_unpack("<Q", extra[at + 4 : at + 4 + count // 8 * 8])
            held = [next(wide, (n,))[0] if n == FULL else n for n in numbers]
            if FULL in held:
                break
            return held
        at += 4 + count
    raise ValueError("a number of 64 bits that is missing")
