"""What each rank keeps in memory while it trains: weights, gradients, optimizer states.

By ZeRO stage these lie whole on every dp rank or cut over them: from 1 on the optimizer states, from 2 on the gradients
too, at 3 the weights too (Rajbhandari et al. 2020, arXiv:1910.02054, figure 1). Gradients are taken to have the
weights' dtype. Activations and buffers of the communication are not in it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from ckptlab.catalog import MODULE, Catalog
from ckptlab.formats.deepspeed.options import np_dtype

KINDS = ("weights", "gradients", "optimizer states")


def by_rank(catalog: Catalog) -> dict[str, dict[str, int]]:
    """Kind → bytes, for each rank in turn: `{"rank 0 · tp 0 · pp 0 · dp 0": {"weights": …}}`."""
    mesh = catalog.mesh
    kept = {(pp, tp): _kept(catalog, pp, tp) for pp in range(mesh.pp) for tp in range(mesh.tp)}
    found = {}
    for rank in range(mesh.size):
        at = mesh.coordinate(rank)
        label = " · ".join([f"rank {rank}", *(f"{axis} {at[axis]}" for axis in ("tp", "pp", "dp") if mesh[axis] > 1)])
        found[label] = dict(zip(KINDS, kept[at["pp"], at["tp"]], strict=True))
    return found


def fullest(catalog: Catalog) -> dict[str, int]:
    """Kind → bytes on the rank that keeps most."""
    return max(by_rank(catalog).values(), key=lambda kinds: sum(kinds.values()))


def largest(catalog: Catalog) -> int:
    """Bytes on the rank that keeps most."""
    return sum(fullest(catalog).values())


def _kept(catalog: Catalog, pp: int, tp: int) -> tuple[int, ...]:
    """Bytes of each of KINDS on the first dp rank, whose part is never the smaller."""
    stage, dp = catalog.zero_stage or 0, catalog.mesh.dp
    counts = {
        t.name: math.prod(t.cut.shard_shape(t.cut.coordinate({"tp": tp})))
        for t in catalog.tensors.values()
        if pp in t.stages
    }
    trained = {name: n for name, n in counts.items() if catalog.tensors[name].kind == "parameter"}
    groups = [g for g in catalog.flat_groups if g.stage == pp]
    partition = sum(g.flats[tp].size(0) for g in groups)
    optimizer = sum(g.flats[tp].size(0) * _bytes_of(g.dtypes) for g in groups)
    if not groups:
        optimizer = sum(n * _bytes_of(catalog.tensors[name].states) for name, n in trained.items())
    whole = sum(-(-n // dp) if stage == 3 else n for n in counts.values())
    each = np_dtype(catalog.native.dtype if catalog.native else "fp32").itemsize
    return whole * each, (partition if stage >= 2 else sum(trained.values())) * each, optimizer


def _bytes_of(states: Mapping[str, np.dtype]) -> int:
    """Bytes of one element of all optimizer states."""
    return sum(dtype.itemsize for state, dtype in states.items() if state != MODULE)
