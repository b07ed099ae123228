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

from ckptlab.analysis.partial import OCTAVES, Bins, Partial, of_octaves
from ckptlab.errors import UnsupportedError

BLOCK = 1 << 17  # elements whose float64 and exponents are held at a time
_ROW = 4096  # elements that one dot product adds up: short enough for BLAS to stay on this thread
_CANCELLED = 1e-4  # of a block's sum of squares: a variance below it is computed again around the mean


class Accumulator(Protocol):
    """Takes elements, one-dimensional and in any order, and gives their statistics."""

    def add(self, window: np.ndarray) -> None: ...

    def result(self) -> Partial: ...


def accumulator(dtype: np.dtype, bins: Bins | None = None) -> Accumulator:
    """What accumulates elements of this dtype. UnsupportedError for complex numbers and what is no number."""
    dtype = np.dtype(dtype)
    if dtype.type is np.void or dtype.kind not in "fiubV":
        raise UnsupportedError(f"there are no statistics of elements of {dtype}")
    if dtype.itemsize <= 2:
        return _Patterns(dtype, bins)
    return _Values(dtype, bins)


def partial(array: np.ndarray, bins: Bins | None = None) -> Partial:
    """The statistics of an array of any dtype and shape."""
    taken = accumulator(array.dtype, bins)
    taken.add(array.reshape(-1))
    return taken.result()


# -------------------------------------------------------------------------------- 16 bits and fewer


class _Patterns:
    """Counts of every bit pattern."""

    def __init__(self, dtype: np.dtype, bins: Bins | None) -> None:
        self._dtype, self._bins = dtype, bins
        self._unsigned = np.dtype(f"u{dtype.itemsize}")
        self._counts = np.zeros(1 << 8 * dtype.itemsize, np.int64)
        self._keys = np.empty(0, np.intp)

    def add(self, window: np.ndarray) -> None:
        patterns = window.view(self._unsigned)
        size = min(4 * BLOCK, len(patterns))
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

    def _histogram(self, x: NDArray[np.float64], n: NDArray[np.int64]) -> NDArray[np.int64]:
        assert self._bins is not None
        if self._bins.edges is not None:
            return np.histogram(x, self._bins.edges, weights=n)[0].astype(np.int64)
        fields = _fields(np.bincount(x.view(np.uint64) >> np.uint64(52), n, 1 << 12).astype(np.int64))
        zero = x == 0
        return of_octaves(fields, int(n[zero].sum()), int(n[zero & np.signbit(x)].sum()))


# -------------------------------------------------------------------------------- wider


class _Values:
    """Sums in float64, exponents by bit pattern (of float32's own bits, or of the float64)."""

    def __init__(self, dtype: np.dtype, bins: Bins | None) -> None:
        self._dtype, self._bins = dtype, bins
        self._single = dtype == np.float32
        self._exponents = np.zeros(1 << (9 if self._single else 12), np.int64)
        self._found = Partial()
        self._negative_zeros = 0
        self._edges = None if bins is None or bins.edges is None else np.asarray(bins.edges)
        self._histogram = np.zeros(0 if bins is None else bins.size, np.int64)
        self._wide, self._keys = np.empty(0), np.empty(0, np.int64)

    def add(self, window: np.ndarray) -> None:
        size = min(BLOCK, len(window))
        if len(self._wide) < size:
            self._wide, self._keys = np.empty(size), np.empty(size, np.int64)
        for start in range(0, len(window), max(size, 1)):
            self._block(window[start : start + size])

    def _block(self, block: np.ndarray) -> None:
        wide = self._wide[: len(block)]
        np.copyto(wide, block, casting="unsafe")
        few, odd = self._count_exponents(block, wide)
        nan = inf = zeros = subnormals = 0
        count = len(block)
        if odd:
            nan = int(np.count_nonzero(np.isnan(wide)))
            inf = odd - nan
            wide = wide[np.isfinite(wide)]
        if few:
            zeros = int(np.count_nonzero(wide == 0))
            subnormals = few - zeros
            if zeros and self._bins is not None:
                self._negative_zeros += int(np.count_nonzero(np.signbit(wide[wide == 0])))
        if self._edges is not None:
            self._histogram += np.histogram(wide, self._edges)[0]
        if not len(wide):
            self._found = self._found.merge(Partial(count, nan, inf))
            return
        extremes = wide if odd or not self._single else block
        low, high = float(extremes.min()), float(extremes.max())
        mean, m2 = _moments(wide)
        self._found = self._found.merge(Partial(count, nan, inf, zeros, subnormals, mean, m2, low, high))

    def _count_exponents(self, block: np.ndarray, wide: NDArray[np.float64]) -> tuple[int, int]:
        """Count exponents; how many elements are zero or subnormal, and how many not finite."""
        keys = self._keys[: len(block)]
        if self._single:
            np.right_shift(block.view(np.uint32), 23, out=keys, casting="unsafe", dtype=np.uint32)
        else:
            np.right_shift(wide.view(np.uint64), 52, out=keys.view(np.uint64))
        counts = np.bincount(keys, minlength=len(self._exponents))
        self._exponents += counts
        half = len(counts) // 2
        return int(counts[0] + counts[half]), int(counts[half - 1] + counts[-1])

    def result(self) -> Partial:
        if self._bins is None:
            return self._found
        if self._edges is None:
            fields = self._exponents.reshape(2, OCTAVES) if self._single else _fields(self._exponents)
            self._histogram = of_octaves(fields, self._found.zeros, self._negative_zeros)
        return replace(self._found, histogram=self._histogram)


def _moments(wide: NDArray[np.float64]) -> tuple[float, float]:
    """Mean, and the sum of squared deviations from it; the array may be changed."""
    n = len(wide)
    mean = float(wide.sum()) / n
    squares = _squares(wide)
    m2 = squares - n * mean * mean
    if m2 < _CANCELLED * squares:  # the mean is far larger than the spread
        wide -= mean
        rest = float(wide.sum())
        m2 = _squares(wide) - rest * rest / n
        mean += rest / n
    return mean, max(m2, 0.0)


def _squares(wide: NDArray[np.float64]) -> float:
    """The sum of squares."""
    whole = len(wide) // _ROW * _ROW
    rows = wide[:whole].reshape(-1, _ROW)
    rest = wide[whole:]
    return float(np.matmul(rows[:, None, :], rows[:, :, None]).sum()) + float(rest @ rest)


def _fields(counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """float32's exponent fields (sign, field) out of counts of float64's sign and exponent; the ends take the rest."""
    by_sign = counts.reshape(2, 1 << 11)
    at = np.clip(np.arange(1 << 11) - 1023 + 127, 0, OCTAVES - 2)
    at[-1] = OCTAVES - 1  # not finite
    fields = np.zeros((2, OCTAVES), np.int64)
    for sign in range(2):
        np.add.at(fields[sign], at, by_sign[sign])
    return fields


def _smallest_normal(dtype: np.dtype) -> float:
    return 0.0 if dtype.kind in "iub" else float(finfo(dtype).smallest_normal)
