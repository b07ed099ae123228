"""How layers are dealt to pipeline stages: evenly, or so that the stages weigh alike.

Sources: DeepSpeed 0.19.8, `runtime.utils.partition_balanced` and `partition_uniform`.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from ckptlab.catalog import Catalog
from ckptlab.catalog.stacks import split
from ckptlab.errors import ReshapeError


def stage_of(layer: int, starts: Sequence[int]) -> int:
    """The stage that layer is on, given the first layer of each stage."""
    return bisect_right(starts, layer) - 1


def uniform(layers: int, pp: int) -> tuple[int, ...]:
    """As even as possible, the longer stages first."""
    size, rest = divmod(layers, pp)
    return tuple(p * size + min(p, rest) for p in range(pp))


def balanced(weights: Sequence[int], pp: int) -> tuple[int, ...]:
    """The contiguous partition with the least spread between its heaviest and lightest part; of equal ones the latest
    cut.

    A dynamic programme over (layers dealt, stages used), as DeepSpeed's: it keeps for each cell the cheapest way and
    that way's extremes.
    """
    return _balanced(tuple(weights), pp)


@lru_cache(maxsize=256)
def _balanced(weights: tuple[int, ...], pp: int) -> tuple[int, ...]:
    n = len(weights)
    if n <= pp:
        return uniform(n, pp)
    prefix = np.r_[0.0, np.cumsum(weights, dtype=np.float64)]
    high = np.full((n + 1, pp + 1), math.inf)
    low, cost = high.copy(), high.copy()
    high[0, 0] = cost[0, 0] = 0.0
    cut = np.zeros((n + 1, pp + 1), np.int64)
    for i in range(1, n + 1):
        part = prefix[i] - prefix[:i]
        for j in range(1, min(i, pp) + 1):
            highest, lowest = np.maximum(high[:i, j - 1], part), np.minimum(low[:i, j - 1], part)
            spread = np.where(np.isfinite(highest), highest - lowest, math.inf)
            k = i - 1 - int(np.argmin(spread[::-1]))
            cost[i, j], high[i, j], low[i, j], cut[i, j] = spread[k], highest[k], lowest[k], k
    ends = [n]
    for j in range(pp, 0, -1):
        ends.append(int(cut[ends[-1], j]))
    return tuple(reversed(ends[1:]))


def dealt(source: Catalog, pp: int) -> dict[str, tuple[int, ...]]:
    """The pp stages of every tensor of a source, the canonical one first: those that a layout says, else the source's
    where pp stays, else layers dealt evenly by the first number in their names, what comes before them to the first
    stage and what comes behind to the last. ReshapeError where a stage would hold nothing."""
    trained = source.training.mesh or source.mesh
    numbers = {name: split(name)[1] for name in source.tensors}
    layers = sorted({n for n in numbers.values() if n is not None})
    starts = uniform(len(layers), pp)
    said = {name: t.layout.stages for name, t in source.tensors.items() if t.layout.stages is not None}
    if trained.pp != pp and said == {name: t.stages for name, t in source.tensors.items()}:
        said = {}  # nobody's word on the target, but where the source has them
    found: dict[str, tuple[int, ...]] = {}
    seen = False
    for name, tensor in source.tensors.items():
        number = numbers[name]
        seen = seen or number is not None
        if name in said:
            found[name] = said[name]
        elif trained.pp == pp:
            found[name] = tensor.stages
        elif len(tensor.stages) > 1:
            found[name] = tuple(dict.fromkeys((0, pp - 1)))
        elif number is None:
            found[name] = (pp - 1 if seen else 0,)
        else:
            found[name] = (stage_of(layers.index(number), starts),)
    if missing := set(range(pp)) - {stage for held in found.values() for stage in held}:
        raise ReshapeError(
            f"{source.path}: pp {pp}: stage {min(missing)} would hold no tensor: there are {len(layers)} layers to deal"
        )
    return found
