"""What is to be said of a target before a byte moves: what was taken for granted, and what DeepSpeed makes of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from ckptlab.catalog import Catalog, ParameterGroup
from ckptlab.findings import Finding
from ckptlab.formats.deepspeed.adopted import ZERO_STAGE
from ckptlab.formats.deepspeed.names import layer_number
from ckptlab.formats.deepspeed.optimfile import Wrapper
from ckptlab.formats.deepspeed.options import TargetOptions, Wanted
from ckptlab.formats.deepspeed.read import Native
from ckptlab.words import some


def told(code: str, severity: str, found: str) -> Finding:
    return Finding(code, severity, found=found, about="target")


def assumed(source: Catalog, options: TargetOptions) -> Iterator[Finding]:
    """What a user must hear of a target whose source DeepSpeed did not write."""
    if isinstance(source.private, Native):
        return
    if options.zero_stage is None and source.zero_stage is None:
        text = f"{source.path} says no ZeRO stage: written for ZeRO-{ZERO_STAGE}; say zero_stage="
        yield told("zero-stage-assumed", "info", text)
    if left := [key for key in source.client if key not in ("train_state", "lr_scheduler")]:
        text = (
            f"what the program put into {source.path} ({some(left, 4)}) is not DeepSpeed's to restore, and is left "
            "out: data loaders and random states begin anew"
        )
        yield told("client-left-out", "info", text)


def with_joined(target: Catalog, joined: Sequence[str]) -> Catalog:
    """The target, with a remark where its mesh was asked for with parts of dp that DeepSpeed does not have."""
    if not joined:
        return target
    text = f"{' and '.join(joined)} are one axis to DeepSpeed: ZeRO cuts over all of dp {target.mesh.dp}"
    return replace(target, findings=(*target.findings, told("dp-joined", "info", text)))


def of_heads(wanted: Wanted, heads: int | None) -> Iterator[Finding]:
    """Attention heads on the target's tp ranks, of AutoTP those of keys and values: unknown, or too few."""
    mesh, before, autotp = wanted.mesh, wanted.trained.tp, wanted.native.autotp
    if autotp and heads and mesh.tp > heads and mesh.tp != before:
        text = (
            f"tp {mesh.tp} of {heads} key/value heads: AutoTP leaves tp ranks from {heads} on no part of attention. "
            "DeepSpeed trains that (transformers' LLaMA, say), no faster; a model whose own code divides by its number "
            "of heads fails"
        )
        yield told("heads-few", "warning", text)
    if heads is None and before % mesh.tp:  # else a rank has the heads of whole ranks of the source
        kind, option = ("key/value", "kv_heads") if autotp else ("attention", "heads")
        text = (
            f"{wanted.source.path}: the number of {kind} heads is unknown: whether tp {mesh.tp} divides it was not "
            f"checked; say {option}="
        )
        yield told("heads-unknown", "warning", text)


def of_tied_layers(catalog: Catalog) -> Iterator[Finding]:
    """Layers of a pipeline that tied modules are, where no file says which."""
    module = catalog.private.module
    if catalog.private.folder.is_pipeline and module.assumed:
        number = {prefix: layer for layer, prefix in module.layer_keys.items()}
        text = (
            f"{catalog.path} does not say which layers of the pipeline {some(module.assumed, 4)} are: taken to be "
            f"{', '.join(str(number[prefix]) for prefix in module.assumed)}, right before the others, which is what "
            "their files are called by. DeepSpeed finds none if the program has layers between; convert from the step "
            "folder"
        )
        yield told("tied-layer-assumed", "warning", text)


def of_masters(wanted: Wanted) -> Iterator[Finding]:
    """How an optimizer without ZeRO keeps its master weights, where the source is one with ZeRO."""
    if wanted.native.wrapper is Wrapper.WHOLE or wanted.options.fused is not None:
        return
    kept = "in one flat tensor a group, as a fused Adam does" if wanted.fused else "one by one"
    text = (
        f"the target is taken to keep master weights {kept} (by the run's ds_config); say fused= if its optimizer does "
        "otherwise"
    )
    yield told("masters-assumed", "warning", text)


def of_order(wanted: Wanted, groups: Sequence[ParameterGroup]) -> Iterator[Finding]:
    """What of a group's order on other stages is a guess: stages are taken to follow one another, which is so where the
    program goes from layer to layer, and not where it does not on a stage of the source. So are groups that no stage
    has both of."""
    catalog, trained = wanted.source, wanted.trained.pp
    if wanted.mesh.pp == trained:
        return
    held = [{stage for n in group.tensors for stage in catalog.tensors[n].stages} for group in groups]
    if (i := next((i for i in range(1, len(groups)) if not held[i - 1] & held[i]), None)) is not None:
        text = (
            f"{catalog.path}: no pp stage has tensors of both parameter groups {i - 1} and {i}: that they come in this "
            "order is assumed. If the program's is another, DeepSpeed loads states into other tensors"
        )
        yield told("group-order", "warning", text)
        return
    for i, group in enumerate(groups):
        for stage in range(trained):
            names = [n for n in group.tensors if stage in catalog.tensors[n].stages]
            layers = [number for number in map(layer_number, names) if number is not None]
            if layers != sorted(layers):
                text = (
                    f"{catalog.path}: parameter group {i} ({group.name or 'unnamed'}) does not have its tensors in the "
                    f"order of layers ({some(names, 3)} on pp stage {stage}): on other stages their order is assumed, "
                    "stage after stage. If the program's is another, DeepSpeed loads states into other tensors"
                )
                yield told("group-order", "warning", text)
                return


def not_loaded(target: Catalog) -> Iterator[Finding]:
    """What DeepSpeed (0.19.8) does not read right out of a universal folder on the target's mesh."""
    experts, mesh = target.private.experts, target.mesh
    dealt = target.flat_groups if target.private.wrapper is Wrapper.ZERO12 else ()
    if experts and not experts.fused and experts.sizes[-1] > 1:
        text = (
            f"ep {experts.sizes[-1]}: DeepSpeed looks for experts in a universal folder by the numbers that they have "
            "on a rank, so that every rank takes the first ones, in silence: load it at ep 1, or write deepspeed files"
        )
        yield told("universal-experts", "warning", text)
    untrained = [t.name for t in target.tensors.values() if t.kind != "parameter"]
    if untrained and target.training.layer_stages and not experts:
        text = (
            f"{some(untrained, 4)}: not trained, and a universal folder of a pipeline has no place for what is not, "
            "since its layer files do not come along: left out; write deepspeed files to keep it"
        )
        yield told("universal-left-out", "warning", text)
    if target.zero_stage == 3 and mesh.tp > 1:
        text = (
            f"tp {mesh.tp}: at ZeRO-3 DeepSpeed takes tensors of a universal folder whole, which fits one "
            "tensor-parallel rank alone: load it at tp 1, or write deepspeed files"
        )
        yield told("universal-whole", "warning", text)
    if any(here != [*range(len(here))] for here in groups_of_stages(target)):
        text = (
            "pp stages have different parameter groups, and DeepSpeed gives those of a stage the hyperparameters of "
            "the first that a universal folder has, in silence: set lr and weight decay after loading, or write "
            "deepspeed files"
        )
        yield told("universal-groups", "warning", text)
    if any(_is_dealt(flat.names, target.groups[flat.group]) for flat in dealt):
        text = (
            "round_robin_gradients: DeepSpeed puts what it loads out of a universal folder in other tensors' places, "
            "in silence: train on without, or write deepspeed files"
        )
        yield told("universal-round-robin", "warning", text)


def groups_of_stages(target: Catalog) -> list[list[int]]:
    """Which parameter groups each pp stage has; nothing where all have all."""
    if not target.flat_groups:
        return []
    held = [list(dict.fromkeys(f.group for f in target.flat_groups if f.stage == p)) for p in range(target.mesh.pp)]
    return [] if all(sorted(one) == [*range(len(target.groups))] for one in held) else held


def _is_dealt(names: Sequence[str], group: ParameterGroup) -> bool:
    """Whether a buffer has tensors in another order than the program."""
    held = set(names)
    return list(names) != [n for n in group.tensors if n in held]
