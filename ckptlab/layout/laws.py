"""The laws of a layout, tried element by element on numbers that are all different: then an equation between arrays is
a proof that no element was lost, doubled or misplaced.

Rows spelled out one by one (`Cut.take`, `Cut.put`) are held against `overlap`, by which everything is executed.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ckptlab.layout.cut import Coordinate, Cut, check_same_tensor, overlap
from ckptlab.layout.rows import Rows


@dataclass(frozen=True)
class Laws:
    """What holds of a layout for a shape on a mesh; true if all does.

    held: by how many coordinates an element is held, each number once: 0 is not among them. split: what every
    coordinate holds is what the rows say. merged: merging undoes splitting. returned: from this cut to another and back
    is the identity, on both sides; None if no other was given.
    """

    held: tuple[int, ...]
    split: bool
    merged: bool
    returned: bool | None = None

    def __bool__(self) -> bool:
        return 0 not in self.held and self.split and self.merged and self.returned is not False

    def to_dict(self) -> dict[str, bool | str]:
        """In words, for a table."""
        said: dict[str, bool | str] = {
            "merge undoes split": self.merged,
            "an element is held by": " or ".join(map(str, self.held)) or "nobody: there is none",
            "shards are as the rows say": self.split,
        }
        return said if self.returned is None else {**said, "there and back": self.returned}


def laws(cut: Cut, there: Cut | None = None) -> Laws:
    """Try the laws on a cut; `there`: another one of the same tensor, to go to and come back from.

    Takes memory for some copies of the whole in int64: meant for small shapes. LayoutError where the two are of
    different tensors.
    """
    whole = np.random.default_rng(0).permutation(math.prod(cut.shape)).reshape(cut.shape)
    held = np.zeros(cut.shape, np.int64)
    shards = {at: cut.take(whole, at) for at in cut.coordinates()}
    for at in shards:
        held[cut.index(at)] += 1
    uncut = Cut.whole(cut.shape)
    padded = Cut(cut.shape, cut.mesh, cut.dims)  # the same, its padding taken for elements
    split = _moved(uncut, {(): whole}, padded)
    merged = _moved(padded, shards, uncut)[()]
    return Laws(
        held=tuple(np.unique(held).tolist()),
        split=_same(split, shards),
        merged=bool((merged == whole).all()),
        returned=None if there is None else _returns(cut, there) and _returns(there, cut),
    )


def _returns(cut: Cut, there: Cut) -> bool:
    """Shards of `cut`, taken there and back, are what they were, but for padding, which is not part of it."""
    check_same_tensor(cut, there)
    whole = np.full(cut.shape, -1, np.int64)
    whole[tuple(map(slice, cut.logical))] = np.arange(math.prod(cut.logical)).reshape(cut.logical)
    shards = {at: cut.take(whole, at) for at in cut.coordinates()}
    return _same(_moved(there, _moved(cut, shards, there), cut), shards)


def _moved(a: Cut, shards: Mapping[Coordinate, np.ndarray], b: Cut) -> dict[Coordinate, np.ndarray]:
    """The shards of b out of those of a, by overlaps alone; -1 is left where none gives anything."""
    found = {at: np.full(b.shard_shape(at), -1, np.int64) for at in b.coordinates()}
    for (at_a, shard), (at_b, out) in itertools.product(shards.items(), found.items()):
        rows = overlap(a, at_a, b, at_b, owned=True)
        source, target = (np.ix_(*(_spelled(dim, side) for dim in rows)) for side in (0, 1))
        out[target] = shard[source]
    return found


def _spelled(rows: Rows, side: int) -> np.ndarray:
    """The indices of one dim that rows of an overlap stand for in a's shard (side 0) or in b's (1)."""
    pieces = [np.arange(row[2]) + row[side] + k * row[4 + side] for row in rows.tolist() for k in range(row[3])]
    return np.concatenate(pieces) if pieces else np.zeros(0, np.int64)


def _same(a: Mapping[Coordinate, np.ndarray], b: Mapping[Coordinate, np.ndarray]) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[at], b[at]) for at in a)
