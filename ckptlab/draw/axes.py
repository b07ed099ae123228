"""Several axes run together: what a cell is called that stands for some of their coordinates."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ckptlab.draw.blocks import listed
from ckptlab.words import ranges


@dataclass(frozen=True)
class Axes:
    """Axes by name, slowest first, with their degrees; their coordinates together are 0 … size - 1."""

    names: tuple[str, ...]
    degrees: tuple[int, ...]

    @property
    def size(self) -> int:
        return math.prod(self.degrees)

    def label(self, numbers: Sequence[int], order: Sequence[str] = (), *, short: bool = False) -> str:
        """`pp 1`, `dp 0–7`, `edp 0 ep 1`; axes of degree 1 are not worth a word. order: in which they are named.
        short: those are not either of which there is every coordinate, unless that is so of all."""
        told, degrees = self._values(numbers), dict(zip(self.names, self.degrees, strict=True))
        named = [name for name in order or self.names if degrees[name] > 1]
        some = [name for name in named if len(told[name]) < degrees[name]]
        return " ".join(f"{name} {ranges(told[name])}" for name in (short and some) or named)

    def data(self, numbers: Sequence[int]) -> dict[str, str]:
        """The same for `data-*` attributes: `{"dp": "0-7"}`, axes of degree 1 too."""
        return {name: listed(values) for name, values in self._values(numbers).items()}

    def where(self, place: dict[str, int]) -> set[int]:
        """The numbers at which the axes named in `place` have the coordinates given there."""
        grid = np.arange(self.size).reshape(self.degrees)
        return {int(k) for k in grid[tuple(place.get(name, slice(None)) for name in self.names)].ravel()}

    def _values(self, numbers: Sequence[int]) -> dict[str, set[int]]:
        places = np.unravel_index(np.asarray(numbers, np.int64), self.degrees) if self.names else ()
        return {name: set(found.tolist()) for name, found in zip(self.names, places, strict=True)}
