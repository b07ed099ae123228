"""A DeepSpeed step folder → `Catalog`."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ckptlab import paths
from ckptlab.catalog import DTYPES, PARAM, Catalog, Extents, ParameterGroup, Tensor, Training
from ckptlab.errors import CheckpointError, LayoutError
from ckptlab.findings import Faults, Finding, Where
from ckptlab.formats.deepspeed import shapes
from ckptlab.formats.deepspeed.assemble import placements
from ckptlab.formats.deepspeed.autoep import FOLDING, Fused
from ckptlab.formats.deepspeed.checks import noted
from ckptlab.formats.deepspeed.files import StepFolder, read_step_folder
from ckptlab.formats.deepspeed.header import Header
from ckptlab.formats.deepspeed.infer import infer, vocabulary
from ckptlab.formats.deepspeed.layouts import UniversalInfo
from ckptlab.formats.deepspeed.module import ModuleWeights, by_names, read_module
from ckptlab.formats.deepspeed.optimfile import Wrapper
from ckptlab.formats.deepspeed.optimizer import OptimizerFiles, gradients, read_optimizer
from ckptlab.formats.deepspeed.whole import whole_optimizer
from ckptlab.layout import Cut, Layout, on_degree, whole_shape
from ckptlab.layout.notation import names
from ckptlab.mesh import STANDARD, Mesh
from ckptlab.sharding.strategies import Shape, Strategy, replicated

# what DeepSpeed itself puts into a model file; everything else there is the training program's
_ENGINES = """
module buffer_names optimizer param_shapes frozen_param_shapes shared_params frozen_param_fragments lr_scheduler
data_sampler random_ltd sparse_tensor_module_names skipped_steps global_steps global_samples dp_world_size mp_world_size
checkpoint_parallel_dimensions ds_config ds_version num_experts ds_autoep_layers autoep_layers
"""
ENGINE_KEYS = frozenset((*_ENGINES.split(), FOLDING))


@dataclass(frozen=True)
class Native:
    """What a DeepSpeed writer needs of its source beyond the catalog.

    `folder` holds the parsed model files (of a universal folder too: its `mesh` is the one that the run trained on);
    `told`: the layouts are those of its universal_checkpoint_info;
    `extras` and `elastic` are those of `OptimizerFiles`.
    """

    folder: StepFolder
    wrapper: Wrapper
    told: bool
    module: ModuleWeights
    extras: Mapping[str, Any]
    elastic: bool

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
        """What the engine trains in: "bf16", "fp16" or "fp32". Where the configuration is silent file names tell, or
        the weights of the module."""
        if self.folder.config.dtype is not None:
            return self.folder.config.dtype
        if self.folder.prefix == "bf16" or self.wrapper is Wrapper.BF16:
            return "bf16"
        weights = (f[0].stored for by_holder in self.module.pieces.values() for f in by_holder.values() if f)
        held = next((w.dtype for w in weights if w.dtype in DTYPES.values()), DTYPES["fp32"])
        return next(name for name, dtype in DTYPES.items() if dtype == held)

    @property
    def autotp(self) -> bool:
        """AutoTP says the layouts."""
        return self.told and bool((self.model.get("universal_checkpoint_info") or {}).get("affine_map"))

    @property
    def grain(self) -> int:
        """AutoTP's tp_grain_size."""
        said = (self.config.get("tensor_parallel") or {}).get("tp_grain_size", 1)
        return said if isinstance(said, int) and said > 0 else 1

    @property
    def is_pipeline(self) -> bool:
        """Written by the pipeline engine."""
        return self.folder.is_pipeline or (self.folder.is_numbered and self.mesh.pp > 1)


def read_native(
    path: str, faults: Faults, strategy: Strategy | None = None, also: Sequence[str] = ()
) -> Catalog | None:
    """Open a step folder that `engine.save_checkpoint` wrote: ZeRO 0 to 3, BF16_Optimizer, with or without pipeline
    and tensor parallelism. Headers only; nothing in it is executed. also: folders with further files of the same step.

    None where `faults` was told of an error: files that are missing, damaged or contradict each other, or kinds that
    are not read yet.
    """
    folder = read_step_folder(path, faults, also=also)
    if folder is None:
        return None
    folder = shapes.told(folder, faults)
    for finding in _newer(path):
        faults.report(finding)
    info = universal_info(folder, faults)
    module = read_module(folder, faults)
    optimizer = read_optimizer(folder, faults) if folder.optims else whole_optimizer(folder, module)
    if optimizer is None or faults.failed:
        return None
    told = info
    if info is None:
        told = vocabulary(folder)
        if folder.mesh.tp > 1:
            strategy = infer(folder, module, strategy, faults)
    tensors = {} if faults.failed else build_tensors(folder, told, strategy, module, optimizer, faults)
    return None if faults.failed else _catalog(folder, info, strategy, module, optimizer, tensors, faults)


def _catalog(
    folder: StepFolder,
    info: UniversalInfo | None,
    strategy: Strategy | None,
    module: ModuleWeights,
    optimizer: OptimizerFiles,
    tensors: Mapping[str, Tensor],
    faults: Faults,
) -> Catalog:
    outside = {(name, PARAM): by_holder for name, by_holder in module.pieces.items()} | dict(optimizer.pieces)
    told = layouts_are_told(info, strategy)
    if folder.is_numbered:
        module = by_names(module, tensors)
    native = Native(folder, optimizer.wrapper, told, module, optimizer.extras, optimizer.elastic)
    return Catalog(
        path=folder.path,
        format="deepspeed",
        mesh=folder.mesh,
        tensors=tensors,
        placements=placements(tensors, optimizer.flat_groups, outside, folder.mesh, folder.is_zero3),
        extents=Extents(outside, optimizer.partitions),
        flat_groups=optimizer.flat_groups,
        training=training(native, optimizer.zero_stage, optimizer.groups),
        client=client_state(folder),
        private=native,
        findings=tuple(faults.findings),
        files=folder.files,
    )


def training(native: Native, zero_stage: int | None, groups: tuple[ParameterGroup, ...]) -> Training:
    """What a run says of itself in its model files, and in a config.json beside the checkpoint."""
    client = client_state(native.folder)
    step = client.get("iteration", native.model.get("global_steps"))
    heads, kv_heads = head_counts(client, native.folder.path)
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


_HEADS = ("num_attention_heads", "num_heads", "n_heads", "n_head", "attention_heads")
_KV_HEADS = ("num_key_value_heads", "num_kv_heads", "multi_query_group_num", "n_head_kv", "kv_n_heads")


def head_counts(client: Mapping[str, Any], path: str) -> tuple[int | None, int | None]:
    """(attention heads, key/value heads) by the client's `args`, or by a config.json in the folder or beside it, under
    the names that AutoTP looks for (`module_inject/tp_shard.py`)."""
    args = getattr(client.get("args"), "attributes", None) or {}
    config: Mapping[str, Any] = {}
    for folder in (path, paths.parent(path)):
        try:
            found = json.loads(paths.text(os.path.join(folder, "config.json")))
        except (OSError, ValueError):
            continue
        config = found if isinstance(found, dict) else {}
        config = config["text_config"] if isinstance(config.get("text_config"), dict) else config
        break
    heads, kv_heads = (
        next((n for key in keys for n in (args.get(key), config.get(key)) if isinstance(n, int) and n > 0), None)
        for keys in (_HEADS, _KV_HEADS)
    )
    return heads, kv_heads


def client_state(folder: StepFolder) -> dict[str, Any]:
    """What the training program put into the first model file."""
    return {k: v for k, v in folder.models[0, 0].items() if k not in ENGINE_KEYS}


def universal_info(folder: StepFolder, faults: Faults) -> UniversalInfo | None:
    """The layouts that the training program told DeepSpeed; None if it told none."""
    head = folder.first
    if head.content.get("universal_checkpoint_info") is not None:
        with faults.caught("odd-header", head.name):
            return UniversalInfo.of(Header(head.path, head.content).inside("universal_checkpoint_info"), folder.mesh.tp)
    return None


def layouts_are_told(info: UniversalInfo | None, strategy: Strategy | None) -> bool:
    """The checkpoint itself says its layouts, and no strategy overrules it."""
    return info is not None and info.trusted and strategy is None


def _newer(path: str) -> Iterator[Finding]:
    """A step folder beside this one that is newer and as whole, where `latest` names this one."""
    parent, name = os.path.split(paths.real(path))
    try:
        named = paths.text(os.path.join(parent, "latest"), "replace", 4096).strip()
        mine, beside = set(paths.names(path)), [e.name for e in paths.entries(parent) if e.is_folder]
    except OSError:
        return
    step = re.fullmatch(r"(.*?)(\d+)", name)
    if named != name or step is None:
        return
    later = {int(m[2]): m[0] for m in (re.fullmatch(r"(.*?)(\d+)", n) for n in beside) if m and m[1] == step[1]}
    whole = [n for n in later if n > int(step[2]) and mine <= set(paths.names(os.path.join(parent, later[n])))]
    if whole:
        found = f"`latest` names {name}, and {later[max(whole)]} beside it is newer and has all files"
        todo = f"open {later[max(whole)]} itself if that is the one you mean"
        yield noted(path, "latest-old", "info", Where(), "the newest step", found, todo)


def build_tensors(
    folder: StepFolder,
    info: UniversalInfo | None,
    strategy: Strategy | None,
    module: ModuleWeights,
    optimizer: OptimizerFiles,
    faults: Faults,
) -> dict[str, Tensor]:
    """Every tensor with its layout and whole shape, in the model's order (stage by stage)."""
    mesh = folder.mesh
    states_of: dict[str, dict[str, np.dtype]] = {}
    for group in optimizer.flat_groups:
        for name in group.names:
            states_of.setdefault(name, dict(group.dtypes))
    for (name, state), by_holder in optimizer.pieces.items():
        states_of.setdefault(name, {})[state] = next(iter(by_holder.values()))[0].stored.dtype
    shapes_of = {**module.shapes, **folder.shards}
    stages = {name: tuple(sorted({holder["pp"] for holder in held})) for name, held in module.pieces.items()}
    stages |= folder.stages
    group_of = {name: i for i, g in enumerate(optimizer.groups) for name in g.tensors}
    aliases = module.called
    tensors = {}
    for name in dict.fromkeys((*module.pieces, *folder.shards)):  # the module's own order where it is stored
        with faults.caught():
            shards = shards_of(folder, name, shapes_of[name])
            kind = "parameter" if name in states_of else module.kinds.get(name, "frozen")
            fused = folder.experts.fused_of(name)
            if fused is not None:
                layout, shape, cut = all_experts(name, fused, shards[0], folder.experts.mesh_of(name, mesh))
                layout_known = True
            elif folder.experts.over_tp and folder.experts.degree(name):
                layout, shape = replicated(len(shards[0])).on_stages(stages[name]), shards[0]
                cut, layout_known = layout.resolve(shape, folder.experts.mesh_of(name, mesh)), True
            else:
                layout, layout_known = choose_layout(name, kind, shards, info, strategy, folder.path)
                layout = layout.on_stages(stages[name])
                layout, shape, cut = whole(name, layout, shards, info, mesh)
            states = dict(states_of.get(name, {}))
            if name in module.pieces:
                held = (f for fragments in module.pieces[name].values() for f in fragments)
                states[PARAM] = next(held).stored.dtype
            tensors[name] = Tensor(
                name,
                shape,
                layout,
                cut,
                kind,
                states,
                group_of.get(name),
                stages[name],
                aliases.get(name, ()),
                layout_known,
            )
    if mesh.tp > 1 and any(t.layout.replicas == "mean" for t in tensors.values()):
        faults.report(_averaged(folder.path))
    return tensors


def shards_of(folder: StepFolder, name: str, shapes: Mapping[int, Shape]) -> list[Shape]:
    """The shapes of a tensor's shards, tp rank by tp rank. CheckpointError where they have other numbers of dims."""
    if folder.experts.over_tp and folder.experts.degree(name):
        return [shapes[0]]  # the first ep rank's: they are on a mesh of their own
    shards = [shapes[t] for t in range(folder.mesh.tp) if t in shapes]
    if len(shards) != folder.mesh.tp or len({len(s) for s in shards}) > 1:
        raise CheckpointError(
            f"{folder.path}: {name}: expected a shard of as many dims on each of {folder.mesh.tp} tp ranks, found "
            f"{', '.join(map(str, shards))}: the files do not belong together"
        )
    return shards


def _averaged(path: str) -> Finding:
    found = "the tp replicas of tensors listed in parameter_to_average_patterns are averaged"
    todo = "nothing: DeepSpeed does so too; what a single rank held is in the views of shards"
    return noted(path, "averaged", "info", Where(), "replicas that training averages", found, todo)


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


def all_experts(name: str, fused: Fused, shard: Shape, mesh: Mesh) -> tuple[Layout, Shape, Cut]:
    """Of a tensor of all experts of a layer, of which the first ep rank has a shard of that shape: layout, whole shape
    and cut. CheckpointError where they contradict each other."""
    shape = (fused.total, *shard[1:])
    found = len(shard) == len(fused.layout(shape).dims) and fused.layout(shape).resolve(shape, mesh)
    if not found or found.shard_shape(found.coordinate({"ep": 0})) != shard:
        raise CheckpointError(
            f"{name}: the first ep rank's shard has shape {shard}, ds_autoep_layers gives it {len(fused.ranks[0])} of "
            f"{fused.total} experts: the files do not belong together"
        )
    return fused.layout(shape), shape, found


def whole(
    name: str, layout: Layout, shards: Sequence[Shape], info: UniversalInfo | None, mesh: Mesh
) -> tuple[Layout, Shape, Cut]:
    """The true whole shape that a layout and the shards imply, and the cut; vocabulary padding goes into the layout.

    CheckpointError if they contradict each other.
    """
    if beyond := sorted({axis for node in layout.tree for axis in names(node)} & {*STANDARD, "ep"} - {"tp"}):
        raise CheckpointError(
            f"{name}: its layout {layout.text!r} names {' and '.join(beyond)}, and DeepSpeed's files cut tensors over "
            "tp alone (dp cuts them when they are flattened): layouts over other axes are for a target, "
            "reshape(mesh, strategy=…)"
        )
    try:
        shape = whole_shape(layout, shards)
        if shape and info is not None and info.is_vocabulary(name) and info.original_vocab_size is not None:
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
