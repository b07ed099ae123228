"""How tensors lie in DeepSpeed's files, out of what their readers found or a target is to have."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from ckptlab.catalog import ALONE, FlatGroup, Tensor, placements_of
from ckptlab.mesh import Mesh
from ckptlab.plan import FlatBuffer, Holder, Placement

Key = tuple[str, str]  # (tensor, state)


def placements(
    tensors: Mapping[str, Tensor],
    flat_groups: Sequence[FlatGroup],
    outside: Mapping[Key, Iterable[Holder]],
    mesh: Mesh,
    zero3: bool,
) -> dict[Key, tuple[Placement, ...]]:
    """How every state lies: those of flat groups in their buffers, those `outside` with the holders given.

    ZeRO-3 cuts frozen tensors over dp, each by itself, and writes buffers once on every dp rank (holders with a `dp`).
    """
    found = placements_of(tensors, flat_groups, {})
    for (name, state), holders in outside.items():
        tensor = tensors[name]
        stages = tuple(dict.fromkeys(h["pp"] for h in holders))
        if ranks := dict.fromkeys(h["dp"] for h in holders if "dp" in h):
            found[name, state] = copies(tensor, stages, [{"dp": d} for d in ranks])
            continue
        cut = ["pp", "tp", "dp", *tensor.cut.axes]
        spread = {axis: k for axis, k in next(iter(holders), ALONE).items() if axis not in cut}
        (whole,) = copies(tensor, stages, [spread])
        if zero3:
            flats = {
                h: (FlatBuffer.per_tensor((name,), (math.prod(whole.shape(h)),), mesh.dp), 0) for h in whole.holders
            }
            whole = Placement(tensor.cut, stages, flats, tensor.layout.replicas)
        found[name, state] = (whole,)
    return found


def copies(tensor: Tensor, stages: tuple[int, ...], places: Iterable[Mapping[str, int]]) -> tuple[Placement, ...]:
    """A copy of a tensor for each of these coordinates."""
    return tuple(Placement(tensor.cut, stages, None, tensor.layout.replicas, at) for at in places)
