"""How far apart two tensors are, summed up window by window; and the sums of many, by layer and by kind."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from ckptlab.catalog.stacks import kind_and_layer

K = TypeVar("K")
_PIECE = 1 << 16  # elements that are summed at a time: they stay in the cache


@dataclass(frozen=True)
class Measure:
    """One state of one tensor on both sides: `count` of its `elements` differ, the sums of squares of a, of b and of
    a - b, and of the products a · b. NaN where an element is."""

    name: str
    state: str
    elements: int
    count: int = 0
    max_abs: float = 0.0
    squares_a: float = 0.0
    squares_b: float = 0.0
    squares_apart: float = 0.0
    products: float = 0.0

    @property
    def relative(self) -> float:
        """|a - b| / |a|, norms over all elements: 0 where nothing differs, inf where a is zero and b is not."""
        return relative(self.squares_apart, self.squares_a)

    @property
    def cosine(self) -> float:
        """The cosine of the angle between a and b: 1 where nothing differs, NaN where one is zero."""
        return cosine(self.products, self.squares_a, self.squares_b, bool(self.count))

    @property
    def layer(self) -> int | None:
        """The layer that the tensor's name says."""
        return kind_and_layer(self.name)[1]

    @property
    def kind(self) -> str:
        """The tensor's name without the number of its layer."""
        return kind_and_layer(self.name)[0]


@dataclass(frozen=True)
class Summary:
    """Several tensors of one state together: of the layer or kind `label`."""

    label: str
    tensors: int
    differ: int
    max_abs: float
    relative: float
    cosine: float


def relative(squares_apart: float, squares_a: float) -> float:
    """|a - b| / |a| from sums of squares."""
    if squares_apart == 0:
        return 0.0
    return math.sqrt(squares_apart / squares_a) if squares_a else math.inf


def cosine(products: float, squares_a: float, squares_b: float, differ: bool) -> float:
    """The cosine from sums of products and squares; rounding does not take it past 1."""
    if not differ:
        return 1.0
    length = math.sqrt(squares_a) * math.sqrt(squares_b)
    return max(-1.0, min(1.0, products / length)) if length and math.isfinite(length) else math.nan


def summed(measures: Iterable[Measure], key: Callable[[Measure], K], label: Callable[[K], str]) -> tuple[Summary, ...]:
    """Measures with the same key together, in the order of the first of each."""
    groups: dict[K, list[Measure]] = {}
    for measure in measures:
        groups.setdefault(key(measure), []).append(measure)
    return tuple(_summary(label(k), members) for k, members in groups.items())


def _summary(label: str, members: list[Measure]) -> Summary:
    a, b, apart, products = (
        math.fsum(getattr(m, f) for m in members) for f in ("squares_a", "squares_b", "squares_apart", "products")
    )
    differ = sum(m.count > 0 for m in members)
    worst = max(m.max_abs for m in members)
    return Summary(label, len(members), differ, worst, relative(apart, a), cosine(products, a, b, differ > 0))


@dataclass
class Sums:
    """The sums of a `Measure`, window by window. What is equal is summed in float32, fast: its error is the same on
    both sides. What differs is summed in float64."""

    squares_a: float = 0.0
    squares_b: float = 0.0
    squares_apart: float = 0.0
    products: float = 0.0

    def equal(self, window: np.ndarray) -> None:
        """A window that is the same on both sides."""
        for start in range(0, len(window), _PIECE):
            piece = window[start : start + _PIECE]
            with np.errstate(over="ignore", invalid="ignore"):
                squares = float(np.dot(x := _plain(piece, np.float32), x))
            if not math.isfinite(squares):  # beyond float32, or not finite at all
                squares = float(np.dot(x := _plain(piece, np.float64), x))
            self.squares_a += squares
            self.squares_b += squares
            self.products += squares

    def other(self, a: np.ndarray, b: np.ndarray) -> None:
        """A window in which something differs."""
        for start in range(0, len(a), _PIECE):
            x, y = (_plain(side[start : start + _PIECE], np.float64) for side in (a, b))
            with np.errstate(over="ignore", invalid="ignore"):  # NaN and infinity are said to be so
                self.squares_a += float(np.dot(x, x))
                self.squares_b += float(np.dot(y, y))
                self.products += float(np.dot(x, y))
                x = x - y
                self.squares_apart += float(np.dot(x, x))


def _plain(window: np.ndarray, dtype: type[np.floating]) -> np.ndarray:
    """As real numbers: complex ones as pairs of them."""
    return (window.view(window.real.dtype) if window.dtype.kind == "c" else window).astype(dtype, copy=False)
