"""The optimizer of a run without ZeRO: whole states of each shard, in the model files."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from ckptlab.catalog import MASTER, Fragment, ParameterGroup
from ckptlab.formats.deepspeed.files import Rank, StepFolder
from ckptlab.formats.deepspeed.groups import Groups, match_groups
from ckptlab.formats.deepspeed.module import ModuleWeights
from ckptlab.formats.deepspeed.optimfile import WholeOptimizer, Wrapper
from ckptlab.formats.deepspeed.optimizer import OptimizerFiles, Pieces
from ckptlab.plan import Holder
from ckptlab.stored import Stored


def whole_optimizer(folder: StepFolder, module: ModuleWeights) -> OptimizerFiles:
    """What the model files hold of an optimizer; nothing where there is none, or its parameters could not be named."""
    pieces: Pieces = {}
    stages: list[Groups] = [[] for _ in range(folder.mesh.pp)]
    scalars: dict[str, Mapping[str, Any]] = {}
    named = False
    for rank, (head, *_) in folder.heads.items():
        optimizer = head.optimizer
        if optimizer is None or head.shapes is None or len(head.shapes) != len(optimizer.options):
            continue
        named = True
        held = [tuple(folder.experts.everywhere(list(names))) for names in head.shapes]
        if rank[1] == 0:
            stages[rank[0]] = list(zip(optimizer.options, held, strict=True))
        for g, names in enumerate(held):
            scalars.update(dict.fromkeys(names, optimizer.scalars[g]))
        files = folder.expert_optims.get(rank, ((0, optimizer),))
        for i, (ep, own) in enumerate(files):  # the first is the rank's own, others may be of other tp ranks
            for name, at, state, fragments in _fragments(
                folder, own.ordered_as(optimizer), head.shapes, module, rank, ep, i > 0
            ):
                pieces.setdefault((name, state), {}).setdefault(at, fragments)
    groups, _ = match_groups(folder.path, stages)
    stage = folder.config.stage
    return OptimizerFiles(
        Wrapper.WHOLE if named else Wrapper.NONE,
        stage or 0,
        tuple(ParameterGroup(g.options, g.tensors, scalars[g.tensors[0]]) for g in groups if g.tensors),
        (),
        {},
        False,
        {},
        pieces,
    )


def _fragments(
    folder: StepFolder,
    optimizer: WholeOptimizer,
    shapes: tuple[Mapping[str, tuple[int, ...]], ...],
    module: ModuleWeights,
    rank: Rank,
    ep: int,
    experts_alone: bool,
) -> Iterator[tuple[str, Holder, str, tuple[Fragment, ...]]]:
    """(tensor, holder, state, where it lies) of all that the optimizer of a rank keeps, of its experts by their global
    names. What it steps is the module's own weight where it has no other."""
    for g, of_first in enumerate(shapes):
        degree = folder.experts.degree(next(iter(of_first), ""))
        if degree is None and experts_alone:
            continue
        at = folder.experts.place(ep, degree, folder.mesh) if degree else ep
        done, k, names = 0, -1, folder.experts.shapes_on(of_first, at)
        whole = optimizer.fused or len(optimizer.states[g]) == len(names)  # else without tensors of no elements
        for name, shape in zip(folder.experts.globally(names, at), names.values(), strict=True):
            holder = folder.experts.holder(name, folder.mesh, at, pp=rank[0], tp=rank[1])
            count = math.prod(shape)
            if not (count or whole):
                own_masters = () if optimizer.masters is None else (MASTER,)
                yield from ((name, holder, state, ()) for state in (*own_masters, *optimizer.states[g][0]))
                continue
            k += 1
            kept: dict[str, Stored] = dict(optimizer.states[g][0 if optimizer.fused else k])
            if optimizer.masters is not None:
                kept = {MASTER: optimizer.masters[g][0 if optimizer.fused else k], **kept}
            elif (own := module.pieces.get(name, {}).get(holder)) is not None:
                yield name, holder, MASTER, own
            for state, stored in kept.items():
                yield name, holder, state, (Fragment(0, stored.elements(done, count) if optimizer.fused else stored),)
            done += count
