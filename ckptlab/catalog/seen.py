"""Tensors that are seen otherwise than they are stored: under other names, joined, taken apart, in another order."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

import numpy as np

from ckptlab.aliases import Int64

Runs = Int64


@dataclass(frozen=True, eq=False)
class Piece:
    """Which elements of a tensor that is seen are which of a stored one, `name`.

    `dims` says for each dim of the stored one either the index there (of a stack, of which this is one), or the dim of
    the seen one and runs, int64 (n, 6): start in the seen dim, start in the stored one, length, count, the strides of
    both. `at`: the indices of dims that only the seen one has.
    """

    name: str
    dims: tuple[int | tuple[int, Runs], ...]
    at: tuple[tuple[int, int], ...] = ()

    def is_all(self, shape: tuple[int, ...], stored: tuple[int, ...]) -> bool:
        """Whether it is the stored tensor as it is."""
        return shape == stored and all(
            not isinstance(dim, int) and dim[0] == i and len(dim[1]) == 1 and dim[1][0, :4].tolist() == [0, 0, n, 1]
            for i, (dim, n) in enumerate(zip(self.dims, shape, strict=True))
        )

    @property
    def key(self) -> Hashable:
        """Which elements are which, whatever the stored tensor is called."""
        return self.at, tuple(dim if isinstance(dim, int) else (dim[0], dim[1].tobytes()) for dim in self.dims)

    def same(self, other: Piece) -> bool:
        """Whether both say the same."""
        return (self.name, self.key) == (other.name, other.key)


@dataclass(frozen=True)
class LowRank:
    """What is added to a weight (out, in) that is seen: `scale` times the product of two stored tensors, b (out, rank)
    and a (rank, in); transposed: of a weight (in, out)."""

    a: str
    b: str
    scale: float
    transposed: bool = False


def identity(name: str, shape: tuple[int, ...]) -> Piece:
    """A stored tensor as it is."""
    return Piece(name, tuple((i, np.array([[0, 0, n, 1, 0, 0]], np.int64)) for i, n in enumerate(shape)))
