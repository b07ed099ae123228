"""A file to be written, as a plan: its parts in their order, from which its exact size and the place of each follow.

A plan is made from metadata alone and is a small value that can be pickled: what it takes from a source is not in it,
but a reader that will draw it. It falls into pieces that anyone may write, in any order, in any process.
"""

from __future__ import annotations

import os
import struct
import zlib
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import numpy as np

from ckptlab.errors import CheckpointError
from ckptlab.formats import checksum

_STEP = 1 << 20  # bytes that are checksummed and written at a time: they stay in the cache between the two


class Reader(Protocol):
    """What draws elements: a value that can be pickled."""

    def chunks(self, lo: int, hi: int) -> Iterable[np.ndarray]:
        """Elements lo … hi-1 as 1-D arrays, one after the other; each is valid until the next one is asked for."""
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
        expected, given = self.hi - self.lo, 0
        wanted = f"{expected} elements of {self.dtype} in 1-D chunks were planned"
        for chunk in self.reader.chunks(self.lo, self.hi):
            given += chunk.size
            if chunk.ndim != 1 or chunk.dtype != self.dtype:
                raise CheckpointError(f"{wanted}, but a chunk has shape {chunk.shape} and dtype {chunk.dtype}")
            if given > expected:
                raise CheckpointError(f"{wanted}, but there are more: at least {given}")
            yield np.ascontiguousarray(chunk).view(np.uint8)
        if given < expected:
            raise CheckpointError(f"{wanted}, but there are only {given}")


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
                    yield self._piece(path, size, start, offset, held)
                    held, start = [], offset
                held.append(share)
                offset += share.nbytes
        yield self._piece(path, size, start, offset, held)

    def _piece(self, path: str, size: int, start: int, stop: int, parts: list[Part]) -> Piece:
        touched = tuple(c for c in self.checksums if c.start < stop and start < c.stop)
        return Piece(path, size, start, tuple(parts), touched)


@dataclass(frozen=True)
class Piece:
    """The parts of the file `path`, of `size` bytes in all, that lie from `offset` on, and the checksums of the file
    that they are in."""

    path: str
    size: int
    offset: int
    parts: tuple[Part, ...]
    checksums: tuple[Checksum, ...]

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)

    def write(self) -> list[Sum]:
        """Write it into its file, which is made if there is none; what stood there but no piece writes must be 0.

        Returns the sums of the parts that a checksum covers. CheckpointError, with the file and the place, where what
        is drawn is not what was planned.
        """
        starts = [c.start for c in self.checksums]
        sums = []
        handle = os.open(self.path, os.O_WRONLY | os.O_CREAT, 0o666)
        try:
            os.ftruncate(handle, self.size)
            offset = self.offset
            for part in self.parts:
                covering = bisect_right(starts, offset) - 1
                summed = covering >= 0 and offset < self.checksums[covering].stop
                try:
                    crc = _write(handle, offset, part, summed)
                except CheckpointError as e:
                    raise CheckpointError(f"{self.path}: from byte {offset} on {e}") from None
                if summed:
                    sums.append(Sum(offset, part.nbytes, crc))
                offset += part.nbytes
        finally:
            os.close(handle)
        return sums


def _write(handle: int, offset: int, part: Part, summed: bool) -> int:
    """Write a part at its place; returns its CRC-32 if that is wanted."""
    if isinstance(part, Zeros):
        return checksum.of_zeros(part.nbytes) if summed else 0
    crc = 0
    for chunk in part.bytes():
        for start in range(0, chunk.size, _STEP):
            step = chunk[start : start + _STEP].data
            if summed:
                crc = zlib.crc32(step, crc)
            while step.nbytes:
                written = os.pwrite(handle, step, offset)
                offset, step = offset + written, step[written:]
    return crc


def seal(path: str, checksums: Iterable[Checksum], sums: Iterable[Sum]) -> None:
    """Write the checksums of a file whose pieces are all written; sums: what their writers found."""
    ordered = sorted(sums)
    with open(path, "r+b") as file:
        for c in checksums:
            crc = checksum.combined((s.crc, s.nbytes) for s in ordered if c.start <= s.offset < c.stop)
            for place in c.places:
                os.pwrite(file.fileno(), struct.pack("<I", crc), place)


def write(plan: FilePlan, path: str | os.PathLike[str]) -> None:
    """Write a planned file as `path`, whatever its name. After an error it is left empty."""
    path = os.fspath(path)
    open(path, "wb").close()
    try:
        seal(path, plan.checksums, [s for piece in plan.pieces(path, plan.size) for s in piece.write()])
    except BaseException:
        os.truncate(path, 0)
        raise
