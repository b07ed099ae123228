"""What a user may ask of a target, and why it cannot be: cheap checks on metadata, before any cut is resolved."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ckptlab.catalog import DTYPES, Catalog
from ckptlab.formats.deepspeed import pipeline
from ckptlab.mesh import Mesh


@dataclass(frozen=True)
class TargetOptions:
    """What a user may say of a target; None keeps the source's.

    `zero_stage`: 1, 2 or 3. `dtype`: "bf16", "fp16" or "fp32", what the engine trains in. `pipeline`: a method
    ("blocks", "parameters", "uniform") or the first layer of each stage. `padded_vocab`: rows of the padded vocabulary.
    `heads`: attention heads (and `kv_heads`), where the checkpoint does not tell. `sub_group_size`: ZeRO-3, elements.
    `round_robin`: whether the target trains with round_robin_gradients. `param_groups`: hyperparameters of each group.
    `ep`: over how many of the dp ranks experts are spread; `data_before_experts`: whether the target trains with
    use_data_before_expert_parallelism.
    """

    zero_stage: int | None = None
    dtype: str | None = None
    pipeline: str | tuple[int, ...] | None = None
    padded_vocab: int | None = None
    heads: int | None = None
    kv_heads: int | None = None
    sub_group_size: int | None = None
    round_robin: bool | None = None
    param_groups: tuple[Mapping[str, Any], ...] | None = None
    ep: int | None = None
    data_before_experts: bool | None = None


def head_counts(catalog: Catalog, options: TargetOptions) -> tuple[int | None, int | None]:
    """(attention heads, key/value heads): from the user, else what the run says."""
    return options.heads or catalog.training.heads, options.kv_heads or catalog.training.kv_heads


def problems(catalog: Catalog, mesh: Mesh, options: TargetOptions) -> Iterator[str]:
    """Why the checkpoint cannot be written for that mesh; nothing if it can (cheap: no cut is resolved)."""
    native = catalog.private
    stage = options.zero_stage if options.zero_stage is not None else catalog.zero_stage
    if stage not in (1, 2, 3):
        yield f"ZeRO stage {stage}: ckptlab writes stages 1, 2 and 3"
    trained = native.folder.mesh
    if native.elastic and options.param_groups is None:
        yield (
            "the checkpoint is elastic and holds no hyperparameters: give param_groups, a list with lr, weight_decay, "
            "… of each group"
        )
    is_pipeline = native.is_pipeline
    if is_pipeline and stage in (2, 3):
        yield f"ZeRO-{stage} with a pipeline: DeepSpeed's pipeline engine trains with ZeRO-1 only"
    if mesh.pp > 1 and not is_pipeline:
        yield f"pp {mesh.pp}: the checkpoint was not written by the pipeline engine: it has no layers to deal to stages"
    if is_pipeline and mesh.pp != trained.pp:
        layers = sum(pipeline.describe(catalog).blocks)
        if mesh.pp > layers:
            yield f"pp {mesh.pp}: more stages than the {layers} transformer layers"
    if stage == 3 and mesh.tp > 1:
        yield f"ZeRO-3 with tp {mesh.tp}: ckptlab cannot write it yet"
    if mesh.tp > 1 and mesh.tp != trained.tp:
        heads, kv = head_counts(catalog, options)
        for count, what in (
            () if native.autotp else ((heads, "attention heads"), (kv if kv != heads else None, "key/value heads"))
        ):
            if count and count % mesh.tp:
                yield f"tp {mesh.tp}: {count} {what} are not divisible by it"
        unknown = [t.name for t in catalog.tensors.values() if not t.layout_known]
        if unknown:
            yield (
                f"tp {mesh.tp}: nothing says how {unknown[0]}"
                + (f" and {len(unknown) - 1} more tensors are" if unknown[1:] else " is")
                + " cut: give a strategy (a registered one such as megatron, or {pattern: notation})"
            )
    if experts := native.folder.experts:
        yield from experts.refusals(mesh, options.ep)
        if stage == 3:
            yield "ZeRO-3 with experts: DeepSpeed does not train it"
        if mesh.tp != trained.tp:
            yield f"tp {mesh.tp}: ckptlab cannot cut experts for another tp than {trained.tp} yet"
    elif options.ep not in (None, 1):
        yield f"ep {options.ep}: the checkpoint has no experts"
    if options.dtype is not None and options.dtype not in DTYPES:
        yield f"dtype {options.dtype!r}: expected one of {', '.join(DTYPES)}"
