"""Copies of tensors that are taken to be replicas: are they?

Where a strategy, and not the checkpoint itself, says that ranks hold copies, a wrong strategy would drop all but one of
several different shards. So they are compared before that.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np

from ckptlab.arrays.gather import reader
from ckptlab.catalog import Catalog
from ckptlab.errors import ReshapeError
from ckptlab.layout.cut import Coordinate
from ckptlab.plan import Holder

REPLICA_TOLERANCE = 1e-2
"""How far apart copies may be, as a part of the largest element: ranks that compute the same sums in another order
drift, in bfloat16 by that much."""


def refuse_unequal(catalog: Catalog) -> None:
    """ReshapeError, with the tensor, where copies of a weight that the layouts (not told by the checkpoint itself) call
    equal are further apart than REPLICA_TOLERANCE. Reads the weights of all copies."""
    if catalog.training.layouts_told or catalog.extents is None:
        return
    for name, tensor in catalog.tensors.items():
        state = catalog.weight(name)
        if tensor.layout.replicas != "equal" or tensor.kind == "buffer" or state is None:
            continue
        pairs = ((pair, _difference(catalog, name, state, *pair)) for pair in _pairs(catalog, name, state))
        within = inside(catalog, name, state) if tensor.cut.repeats else ()
        parts = (((first, other), _apart(a, b)) for other, first, a, b, _ in within)
        for (first, other), (apart, largest) in itertools.chain(pairs, parts):
            if apart > REPLICA_TOLERANCE * largest:
                raise ReshapeError(
                    f"{catalog.path}: {name}: its layout {tensor.layout.text!r} says that {first} and {other} hold the "
                    f"same, and their copies differ by up to {apart:.3g} (largest element {largest:.3g}, tolerance "
                    f"{REPLICA_TOLERANCE:g} of it): the strategy is wrong, or the copies are to be averaged "
                    '(replicas="mean"), summed ("sum"), or the first is right ("first")'
                )


def inside(
    catalog: Catalog, name: str, state: str, stage: int | None = None
) -> Iterator[tuple[Holder, Holder, np.ndarray, np.ndarray, list[np.ndarray]]]:
    """(holder, the first one, what both have of the whole as either has it, where that is in each dim of the holder's
    shard): parts of a cut tensor that several hold, as the keys and values of multi-query attention
    (`((tp q) + k + v) in`)."""
    placement = catalog.placement(name, state)
    cut, holders = placement.cut, placement.on(placement.stages[0] if stage is None else stage)
    places = [placement.coordinate(holder) for holder in holders]
    shards = (reader(catalog, name, state, holder=h).shard(cut, at) for h, at in zip(holders, places, strict=True))
    first = next(shards)
    positions = [d.positions(at) for d, at in zip(cut.dims, cut.per_dim(places[0]), strict=True)]
    for holder, place, shard in zip(holders[1:], places[1:], shards, strict=True):
        here = [d.positions(at) for d, at in zip(cut.dims, cut.per_dim(place), strict=True)]
        both = [np.intersect1d(a, b, return_indices=True)[1:] for a, b in zip(here, positions, strict=True)]
        mine, other = (np.ix_(*(pair[side] for pair in both)) for side in (0, 1))
        yield holder, holders[0], shard[mine], first[other], [a for a, _ in both]


def _pairs(catalog: Catalog, name: str, state: str) -> Iterator[tuple[Holder, Holder]]:
    """Holders of one stage that should hold the same, each with the first of them."""
    placement = catalog.placement(name, state)
    known: dict[Coordinate, Holder] = {}
    for holder in placement.on(placement.stages[0]):
        first = known.setdefault(placement.coordinate(holder), holder)
        if first is not holder:
            yield first, holder


def _difference(catalog: Catalog, name: str, state: str, first: Holder, other: Holder) -> tuple[float, float]:
    """(the largest difference, the largest element) of two copies; NaN beside a number is infinitely far."""
    placement = catalog.placement(name, state)
    at = placement.coordinate(first)
    count = int(np.prod(placement.shape(first), dtype=np.int64))
    apart = largest = 0.0
    pieces = (reader(catalog, name, state, holder=h).chunks(placement.cut, at, 0, count) for h in (first, other))
    for a, b in zip(*pieces, strict=True):
        here, size = _apart(a, b)
        apart, largest = max(apart, here), max(largest, size)
    return apart, largest


def _apart(a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
    """(the largest difference, the largest element)."""
    x, y = (one.astype(np.complex64 if np.iscomplexobj(one) else np.float32) for one in (a, b))
    same = (x == y) | (np.isnan(x) & np.isnan(y))
    with np.errstate(invalid="ignore"):
        gap = np.where(same, 0, np.nan_to_num(np.abs(x - y), nan=np.inf))
    return float(gap.max(initial=0)), float(np.abs(np.where(np.isfinite(x), x, 0)).max(initial=0))
