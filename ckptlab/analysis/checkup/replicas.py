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
from ckptlab.arrays.copies import inside
from ckptlab.catalog import Catalog, Tensor
from ckptlab.errors import CkptlabError
from ckptlab.findings import Finding, Where
from ckptlab.words import number_of, some

_SAMPLE = 64  # elements of each shard that are compared first


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


def alike(catalog: Catalog) -> Iterator[Finding]:
    """A finding on tensors that the layouts call cut, and of which all tp ranks have the same: replicas that the
    training program's lists leave out, so that joined they are a tensor of several copies."""
    cut = [t for t in catalog.tensors.values() if "tp" in t.cut.axes and t.cut.mesh.tp > 1]
    if same := [t.name for t in cut if _is_alike(catalog, t)]:
        yield Finding(
            "shards-alike",
            "warning",
            Where(tensors=tuple(same)),
            "parts of a tensor, of which each is another",
            f"{number_of(len(same), 'tensor')}: {some(same, 4)}: cut by the layouts, and the same on all tp ranks",
            "if they are replicas, say so, strategy={pattern: notation} without tp, and add them to the program's "
            "tp_replicated_parameter_patterns: else they are joined, by DeepSpeed's converter too. If they are parts, "
            "tp ranks began with the same random numbers",
        )


def _is_alike(catalog: Catalog, tensor: Tensor) -> bool:
    state = catalog.weight(tensor.name)
    if state is None:
        return False
    placement = catalog.placement(tensor.name, state)
    first, *others = placement.on(placement.stages[0])
    count = math.prod(placement.shape(first))
    if not count or any(placement.shape(holder) != placement.shape(first) for holder in others):
        return False
    try:
        for lo, hi in ((0, min(count, _SAMPLE)), (0, count)):  # most differ at once
            pieces = [
                reader(catalog, tensor.name, state, holder=h).chunks(placement.cut, placement.coordinate(h), lo, hi)
                for h in (first, *others)
            ]
            single = True
            for own, *beside in zip(*pieces, strict=True):
                if any(len(unequal(own, one)) for one in beside):
                    return False
                single = single and bool((own == own[0]).all())
    except CkptlabError:  # a damaged item, of which is said where elements are read
        return False
    return not single
