"""The elements of a lazy or any other array, window by window, for what does not ask in which order they come.

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

from ckptlab.analysis.elements import WINDOW, pieces, runs
from ckptlab.arrays import Reader
from ckptlab.arrays.lazy import Converted, Gathered, LazyArray, under
from ckptlab.layout import Cut
from ckptlab.layout.boxes import flat_boxes

_SPAN = 16  # windows that a task goes through

Array = LazyArray | xr.Variable


class Span(Protocol):
    """Some of the elements of an array, with which a worker is busy for a while."""

    @property
    def count(self) -> int: ...

    def windows(self) -> Iterator[np.ndarray]:
        """One-dimensional pieces, each valid until the next one is asked for."""
        ...


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
        for piece in pieces(self.gather, self.cut, self.at, self.lo, self.hi, self.window):
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
    found = runs(held.reader, held.cut, held.at, size)
    return [_Stored(held.reader, *run, array.dtype, window) for run in found]
