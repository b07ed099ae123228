"""What reads the elements of a tensor in any cut: one protocol, and what is made of other readers.

A reader writes a box of a shard of some cut of the whole into memory that it is given (`read_into`), in the dtype of
that memory; everything else follows from it. So readers compose without a copy between them: the mean of replicas,
another dtype. `Gather` is the one that reads files.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import DTypeLike

from ckptlab.catalog import MASTER, PARAM
from ckptlab.layout import Cut
from ckptlab.layout.boxes import flat_boxes
from ckptlab.layout.cut import Coordinate

CHUNK = 1 << 20  # bytes that `chunks` gives at a time: what is done with them next finds them in the cache


class Reader(ABC):
    """Reads one state of one tensor (`name`, `state`) in any cut. `cut` is the one in which it is stored, `dtype` what
    elements arrive as, `piece` how many bytes `chunks` gives at a time where it is not said. `spares`: what the source
    does not hold (padding, the rest of a tensor of which this is a piece) is left as it is by `read_into`; else it may
    be 0."""

    name: str
    state: str
    cut: Cut
    dtype: np.dtype
    piece: int = CHUNK
    spares = False

    @abstractmethod
    def read_into(self, out: np.ndarray, cut: Cut, at: Coordinate, starts: Sequence[int]) -> None:
        """Write into `out` (of any strides and dtype) the box of shard `at` of `cut` that begins at `starts` and has
        the shape of `out`."""

    def leaves_gaps(self, cut: Cut) -> bool:
        """Whether a shard of `cut` may have elements that are not held, which `read_into` leaves alone."""
        return any(b > a for a, b in zip(self.cut.shape, cut.shape, strict=True))

    def fill(self, out: np.ndarray, cut: Cut, at: Coordinate, starts: Sequence[int]) -> None:
        """As `read_into`, and what is not held is 0."""
        if self.leaves_gaps(cut):
            out[...] = 0
        self.read_into(out, cut, at, starts)

    def box(self, cut: Cut, at: Coordinate, starts: Sequence[int], sizes: Sequence[int]) -> np.ndarray:
        """The box as an array of its own, of shape `sizes`; what is not held is 0. To write to it changes no file."""
        out = np.empty(tuple(sizes), self.dtype)
        self.fill(out, cut, at, starts)
        return out

    def shard(self, cut: Cut, at: Coordinate) -> np.ndarray:
        """The whole shard `at` of `cut`, of shape `cut.shard_shape(at)`."""
        shape = cut.shard_shape(at)
        return self.box(cut, at, (0,) * len(shape), shape)

    def chunks(self, cut: Cut, at: Coordinate, lo: int, hi: int, limit: int | None = None) -> Iterator[np.ndarray]:
        """Elements lo … hi-1 of the flattened shard, in pieces of at most `limit` elements (one-dimensional; None: as
        many as `piece` bytes hold).

        A piece is only valid until the next one is asked for: the buffer is used again.
        """
        shape, limit = cut.shard_shape(at), limit or self.piece // self.dtype.itemsize
        buffer = np.empty(min(limit, hi - lo), self.dtype) if hi > lo else None
        for start in range(lo, hi, limit):
            assert buffer is not None
            stop = min(start + limit, hi)
            flat, done = buffer[: stop - start], 0
            if self.leaves_gaps(cut):
                flat[...] = 0
            for starts, sizes in flat_boxes(shape, start, stop):
                count = math.prod(sizes)
                self.read_into(flat[done : done + count].reshape(sizes), cut, at, starts)
                done += count
            yield flat

    def is_straight(self, cut: Cut, at: Coordinate) -> bool:
        """Whether `chunks` of that shard are views of what is stored, nothing copied."""
        return False

    def unordered(self, cut: Cut, at: Coordinate) -> list[tuple[Cut, Coordinate]]:
        """Shards that together hold every element of shard `at` of `cut` once, for whoever needs them in no order."""
        return [(cut, at)]


class Over(Reader):
    """A reader that stands over another, of the same tensor: what it does not say itself is as that one says."""

    def __init__(self, reader: Reader, dtype: np.dtype | None = None) -> None:
        self.reader, self.name, self.state = reader, reader.name, reader.state
        self.cut, self.piece = reader.cut, reader.piece
        self.dtype = reader.dtype if dtype is None else np.dtype(dtype)

    def leaves_gaps(self, cut: Cut) -> bool:
        return self.reader.leaves_gaps(cut)


def over_zeros(
    reader: Reader, sizes: Sequence[int], dtype: DTypeLike, cut: Cut, at: Coordinate, starts: Sequence[int]
) -> np.ndarray:
    """A box in a dtype, 0 where the reader holds nothing."""
    found = np.zeros(sizes, dtype)
    reader.read_into(found, cut, at, starts)
    return found


class Cast(Over):
    """A reader's elements in another dtype, rounded to nearest even."""

    def read_into(self, out: np.ndarray, cut: Cut, at: Coordinate, starts: Sequence[int]) -> None:
        if out.dtype == self.dtype:
            self.reader.read_into(out, cut, at, starts)
            return
        # two roundings where two dtypes are asked for, as composed
        rounded = over_zeros(self.reader, out.shape, self.dtype, cut, at, starts)
        np.copyto(out, rounded, casting="unsafe")

    def chunks(self, cut: Cut, at: Coordinate, lo: int, hi: int, limit: int | None = None) -> Iterator[np.ndarray]:
        if not self.reader.is_straight(cut, at):
            yield from super().chunks(cut, at, lo, hi, limit)
            return
        for chunk in self.reader.chunks(cut, at, lo, hi, limit):
            yield chunk.astype(self.dtype)

    def unordered(self, cut: Cut, at: Coordinate) -> list[tuple[Cut, Coordinate]]:
        return self.reader.unordered(cut, at)


def in_dtype(reader: Reader, dtype: np.dtype | None) -> Reader:
    """A reader whose elements arrive in a dtype (None: its own)."""
    return reader if dtype is None or np.dtype(dtype) == reader.dtype else Cast(reader, dtype)


def _wide(dtype: np.dtype) -> np.dtype:
    """In which sums of a dtype are made: float32, or what holds its numbers and fractions of them."""
    return np.dtype(np.float32) if dtype.itemsize < 4 else np.result_type(dtype, np.float32)


class Mean(Over):
    """The mean (the sum if `summed`) of replicas that each hold the whole, in their own dtype, summed in float32 at
    least."""

    def __init__(self, replicas: Sequence[Reader], summed: bool = False) -> None:
        super().__init__(replicas[0])
        self.replicas, self.summed = tuple(replicas), summed

    def read_into(self, out: np.ndarray, cut: Cut, at: Coordinate, starts: Sequence[int]) -> None:
        total = np.zeros(out.shape, _wide(self.dtype))
        for reader in self.replicas:
            total += over_zeros(reader, out.shape, reader.dtype, cut, at, starts)
        if not self.summed:
            np.divide(total, total.dtype.type(len(self.replicas)), out=total)
        np.copyto(out, total, casting="unsafe")


class Share(Over):
    """One of `count` equal parts of a sum: a reader's elements divided by it."""

    def __init__(self, reader: Reader, count: int) -> None:
        super().__init__(reader)
        self.count = count

    def read_into(self, out: np.ndarray, cut: Cut, at: Coordinate, starts: Sequence[int]) -> None:
        one = over_zeros(self.reader, out.shape, _wide(self.dtype), cut, at, starts)
        np.divide(one, one.dtype.type(self.count), out=one)
        np.copyto(out, one, casting="unsafe")


class Zeros(Reader):
    """Nothing but zeros, of a tensor that lies in a cut."""

    def __init__(self, name: str, state: str, cut: Cut, dtype: np.dtype) -> None:
        self.name, self.state, self.cut, self.dtype = name, state, cut, np.dtype(dtype)

    def read_into(self, out: np.ndarray, cut: Cut, at: Coordinate, starts: Sequence[int]) -> None:
        out[...] = 0


def is_sum(replicas: str, state: str) -> bool:
    """Whether copies of that state are parts of a sum: weights are; what an optimizer keeps of them is equal."""
    return replicas == "sum" and state in (MASTER, PARAM)
