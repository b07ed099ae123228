"""How tensors lie in DeepSpeed's files, out of what their readers found or a target is to have."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from ckptlab.catalog import ALONE, FlatGroup, Tensor, placements_of
from ckptlab.mesh import Mesh
from ckptlab.plan import FlatBuffer, Holder, Placement


def placements(
    tensors: Mapping[str, Tensor],
    flat_groups: Sequence[FlatGroup],
    outside: Mapping[tuple[str, str], Iterable[Holder]],
    mesh: Mesh,
    zero3: bool,
) -> dict[tuple[str, str], tuple[Placement, ...]]:
    """How every state lies: those of flat groups in their buffers, those `outside` with the holders given.

    ZeRO-3 cuts frozen tensors over dp, each by itself, and writes buffers once on every dp rank (holders with a `dp`).
    """
    found = placements_of(tensors, flat_groups, {})
    for (name, state), holders in outside.items():
        tensor = tensors[name]
        stages = tuple(dict.fromkeys(h["pp"] for h in holders))
        cut = ["pp", "tp", "dp", *tensor.cut.axes]
        spread = {axis: k for axis, k in next(iter(holders), ALONE).items() if axis not in cut}
        whole = Placement(tensor.cut, stages, None, tensor.layout.replicas, spread)
        copies = dict.fromkeys(h["dp"] for h in holders if "dp" in h)
        if copies:
            found[name, state] = tuple(
                Placement(tensor.cut, stages, None, tensor.layout.replicas, {"dp": d}) for d in copies
            )
        elif zero3:
            flats = {
                h: (FlatBuffer.per_tensor((name,), (math.prod(whole.shape(h)),), mesh.dp), 0) for h in whole.holders
            }
            found[name, state] = (Placement(tensor.cut, stages, flats, tensor.layout.replicas),)
        else:
            found[name, state] = (whole,)
    return found
