"""Replicas inside of shards: parts of a cut tensor that several tp ranks hold, as the keys and values of multi-query
attention (`((tp q) + k + v) in`).

They do not lie at the same places of the flattened shards, so the one pass over those cannot compare them. Such tensors
are few; their shards are read once more, two at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from ckptlab.analysis.checkup.data import Key, Seen, Told
from ckptlab.analysis.elements import unequal
from ckptlab.arrays import reader
from ckptlab.catalog import Catalog, Tensor


def survey(catalog: Catalog) -> Told:
    """What such parts have that is not the same on all ranks."""
    told = Told()
    for tensor in catalog.tensors.values():
        if not _repeats(tensor) or tensor.layout.replicas == "mean":
            continue
        for state in tensor.states:
            if (tensor.name, state) not in catalog.placements:
                continue
            for stage in catalog.placement(tensor.name, state).stages:
                for key, seen in _compared(catalog, tensor, state, stage):
                    told.note(key, seen)
    return told


def _repeats(tensor: Tensor) -> bool:
    """The tensor is cut over tp, and some of it is held by several ranks."""
    return bool(tensor.cut.axes) and any(sum(d.widths.values()) > d.size for d in tensor.cut.dims)


def _compared(catalog: Catalog, tensor: Tensor, state: str, stage: int) -> Iterator[tuple[Key, Seen]]:
    """Each tp rank's shard against that of the first."""
    cut = tensor.cut
    placement = catalog.placement(tensor.name, state)
    holders = placement.on(stage)
    places = [placement.coordinate(holder) for holder in holders]
    shards = (
        reader(catalog, tensor.name, state, holder=holder).shard(cut, place)
        for holder, place in zip(holders, places, strict=True)
    )
    first = next(shards)
    positions = [d.positions(at) for d, at in zip(cut.dims, cut.per_dim(places[0]), strict=True)]
    for holder, place, shard in zip(holders[1:], places[1:], shards, strict=True):
        here = [d.positions(at) for d, at in zip(cut.dims, cut.per_dim(place), strict=True)]
        both = [np.intersect1d(a, b, return_indices=True)[1:] for a, b in zip(here, positions, strict=True)]
        mine, other = shard[np.ix_(*(a for a, _ in both))], first[np.ix_(*(b for _, b in both))]
        where = unequal(mine.reshape(-1), other.reshape(-1))
        if len(where):
            seen = Seen()
            seen.add(where, 0, mine.reshape(-1), other.reshape(-1))
            at = [int(a[i]) for (a, _), i in zip(both, np.unravel_index(seen.at, mine.shape), strict=True)]
            seen.at = int(np.ravel_multi_index(at, shard.shape)) if math.prod(shard.shape) else 0
            yield Key("equal", tensor.name, state, holder, holders[0]), seen
