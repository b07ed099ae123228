"""Boxes that tile a tensor as a grid: a cut from what was stored, where no layout says how it came about."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from ckptlab.aliases import Int64
from ckptlab.errors import LayoutError


@dataclass(frozen=True, eq=False)
class Grid:
    """Dim d is cut at `edges[d]`, 0 and its length among them; cell [i, j, …] is box number `cells[i, j, …]`."""

    edges: tuple[Int64, ...]
    cells: Int64

    @property
    def counts(self) -> tuple[int, ...]:
        """Into how many intervals each dim is cut."""
        return self.cells.shape


def grid(shape: Sequence[int], starts: Sequence[Sequence[int]], sizes: Sequence[Sequence[int]]) -> Grid:
    """The grid that boxes (where each begins, its lengths) make of a tensor of that shape, those without elements left
    out. LayoutError, with the place, where they overlap, leave a gap, or are no grid."""
    if 0 in shape or not shape:
        if len(starts) > 1:
            raise LayoutError(f"{len(starts)} boxes of a tensor of shape {tuple(shape)}: expected one")
        return uncut(tuple(shape))
    if len(starts) == 1 and not any(starts[0]) and tuple(sizes[0]) == tuple(shape):
        return uncut(tuple(shape))
    kept = [i for i, size in enumerate(sizes) if 0 not in size]
    low = np.array([starts[i] for i in kept], np.int64).reshape(-1, len(shape))
    high = low + np.array([sizes[i] for i in kept], np.int64).reshape(-1, len(shape))
    edges = tuple(np.unique([0, n, *low[:, d], *high[:, d]]) for d, n in enumerate(shape))
    counts = tuple(len(e) - 1 for e in edges)
    first = [np.searchsorted(e, low[:, d]) for d, e in enumerate(edges)]
    if any((np.searchsorted(e, high[:, d]) - first[d] != 1).any() for d, e in enumerate(edges)):
        raise LayoutError(f"{len(kept)} boxes of a tensor of shape {tuple(shape)} are not a grid")
    place = np.ravel_multi_index(tuple(first), counts)
    held = np.bincount(place, minlength=math.prod(counts))
    if (held != 1).any():
        cell = np.unravel_index(int(np.argmax(held != 1)), counts)
        where = tuple(f"{e[k]}:{e[k + 1]}" for e, k in zip(edges, cell, strict=True))
        how = "overlap" if held.max() > 1 else "leave a gap"
        raise LayoutError(f"boxes of a tensor of shape {tuple(shape)} {how}, at [{', '.join(where)}] of others")
    cells = np.zeros(math.prod(counts), np.int64)
    cells[place] = kept
    return Grid(edges, cells.reshape(counts))


@lru_cache(maxsize=1 << 10)
def uncut(shape: tuple[int, ...]) -> Grid:
    """The grid of one box. The same object for all of a shape: what follows of it is worked out once."""
    return Grid(tuple(np.array([0, n], np.int64) for n in shape), np.zeros((1,) * len(shape), np.int64))


def neutral_axes(counts: Mapping[str, tuple[int, ...]]) -> tuple[dict[str, int], dict[str, tuple[str | None, ...]]]:
    """Axes for grids of whose mesh nothing is known: their names (`shard`, or `shard0`, …) and degrees, and for each
    grid (by name, with the counts of its dims) the axis that cuts each dim, None where it is whole.

    A count takes an axis of its degree, or of a larger one (whose last coordinates then hold nothing).
    """
    degrees: list[int] = []
    chosen: dict[str, list[int | None]] = {}
    apart = {name: dims for name, dims in counts.items() if max(dims, default=1) > 1}
    for name, dims in sorted(apart.items(), key=lambda item: (-sum(n > 1 for n in item[1]), [-n for n in item[1]])):
        mine: list[int | None] = []
        for count in dims:
            fitting = [i for i, degree in enumerate(degrees) if degree >= count > 1 and i not in mine]
            if count > 1 and not fitting:
                fitting = [len(degrees)]
                degrees.append(count)
            mine.append(min(fitting, key=degrees.__getitem__) if fitting else None)
        chosen[name] = mine
    names = ["shard"] if len(degrees) == 1 else [f"shard{i}" for i in range(len(degrees))]
    axes: dict[str, tuple[str | None, ...]] = {name: (None,) * len(dims) for name, dims in counts.items()}
    axes |= {name: tuple(None if i is None else names[i] for i in mine) for name, mine in chosen.items()}
    return dict(zip(names, degrees, strict=True)), axes
