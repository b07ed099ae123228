"""Where what a target stores outside of flat buffers will lie: module weights, and without ZeRO the optimizer's states.

Where there are experts, what all have is in several files, and of some of them it is the first ranks' to write it.
"""

from __future__ import annotations

from collections.abc import Mapping

from ckptlab.catalog import PARAM, Tensor
from ckptlab.formats.deepspeed.assemble import Key, copies
from ckptlab.formats.deepspeed.experts import layer_of
from ckptlab.formats.deepspeed.optimfile import Wrapper
from ckptlab.formats.deepspeed.options import Wanted
from ckptlab.plan import Holder, Placement


def holders(tensors: Mapping[str, Tensor], wanted: Wanted) -> dict[Key, list[Holder]]:
    """Who will store module weights: all stages that hold a tensor, or where there are layer files the first. ZeRO-3
    stores none for its parameters, and buffers on every dp rank."""
    zero3, layered = wanted.wrapper is Wrapper.ZERO3, wanted.native.folder.is_pipeline
    found: dict[Key, list[Holder]] = {}
    for name, tensor in tensors.items():
        if tensor.states.get(PARAM) is None or (zero3 and tensor.kind == "parameter"):
            continue
        stages = tensor.stages[:1] if layered else tensor.stages
        those = Placement(tensor.cut, stages, at=wanted.experts.at(name, wanted.split)).holders
        every = range(wanted.mesh.dp) if zero3 and tensor.kind == "buffer" else None
        found[name, PARAM] = [h if d is None else h.with_(dp=d) for d in every or (None,) for h in those]
        if wanted.wrapper is Wrapper.WHOLE and not wanted.experts:  # see _in_every_file
            everywhere = Placement(tensor.cut, tensor.stages).holders
            found.update({(name, state): list(everywhere) for state in tensor.states if state != PARAM})
    return found


def beside_experts(tensors: Mapping[str, Tensor], wanted: Wanted) -> dict[Key, tuple[Placement, ...]]:
    """How what is written for experts will lie, where that is not as of other tensors: in several copies."""
    experts = wanted.experts
    found: dict[Key, tuple[Placement, ...]] = {}
    if experts.folded:
        found = _by_first_ranks(tensors, wanted)
    elif experts and wanted.wrapper is Wrapper.WHOLE:
        found = _in_every_file(tensors, wanted)
    on = experts.mesh(wanted.split)
    for name, tensor in tensors.items():  # weights of experts that tp ranks share: once in the files of each of these
        if experts.over_tp and layer_of(name) and len(ranks := experts.kept_by(name, wanted.split, 0)) > 1:
            places = [{axis: on.coordinate(rank)[axis] for axis in on.leaves("dp")} for rank in ranks]
            found[name, PARAM] = copies(tensor, tensor.stages, places)
    return found


def _in_every_file(tensors: Mapping[str, Tensor], wanted: Wanted) -> dict[Key, tuple[Placement, ...]]:
    """How what an optimizer keeps will lie without ZeRO: each ep rank has a file of all that it has, what the others
    have too once more."""
    experts, mesh = wanted.experts, wanted.split
    spread = next(name for name in tensors if experts.degree(name) == experts.sizes[-1])
    every = [share.at for share in experts.shares([spread], mesh)]
    found: dict[Key, tuple[Placement, ...]] = {}
    rows = {experts.writer(ep, mesh) // mesh.tp for ep in range(len(every))}  # where each writer is a tp rank's own
    for name, tensor in tensors.items():
        own = Holder(**experts.at(name, mesh))
        places = dict.fromkeys(Holder(**at).without(*tensor.cut.axes) for at in every if own.within(at))
        if experts.over_tp and not experts.degree(name):
            places = dict.fromkeys(Holder(dp=d) for d in sorted(rows))
        each = copies(tensor, tensor.stages, places)
        found.update({(name, state): each for state in tensor.states if state != PARAM})
    return found


def _by_first_ranks(tensors: Mapping[str, Tensor], wanted: Wanted) -> dict[Key, tuple[Placement, ...]]:
    """How what the files of experts hold will lie beside AutoTP: each ep rank and tp rank that go together have files
    of their own, without ZeRO of all that the optimizer keeps."""
    experts, mesh = wanted.experts, wanted.split
    found: dict[Key, tuple[Placement, ...]] = {}
    writers = experts.first_ranks(mesh, experts.sizes[-1]).values()
    for name, tensor in tensors.items():
        states = [s for s in tensor.states if s != PARAM] if wanted.wrapper is Wrapper.WHOLE else []
        data = "edp" if experts.fused_of(name) else "dp"
        states += [PARAM] if data == "edp" and wanted.wrapper is not Wrapper.ZERO3 else []
        ranks = mesh.size // tensor.cut.mesh[data]
        places = dict.fromkeys(rank // ranks for rank in writers) if states else ()
        each = copies(tensor, (0,), [{data: k} for k in places] if len(places) > 1 else [{}])
        found.update({(name, state): each for state in states})
    return found
