"""What part of a tensor tells of its numbers, in a form that adds up: the statistics of parts merge into the whole's.

Counts, extremes and histograms merge exactly, mean and variance with Chan, Golub and LeVeque's formula ("Algorithms for
computing the sample variance", 1983). Everything is float64: numpy's own sums of bfloat16 and float16 are wrong.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import reduce

import numpy as np
from numpy.typing import NDArray

from ckptlab.aliases import Int64

OCTAVES = 256  # of each sign: below 2^-126 first, then an octave each (float32's exponents), the last for 2^127 and up


@dataclass(frozen=True)
class Partial:
    """The statistics of some elements.

    count: all of them; nan, inf: those that are not finite (of both signs), zeros (of both signs) and subnormal ones
    among them. mean, m2: of the finite ones, and the sum of the squares of their deviations from it. low, high: their
    extremes, inf and -inf where there are none. histogram: counts of finite elements in the bins that were asked for
    (`Bins`), None if none were.
    """

    count: int = 0
    nan: int = 0
    inf: int = 0
    zeros: int = 0
    subnormals: int = 0
    mean: float = 0.0
    m2: float = 0.0
    low: float = math.inf
    high: float = -math.inf
    histogram: Int64 | None = None

    @property
    def finite(self) -> int:
        """Elements that are neither NaN nor infinite."""
        return self.count - self.nan - self.inf

    @property
    def std(self) -> float:
        """Of the finite elements, as a population (numpy's, ddof=0); NaN where there are none."""
        return math.sqrt(self.m2 / self.finite) if self.finite else math.nan

    @property
    def norm(self) -> float:
        """The Euclidean norm of the finite elements."""
        return math.sqrt(self.m2 + self.finite * self.mean**2)

    def merge(self, other: Partial) -> Partial:
        """The statistics of both parts together."""
        if not other.count:
            return self if self.histogram is not None else replace(self, histogram=other.histogram)
        if not self.count:
            return other.merge(self)
        n, m = self.finite, other.finite
        apart = other.mean - self.mean
        both = n + m
        return Partial(
            self.count + other.count,
            self.nan + other.nan,
            self.inf + other.inf,
            self.zeros + other.zeros,
            self.subnormals + other.subnormals,
            (n * self.mean + m * other.mean) / both if both else 0.0,
            self.m2 + other.m2 + (apart * apart * (n * m / both) if both else 0.0),
            min(self.low, other.low),
            max(self.high, other.high),
            None if self.histogram is None or other.histogram is None else self.histogram + other.histogram,
        )


def merged(parts: Iterable[Partial]) -> Partial:
    """The statistics of all parts together; of none: of no elements."""
    return reduce(Partial.merge, parts, Partial())


@dataclass(frozen=True)
class Bins:
    """The bins of a histogram: `edges` that were given (as numpy's: half-open, the last one closed), or octaves.

    Octaves are the same for every tensor and need no look at its range: one for zero, and for each sign one for each
    power of two from 2^-126 to 2^127, with all that is smaller in one more, and all that is larger in the last.
    """

    edges: tuple[float, ...] | None = None

    @property
    def size(self) -> int:
        return 2 * (OCTAVES - 1) + 1 if self.edges is None else len(self.edges) - 1

    def bounds(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """The lower and the upper edge of each bin, ascending; those of the bin for zero are both 0."""
        if self.edges is not None:
            edges = np.asarray(self.edges, np.float64)
            return edges[:-1], edges[1:]
        near = np.concatenate([[0.0], np.exp2(np.arange(-126.0, 128.0))])
        far = np.append(near[1:], np.inf)
        return np.concatenate([-far[::-1], [0.0], near]), np.concatenate([-near[::-1], [0.0], far])


def of_octaves(fields: Int64, zeros: int, negative_zeros: int) -> Int64:
    """The octaves' counts in ascending order, out of counts (sign, exponent field) of float32, zeros among them."""
    fields = fields.copy()
    fields[0, 0] -= zeros - negative_zeros
    fields[1, 0] -= negative_zeros
    return np.concatenate([fields[1, -2::-1], [zeros], fields[0, :-1]])
