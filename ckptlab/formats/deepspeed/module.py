"""Where the model's own weights stand: the model file, layer files (pipeline engine), or fragments (ZeRO-3)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from ckptlab.catalog import Fragment
from ckptlab.errors import CheckpointError
from ckptlab.formats.deepspeed.files import Rank, StepFolder
from ckptlab.plan import Holder
from ckptlab.stored import Stored

Shape = tuple[int, ...]


@dataclass
class ModuleWeights:
    """Everything of the module that is stored.

    `pieces[name][holder]`: the fragments of each tensor's module weight; `shapes[name][tp]`: shard shapes;
    `kinds[name]`: "parameter", "frozen" or "buffer"; `aliases`: further name → name; `layer_keys[layer]`: the prefix
    that the tensors of a layer file have in the model (`"3."` or `"tied_modules.embed."`).
    """

    pieces: dict[str, dict[Holder, tuple[Fragment, ...]]] = field(default_factory=dict)
    shapes: dict[str, dict[int, Shape]] = field(default_factory=dict)
    kinds: dict[str, str] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)
    layer_keys: dict[int, str] = field(default_factory=dict)
    layer_stages: dict[int, int] = field(default_factory=dict)

    def add(self, name: str, kind: str, rank: Rank, shape: Shape, fragments: tuple[Fragment, ...], **at: int) -> None:
        """Note what a (pp, tp) rank stores; `at`: its dp coordinate, where every dp rank has a copy of its own."""
        self.pieces.setdefault(name, {})[Holder(pp=rank[0], **at, tp=rank[1])] = fragments
        self.shapes.setdefault(name, {})[rank[1]] = shape
        self.kinds[name] = kind


def read_module(folder: StepFolder, trainable: Mapping[Rank, Mapping[str, Shape]]) -> ModuleWeights:
    """Find the module weights. `trainable[pp, tp]`: shapes of the tensors that the optimizer of that rank knows.

    CheckpointError where a weight's shape contradicts them.
    """
    weights = ModuleWeights()
    if folder.is_pipeline:
        _from_layers(folder, trainable, weights)
    elif folder.is_zero3:
        _from_zero3(folder, trainable, weights)
    else:
        _from_model_files(folder, trainable, weights)
    for name, by_tp in weights.shapes.items():
        for rank, shapes in trainable.items():
            if name in shapes and rank[1] in by_tp and shapes[name] != by_tp[rank[1]]:
                raise CheckpointError(
                    f"{folder.name_of('model', rank)}: {name}: param_shapes says {shapes[name]}, the module weight "
                    "of tp rank "
                    f"{rank[1]} has {by_tp[rank[1]]}: the files do not belong together"
                )
    return weights


def _from_model_files(
    folder: StepFolder, trainable: Mapping[Rank, Mapping[str, Shape]], weights: ModuleWeights
) -> None:
    for rank, model in folder.models.items():
        shared = dict(model.get("shared_params") or {})
        buffers = set(model.get("buffer_names") or ())
        module = {name: value for name, value in (model.get("module") or {}).items() if isinstance(value, Stored)}
        by_place = {_place(v): n for n, v in module.items() if n in trainable[rank]}
        for name, stored in module.items():
            known = name in trainable[rank] or name in buffers
            target = shared.get(name) or (None if known else by_place.get(_place(stored)))
            if target and target != name and target in module:
                weights.aliases[name] = target
                continue
            if not known:  # a frozen tensor; its own aliases share its place
                by_place.setdefault(_place(stored), name)
            kind = "parameter" if name in trainable[rank] else "buffer" if name in buffers else "frozen"
            weights.add(name, kind, rank, stored.shape, (Fragment(0, stored),))


def _from_zero3(folder: StepFolder, trainable: Mapping[Rank, Mapping[str, Shape]], weights: ModuleWeights) -> None:
    for rank, model in folder.models.items():
        weights.aliases.update(model.get("shared_params") or {})
        buffers = set(model.get("buffer_names") or ())
        frozen = {n: tuple(map(int, s)) for n, s in (model.get("frozen_param_shapes") or {}).items()}
        for d, content in enumerate(folder.zero3_models[rank]):
            for name, value in (content.get("module") or {}).items():
                if name in buffers and isinstance(value, Stored):
                    weights.add(name, "buffer", rank, value.shape, (Fragment(0, value),), dp=d)
        for name, shape in frozen.items():
            weights.add(name, "frozen", rank, shape, tuple(_frozen_fragments(folder, rank, name, shape)))


def _frozen_fragments(folder: StepFolder, rank: Rank, name: str, shape: Shape) -> Iterable[Fragment]:
    """ZeRO-3 cuts a frozen tensor as it cuts a parameter: ceil(n / dp) elements a rank."""
    numel = math.prod(shape)
    part = -(-numel // folder.mesh.dp)
    for d, model in enumerate(folder.zero3_models[rank]):
        stored = (model.get("frozen_param_fragments") or {}).get(name)
        count = max(0, min(part, numel - d * part))
        if stored is None or stored.numel < count:
            raise CheckpointError(
                f"{folder.name_of('model', rank, d)}: frozen_param_fragments of {name}: expected {count} elements, "
                "found "
                f"{'none' if stored is None else stored.numel}: the file is incomplete"
            )
        if count:
            yield Fragment(d * part, stored.elements(0, count), d)


def _from_layers(folder: StepFolder, trainable: Mapping[Rank, Mapping[str, Shape]], weights: ModuleWeights) -> None:
    stage_of = {name: p for p in reversed(range(folder.mesh.pp)) for name in trainable[p, 0]}
    prefixes = sorted(_tied(stage_of))
    current = 0
    for layer, by_tp in folder.layers.items():
        keys = [k for k, v in by_tp[0].items() if isinstance(v, Stored)]
        own = f"{layer}."
        tied = [p for p in prefixes if keys and any(p + k in stage_of for k in keys)]
        prefix = own if not tied or any(own + k in stage_of for k in keys) else tied[0]
        current = next((stage_of[prefix + k] for k in keys if prefix + k in stage_of), current)
        weights.layer_keys[layer], weights.layer_stages[layer] = prefix, current
        for tp, content in enumerate(by_tp):
            for key in keys:
                stored = content.get(key)
                if not isinstance(stored, Stored):
                    raise CheckpointError(f"{folder.path}: layer {layer}: tensor {key!r} is missing on tp rank {tp}")
                kind = "parameter" if prefix + key in stage_of else "frozen"
                weights.add(prefix + key, kind, (current, tp), stored.shape, (Fragment(0, stored),))


def _tied(names: Iterable[str]) -> set[str]:
    """`tied_modules.KEY.` of every tied module."""
    return {".".join(n.split(".")[:2]) + "." for n in names if n.startswith("tied_modules.")}


def _place(stored: Stored) -> tuple[str, int, Shape]:
    return stored.path, stored.offset, stored.shape
