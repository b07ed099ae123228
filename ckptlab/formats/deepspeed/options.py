"""What a user may ask of a target, and why it cannot be: cheap checks on metadata, before any cut is resolved."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ckptlab.catalog import DTYPES, Catalog, Tensor
from ckptlab.catalog.training import ZERO_STAGES
from ckptlab.formats.deepspeed import autotp, pipeline
from ckptlab.formats.deepspeed.experts import Experts
from ckptlab.formats.deepspeed.optimfile import Wrapper
from ckptlab.formats.deepspeed.read import Native
from ckptlab.layout.notation import names
from ckptlab.mesh import Mesh
from ckptlab.words import some


@dataclass(frozen=True)
class TargetOptions:
    """What a user may say of a target; None keeps the source's.

    `zero_stage`: 0 to 3. `dtype`: "bf16", "fp16" or "fp32", what the engine trains in. `pipeline`: a method
    ("blocks", "parameters", "uniform") or the first layer of each stage. `padded_vocab`: rows of the padded vocabulary.
    `heads`: attention heads (and `kv_heads`), where the checkpoint does not tell. `sub_group_size`: ZeRO-3, elements.
    `round_robin`: whether the target trains with round_robin_gradients (None: as the run's ds_config says).
    `param_groups`: hyperparameters of each group.
    `fused`: without ZeRO, whether its optimizer is a fused Adam, which keeps master weights in one flat tensor a group.
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
    fused: bool | None = None
    ep: int | None = None
    data_before_experts: bool | None = None


@dataclass(frozen=True)
class Wanted:
    """A target that is asked for, on a mesh of pp, dp and tp, and what follows from that before any cut is resolved."""

    source: Catalog
    mesh: Mesh
    options: TargetOptions

    @property
    def native(self) -> Native:
        """What DeepSpeed's writers know of the source."""
        return self.source.private

    @property
    def trained(self) -> Mesh:
        """The mesh that the run trained on."""
        return self.native.mesh

    @cached_property
    def is_pipeline(self) -> bool:
        """Whether a pipeline engine is to read it: where one had written the source, and where tensors go by the
        numbers of layers and there are to be stages."""
        staged = self.mesh.pp > 1 or self.options.pipeline is not None
        return self.native.is_pipeline or (self.native.folder.is_numbered and staged)

    @cached_property
    def dtype(self) -> str:
        return self.options.dtype or self.native.dtype

    @property
    def is_bf16_pipeline(self) -> bool:
        return self.is_pipeline and self.dtype == "bf16"

    @cached_property
    def stage(self) -> int:
        """Its ZeRO stage: as asked for, else the source's, but that of a bf16 pipeline without ZeRO is 1."""
        if self.options.zero_stage is not None:
            return self.options.zero_stage
        return 1 if self.is_bf16_pipeline else self.source.zero_stage or 0

    @cached_property
    def wrapper(self) -> Wrapper:
        """Whose files it is to have: stage 1 and BF16_Optimizer take each other's."""
        if self.stage in (0, 3):
            return Wrapper.WHOLE if self.stage == 0 else Wrapper.ZERO3
        bf16 = self.stage == 1 and self.native.wrapper is Wrapper.BF16
        return Wrapper.BF16 if bf16 else Wrapper.ZERO12

    @cached_property
    def fused(self) -> bool:
        """Whether, without ZeRO, it keeps its master weights flat: as asked for, else as the source, else as DeepSpeed
        would choose by the run's configuration."""
        if self.options.fused is not None:
            return self.options.fused
        if (held := self.native.folder.first.optimizer) is not None:
            return held.fused
        config = self.native.config.get("optimizer")
        named = config if isinstance(config, Mapping) else {}
        given = named.get("params")
        torchs = isinstance(given, Mapping) and bool(given.get("torch_adam"))
        return str(named.get("type")).lower() in ("adam", "adamw") and not torchs

    @cached_property
    def experts(self) -> Experts:
        """The source's experts, dealt to the ranks anew."""
        held, options = self.native.folder.experts, self.options
        return held.spread(
            options.ep, options.data_before_experts, dealt_to_tp(held, self.source.tensors, self.mesh.tp)
        )

    @cached_property
    def split(self) -> Mesh:
        """Its mesh, with dp split for the experts."""
        return self.experts.on(self.mesh)

    @cached_property
    def heads(self) -> tuple[int | None, int | None]:
        """(attention heads, key/value heads): from the user, else what the run says, and of AutoTP's the tensors; there
        a model is taken to have as many of both where nothing says otherwise, as AutoTP does."""
        told = self.source.training
        heads, kv_heads = self.options.heads or told.heads, self.options.kv_heads or told.kv_heads
        if self.native.autotp:
            kv_heads = kv_heads or autotp.told_heads(self.source.tensors, self.trained, heads) or heads
        return heads, kv_heads


def dealt_to_tp(experts: Experts, tensors: Mapping[str, Tensor], tp: int) -> bool:
    """Whether experts are dealt to tp ranks too, as DeepSpeed deals those that tp does not cut."""
    trees = (node for tensor in tensors.values() if experts.degree(tensor.name) for node in tensor.layout.tree)
    return bool(experts) and tp > 1 and not any("tp" in names(node) for node in trees)


def problems(wanted: Wanted) -> Iterator[str]:
    """Why the checkpoint cannot be written for that mesh; nothing if it can (cheap: no cut is resolved)."""
    catalog, native, mesh, trained = wanted.source, wanted.native, wanted.mesh, wanted.trained
    options, stage = wanted.options, wanted.stage
    if not catalog.groups:
        yield "it holds weights alone, and no optimizer that could be resumed: save it as safetensors"
        return
    if stage not in ZERO_STAGES:
        yield f"ZeRO stage {stage}: expected 0, 1, 2 or 3"
    if native.elastic and options.param_groups is None:
        yield (
            "the checkpoint is elastic and holds no hyperparameters: give param_groups, a list with lr, weight_decay, "
            "… of each group"
        )
    if wanted.is_pipeline and stage in (2, 3):
        yield f"ZeRO-{stage} with a pipeline: DeepSpeed's pipeline engine trains with ZeRO-1 only: take zero_stage=1"
    if stage == 0 and wanted.is_bf16_pipeline:
        yield "a bf16 pipeline without ZeRO: DeepSpeed saves such checkpoints and cannot load them: take zero_stage=1"
    if mesh.pp > 1 and not wanted.is_pipeline:
        yield f"pp {mesh.pp}: the checkpoint was not written by the pipeline engine: it has no layers to deal to stages"
    if wanted.is_pipeline and mesh.pp != trained.pp:
        layers = sum(pipeline.describe(catalog).blocks)
        if mesh.pp > layers:
            yield f"pp {mesh.pp}: more stages than the {layers} transformer layers"
    heads, kv = wanted.heads
    if native.autotp and stage == 3 and kv and kv < mesh.tp:
        yield (
            f"ZeRO-3 at tp {mesh.tp} of {kv} key/value heads: AutoTP leaves tp ranks from {kv} on no part of "
            "attention, which DeepSpeed trains at ZeRO-2 and below alone: take a tp of at most as many"
        )
    if mesh.tp > 1 and mesh.tp != trained.tp:
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
    held = native.folder.first.module or {} if native.folder.left_out else {}
    known = {name for tensor in catalog.tensors.values() for name in (tensor.name, *tensor.aliases)}
    if lost := [name for name in held if name not in known]:
        yield f"{some(lost, 4)}: not stored whole, and an engine asks for them: save what there is as safetensors"
    if experts := native.folder.experts:
        yield from experts.refusals(mesh, options.ep, wanted.experts, stage)
        if stage == 3 and experts.total:
            yield "ZeRO-3 with experts: DeepSpeed does not train it"
    elif options.ep not in (None, 1):
        yield f"ep {options.ep}: the checkpoint has no experts"
    if options.dtype is not None and options.dtype not in DTYPES:
        yield f"dtype {options.dtype!r}: expected one of {', '.join(DTYPES)}"
