"""Where the model's own weights stand: the model file, layer files (pipeline engine), or fragments (ZeRO-3)."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from ckptlab.catalog import Fragment, Tensor
from ckptlab.findings import Faults, contradiction
from ckptlab.formats.deepspeed import names
from ckptlab.formats.deepspeed.files import Rank, StepFolder
from ckptlab.formats.deepspeed.header import Shape
from ckptlab.plan import Holder
from ckptlab.stored import Stored
from ckptlab.words import some


@dataclass
class ModuleWeights:
    """Everything of the module that is stored.

    `pieces[name][holder]`: the fragments of each tensor's module weight; `shapes[name][tp]`: shard shapes;
    `kinds[name]`: "parameter", "frozen" or "buffer"; `aliases`: further name → name; `layer_keys[layer]`: the prefix
    that the tensors of a layer file have in the model (`"3."` or `"tied_modules.embed."`); `assumed`: those of which
    nothing tells the layer.
    """

    pieces: dict[str, dict[Holder, tuple[Fragment, ...]]] = field(default_factory=dict)
    shapes: dict[str, dict[int, Shape]] = field(default_factory=dict)
    kinds: dict[str, str] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)
    layer_keys: dict[int, str] = field(default_factory=dict)
    layer_stages: dict[int, int] = field(default_factory=dict)
    assumed: tuple[str, ...] = ()

    @property
    def called(self) -> dict[str, tuple[str, ...]]:
        """Name → its further names, of tensors that have any."""
        found: dict[str, tuple[str, ...]] = {}
        for alias, name in self.aliases.items():
            found[name] = (*found.get(name, ()), alias)
        return found

    def add(self, name: str, kind: str, rank: Rank, shape: Shape, fragments: tuple[Fragment, ...], **at: int) -> None:
        """Note what a (pp, tp) rank stores; `at`: its dp coordinate, where every dp rank has a copy of its own."""
        self.pieces.setdefault(name, {})[Holder(pp=rank[0], **at, tp=rank[1])] = fragments
        self.shapes.setdefault(name, {})[rank[1]] = shape
        self.kinds[name] = kind


def read_module(folder: StepFolder, faults: Faults) -> ModuleWeights:
    """Find the module weights. `faults` is told where one's shape contradicts those that the optimizer knows."""
    weights = ModuleWeights()
    if folder.is_zero3:
        _from_zero3(folder, weights, faults)
    elif folder.is_pipeline:
        _from_layers(folder, weights, faults)
    else:
        _from_model_files(folder, weights)
        _without_left_out(folder, weights)
        _from_expert_files(folder, weights, faults)
    for name, by_tp in weights.shapes.items():
        for rank, shapes in folder.trained.items():
            found = by_tp.get(rank[1])
            if name in shapes and found is not None and shapes[name] != found:
                path = folder.heads[rank][0].path
                faults.report(
                    contradiction(
                        path,
                        f"{path}: {name}: param_shapes says {shapes[name]}, the module weight of tp rank {rank[1]} has "
                        f"{found}: the files do not belong together",
                        name,
                    )
                )
    return weights


def by_names(
    module: ModuleWeights, tensors: Mapping[str, Tensor], told: Mapping[str, int] | None = None
) -> ModuleWeights:
    """The same with the layers of a pipeline, where there are no layer files: told from the tensors' names, and a tied
    module is taken to stand right before the first of them. told: where it stands, by its prefix, if that is known."""
    numbered: dict[int, int] = {}
    for name, tensor in tensors.items():
        if (number := names.layer_number(name)) is not None:
            numbered.setdefault(number, tensor.stages[0])
    module.layer_keys = {i: f"{i}." for i in sorted(numbered)}
    module.layer_stages = dict(numbered)
    tied = names.tied(tensors)
    for offset, prefix in enumerate(reversed(tied)):
        layer = min(numbered, default=len(tied)) - 1 - offset
        if told is not None and prefix in told:
            layer = told[prefix]
        else:
            module.assumed = (*module.assumed, prefix)
        module.layer_keys = {layer: prefix, **module.layer_keys}
        module.layer_stages[layer] = 0
    return module


def _from_model_files(folder: StepFolder, weights: ModuleWeights) -> None:
    for rank, (model, *_) in folder.heads.items():
        trained, module = folder.trained[rank], model.module or {}
        by_place = {_place(v): n for n, v in module.items() if n in trained}
        for name, stored in module.items():
            known = name in trained or name in model.buffers
            target = model.shared.get(name) or (None if known else by_place.get(_place(stored)))
            if target and target != name and target in module:
                weights.aliases[name] = target
                continue
            if not known:  # a frozen tensor; its own aliases share its place
                by_place.setdefault(_place(stored), name)
            kind = "parameter" if name in trained else "buffer" if name in model.buffers else "frozen"
            weights.add(name, kind, rank, stored.shape, (Fragment(0, stored),))


def _without_left_out(folder: StepFolder, weights: ModuleWeights) -> None:
    """Where some ranks have no model file, a weight of the others is not the whole; buffers are alike."""
    for name in [n for n, kind in weights.kinds.items() if folder.left_out and kind != "buffer"]:
        for held in (weights.pieces, weights.shapes, weights.kinds):
            held.pop(name, None)


def _from_expert_files(folder: StepFolder, weights: ModuleWeights, faults: Faults) -> None:
    over_tp, files = folder.experts.over_tp, folder.experts.files
    places = range(1 if over_tp else folder.mesh.tp)
    parts = {(tp, name): one for (_, _, tp), held in files.items() if tp in places for name, one in held.items()}
    for layer in folder.experts.fused if parts else ():
        for tp, name in itertools.product(places, layer.names):
            kind = "parameter" if name in folder.trained[0, tp] else "frozen"
            own = {e: parts.pop((tp, layer.name(name, e)), None) for e in range(layer.total)}
            held = {e: one for e, one in own.items() if one is not None}
            if lacking := [e for e in own if e not in held]:
                where = some([*map(str, lacking)], 4)
                message = f"{folder.path}: {name}: the files of experts {where} do not have it: put them back"
                faults.report(contradiction(folder.path, message, name))
                continue
            inner = held[0].shape
            for ep, experts in reversed(list(enumerate(layer.ranks))):  # the first rank's shape is the one that is kept
                fragments = tuple(Fragment(i * math.prod(inner), held[e]) for i, e in enumerate(experts))
                weights.add(name, kind, (0, tp), (len(experts), *inner), fragments, ep=ep)
    for (tp, name), stored in parts.items():
        at, rank = folder.experts.at(name, folder.mesh), (folder.experts.stage(name), tp)
        kind = "parameter" if name in folder.trained[rank] else "frozen"
        weights.add(name, kind, rank, stored.shape, (Fragment(0, stored),), **at)


def _from_zero3(folder: StepFolder, weights: ModuleWeights, faults: Faults) -> None:
    for rank, (model, *_) in folder.heads.items():
        weights.aliases.update(model.shared)
        for d, copy in enumerate(folder.heads[rank]):
            for name, value in (copy.module or {}).items():
                if name in model.buffers and (not d or value.shape == weights.shapes[name][rank[1]]):
                    weights.add(name, "buffer", rank, value.shape, (Fragment(0, value),), dp=d)
        for name, shape in model.frozen.items():
            fragments = list(_frozen_fragments(folder, rank, name, shape, faults))
            if sum(f.count for f in fragments) == math.prod(shape):
                weights.add(name, "frozen", rank, shape, tuple(fragments))


def _frozen_fragments(folder: StepFolder, rank: Rank, name: str, shape: Shape, faults: Faults) -> Iterable[Fragment]:
    """ZeRO-3 cuts a frozen tensor as it cuts a parameter: ceil(n / dp) elements a rank."""
    numel = math.prod(shape)
    part = -(-numel // folder.mesh.dp)
    for d, model in enumerate(folder.heads[rank]):
        stored = model.frozen_fragments.get(name)
        count = max(0, min(part, numel - d * part))
        if stored is None or stored.numel < count:
            faults.report(
                contradiction(
                    model.path,
                    f"{model.path}: frozen_param_fragments of {name}: expected {count} elements, found "
                    f"{'none' if stored is None else stored.numel}: the file is incomplete",
                    name,
                )
            )
        elif count:
            yield Fragment(d * part, stored.elements(0, count), d)


def _from_layers(folder: StepFolder, weights: ModuleWeights, faults: Faults) -> None:
    stage_of = {name: p for p in reversed(range(folder.mesh.pp)) for name in folder.trained[p, 0]}
    prefixes = names.tied(stage_of)
    buffers = folder.buffers
    current = 0
    for layer, by_tp in folder.layers.items():
        keys = list(by_tp[0])
        own = f"{layer}."
        tied = [p for p in prefixes if keys and any(p + k in stage_of for k in keys)]
        prefix = own if not tied or any(own + k in stage_of for k in keys) else tied[0]
        current = next((stage_of[prefix + k] for k in keys if prefix + k in stage_of), current)
        weights.layer_keys[layer], weights.layer_stages[layer] = prefix, current
        for tp, tensors in enumerate(by_tp):
            for key in keys:
                if key not in tensors:
                    path = os.path.join(folder.path, names.FileName.of_layer(layer, tp, folder.layer_axis).text)
                    message = (
                        f"{path}: tensor {key!r} is missing, which tp rank 0 has: the files do not belong together"
                    )
                    faults.report(contradiction(path, message, prefix + key))
                    continue
                kind = "buffer" if prefix + key in buffers else "parameter" if prefix + key in stage_of else "frozen"
                stored = tensors[key]
                weights.add(prefix + key, kind, (current, tp), stored.shape, (Fragment(0, stored),))


def _place(stored: Stored) -> tuple[str, int, Shape]:
    return stored.path, stored.offset, stored.shape
