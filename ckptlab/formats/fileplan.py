"""A file to be written, as a plan: its parts in their order, from which its exact size and the place of each follow.

A plan is made from metadata alone and is a small value that can be pickled: what it takes from a source is not in it,
but a reader that will draw it. It falls into pieces that anyone may write, in any order, in any process.
"""

from __future__ import annotations

import itertools
import os
import struct
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import NamedTuple, Protocol

import numpy as np

from ckptlab.errors import CheckpointError
from ckptlab.formats import checksum
from ckptlab.formats.checksum import crc32, crc32_combine
from ckptlab.formats.finite import not_finite

_STEP = 1 << 20  # bytes that are checksummed and written at a time: they stay in the cache between the two


class Reader(Protocol):
    """What draws elements: a value that can be pickled."""

    def chunks(self, lo: int, hi: int) -> Iterable[np.ndarray]:
        """Elements lo … hi-1 as 1-D arrays, one after the other, each of one tensor; valid until the next is asked
        for."""
        ...

    def label(self, index: int) -> str:
        """Of which tensor and state an element is, for people."""
        ...


@dataclass(frozen=True)
class Literal:
    """Bytes that are known: headers, pickles."""

    data: bytes

    @property
    def nbytes(self) -> int:
        return len(self.data)

    def split(self, limit: int) -> Iterator[Part]:
        yield self

    def bytes(self) -> Iterator[np.ndarray]:
        yield np.frombuffer(self.data, np.uint8)


@dataclass(frozen=True)
class Zeros:
    """Zero bytes, of which nothing is written: the file holds them from the start."""

    nbytes: int

    def split(self, limit: int) -> Iterator[Part]:
        yield self

    def bytes(self) -> Iterator[np.ndarray]:
        yield np.zeros(self.nbytes, np.uint8)


@dataclass(frozen=True)
class Elements:
    """Elements lo … hi-1 of what `reader` draws, of `dtype`."""

    reader: Reader
    dtype: np.dtype
    lo: int
    hi: int

    @property
    def nbytes(self) -> int:
        return (self.hi - self.lo) * self.dtype.itemsize

    def split(self, limit: int) -> Iterator[Part]:
        """The same in parts of at most `limit` bytes, or of one element."""
        count = max(limit // self.dtype.itemsize, 1)
        for lo in range(self.lo, self.hi, count):
            yield replace(self, lo=lo, hi=min(lo + count, self.hi))

    def bytes(self) -> Iterator[np.ndarray]:
        """Their bytes in chunks, as 1-D arrays. CheckpointError if the reader gives anything but what was planned."""
        for chunk in self.chunks():
            yield chunk.view(np.uint8)

    def chunks(self) -> Iterator[np.ndarray]:
        """The elements in contiguous 1-D chunks; see `bytes`."""
        expected, given = self.hi - self.lo, 0
        for chunk in self.reader.chunks(self.lo, self.hi):
            given += chunk.size
            if chunk.ndim != 1 or chunk.dtype != self.dtype:
                raise self._unlike(f"a chunk has shape {chunk.shape} and dtype {chunk.dtype}")
            if given > expected:
                raise self._unlike(f"there are more: at least {given}")
            yield np.ascontiguousarray(chunk)
        if given < expected:
            raise self._unlike(f"there are only {given}")

    def _unlike(self, found: str) -> CheckpointError:
        wanted = f"{self.hi - self.lo} elements of {self.dtype} in 1-D chunks were planned"
        return CheckpointError(f"{wanted}, but {found}")


Part = Literal | Elements | Zeros


def merged(parts: Iterable[Part]) -> Iterator[Part]:
    """The same bytes in fewer parts: literal ones that are neighbours together, none that is empty."""
    literal: list[bytes] = []
    for part in parts:
        if isinstance(part, Literal):
            literal.append(part.data)
        elif part.nbytes:
            if literal:
                yield Literal(b"".join(literal))
                literal = []
            yield part
    if literal:
        yield Literal(b"".join(literal))


class Checksum(NamedTuple):
    """The CRC-32 of a file's bytes from `start` up to `stop`, between which are whole parts, and the places (bytes from
    the file's start) where it is to stand as four bytes, little-endian."""

    start: int
    stop: int
    places: tuple[int, ...]


class Sum(NamedTuple):
    """What a piece's writer found: the CRC-32 of `nbytes` bytes from `offset` on."""

    offset: int
    nbytes: int
    crc: int


@dataclass
class Written:
    """What a piece's writer found: the sums of its parts, ascending and without gaps, and how many elements are NaN or
    infinite, by what they are of."""

    sums: list[Sum] = field(default_factory=list)
    odd: Counter[str] = field(default_factory=Counter)

    @property
    def crc(self) -> int:
        """Of the whole piece."""
        return checksum.combined((s.crc, s.nbytes) for s in self.sums)


@dataclass(frozen=True)
class FilePlan:
    """One output file: `name` is its path within the destination, `parts` are what it consists of, without gaps,
    `checksums` are ascending and apart. nbytes: bytes of tensors of the model among them.
    """

    name: str
    parts: tuple[Part, ...]
    checksums: tuple[Checksum, ...] = ()
    nbytes: int = 0

    @property
    def size(self) -> int:
        """The file's bytes."""
        return sum(part.nbytes for part in self.parts)

    def placed(self) -> Iterator[tuple[int, Part]]:
        """Each part and its place, in bytes from the file's start."""
        offset = 0
        for part in self.parts:
            yield offset, part
            offset += part.nbytes

    def pieces(self, path: str, limit: int) -> Iterator[Piece]:
        """The file at `path` in pieces of `limit` bytes or less; a literal part, however long, is never split."""
        size, offset, start = self.size, 0, 0
        held: list[Part] = []
        for part in self.parts:
            for share in part.split(limit):
                if held and offset + share.nbytes - start > limit:
                    yield Piece(path, size, start, tuple(held))
                    held, start = [], offset
                held.append(share)
                offset += share.nbytes
        yield Piece(path, size, start, tuple(held))


@dataclass(frozen=True)
class Piece:
    """The parts of the file `path`, of `size` bytes in all, that lie from `offset` on."""

    path: str
    size: int
    offset: int
    parts: tuple[Part, ...]

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)

    def _filled(self) -> Iterator[tuple[int, int]]:
        """(offset, bytes) of what will take room: zeros stay holes."""
        start = self.offset
        for zeros, parts in itertools.groupby(self.parts, lambda part: isinstance(part, Zeros)):
            nbytes = sum(part.nbytes for part in parts)
            if nbytes and not zeros:
                yield start, nbytes
            start += nbytes

    def write(self, crc_of: Callable[[np.ndarray], int] = crc32) -> Written:
        """Write it into its file, which is made if there is none; what stood there but no piece writes must be 0.

        Its room on the disk is taken first. crc_of: the CRC-32 of a 1-D array of bytes. CheckpointError, with the file
        and the place, where what is drawn is not what was planned; OSError, with the file, where there is no room.
        """
        found = Written()
        try:
            handle = os.open(self.path, os.O_WRONLY | os.O_CREAT, 0o666)
            try:
                if os.fstat(handle).st_size != self.size:
                    os.ftruncate(handle, self.size)
                for start, nbytes in self._filled() if hasattr(os, "posix_fallocate") else ():
                    os.posix_fallocate(handle, start, nbytes)
                offset = self.offset
                for part in self.parts:
                    try:
                        crc = _write(handle, offset, part, crc_of, found.odd)
                    except CheckpointError as e:
                        raise CheckpointError(f"{self.path}: from byte {offset} on {e}") from None
                    found.sums.append(Sum(offset, part.nbytes, crc))
                    offset += part.nbytes
            finally:
                os.close(handle)
        except OSError as error:
            if error.filename is not None or error.errno is None:  # of what is read
                raise
            raise OSError(error.errno, os.strerror(error.errno or 0), self.path) from None
        return found


def _write(handle: int, offset: int, part: Part, crc_of: Callable[[np.ndarray], int], odd: Counter[str]) -> int:
    """Write a part at its place; returns its CRC-32, and counts in `odd` what of it is not finite."""
    if isinstance(part, Zeros):
        return checksum.of_zeros(part.nbytes)
    crc, done = 0, 0
    for chunk in part.chunks() if isinstance(part, Elements) else part.bytes():
        if isinstance(part, Elements):
            if count := not_finite(chunk):
                odd[part.reader.label(part.lo + done)] += count
            done += chunk.size
        raw = chunk.view(np.uint8)
        for start in range(0, raw.size, _STEP):
            step = raw[start : start + _STEP]
            crc = crc32_combine(crc, crc_of(step), step.size)
            left = step.data
            while left.nbytes:
                written = os.pwrite(handle, left, offset)
                offset, left = offset + written, left[written:]
    return crc


def seal(path: str, plan: FilePlan, sums: Iterable[Sum]) -> int:
    """Write the checksums of a file whose pieces are all written; sums: what their writers found. Returns the CRC-32 of
    the whole file."""
    ordered = sorted(sums)
    crc = checksum.combined((s.crc, s.nbytes) for s in ordered)
    numbers = []
    for c in plan.checksums:
        inside = checksum.combined((s.crc, s.nbytes) for s in ordered if c.start <= s.offset < c.stop)
        numbers += [(place, inside) for place in c.places]
    with open(path, "r+b") as file:
        for place, number in numbers:
            os.pwrite(file.fileno(), struct.pack("<I", number), place)
    return checksum.with_numbers(crc, plan.size, numbers)


def write(plan: FilePlan, path: str | os.PathLike[str]) -> None:
    """Write a planned file as `path`, whatever its name. After an error it is left empty."""
    path = os.fspath(path)
    open(path, "wb").close()
    try:
        found = [s for piece in plan.pieces(path, plan.size) for s in piece.write().sums]
        seal(path, plan, found)
    except BaseException:
        os.truncate(path, 0)
        raise
