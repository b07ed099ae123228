"""What DeepSpeed would hold of a checkpoint on another mesh: the catalog of the target, with nothing stored behind it.

Everything that cannot be is refused here, before a byte of data is read. The rules are those that real DeepSpeed 0.19.8
was seen to need.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ckptlab.catalog import DTYPES, MASTER, PARAM, Catalog, FlatGroup, ParameterGroup, Tensor
from ckptlab.errors import LayoutError, ReshapeError
from ckptlab.findings import Finding
from ckptlab.formats.deepspeed import autotp, cautions, muon, outside, pipeline
from ckptlab.formats.deepspeed.assemble import placements
from ckptlab.formats.deepspeed.cautions import told
from ckptlab.formats.deepspeed.experts import Experts, asked
from ckptlab.formats.deepspeed.groups import regrouped
from ckptlab.formats.deepspeed.optimfile import Wrapper
from ckptlab.formats.deepspeed.optimizer import dealt_round_robin, gradients
from ckptlab.formats.deepspeed.options import TargetOptions, Wanted, problems
from ckptlab.layout import on_degree
from ckptlab.mesh import Mesh
from ckptlab.plan import Holder
from ckptlab.stored import scalar
from ckptlab.words import number_of


@dataclass(frozen=True)
class NativeTarget:
    """What the native writer must know of the target beyond its catalog. `fused`: see `TargetOptions`."""

    wrapper: Wrapper
    dtype: str
    options: TargetOptions
    layer_stages: Mapping[int, int]
    experts: Experts
    fused: bool


def reshape(catalog: Catalog, mesh: Mesh, options: TargetOptions) -> Catalog:
    """The target's catalog. ReshapeError, with every reason and the nearest meshes that work, if it cannot be."""
    if extra := [a for a in mesh.axes if a not in ("pp", *mesh.leaves("dp"), "tp")]:
        also = (
            ', and ep as a part of dp: Mesh(dp=4).split("dp", edp=2, ep=2)'
            if extra[0] == "ep"
            else ", or lay it out on paper by a strategy, reshape(mesh, strategy={pattern: notation})"
        )
        raise ReshapeError(f"{mesh}: DeepSpeed's native format has no axis {extra[0]!r}: use pp, dp and tp{also}")
    joined = [axis for axis in mesh.leaves("dp") if axis not in ("dp", "ep", "edp")]
    mesh, ep, data_first = asked(mesh)
    options = replace(
        options,
        ep=options.ep or ep,
        data_before_experts=data_first if options.data_before_experts is None else options.data_before_experts,
    )
    wanted = Wanted(catalog, mesh, options)
    reasons = list(problems(wanted))
    if not reasons:
        try:
            return cautions.with_joined(_build(wanted), joined)
        except LayoutError as e:
            reasons.append(str(e))
    near = list(itertools.islice(_nearest_meshes(wanted), 3))
    hint = "\nMeshes that work: " + "; ".join(map(str, near)) if near else ""
    raise ReshapeError(
        f"{catalog.path}: cannot be reshaped to {mesh}:\n" + "\n".join(f"  - {r}" for r in reasons) + hint
    )


def _nearest_meshes(wanted: Wanted) -> Iterator[Mesh]:
    """Meshes that the checkpoint can be reshaped to, the nearest to the wanted one first (in doublings of a degree)."""
    mesh = wanted.mesh
    degrees = sorted({1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 24, 32, 64, mesh.tp, mesh.pp})
    candidates = [Mesh(tp=t, pp=p, dp=mesh.dp) for t, p in itertools.product(degrees, repeat=2)]
    candidates.sort(key=lambda m: abs(math.log2(m.tp / mesh.tp)) + abs(math.log2(m.pp / mesh.pp)))
    for candidate in (replace(wanted, mesh=m) for m in candidates[1:60]):
        if any(problems(candidate)):
            continue
        try:
            _build(candidate)
        except (LayoutError, ReshapeError):
            continue
        yield candidate.mesh


def _build(wanted: Wanted) -> Catalog:
    catalog, source, mesh = wanted.source, wanted.native, wanted.split
    wrapper, experts = wanted.wrapper, wanted.experts
    stages, layer_stages, of_stages = _stages(wanted)
    padded, of_padding = _padded_vocab(wanted)
    heads, kv_heads = wanted.heads
    if source.autotp and wanted.trained.tp % mesh.tp == 0:
        kv_heads = kv_heads or autotp.divided_heads(catalog.tensors, wanted.trained)
    tensors = {name: _retarget(wanted, t, stages[name], padded, kv_heads) for name, t in catalog.tensors.items()}
    groups = _groups(wanted, stages)
    findings = [
        *of_stages,
        *of_padding,
        *cautions.of_heads(wanted, kv_heads if source.autotp else heads),
        *cautions.of_order(wanted, groups),
        *cautions.of_tied_layers(catalog),
    ]
    whole = wrapper is Wrapper.WHOLE
    if not whole or (wanted.dtype != "fp32" and wanted.fused):
        groups, said = _of_one_step(catalog, groups)
        findings += said
    place = {name: i for i, group in enumerate(groups) for name in group.tensors}
    tensors = {name: replace(tensor, group=place.get(name)) for name, tensor in tensors.items()}
    flat_groups = _flat_groups(wanted, groups, tensors)
    _refuse_stages_without_experts(wanted, tensors)
    _refuse_empty_groups(wanted, groups, tensors)
    if whole and wanted.dtype != "fp32":
        findings += cautions.of_masters(wanted)
    flat_groups, whole_states = muon.of_target(flat_groups, groups, wrapper, source.config, bool(experts))
    apart = outside.holders(tensors, wanted) | whole_states
    return Catalog(
        path="",
        format="deepspeed",
        mesh=mesh,
        tensors=tensors,
        placements=placements(tensors, flat_groups, apart, mesh, wrapper is Wrapper.ZERO3)
        | outside.beside_experts(tensors, wanted),
        flat_groups=flat_groups,
        training=replace(
            catalog.training,
            mesh=mesh,
            zero_stage=wanted.stage,
            dtype=wanted.dtype,
            wrapper=wrapper.value,
            groups=groups,
            layer_stages=layer_stages,
            gradients=gradients(wrapper, wanted.dtype, wanted.stage),
        ),
        private=NativeTarget(wrapper, wanted.dtype, wanted.options, layer_stages, experts, wanted.fused),
        findings=tuple(findings),
    )


def _stages(wanted: Wanted) -> tuple[dict[str, tuple[int, ...]], dict[int, int], list[Finding]]:
    """Stages of each tensor, the stage of each layer file, and what was inferred."""
    catalog, mesh, options = wanted.source, wanted.mesh, wanted.options
    module, trained = wanted.native.module, wanted.trained
    if not wanted.is_pipeline:
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
        starts = pipeline.describe(catalog, wanted.experts).starts(mesh.pp, method)
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


def _padded_vocab(wanted: Wanted) -> tuple[int | None, list[Finding]]:
    """Rows of the padded vocabulary on the target (None: nothing is padded), by Megatron's rule where recorded."""
    catalog, mesh = wanted.source, wanted.mesh
    padded = {dict(t.layout.padded)[0]: t.shape[0] for t in catalog.tensors.values() if t.layout.padded}
    if not padded:
        return None, []
    (old, true), *_ = padded.items()
    if wanted.options.padded_vocab is not None:
        new = wanted.options.padded_vocab
        if new < true or new % mesh.tp:
            raise ReshapeError(f"padded vocabulary of {new}: expected at least {true} rows, a multiple of tp {mesh.tp}")
    elif mesh.tp == wanted.trained.tp:
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
    wanted: Wanted, tensor: Tensor, stages: tuple[int, ...], padded: int | None, kv_heads: int | None
) -> Tensor:
    native, experts, tp = wanted.native, wanted.experts, wanted.mesh.tp
    if (fused := experts.fused_of(tensor.name)) is not None:
        layout = fused.layout(tensor.shape)
    elif native.autotp and tp != wanted.trained.tp:
        layout = autotp.on_tp(tensor.layout, tensor.name, tensor.shape, tp, kv_heads, native.grain)
    else:
        layout = on_degree(tensor.layout, "tp", tp)
    layout = layout.on_stages(stages)
    if layout.padded and padded is not None:
        layout = layout.replace(padded={0: padded})
    try:
        cut = layout.resolve(tensor.shape, experts.mesh_of(tensor.name, wanted.split))
    except LayoutError as e:
        raise LayoutError(f"{tensor.name}: {e}") from None
    states = {s: d for s, d in tensor.states.items() if s != PARAM}
    if wanted.dtype == "fp32" and wanted.wrapper is Wrapper.WHOLE:  # the module's own weights are what is stepped
        states.pop(MASTER, None)
    dtype = tensor.states.get(PARAM)
    converts = wanted.dtype != native.dtype and tensor.kind != "buffer"
    if dtype is None or (converts and dtype.kind not in "iub"):
        dtype = DTYPES[wanted.dtype]
    return replace(tensor, layout=layout, cut=cut, states={**states, PARAM: dtype}, stages=stages)


def _groups(wanted: Wanted, stages: Mapping[str, tuple[int, ...]]) -> tuple[ParameterGroup, ...]:
    tensors, groups, given = wanted.source.tensors, wanted.source.groups, wanted.options.param_groups
    if wanted.experts:
        sizes = {name: tensor.numel for name, tensor in tensors.items()}
        own = {name: tensor.stages[0] for name, tensor in tensors.items()}
        new = {name: held[0] for name, held in stages.items()}
        groups = regrouped(groups, wanted.native.folder.experts, wanted.experts, sizes, own, new)
    if given is None:
        return groups
    if len(given) != len(groups):
        raise ReshapeError(f"param_groups: {len(given)} given, the target has {len(groups)} groups")
    return tuple(replace(group, options=one) for group, one in zip(groups, given, strict=True))


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
    wanted: Wanted, groups: Sequence[ParameterGroup], tensors: Mapping[str, Tensor]
) -> tuple[FlatGroup, ...]:
    mesh, experts, wrapper = wanted.split, wanted.experts, wanted.wrapper
    said = wanted.options.round_robin
    round_robin = wanted.native.folder.config.round_robin if said is None else said
    found: list[FlatGroup] = []
    for p in range(0 if wrapper is Wrapper.WHOLE else mesh.pp):
        for index, group in enumerate(groups):
            every = [n for n in group.tensors if p in tensors[n].stages]
            if not every:
                continue
            shares = experts.shares(every, mesh)
            on = experts.mesh_of(every[0], mesh)
            if experts.fused_of(every[0]):  # ep cuts them: the same tensors are on all its ranks
                shares = (replace(shares[0], at={}),)
            for rank, share in enumerate(shares):
                names, dp = experts.on_rank(every, rank) if share.at else every, len(share.ranks)
                if wrapper is Wrapper.ZERO12 and round_robin:
                    names = dealt_round_robin(names, dp)
                zero3 = wrapper is Wrapper.ZERO3
                at = Holder(pp=p, **share.at)
                for sub, members in enumerate(_sub_groups(wanted, names, tensors, dp) if zero3 else [names]):
                    found.append(FlatGroup.laid_out(at, index, members, tensors, on, 3 if zero3 else 1, sub))
    return tuple(found)


def _sub_groups(wanted: Wanted, names: list[str], tensors: Mapping[str, Tensor], dp: int) -> list[list[str]]:
    """ZeRO-3 closes a sub-group when the elements a rank holds reach `sub_group_size`."""
    limit = wanted.options.sub_group_size or wanted.native.folder.config.sub_group_size or 1_000_000_000
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


def _refuse_empty_groups(wanted: Wanted, groups: Sequence[ParameterGroup], tensors: Mapping[str, Tensor]) -> None:
    """A stage without a group's tensors cannot be trained, unless the source's own stages were like that."""
    catalog, pp = wanted.source, wanted.mesh.pp
    for index, group in enumerate(groups):
        found_on = {stage for name in group.tensors for stage in catalog.tensors[name].stages}
        if found_on != set(range(wanted.trained.pp)):
            continue
        missing = set(range(pp)) - {stage for name in group.tensors for stage in tensors[name].stages}
        if missing:
            raise ReshapeError(
                f"{catalog.path}: pp stage {min(missing)} of {pp} would hold no tensor of parameter group {index} "
                f"({group.name or 'unnamed'}): DeepSpeed cannot train such a stage"
            )


def _refuse_stages_without_experts(wanted: Wanted, tensors: Mapping[str, Tensor]) -> None:
    """Where some ranks of a pipeline have experts and others do not, DeepSpeed's wait for each other for ever."""
    pp = wanted.mesh.pp
    held = {stage for name, tensor in tensors.items() if wanted.experts.degree(name) for stage in tensor.stages}
    if held and (without := set(range(pp)) - held):
        raise ReshapeError(
            f"{wanted.source.path}: pp stage {min(without)} of {pp} would have no experts, and others some: DeepSpeed "
            "hangs when it begins to train such a pipeline; take fewer stages, or say pipeline="
        )
