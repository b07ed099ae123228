"""A DeepSpeed step folder → `Catalog`."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ckptlab.catalog import MODULE, Catalog, Extents, FlatGroup, Notice, ParameterGroup, Tensor, Training
from ckptlab.errors import CheckpointError, LayoutError, UnsupportedError
from ckptlab.formats.deepspeed.assemble import placements
from ckptlab.formats.deepspeed.files import Rank, StepFolder, read_step_folder
from ckptlab.formats.deepspeed.layouts import UniversalInfo
from ckptlab.formats.deepspeed.module import ModuleWeights, read_module
from ckptlab.formats.deepspeed.optimizer import Wrapper, gradients, read_optimizer
from ckptlab.layout import Cut, Layout, on_degree, whole_shape
from ckptlab.mesh import Mesh
from ckptlab.strategy import Shape, Strategy, replicated

# what DeepSpeed itself puts into a model file; everything else there is the training program's
ENGINE_KEYS = frozenset(
    (
        "module",
        "buffer_names",
        "optimizer",
        "param_shapes",
        "frozen_param_shapes",
        "shared_params",
        "frozen_param_fragments",
        "lr_scheduler",
        "data_sampler",
        "random_ltd",
        "sparse_tensor_module_names",
        "skipped_steps",
        "global_steps",
        "global_samples",
        "dp_world_size",
        "mp_world_size",
        "checkpoint_parallel_dimensions",
        "ds_config",
        "ds_version",
        "num_experts",
    )
)


@dataclass(frozen=True)
class Native:
    """What a DeepSpeed writer needs of its source beyond the catalog.

    `folder` holds the parsed model files (of a universal folder too: its `mesh` is the one that the run trained on);
    `told`: the layouts are those of its universal_checkpoint_info;
    `extras`, `elastic` and `round_robin` are those of `OptimizerFiles`.
    """

    folder: StepFolder
    wrapper: Wrapper
    told: bool
    module: ModuleWeights
    extras: Mapping[str, Any]
    elastic: bool
    round_robin: bool

    @property
    def mesh(self) -> Mesh:
        """The mesh that the run trained on."""
        return self.folder.mesh

    @property
    def model(self) -> Mapping[str, Any]:
        """The first rank's model file."""
        return self.folder.models[0, 0]

    @property
    def config(self) -> Mapping[str, Any]:
        """The ds_config of the run."""
        return self.model.get("ds_config") or {}

    @property
    def dtype(self) -> str:
        """What the engine trains in: "bf16", "fp16" or "fp32". Where the configuration is silent file names tell."""
        for dtype, keys in (("bf16", ("bf16", "bfloat16")), ("fp16", ("fp16",))):
            if any((self.config.get(k) or {}).get("enabled") for k in keys):
                return dtype
        told = {"bf16", "bfloat16", "fp16"} & self.config.keys()
        return "bf16" if not told and (self.folder.prefix == "bf16" or self.wrapper is Wrapper.BF16) else "fp32"

    @property
    def is_pipeline(self) -> bool:
        """Written by the pipeline engine."""
        return self.folder.is_pipeline


def read_native(path: str, strategy: Strategy | None = None) -> Catalog:
    """Open a step folder that `engine.save_checkpoint` wrote: ZeRO 1, 2, 3, BF16_Optimizer, with or without pipeline
    and tensor parallelism. Headers only; nothing in it is executed.

    Raises CheckpointError where files are missing, damaged or contradict each other, UnsupportedError for kinds that
    are not read yet.
    """
    folder = read_step_folder(path)
    optimizer = read_optimizer(folder)
    info = universal_info(folder)
    _refuse_unsupported(folder, info, strategy)
    trainable = trainable_shapes(folder)
    module = read_module(folder, trainable)
    tensors, notices = build_tensors(folder, info, strategy, trainable, module, optimizer.flat_groups)
    group_of = {name: i for i, g in enumerate(optimizer.groups) for name in g.tensors}
    tensors = {n: replace(t, group=group_of.get(n)) for n, t in tensors.items()}
    outside = {(name, MODULE): by_holder for name, by_holder in module.pieces.items()}
    told = layouts_are_told(info, strategy)
    native = Native(folder, optimizer.wrapper, told, module, optimizer.extras, optimizer.elastic, optimizer.round_robin)
    return Catalog(
        path=path,
        format="deepspeed",
        mesh=folder.mesh,
        tensors=tensors,
        placements=placements(tensors, optimizer.flat_groups, outside, folder.mesh, folder.is_zero3),
        extents=Extents(outside, optimizer.partitions),
        flat_groups=optimizer.flat_groups,
        training=training(native, optimizer.zero_stage, optimizer.groups, path),
        client=client_state(folder),
        private=native,
        notices=(*folder.notices, *optimizer.notices, *notices),
        files=folder.files,
    )


def client_state(folder: StepFolder) -> dict[str, Any]:
    """What the training program put into the first rank's model file."""
    return {k: v for k, v in folder.models[0, 0].items() if k not in ENGINE_KEYS}


def training(native: Native, zero_stage: int | None, groups: tuple[ParameterGroup, ...], path: str) -> Training:
    """What a run says of itself in its model files, and in a config.json beside the checkpoint."""
    client = client_state(native.folder)
    step = client.get("iteration", native.model.get("global_steps"))
    heads, kv_heads = head_counts(client, path)
    return Training(
        mesh=native.mesh,
        step=int(step) if isinstance(step, int) else None,
        zero_stage=zero_stage,
        dtype=native.dtype,
        wrapper=native.wrapper.value,
        groups=groups,
        layer_stages=native.module.layer_stages,
        heads=heads,
        kv_heads=kv_heads,
        gradients=gradients(native.wrapper, native.dtype, zero_stage),
        layouts_told=native.told,
    )


def head_counts(client: Mapping[str, Any], path: str) -> tuple[int | None, int | None]:
    """(attention heads, key/value heads) by the client's `args`, or by a config.json in the folder or beside it."""
    args = getattr(client.get("args"), "attributes", None) or {}
    config: Mapping[str, Any] = {}
    for folder in (path, os.path.dirname(path)):
        try:
            with open(os.path.join(folder, "config.json"), encoding="utf-8") as f:
                found = json.load(f)
        except (OSError, ValueError):
            continue
        config = found if isinstance(found, dict) else {}
        break
    heads, kv_heads = (
        next((n for n in (args.get(key), config.get(key)) if isinstance(n, int) and n > 0), None)
        for key in ("num_attention_heads", "num_key_value_heads")
    )
    return heads, kv_heads


def universal_info(folder: StepFolder) -> UniversalInfo | None:
    info = folder.models[0, 0].get("universal_checkpoint_info")
    return UniversalInfo.of(info, folder.mesh.tp) if isinstance(info, Mapping) else None


def trainable_shapes(folder: StepFolder) -> dict[Rank, dict[str, Shape]]:
    """Shard shapes of the tensors that each rank's optimizer knows, in memory order."""
    shapes: dict[Rank, dict[str, Shape]] = {}
    for rank, model in folder.models.items():
        stored = model.get("param_shapes") or []
        stored = [stored] if isinstance(stored, Mapping) else stored
        shapes[rank] = {n: tuple(int(k) for k in s) for group in stored for n, s in group.items()}
    return shapes


def layouts_are_told(info: UniversalInfo | None, strategy: Strategy | None) -> bool:
    """The checkpoint itself says its layouts, and no strategy overrules it."""
    return info is not None and info.trusted and strategy is None


def _refuse_unsupported(folder: StepFolder, info: UniversalInfo | None, strategy: Strategy | None) -> None:
    if folder.models[0, 0].get("num_experts"):
        raise UnsupportedError(f"{folder.path}: a mixture of experts (num_experts), which ckptlab cannot open yet")
    if folder.mesh.tp == 1:
        return
    if info is not None and info.has_affine_map:
        raise UnsupportedError(
            f"{folder.path}: AutoTP (universal_checkpoint_info has an affine_map), which ckptlab cannot open yet"
        )
    if folder.is_zero3:
        raise UnsupportedError(f"{folder.path}: ZeRO-3 with tp {folder.mesh.tp}, which ckptlab cannot open yet")
    if info is None and strategy is None:
        raise UnsupportedError(
            f"{folder.path}: tp {folder.mesh.tp}, and no universal_checkpoint_info says how the tensors are cut. "
            "Give a strategy: "
            "a registered one (megatron), or {pattern: notation}"
        )


def build_tensors(
    folder: StepFolder,
    info: UniversalInfo | None,
    strategy: Strategy | None,
    trainable: Mapping[Rank, Mapping[str, Shape]],
    module: ModuleWeights,
    flat_groups: Sequence[FlatGroup],
) -> tuple[dict[str, Tensor], list[Notice]]:
    """Every tensor with its layout and whole shape, in the model's order (stage by stage)."""
    mesh = folder.mesh
    states_of: dict[str, dict[str, np.dtype]] = {}
    for group in flat_groups:
        for name in group.names:
            states_of.setdefault(name, dict(group.dtypes))
    shapes: dict[str, dict[int, Shape]] = {}
    stages: dict[str, list[int]] = {}
    for (p, t), of_rank in trainable.items():
        for name, shape in of_rank.items():
            known = shapes.setdefault(name, {}).setdefault(t, shape)
            if known != shape:
                raise CheckpointError(
                    f"{folder.name_of('model', (p, t))}: {name} has shape {shape}, on an earlier pp stage {known}: a "
                    "tied tensor "
                    "must have one shape; the files do not belong together"
                )
            held = stages.setdefault(name, [])
            if p not in held:
                held.append(p)
    for name, by_tp in module.shapes.items():
        shapes.setdefault(name, by_tp)
        stages.setdefault(name, sorted({holder["pp"] for holder in module.pieces[name]}))
    tensors, notices = {}, []
    for name in _model_order(module, trainable, shapes):
        shards = [shapes[name][t] for t in range(mesh.tp)]
        kind = "parameter" if name in states_of else module.kinds.get(name, "frozen")
        layout, layout_known = choose_layout(name, kind, shards, info, strategy, folder.path)
        layout = layout.replace(stages=tuple(stages[name]))
        layout, shape, cut = whole(name, layout, shards, info, mesh)
        states = dict(states_of.get(name, {}))
        if name in module.pieces:
            states[MODULE] = _module_dtype(module, name)
        aliases = tuple(a for a, target in module.aliases.items() if target == name)
        tensors[name] = Tensor(name, shape, layout, cut, kind, states, None, tuple(stages[name]), aliases, layout_known)
        if layout.replicas == "mean" and mesh.tp > 1:
            notices.append(
                Notice(
                    "averaged",
                    f"{folder.path}: the tp replicas of tensors listed in parameter_to_average_patterns are averaged",
                )
            )
    return tensors, list(dict.fromkeys(notices))


def _module_dtype(module: ModuleWeights, name: str) -> np.dtype:
    return next(f.stored.dtype for fragments in module.pieces[name].values() for f in fragments)


def _model_order(
    module: ModuleWeights, trainable: Mapping[Rank, Mapping[str, Shape]], shapes: Mapping[str, Any]
) -> list[str]:
    """The module's own order where it is stored, else that of the optimizer."""
    order = dict.fromkeys(module.pieces) | dict.fromkeys(n for names in trainable.values() for n in names)
    return [n for n in order if n in shapes]


def choose_layout(
    name: str, kind: str, shards: Sequence[Shape], info: UniversalInfo | None, strategy: Strategy | None, path: str
) -> tuple[Layout, bool]:
    """The layout of a tensor and whether it is known (False: tp 1, and nothing says how it would be cut)."""
    ndim = len(shards[0])
    if strategy is not None and (layout := strategy.layout(name, shards)) is not None:
        return layout, True
    if kind == "buffer" or ndim == 0:
        return replicated(ndim, replicas="first" if kind == "buffer" else "equal"), True
    if info is not None and (layout := info.layout(name, shards)) is not None:
        return layout, True
    if len(shards) == 1:
        return replicated(ndim), False
    raise CheckpointError(
        f"{path}: {name}: nothing says how its {len(shards)} shards of {shards[0]} make the whole: give a strategy"
    )


def whole(
    name: str, layout: Layout, shards: Sequence[Shape], info: UniversalInfo | None, mesh: Mesh
) -> tuple[Layout, Shape, Cut]:
    """The true whole shape that a layout and the shards imply, and the cut; vocabulary padding goes into the layout.

    CheckpointError if they contradict each other.
    """
    try:
        shape = whole_shape(layout, shards)
        if info is not None and info.is_vocabulary(name) and info.original_vocab_size is not None:
            shape = (min(info.original_vocab_size, shape[0]), *shape[1:])
            layout = layout.replace(padded={0: sum(s[0] for s in shards)})
        # at tp 1 nothing is cut yet: widths that a strategy says are those of the mesh that is to come
        cut = (on_degree(layout, "tp", 1) if mesh.tp == 1 else layout).resolve(shape, mesh)
    except LayoutError as e:
        raise CheckpointError(
            f"{name}: shards of shape {', '.join(map(str, dict.fromkeys(shards)))} do not fit its layout: {e}"
        ) from None
    for t, shard in enumerate(shards):
        if (found := cut.shard_shape(cut.coordinate({"tp": t}))) != tuple(shard):
            raise CheckpointError(
                f"{name}: tp rank {t} holds {tuple(shard)}, the layout {layout.text!r} expects {found}"
            )
    return layout, shape, cut
