"""The elements of a tensor, window by window: all of them, or an error that says which are not stored.

`spans` and `read` take any array, `elements` what a `Gather` reads; only `elements` says in which order they come.

What is stored is read straight from the mapped files where it can be, each byte once; memory stays near a window
whatever the size of the tensor. Arrays of dask come block by block.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import xarray as xr

from ckptlab.arrays import Reader
from ckptlab.arrays.boxes import flat_boxes
from ckptlab.arrays.lazy import Converted, Gathered, LazyArray, under
from ckptlab.errors import CheckpointError
from ckptlab.layout import Cut

WINDOW = 1 << 20  # elements that a window has at most, if not said
_SPAN = 16  # windows that a task goes through

Array = LazyArray | xr.Variable


class Span(Protocol):
    """Some of the elements of an array, with which a worker is busy for a while."""

    @property
    def count(self) -> int: ...

    def windows(self) -> Iterator[np.ndarray]:
        """One-dimensional pieces, each valid until the next one is asked for."""
        ...


def elements(gather: Reader, cut: Cut, at: tuple[int, ...], lo: int, hi: int) -> np.ndarray:
    """Elements lo … hi-1 of shard `at` of `cut`, flattened, as one piece: states need not lie in the same fragments.

    CheckpointError, with the tensor's name, where some are not stored.
    """
    found = list(_pieces(gather, cut, at, lo, hi, hi - lo))
    return found[0] if len(found) == 1 else np.concatenate(found)


def _pieces(gather: Reader, cut: Cut, at: tuple[int, ...], lo: int, hi: int, window: int) -> Iterator[np.ndarray]:
    done = 0
    for piece in gather.chunks(cut, at, lo, hi, window):
        yield piece
        done += len(piece)
    if done != hi - lo:
        raise CheckpointError(
            f"{gather.name}: {gather.state}: of elements {lo} to {hi} of its shard of shape {cut.shard_shape(at)} only "
            f"{done} are stored: the checkpoint is incomplete, see what `ckptlab check` says of it"
        )


@dataclass(frozen=True)
class _Stored:
    """Elements lo … hi-1 of a flattened shard, gathered from where they are stored."""

    gather: Reader
    cut: Cut
    at: tuple[int, ...]
    lo: int
    hi: int
    dtype: np.dtype
    window: int

    @property
    def count(self) -> int:
        return self.hi - self.lo

    def windows(self) -> Iterator[np.ndarray]:
        for piece in _pieces(self.gather, self.cut, self.at, self.lo, self.hi, self.window):
            yield piece.astype(self.dtype, copy=False)


@dataclass(frozen=True)
class _Boxes:
    """Elements lo … hi-1 of any array, box by box."""

    array: Array
    lo: int
    hi: int
    window: int

    @property
    def count(self) -> int:
        return self.hi - self.lo

    def windows(self) -> Iterator[np.ndarray]:
        for lo in range(self.lo, self.hi, self.window):
            for starts, sizes in flat_boxes(self.array.shape, lo, min(lo + self.window, self.hi)):
                index = tuple(slice(start, start + size) for start, size in zip(starts, sizes, strict=True))
                yield read(self.array, index).reshape(-1)


def read(array: Array, index: Sequence[Any]) -> np.ndarray:
    """A part of an array (a slice for each dim), as a plain one in its own dtype."""
    if isinstance(array, LazyArray):
        return array.read(tuple(index))
    return np.asarray(array[tuple(index)].data)


def array_of(variable: xr.Variable) -> Array:
    """What a variable shows: the lazy array of a view where it can be found, else the variable itself."""
    found = under(variable)
    return variable if found is None else found


def spans(array: Array, window: int = WINDOW) -> list[Span]:
    """Spans that hold every element of an array once, to be gone through in windows of so many elements."""
    size = _SPAN * window
    held = array.array if isinstance(array, Converted) else array
    if not isinstance(held, Gathered):
        numel = math.prod(array.shape)
        return [_Boxes(array, lo, min(lo + size, numel), window) for lo in range(0, numel, size)]
    found: list[Span] = []
    for cut, at in held.reader.unordered(held.cut, held.at):
        numel = math.prod(cut.shard_shape(at))
        starts = range(0, numel, size)
        found += (_Stored(held.reader, cut, at, lo, min(lo + size, numel), array.dtype, window) for lo in starts)
    return found
