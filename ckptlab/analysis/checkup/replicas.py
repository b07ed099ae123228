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
from ckptlab.arrays.copies import inside
from ckptlab.catalog import Catalog, Tensor


def survey(catalog: Catalog) -> Told:
    """What such parts have that is not the same on all ranks."""
    told = Told()
    for tensor in catalog.tensors.values():
        if not tensor.cut.repeats or tensor.layout.replicas == "mean":
            continue
        for state in tensor.states:
            if (tensor.name, state) not in catalog.placements:
                continue
            for stage in catalog.placement(tensor.name, state).stages:
                for key, seen in _compared(catalog, tensor, state, stage):
                    told.note(key, seen)
    return told


def _compared(catalog: Catalog, tensor: Tensor, state: str, stage: int) -> Iterator[tuple[Key, Seen]]:
    """Each rank's shard against that of the first."""
    for holder, first, mine, other, here in inside(catalog, tensor.name, state, stage):
        where = unequal(mine.reshape(-1), other.reshape(-1))
        if len(where):
            seen, shape = Seen(), catalog.placement(tensor.name, state).shape(holder)
            seen.add(where, 0, mine.reshape(-1), other.reshape(-1))
            at = [int(a[i]) for a, i in zip(here, np.unravel_index(seen.at, mine.shape), strict=True)]
            seen.at = int(np.ravel_multi_index(at, shape)) if math.prod(shape) else 0
            yield Key("equal", tensor.name, state, holder, first), seen
