"""One pass over the elements of a tensor for all statistics at once, in blocks that stay in the processor's cache.

Elements of 16 bits and fewer are counted by bit pattern, and the statistics are those of the counts: exact, and the
same in whatever order the elements come. Wider ones are widened to float64 block by block.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Protocol

import numpy as np
from ml_dtypes import finfo
from numpy.typing import NDArray

from ckptlab.aliases import Int64
from ckptlab.analysis.partial import OCTAVES, Bins, Partial, of_octaves
from ckptlab.errors import UnsupportedError

BLOCK = 1 << 17  # elements whose float64 and exponents are held at a time, if not said
_ROW = 4096  # elements that one dot product adds up: short enough for BLAS to stay on this thread
_ONES = np.ones(_ROW)
_CANCELLED = 1e-4  # of a block's sum of squares: a variance below it is computed again around the mean


class Accumulator(Protocol):
    """Takes elements, one-dimensional and in any order, and gives their statistics."""

    def add(self, window: np.ndarray) -> None: ...

    def result(self) -> Partial: ...


def accumulator(dtype: np.dtype, bins: Bins | None = None, block: int = BLOCK) -> Accumulator:
    """What accumulates elements of this dtype. UnsupportedError for complex numbers and what is no number."""
    dtype = np.dtype(dtype)
    if dtype.type is np.void or dtype.kind not in "fiubV":
        raise UnsupportedError(f"there are no statistics of elements of {dtype}")
    if dtype.itemsize <= 2:
        return _Patterns(dtype, bins, block)
    return _Values(dtype, bins, block)


def partial(array: np.ndarray, bins: Bins | None = None) -> Partial:
    """The statistics of an array of any dtype and shape."""
    taken = accumulator(array.dtype, bins)
    taken.add(array.reshape(-1))
    return taken.result()


# -------------------------------------------------------------------------------- 16 bits and fewer


class _Patterns:
    """Counts of every bit pattern."""

    def __init__(self, dtype: np.dtype, bins: Bins | None, block: int) -> None:
        self._dtype, self._bins, self._block = dtype, bins, 4 * block
        self._unsigned = np.dtype(f"u{dtype.itemsize}")
        self._counts = np.zeros(1 << 8 * dtype.itemsize, np.int64)
        self._keys = np.empty(0, np.intp)

    def add(self, window: np.ndarray) -> None:
        patterns = window.view(self._unsigned)
        size = min(self._block, len(patterns))
        if len(self._keys) < size:
            self._keys = np.empty(size, np.intp)
        for start in range(0, len(patterns), max(size, 1)):
            block = patterns[start : start + size]
            keys = self._keys[: len(block)]
            np.copyto(keys, block)
            self._counts += np.bincount(keys, minlength=len(self._counts))

    def result(self) -> Partial:
        held = np.flatnonzero(self._counts)
        counts = self._counts[held]
        raw = held.astype(self._unsigned).view(np.uint8 if self._dtype.kind == "b" else self._dtype)
        values = raw.astype(np.float64)
        finite, nan = np.isfinite(values), np.isnan(values)
        n, x = counts[finite], values[finite]
        total = int(n.sum())
        mean = float(n @ x) / total if total else 0.0
        smallest = _smallest_normal(self._dtype)
        return Partial(
            int(counts.sum()),
            int(counts[nan].sum()),
            int(counts[~finite & ~nan].sum()),
            int(n[x == 0].sum()),
            int(n[(x != 0) & (np.abs(x) < smallest)].sum()),
            mean,
            float(n @ np.square(x - mean)),
            float(x.min(initial=math.inf)),
            float(x.max(initial=-math.inf)),
            None if self._bins is None else self._histogram(x, n),
        )

    def _histogram(self, x: NDArray[np.float64], n: Int64) -> Int64:
        assert self._bins is not None
        if self._bins.edges is not None:
            return np.histogram(x, self._bins.edges, weights=n)[0].astype(np.int64)
        fields = _fields(np.bincount(x.view(np.uint64) >> np.uint64(52), n, 1 << 12).astype(np.int64))
        zero = x == 0
        return of_octaves(fields, int(n[zero].sum()), int(n[zero & np.signbit(x)].sum()))


# -------------------------------------------------------------------------------- wider


class _Values:
    """Sums in float64; octaves by the exponents in the bits, float32's own or the float64's."""

    def __init__(self, dtype: np.dtype, bins: Bins | None, block: int) -> None:
        self._bins, self._size = bins, block
        self._single = dtype == np.float32
        self._octaves = bins is not None and bins.edges is None
        self._exponents = np.zeros(1 << (9 if self._single else 12), np.int64)
        self._counts = np.zeros(0 if bins is None else bins.size, np.int64)
        self._found = Partial()
        self._negative_zeros = 0
        self._smallest = np.float32(_smallest_normal(dtype)) if self._single else _smallest_normal(dtype)
        self._wide, self._bits = np.empty(0), np.empty(0, np.uint32 if self._single else np.uint64)

    def add(self, window: np.ndarray) -> None:
        size = min(self._size, len(window))
        if len(self._wide) < size:
            self._wide, self._bits = np.empty(size), np.empty(size, self._bits.dtype)
        for start in range(0, len(window), max(size, 1)):
            self._found = self._found.merge(self._block(window[start : start + size]))

    def _block(self, block: np.ndarray) -> Partial:
        wide = self._wide[: len(block)]
        np.copyto(wide, block, casting="unsafe")
        own = block if self._single else wide
        low, high = float(own.min()), float(own.max())  # NaN if any is
        few, odd = self._by_exponent(own) if self._octaves else self._by_size(own, low, high)
        nan = int(np.count_nonzero(np.isnan(own))) if odd else 0
        if odd:
            wide = own = wide[np.isfinite(wide)]
            low, high = float(own.min(initial=math.inf)), float(own.max(initial=-math.inf))
        zeros = self._zeros(own) if few else 0
        if self._bins is not None and self._bins.edges is not None:
            self._counts += np.histogram(wide, self._bins.edges)[0]
        if not len(wide):
            return Partial(len(block), nan, odd - nan)
        return Partial(len(block), nan, odd - nan, zeros, few - zeros, *_moments(wide), low, high)

    def _by_exponent(self, block: np.ndarray) -> tuple[int, int]:
        """How many elements are zero or subnormal, and how many not finite; their exponents are counted."""
        bits = self._bits[: len(block)]
        np.right_shift(block.view(bits.dtype), 23 if self._single else 52, out=bits)
        counts = np.bincount(bits if self._single else bits.view(np.int64), minlength=len(self._exponents))
        self._exponents += counts
        half = len(counts) // 2
        return int(counts[0] + counts[half]), int(counts[half - 1] + counts[-1])

    def _by_size(self, block: np.ndarray, low: float, high: float) -> tuple[int, int]:
        """The same from the elements themselves: faster, where no octaves are asked for."""
        odd = 0 if math.isfinite(low) and math.isfinite(high) else int(np.count_nonzero(~np.isfinite(block)))
        small = block < self._smallest
        small &= block > -self._smallest
        return int(np.count_nonzero(small)), odd

    def _zeros(self, block: np.ndarray) -> int:
        """How many elements are 0 or -0; where octaves are asked for, how many are -0 is noted."""
        zeros = int(np.count_nonzero(block == 0))
        if self._octaves and zeros:
            bits = block.view(f"u{block.itemsize}")
            self._negative_zeros += int(np.count_nonzero(bits == 1 << (8 * bits.itemsize - 1)))
        return zeros

    def result(self) -> Partial:
        if self._bins is None:
            return self._found
        if self._octaves:
            fields = self._exponents.reshape(2, OCTAVES) if self._single else _fields(self._exponents)
            self._counts = of_octaves(fields, self._found.zeros, self._negative_zeros)
        return replace(self._found, histogram=self._counts)


def _moments(wide: NDArray[np.float64]) -> tuple[float, float]:
    """Mean, and the sum of squared deviations from it; the array may be changed."""
    n = len(wide)
    total, squares = _sums(wide)
    mean = total / n
    m2 = squares - n * mean * mean
    if m2 < _CANCELLED * squares:  # the mean is far larger than the spread
        wide -= mean
        rest, m2 = _sums(wide)
        m2 -= rest * rest / n
        mean += rest / n
    return mean, max(m2, 0.0)


def _sums(wide: NDArray[np.float64]) -> tuple[float, float]:
    """The sum, and the sum of squares; as dot products, the fastest way to go through memory that numpy has."""
    rows, rest = wide[: len(wide) // _ROW * _ROW].reshape(-1, _ROW), wide[len(wide) // _ROW * _ROW :]
    return (
        float(np.vecdot(rows, _ONES).sum()) + float(rest.sum()),
        float(np.vecdot(rows, rows).sum()) + float(rest @ rest),
    )


def _fields(counts: Int64) -> Int64:
    """float32's exponent fields (sign, field) out of counts of float64's sign and exponent; the ends take the rest."""
    by_sign = counts.reshape(2, 1 << 11)
    at = np.clip(np.arange(1 << 11) - 1023 + 127, 0, OCTAVES - 2)
    at[-1] = OCTAVES - 1  # not finite
    fields = np.zeros((2, OCTAVES), np.int64)
    for sign in range(2):
        np.add.at(fields[sign], at, by_sign[sign])
    return fields


def _smallest_normal(dtype: np.dtype) -> float:
    """Below it an element is 0 or subnormal; whole numbers are never subnormal."""
    return 1.0 if dtype.kind in "iub" else float(finfo(dtype).smallest_normal)
