"""Which tensors that one side alone has are one tensor under two names: same shape, and same or similar content.

A sample of each is compared, not the whole: pieces from all over it, so that nothing is read twice that is large.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import takewhile

import numpy as np

from ckptlab.arrays import reader
from ckptlab.catalog import MASTER, PARAM, Catalog, Tensor
from ckptlab.layout import Cut

SAMPLE = 1024  # elements that a tensor is recognised by
_PIECES = 8  # from so many places
_FAR = 0.5  # |a - b| / |a| of the samples from which on two tensors are not taken for one
_NAMES = 0.25  # how much of that distance names that end alike make up for


@dataclass(frozen=True)
class Renamed:
    """A tensor of a that b has as another: `same` if the samples are equal, else they are `distance` apart, as a share
    of their length."""

    a: str
    b: str
    same: bool
    distance: float


def renamed(a: Catalog, b: Catalog, only_a: Iterable[str], only_b: Iterable[str]) -> tuple[Renamed, ...]:
    """Pair off tensors that one side alone has, those that are most alike first; what has no like stays alone."""
    groups: dict[tuple[tuple[int, ...], str], tuple[list[str], list[str]]] = {}
    for side, (catalog, names) in enumerate(((a, only_a), (b, only_b))):
        for name in names:
            tensor = catalog.tensors[name]
            if (state := _state(tensor)) is not None:
                groups.setdefault((tensor.shape, state), ([], []))[side].append(name)
    found = [pair for (_, state), (left, right) in groups.items() for pair in _matched(a, b, left, right, state)]
    order = {name: i for i, name in enumerate(a.tensors)}
    return tuple(sorted(found, key=lambda pair: order[pair.a]))


def _state(tensor: Tensor) -> str | None:
    return next((s for s in (MASTER, PARAM, *tensor.states) if s in tensor.states), None)


def _matched(a: Catalog, b: Catalog, left: list[str], right: list[str], state: str) -> Iterator[Renamed]:
    if not left or not right:
        return
    x, y = (np.stack([_sample(c, n, state) for n in names]) for c, names in ((a, left), (b, right)))
    long_x, long_y = ((v * v).sum(axis=1) for v in (x, y))
    squares = np.maximum(long_x[:, None] + long_y[None, :] - 2 * (x @ y.T), 0)
    apart = np.sqrt(squares / np.maximum(np.maximum(long_x[:, None], long_y[None, :]), 1e-300))
    close = [(i, j) for i, j in np.argwhere(apart < _FAR).tolist()]
    same = {(i, j): bool(np.array_equal(x[i], y[j])) for i, j in close}
    rank = {(i, j): (not same[i, j], apart[i, j] - _NAMES * _alike(left[i], right[j])) for i, j in close}
    taken_a, taken_b = set[int](), set[int]()
    for i, j in sorted(close, key=lambda pair: (rank[pair], pair)):
        if i not in taken_a and j not in taken_b:
            taken_a.add(i)
            taken_b.add(j)
            yield Renamed(left[i], right[j], same[i, j], 0.0 if same[i, j] else float(apart[i, j]))


def _sample(catalog: Catalog, name: str, state: str) -> np.ndarray:
    """Up to SAMPLE elements of the whole tensor as float64, from places all over it."""
    tensor = catalog.tensors[name]
    count = tensor.numel
    length = min(count, SAMPLE) if count <= SAMPLE else SAMPLE // _PIECES
    starts = [0] if count <= SAMPLE else np.linspace(0, count - length, _PIECES).astype(int).tolist()
    gather, cut = reader(catalog, name, state), Cut.whole(tensor.shape)
    pieces = [p.astype(np.float64) for s in starts for p in gather.chunks(cut, (), s, s + length)]
    return np.nan_to_num(np.concatenate(pieces)) if pieces else np.zeros(0)


def _alike(a: str, b: str) -> float:
    """The share of the longer name's parts in which the two end alike."""
    left, right = a.split("."), b.split(".")
    pairs = zip(reversed(left), reversed(right), strict=False)
    return len(list(takewhile(lambda pair: pair[0] == pair[1], pairs))) / max(len(left), len(right))
