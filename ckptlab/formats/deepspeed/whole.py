"""The optimizer of a run without ZeRO: whole states of each shard in the model files, and how they are written."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

from ckptlab.catalog import MASTER, PARAM, Catalog, Fragment, ParameterGroup
from ckptlab.formats.deepspeed.experts import Experts
from ckptlab.formats.deepspeed.files import Rank, StepFolder
from ckptlab.formats.deepspeed.groups import Groups, match_groups
from ckptlab.formats.deepspeed.headers import WholeOptimizer, Wrapper
from ckptlab.formats.deepspeed.module import ModuleWeights
from ckptlab.formats.deepspeed.optimizer import OptimizerFiles, Pieces
from ckptlab.formats.torch.torchfile import Pending
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


class Shards(Protocol):
    """What makes the tensors of a target's files."""

    source: Catalog
    target: Catalog

    experts: Experts

    @property
    def config(self) -> Mapping[str, Any]: ...

    def shard(self, name: str, state: str, rank: int) -> Pending: ...

    def scalars(self, group: int, tensor: str) -> dict[str, Any]: ...


def whole_state(writer: Shards, stage: int, rank: int, ep: int = 0) -> dict[str, Any]:
    """The optimizer of a rank, which is of that pp stage and ep rank, as its engine keeps it: torch's own in float32,
    else DeepSpeed's FP16_UnfusedOptimizer or, flat, FP16_Optimizer."""
    target, source = writer.target, writer.source.private
    state: dict[int, dict[str, Any]] = {}
    groups: list[dict[str, Any]] = []
    masters: list[list[Pending]] = []
    fused = target.private.fused and target.private.dtype != "fp32"
    for index, group in enumerate(target.groups):
        degree = writer.experts.degree(next(iter(group.tensors), ""))
        at = writer.experts.place(ep, degree, target.mesh) if degree else ep
        names = [n for n in writer.experts.on_rank(group.tensors, at) if stage in target.tensors[n].stages]
        if not names:
            continue
        shards = [{s: writer.shard(n, s, rank) for s in target.tensors[n].states if s != PARAM} for n in names]
        shards = [one for one in shards if all(math.prod(held.shape) for held in one.values())]  # as DeepSpeed does
        if not shards:
            continue
        if fused:
            shards = [{s: _joined([one[s] for one in shards]) for s in shards[0]}]
        ids = list(range(len(state), len(state) + len(shards)))
        masters.append([one[MASTER] for one in shards if MASTER in one])
        for i, name, one in zip(ids, names, shards, strict=False):
            state[i] = writer.scalars(index, name) | {s: held for s, held in one.items() if s != MASTER}
        groups.append({**group.options, "params": ids})
    base = {"state": state, "param_groups": groups}
    if target.private.dtype == "fp32":
        return base
    held = source.folder.first.optimizer
    same = held is not None and source.dtype == target.private.dtype
    scale = {k: held.content[k] for k in _SCALE if k in held.content} if same and held else _scale(writer)
    if fused:
        clip = source.extras.get("clip_grad", held.content.get("clip_grad") if held else None)
        clip = writer.config.get("gradient_clipping", 0.0) if clip is None else clip
        return {**scale, "optimizer_state_dict": base, "fp32_groups_flat": [m[0] for m in masters], "clip_grad": clip}
    return {**scale, "optimizer_state_dict": base, "fp32_groups": masters}


_SCALE = ("dynamic_loss_scale", "cur_scale", "cur_iter", "last_overflow_iter", "scale_factor", "scale_window")


def _scale(writer: Shards) -> dict[str, Any]:
    """The loss scale, as that of the source's own scaler says it; a new one where it had none."""
    dynamic = writer.target.private.dtype == "fp16"
    scaler = writer.source.private.extras.get("loss_scaler")
    known = getattr(scaler, "attributes", None) or {}
    made = {"dynamic_loss_scale": dynamic, "cur_scale": 2.0**16 if dynamic else 1.0, "cur_iter": 0}
    if dynamic:
        made |= {"last_overflow_iter": -1, "scale_factor": 2.0, "scale_window": 1000}
        made |= {k: known[k] for k in _SCALE if k in known and known.get("dynamic")}
    return made


def _joined(shards: list[Pending]) -> Pending:
    """One flat tensor of several, one after the other."""
    parts = tuple(part for shard in shards for part in shard.parts)
    return Pending(shards[0].dtype, (sum(math.prod(s.shape) for s in shards),), parts)
