"""What each rank keeps in memory while it trains: weights, gradients, optimizer states.

By ZeRO stage these lie whole on every dp rank or cut over them: from 1 on the optimizer states, from 2 on the gradients
too, at 3 the weights too (Rajbhandari et al. 2020, arXiv:1910.02054, figure 1). Gradients are taken to have the
weights' dtype. Activations and buffers of the communication are not in it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from ckptlab.catalog import MODULE, Catalog
from ckptlab.formats.deepspeed.options import np_dtype

KINDS = ("weights", "gradients", "optimizer states")


def by_rank(catalog: Catalog) -> dict[str, dict[str, int]]:
    """Kind → bytes, for each rank in turn: `{"rank 0 · tp 0 · pp 0 · dp 0": {"weights": …}}`."""
    mesh = catalog.mesh
    kept = _kept(catalog)
    found = {}
    for rank in range(mesh.size):
        at = mesh.coordinate(rank)
        label = " · ".join([f"rank {rank}", *(f"{axis} {at[axis]}" for axis in ("tp", "pp", "dp") if mesh[axis] > 1)])
        found[label] = dict(zip(KINDS, kept[at["pp"], at["tp"]].tolist(), strict=True))
    return found


def fullest(catalog: Catalog) -> dict[str, int]:
    """Kind → bytes on the rank that keeps most."""
    kept = _kept(catalog).reshape(-1, len(KINDS))
    return dict(zip(KINDS, kept[kept.sum(axis=1).argmax()].tolist(), strict=True))


def largest(catalog: Catalog) -> int:
    """Bytes on the rank that keeps most."""
    return sum(fullest(catalog).values())


def _kept(catalog: Catalog) -> NDArray[np.int64]:
    """(pp, tp, kind) bytes on the first dp rank, whose part is never the smaller. Tensors that lie alike are counted
    together."""
    stage, dp, mesh = catalog.zero_stage or 0, catalog.mesh.dp, catalog.mesh
    each = np_dtype(catalog.training.dtype or "fp32").itemsize
    kept = np.zeros((mesh.pp, mesh.tp, len(KINDS)), np.int64)
    weights, gradients, optimizer = (kept[..., k] for k in range(len(KINDS)))
    alike = Counter((t.cut, t.stages, t.kind, _bytes_of(t.states)) for t in catalog.tensors.values())
    for (cut, stages, kind, state_bytes), times in alike.items():
        held = sorted({min(s, mesh.pp - 1) for s in stages})  # where a format holds whole tensors there is one stage
        for tp in range(mesh.tp):
            count = math.prod(cut.shard_shape(cut.coordinate({"tp": tp})))
            part = -(-count // dp) if stage == 3 else count
            weights[held, tp] += part * each * times
            if kind == "parameter":
                gradients[held, tp] += part * each * times
                optimizer[held, tp] += 0 if catalog.flat_groups else count * state_bytes * times
    for group in catalog.flat_groups:
        for holder, flat in group.flats.items():
            optimizer[group.stage, holder["tp"]] += flat.size(0) * _bytes_of(group.dtypes)
    if stage == 2:
        gradients[...] = 0
        for group in catalog.flat_groups:
            gradients[group.stage] += [flat.size(0) * each for flat in group.flats.values()]
    return kept


def _bytes_of(states: Mapping[str, np.dtype]) -> int:
    """Bytes of one element of all optimizer states."""
    return sum(dtype.itemsize for state, dtype in states.items() if state != MODULE)
