"""What DeepSpeed would hold of a checkpoint on another mesh: the catalog of the target, with nothing stored behind it.

Everything that cannot be is refused here, before a byte of data is read. The rules are those that real DeepSpeed 0.19.8
was seen to need.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ckptlab.catalog import DTYPES, MASTER, PARAM, Catalog, FlatGroup, ParameterGroup, Tensor
from ckptlab.errors import LayoutError, ReshapeError
from ckptlab.findings import Finding
from ckptlab.formats.deepspeed import autotp, cautions, muon, pipeline
from ckptlab.formats.deepspeed.assemble import placements
from ckptlab.formats.deepspeed.cautions import told
from ckptlab.formats.deepspeed.experts import Experts, asked, layer_of, regrouped
from ckptlab.formats.deepspeed.headers import Wrapper
from ckptlab.formats.deepspeed.optimizer import dealt_round_robin, gradients
from ckptlab.formats.deepspeed.options import (
    TargetOptions,
    experts_of,
    fused_of,
    head_counts,
    is_pipeline,
    problems,
    stage_of,
)
from ckptlab.layout import on_degree
from ckptlab.mesh import Mesh
from ckptlab.plan import Holder, Placement
from ckptlab.stored import scalar
from ckptlab.words import number_of


@dataclass(frozen=True)
class NativeTarget:
    """What the native writer must know of the target beyond its catalog."""

    wrapper: Wrapper
    dtype: str
    options: TargetOptions
    layer_stages: Mapping[int, int]
    experts: Experts


def reshape(catalog: Catalog, mesh: Mesh, options: TargetOptions) -> Catalog:
    """The target's catalog. ReshapeError, with every reason and the nearest meshes that work, if it cannot be."""
    if extra := [a for a in mesh.axes if a not in ("pp", *mesh.leaves("dp"), "tp")]:
        also = (
            ', and ep as a part of dp: Mesh(dp=4).split("dp", edp=2, ep=2)'
            if extra[0] == "ep"
            else ", or lay it out on paper by a strategy, reshape(mesh, strategy={pattern: notation})"
        )
        raise ReshapeError(f"{mesh}: DeepSpeed's native format has no axis {extra[0]!r}: use pp, dp and tp{also}")
    mesh, ep, data_first = asked(mesh)
    options = replace(
        options,
        ep=options.ep or ep,
        data_before_experts=data_first if options.data_before_experts is None else options.data_before_experts,
    )
    reasons = list(problems(catalog, mesh, options))
    if not reasons:
        try:
            return _build(catalog, mesh, options)
        except LayoutError as e:
            reasons.append(str(e))
    near = list(itertools.islice(_nearest_meshes(catalog, mesh, options), 3))
    hint = "\nMeshes that work: " + "; ".join(map(str, near)) if near else ""
    raise ReshapeError(
        f"{catalog.path}: cannot be reshaped to {mesh}:\n" + "\n".join(f"  - {r}" for r in reasons) + hint
    )


def _nearest_meshes(catalog: Catalog, mesh: Mesh, options: TargetOptions) -> Iterator[Mesh]:
    """Meshes that the checkpoint can be reshaped to, the nearest to the wanted one first (in doublings of a degree)."""
    degrees = sorted({1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 24, 32, 64, mesh.tp, mesh.pp})
    candidates = [Mesh(tp=t, pp=p, dp=mesh.dp) for t, p in itertools.product(degrees, repeat=2)]
    candidates.sort(key=lambda m: abs(math.log2(m.tp / mesh.tp)) + abs(math.log2(m.pp / mesh.pp)))
    for candidate in candidates[1:60]:
        if any(problems(catalog, candidate, options)):
            continue
        try:
            _build(catalog, candidate, options)
        except (LayoutError, ReshapeError):
            continue
        yield candidate


def _build(catalog: Catalog, mesh: Mesh, options: TargetOptions) -> Catalog:
    source = catalog.private
    experts = experts_of(catalog, mesh, options)
    mesh = experts.on(mesh)
    stage = stage_of(catalog, mesh, options)
    dtype = options.dtype or source.dtype
    findings: list[Finding] = []
    stages, layer_stages, said = _stages(catalog, mesh, options, experts)
    findings += said
    padded, said = _padded_vocab(catalog, mesh, options)
    findings += said
    wrapper = _wrapper(source.wrapper, stage)
    whole = wrapper is Wrapper.WHOLE
    heads, kv_heads = head_counts(catalog, options)
    if source.autotp and source.folder.mesh.tp % mesh.tp == 0:
        kv_heads = kv_heads or autotp.divided_heads(catalog.tensors, source.folder.mesh)
    tensors = {
        name: _retarget(catalog, t, mesh, stages[name], padded, dtype, kv_heads, whole, experts)
        for name, t in catalog.tensors.items()
    }
    findings += cautions.of_heads(catalog, mesh, kv_heads if source.autotp else heads)
    groups = _groups(catalog, options, experts, stages)
    findings += [*cautions.of_order(catalog, mesh, groups), *cautions.of_tied_layers(catalog)]
    if not whole or (dtype != "fp32" and fused_of(catalog, options)):
        groups, said = _of_one_step(catalog, groups)
        findings += said
    place = {name: i for i, group in enumerate(groups) for name in group.tensors}
    tensors = {name: replace(tensor, group=place.get(name)) for name, tensor in tensors.items()}
    flat_groups = _flat_groups(catalog, groups, tensors, mesh, wrapper, options, experts)
    _refuse_stages_without_experts(catalog, mesh, tensors, experts)
    _refuse_empty_groups(catalog, groups, mesh, tensors)
    if whole and dtype != "fp32":
        findings += cautions.of_masters(catalog, options)
    flat_groups, whole_states = muon.of_target(flat_groups, groups, wrapper, source.config, bool(experts))
    outside = _outside(tensors, mesh, wrapper, experts, not source.folder.is_pipeline) | whole_states
    return Catalog(
        path="",
        format="deepspeed",
        mesh=mesh,
        tensors=tensors,
        placements=placements(tensors, flat_groups, outside, mesh, wrapper is Wrapper.ZERO3)
        | (_in_every_file(tensors, mesh, experts) if whole and experts and not experts.folded else {})
        | (_by_first_ranks(tensors, mesh, experts, wrapper) if experts.folded else {})
        | _in_several_files(tensors, mesh, experts),
        flat_groups=flat_groups,
        training=replace(
            catalog.training,
            mesh=mesh,
            zero_stage=stage,
            dtype=dtype,
            wrapper=wrapper.value,
            groups=groups,
            layer_stages=layer_stages,
            gradients=gradients(wrapper, dtype, stage),
        ),
        private=NativeTarget(wrapper, dtype, options, layer_stages, experts),
        findings=tuple(findings),
    )


def _stages(
    catalog: Catalog, mesh: Mesh, options: TargetOptions, experts: Experts
) -> tuple[dict[str, tuple[int, ...]], dict[int, int], list[Finding]]:
    """Stages of each tensor, the stage of each layer file, and what was inferred."""
    module = catalog.private.module
    trained = catalog.private.folder.mesh
    if not is_pipeline(catalog, mesh, options):
        return dict.fromkeys(catalog.tensors, (0,)), {}, []
    if mesh.pp == trained.pp and options.pipeline is None:
        return {n: t.stages for n, t in catalog.tensors.items()}, dict(module.layer_stages), []
    layers = pipeline.describe(catalog)
    findings = []
    if isinstance(options.pipeline, tuple):
        starts = options.pipeline
        if len(starts) != mesh.pp or starts[0] != 0 or list(starts) != sorted(set(starts)):
            raise ReshapeError(
                f"pipeline {starts}: expected the first layer of each of {mesh.pp} stages, ascending from 0"
            )
    else:
        method = options.pipeline or layers.infer_method(trained.pp) or "blocks"
        starts = pipeline.describe(catalog, experts).starts(mesh.pp, method)
        if options.pipeline is None and mesh.pp > 1:
            findings.append(
                told(
                    "pipeline-inferred",
                    "warning",
                    f"the checkpoint does not record how layers are dealt to stages; assumed {method!r} (it "
                    + (f"fits the {trained.pp} stages found" if trained.pp > 1 else "is Megatron's default")
                    + f"): stages begin at layers {', '.join(map(str, starts))}. Say pipeline= if the target deals "
                    "them otherwise",
                )
            )
    stages = pipeline.tensor_stages(catalog, starts)
    empty = set(range(mesh.pp)) - {s for held in stages.values() for s in held}
    if empty:
        raise ReshapeError(
            f"{catalog.path}: pp stage {min(empty)} of {mesh.pp} would hold no tensor (stages begin at {starts})"
        )
    return stages, {layer: pipeline.stage_of(layer, starts) for layer in module.layer_keys}, findings


def _padded_vocab(catalog: Catalog, mesh: Mesh, options: TargetOptions) -> tuple[int | None, list[Finding]]:
    """Rows of the padded vocabulary on the target (None: nothing is padded), by Megatron's rule where recorded."""
    padded = {dict(t.layout.padded)[0]: t.shape[0] for t in catalog.tensors.values() if t.layout.padded}
    if not padded:
        return None, []
    (old, true), *_ = padded.items()
    if options.padded_vocab is not None:
        new = options.padded_vocab
        if new < true or new % mesh.tp:
            raise ReshapeError(f"padded vocabulary of {new}: expected at least {true} rows, a multiple of tp {mesh.tp}")
    elif mesh.tp == catalog.private.folder.mesh.tp:
        new = old
    else:
        args = getattr(catalog.client.get("args"), "attributes", None) or {}
        unit = int(args.get("make_vocab_size_divisible_by") or 0)
        if unit:
            new = -(-true // (unit * mesh.tp)) * unit * mesh.tp
        else:
            new = old if old % mesh.tp == 0 else -(-true // mesh.tp) * mesh.tp
            return new, [
                told(
                    "vocabulary-rule",
                    "warning",
                    f"{catalog.path}: the rule by which the vocabulary is padded is not recorded; assumed {new} "
                    "rows. Say padded_vocab= if the target's model has another number",
                )
            ]
    if new == old:
        return new, []
    change = f"{new - old} rows of zeros are added" if new > old else f"the last {old - new} padding rows are cut off"
    return new, [
        told(
            "vocabulary-padding",
            "info",
            f"vocabulary padding follows tp: {old} → {new} rows, {change}; a model that does not mask padding in its "
            "loss will notice",
        )
    ]


def _retarget(
    catalog: Catalog,
    tensor: Tensor,
    mesh: Mesh,
    stages: tuple[int, ...],
    padded: int | None,
    dtype: str,
    kv_heads: int | None,
    whole: bool,
    experts: Experts,
) -> Tensor:
    source = catalog.private
    if (fused := experts.fused_of(tensor.name)) is not None:
        layout = fused.layout(tensor.shape)
    elif source.autotp and mesh.tp != source.folder.mesh.tp:
        layout = autotp.on_tp(tensor.layout, tensor.name, tensor.shape, mesh.tp, kv_heads, source.grain)
    else:
        layout = on_degree(tensor.layout, "tp", mesh.tp)
    layout = layout.on_stages(stages)
    if layout.padded and padded is not None:
        layout = layout.replace(padded={0: padded})
    try:
        cut = layout.resolve(tensor.shape, experts.mesh(mesh) if experts.degree(tensor.name) else mesh)
    except LayoutError as e:
        raise LayoutError(f"{tensor.name}: {e}") from None
    states = {s: d for s, d in tensor.states.items() if s != PARAM}
    if dtype == "fp32" and whole:  # the module's own weights are what the optimizer steps
        states.pop(MASTER, None)
    source_dtype = tensor.states.get(PARAM)
    if source_dtype is None or (
        _converts(catalog, dtype) and tensor.kind != "buffer" and source_dtype.kind not in "iub"
    ):
        states[PARAM] = DTYPES[dtype]
    else:
        states[PARAM] = source_dtype
    return replace(tensor, layout=layout, cut=cut, states=states, stages=stages)


def _converts(catalog: Catalog, dtype: str) -> bool:
    return dtype != catalog.private.dtype


def _wrapper(source: Wrapper, stage: int | None) -> Wrapper:
    """Which wrapper's files the target reads: stage 1 and BF16_Optimizer take each other's."""
    if stage == 0:
        return Wrapper.WHOLE
    if stage == 3:
        return Wrapper.ZERO3
    return Wrapper.BF16 if stage == 1 and source is Wrapper.BF16 else Wrapper.ZERO12


def _groups(
    catalog: Catalog, options: TargetOptions, experts: Experts, stages: Mapping[str, tuple[int, ...]]
) -> tuple[ParameterGroup, ...]:
    groups = catalog.groups
    if experts:
        sizes = {name: tensor.numel for name, tensor in catalog.tensors.items()}
        own = {name: tensor.stages[0] for name, tensor in catalog.tensors.items()}
        new = {name: held[0] for name, held in stages.items()}
        groups = regrouped(groups, catalog.private.folder.experts, experts, sizes, own, new)
    if options.param_groups is None:
        return groups
    if len(options.param_groups) != len(groups):
        raise ReshapeError(f"param_groups: {len(options.param_groups)} given, the target has {len(groups)} groups")
    return tuple(replace(g, options=given) for g, given in zip(groups, options.param_groups, strict=True))


def _of_one_step(
    catalog: Catalog, groups: tuple[ParameterGroup, ...]
) -> tuple[tuple[ParameterGroup, ...], list[Finding]]:
    """The groups as flat buffers keep them, which have one step for all that lies in them: the greatest."""
    apart = {name: its for group in groups for name, its in group.apart.items()}
    if not apart:
        return groups, []
    found = tuple(replace(g, scalars=max([g.scalars, *g.apart.values()], key=_step), apart={}) for g in groups)
    name, its = min(apart.items(), key=lambda item: _step(item[1]))
    text = (
        f"{catalog.path}: {number_of(len(apart), 'tensor')} made other numbers of steps than the rest of the parameter "
        f"group ({name}: {_step(its):g}): a flat buffer has one step for all of them, the greatest, so that Adam's "
        "corrections of their moments will be those of that step"
    )
    return found, [told("steps-apart", "warning", text)]


def _step(scalars: Mapping[str, Any]) -> float:
    value = scalars.get("step")
    return float(value) if isinstance(value, np.ndarray) else scalar(value) or 0.0


def _flat_groups(
    catalog: Catalog,
    groups: tuple[ParameterGroup, ...],
    tensors: Mapping[str, Tensor],
    mesh: Mesh,
    wrapper: Wrapper,
    options: TargetOptions,
    experts: Experts,
) -> tuple[FlatGroup, ...]:
    found: list[FlatGroup] = []
    for p in range(0 if wrapper is Wrapper.WHOLE else mesh.pp):
        for index, group in enumerate(groups):
            every = [n for n in group.tensors if p in tensors[n].stages]
            if not every:
                continue
            shares = experts.shares(every, mesh)
            on = experts.mesh(mesh) if experts.degree(every[0]) else mesh
            if experts.fused_of(every[0]):  # ep cuts them: the same tensors are on all its ranks
                shares = (replace(shares[0], at={}),)
            for rank, share in enumerate(shares):
                names = experts.on_rank(every, rank) if share.at else every
                if wrapper is Wrapper.ZERO12 and _round_robin(catalog, options):
                    names = dealt_round_robin(names, len(share.ranks))
                zero_stage = 3 if wrapper is Wrapper.ZERO3 else 1
                found += [
                    FlatGroup.laid_out(Holder(pp=p, **share.at), index, members, tensors, on, zero_stage, sub)
                    for sub, members in enumerate(
                        _sub_groups(names, tensors, len(share.ranks), wrapper, options, catalog)
                    )
                ]
    return tuple(found)


def _round_robin(catalog: Catalog, options: TargetOptions) -> bool:
    return catalog.private.folder.config.round_robin if options.round_robin is None else options.round_robin


def _sub_groups(
    names: list[str],
    tensors: Mapping[str, Tensor],
    dp: int,
    wrapper: Wrapper,
    options: TargetOptions,
    catalog: Catalog,
) -> list[list[str]]:
    """ZeRO-3 closes a sub-group when the elements a rank holds reach `sub_group_size`; others have one."""
    if wrapper is not Wrapper.ZERO3:
        return [names]
    limit = options.sub_group_size or catalog.private.folder.config.sub_group_size or 1_000_000_000
    shards = (cut.shard_shape(next(iter(cut.coordinates()))) for cut in (tensors[n].cut for n in names))
    sizes = [-(-math.prod(shard) // dp) for shard in shards]
    if sum(sizes) <= limit:
        return [names]
    groups: list[list[str]] = [[]]
    held = 0
    for name, size in zip(names, sizes, strict=True):
        groups[-1].append(name)
        held += size
        if held >= limit and name != names[-1]:
            groups.append([])
            held = 0
    return groups


def _refuse_empty_groups(
    catalog: Catalog, groups: tuple[ParameterGroup, ...], mesh: Mesh, tensors: Mapping[str, Tensor]
) -> None:
    """A stage without a group's tensors cannot be trained, unless the source's own stages were like that."""
    for index, group in enumerate(groups):
        found_on = {stage for name in group.tensors for stage in catalog.tensors[name].stages}
        if found_on != set(range(catalog.private.folder.mesh.pp)):
            continue
        missing = set(range(mesh.pp)) - {stage for name in group.tensors for stage in tensors[name].stages}
        if missing:
            raise ReshapeError(
                f"{catalog.path}: pp stage {min(missing)} of {mesh.pp} would hold no tensor of parameter group {index} "
                f"({group.name or 'unnamed'}): DeepSpeed cannot train such a stage"
            )


def _refuse_stages_without_experts(
    catalog: Catalog, mesh: Mesh, tensors: Mapping[str, Tensor], experts: Experts
) -> None:
    """Where some ranks of a pipeline have experts and others do not, DeepSpeed's wait for each other for ever."""
    held = {stage for name, tensor in tensors.items() if experts.degree(name) for stage in tensor.stages}
    if held and (without := set(range(mesh.pp)) - held):
        raise ReshapeError(
            f"{catalog.path}: pp stage {min(without)} of {mesh.pp} would have no experts, and others some: DeepSpeed "
            "hangs when it begins to train such a pipeline; take fewer stages, or say pipeline="
        )


def _outside(
    tensors: Mapping[str, Tensor], mesh: Mesh, wrapper: Wrapper, experts: Experts, in_model_files: bool
) -> dict[tuple[str, str], list[Holder]]:
    """Who will store module weights: all stages that hold a tensor, or where there are layer files the first. ZeRO-3
    stores none for its parameters, and buffers on every dp rank."""
    zero3 = wrapper is Wrapper.ZERO3
    found: dict[tuple[str, str], list[Holder]] = {}
    for name, tensor in tensors.items():
        if tensor.states.get(PARAM) is None or (zero3 and tensor.kind == "parameter"):
            continue
        stages = tensor.stages if in_model_files else tensor.stages[:1]
        holders = Placement(tensor.cut, stages, at=experts.at(name, mesh)).holders
        every = range(mesh.dp) if zero3 and tensor.kind == "buffer" else None
        found[name, PARAM] = [h if d is None else h.with_(dp=d) for d in every or (None,) for h in holders]
        if wrapper is Wrapper.WHOLE and not experts:  # see _in_every_file
            everywhere = Placement(tensor.cut, tensor.stages).holders
            found.update({(name, state): list(everywhere) for state in tensor.states if state != PARAM})
    return found


def _in_every_file(
    tensors: Mapping[str, Tensor], mesh: Mesh, experts: Experts
) -> dict[tuple[str, str], tuple[Placement, ...]]:
    """How what an optimizer keeps will lie without ZeRO: each ep rank has a file of all that it has, what the others
    have too once more."""
    spread = next(name for name in tensors if experts.degree(name) == experts.sizes[-1])
    every = [share.at for share in experts.shares([spread], mesh)]
    found: dict[tuple[str, str], tuple[Placement, ...]] = {}
    rows = {experts.writer(ep, mesh) // mesh.tp for ep in range(len(every))}  # where each writer is a tp rank's own
    for name, tensor in tensors.items():
        own = Holder(**experts.at(name, mesh))
        places = dict.fromkeys(Holder(**at).without(*tensor.cut.axes) for at in every if own.within(at))
        if experts.over_tp and not experts.degree(name):
            places = dict.fromkeys(Holder(dp=d) for d in sorted(rows))
        copies = tuple(Placement(tensor.cut, tensor.stages, None, tensor.layout.replicas, at) for at in places)
        found.update({(name, state): copies for state in tensor.states if state != PARAM})
    return found


def _by_first_ranks(
    tensors: Mapping[str, Tensor], mesh: Mesh, experts: Experts, wrapper: Wrapper
) -> dict[tuple[str, str], tuple[Placement, ...]]:
    """How what the files of experts hold will lie beside AutoTP: each ep rank and tp rank that go together have files
    of their own, without ZeRO of all that the optimizer keeps."""
    found: dict[tuple[str, str], tuple[Placement, ...]] = {}
    writers = experts.first_ranks(mesh, experts.sizes[-1]).values()
    for name, tensor in tensors.items():
        states = [s for s in tensor.states if s != PARAM] if wrapper is Wrapper.WHOLE else []
        data = "edp" if experts.fused_of(name) else "dp"
        states += [PARAM] if data == "edp" and wrapper is not Wrapper.ZERO3 else []
        each = mesh.size // tensor.cut.mesh[data]
        places = dict.fromkeys(rank // each for rank in writers) if states else ()
        at: list[dict[str, int]] = [{data: k} for k in places] if len(places) > 1 else [{}]
        copies = tuple(Placement(tensor.cut, (0,), None, tensor.layout.replicas, one) for one in at)
        found.update({(name, state): copies for state in states})
    return found


def _in_several_files(
    tensors: Mapping[str, Tensor], mesh: Mesh, experts: Experts
) -> dict[tuple[str, str], tuple[Placement, ...]]:
    """How module weights of experts will lie that tp ranks share: once in the files of each of these."""
    found: dict[tuple[str, str], tuple[Placement, ...]] = {}
    on = experts.mesh(mesh)
    for name, tensor in tensors.items():
        if experts.over_tp and layer_of(name) and len(ranks := experts.kept_by(name, mesh, 0)) > 1:
            places = [{axis: on.coordinate(rank)[axis] for axis in on.leaves("dp")} for rank in ranks]
            found[name, PARAM] = tuple(
                Placement(tensor.cut, tensor.stages, None, tensor.layout.replicas, at) for at in places
            )
    return found
