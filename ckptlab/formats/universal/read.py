"""A universal folder → `Catalog`."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from ckptlab.catalog import ALONE, MASTER, MODULE, Catalog, Extents, Fragment, ParameterGroup, Tensor, whole_placements
from ckptlab.errors import CheckpointError
from ckptlab.formats import torchfile
from ckptlab.formats.deepspeed.files import StepFolder, read_step_folder
from ckptlab.formats.deepspeed.module import ModuleWeights, read_module
from ckptlab.formats.deepspeed.optimizer import EXTRAS, Wrapper, match_groups
from ckptlab.formats.deepspeed.read import (
    Native,
    choose_layout,
    client_state,
    layouts_are_told,
    trainable_shapes,
    training,
    universal_info,
    whole,
)
from ckptlab.layout import Cut
from ckptlab.mesh import Mesh
from ckptlab.plan import Holder
from ckptlab.stored import Stored
from ckptlab.strategy import Strategy

FOLDER = "zero"
OPTIMIZER = "optimizer_state.pt"


def read_universal(path: str, strategy: Strategy | None = None) -> Catalog:
    """Open a universal folder (the one that holds `zero/`): whole tensors, mesh 1 · 1 · 1.

    The layouts, groups and pipeline layers that a reshape needs are taken from the model files beside. CheckpointError
    where a state's shape contradicts them.
    """
    folder = read_step_folder(path, optimizer=False)
    trained, info = folder.mesh, universal_info(folder)
    trainable = trainable_shapes(folder)
    module = read_module(folder, trainable)
    common = torchfile.read(os.path.join(path, FOLDER, OPTIMIZER)) if _has(path, FOLDER, OPTIMIZER) else {}
    wrapper = _wrapper(common)
    shards = {
        n: [trainable[r][n] for r in trainable if n in trainable[r]][: trained.tp]
        for by in trainable.values()
        for n in by
    }
    stages = {n: tuple(dict.fromkeys(p for (p, _), by in trainable.items() if n in by)) for n in shards}
    tensors: dict[str, Tensor] = {}
    pieces: dict[tuple[str, str], dict[Holder, tuple[Fragment, ...]]] = {}
    scalars: dict[str, dict[str, Any]] = {}
    found = dict(_state_files(path))
    for name in dict.fromkeys([*shards, *found]):
        if name in module.aliases or (name not in shards and name in module.kinds):
            continue  # what is not trained is read from the model files, where it has its own dtype
        if name not in found:
            raise CheckpointError(
                f"{os.path.join(path, FOLDER, name)}: missing: the model files list this tensor; convert again"
            )
        states, single = _read_states(found[name])
        tensors[name] = _tensor(name, states, shards.get(name), stages.get(name, (0,)), folder, info, strategy)
        scalars[name] = single
        for state, stored in states.items():
            pieces[name, state] = {ALONE: (Fragment(0, stored),)}
    _add_module(folder, module, tensors, pieces)
    groups = _groups(folder, common, trainable, scalars, wrapper)
    group_of = {n: i for i, g in enumerate(groups) for n in g.tensors}
    native = Native(
        folder,
        wrapper,
        layouts_are_told(info, strategy),
        _layers(folder, module, tensors),
        {k: common[k] for k in EXTRAS if k in common},
        not common.get("param_groups"),
        _round_robin(folder, wrapper),
    )
    tensors = {n: replace(t, group=group_of.get(n)) for n, t in tensors.items()}
    return Catalog(
        path=path,
        format="universal",
        mesh=Mesh(),
        tensors=tensors,
        placements=whole_placements(tensors, pieces),
        extents=Extents(pieces),
        training=training(native, _stage(folder, wrapper), groups, path),
        client=client_state(folder),
        private=native,
        notices=folder.notices,
        files=(*folder.files, *(os.path.relpath(f, path) for files in found.values() for f in files.values())),
    )


def _has(*parts: str) -> bool:
    return os.path.isfile(os.path.join(*parts))


def _wrapper(common: Mapping[str, Any]) -> Wrapper:
    if "fp32_flat_groups" in common or "optimizer_state_dict" in common:
        return Wrapper.ZERO3
    return Wrapper.ZERO12 if "zero_stage" in common else Wrapper.BF16


def _stage(folder: StepFolder, wrapper: Wrapper) -> int:
    if wrapper is Wrapper.ZERO3 or folder.is_zero3:
        return 3
    config = folder.models[0, 0].get("ds_config") or {}
    return int((config.get("zero_optimization") or {}).get("stage") or 1)


def _round_robin(folder: StepFolder, wrapper: Wrapper) -> bool:
    zero = (folder.models[0, 0].get("ds_config") or {}).get("zero_optimization") or {}
    return wrapper is Wrapper.ZERO12 and bool(zero.get("round_robin_gradients")) and folder.mesh.dp > 1


def _state_files(path: str) -> Iterator[tuple[str, dict[str, str]]]:
    """(tensor name, {state: file}) of every folder under zero/ that holds states."""
    root = os.path.join(path, FOLDER)
    for at, _, files in os.walk(root):
        states = {f.removesuffix(".pt"): os.path.join(at, f) for f in sorted(files) if f.endswith(".pt") and at != root}
        if states:
            yield os.path.relpath(at, root).replace(os.sep, "/"), states


def _read_states(files: Mapping[str, str]) -> tuple[dict[str, Stored], dict[str, Any]]:
    """(states as stored, scalars) of one tensor's folder."""
    states, scalars = {}, {}
    for state, file in files.items():
        content = torchfile.read(file)
        value = content.get("param") if isinstance(content, Mapping) else content
        if state == "step" or not isinstance(value, Stored):
            scalars[state] = value
        else:
            states[state] = value
    return states, scalars


def _tensor(
    name: str,
    states: Mapping[str, Stored],
    shards: list[tuple[int, ...]] | None,
    stages: tuple[int, ...],
    folder: StepFolder,
    info: Any,
    strategy: Strategy | None,
) -> Tensor:
    stored = next(iter(states.values()))
    if shards is None:  # not in the model files: what is stored is all there is to know
        shards = [stored.shape]
        info = None
    layout, known = choose_layout(name, "parameter", shards, info, strategy, folder.path)
    layout, shape, _ = whole(name, layout, shards, info, folder.mesh if len(shards) > 1 else Mesh())
    for state, one in states.items():
        if one.numel != math.prod(shape):
            raise CheckpointError(
                f"{one.path}: {name}: {state} has shape {one.shape}, the model files say {shape}: it comes from "
                "another run"
            )
    dtypes = {s: one.dtype for s, one in states.items()}
    ordered = {s: dtypes[s] for s in sorted(dtypes, key=lambda s: s != MASTER)}
    return Tensor(
        name, shape, layout.replace(stages=stages), Cut.whole(shape), "parameter", ordered, None, stages, (), known
    )


def _add_module(
    folder: StepFolder, module: ModuleWeights, tensors: dict[str, Tensor], pieces: dict[tuple[str, str], Any]
) -> None:
    """Frozen tensors, buffers and (at tp 1) module weights, from the model files."""
    for name, by_rank in module.pieces.items():
        aliases = tuple(a for a, target in module.aliases.items() if target == name)
        if name in tensors:
            tensors[name] = replace(tensors[name], aliases=aliases)
            if folder.mesh.tp > 1:
                continue
            dtype = next(f.stored.dtype for fragments in by_rank.values() for f in fragments)
            tensors[name] = replace(tensors[name], states={**tensors[name].states, MODULE: dtype})
        else:
            shape = module.shapes[name][0]
            dtype = next(f.stored.dtype for f in next(iter(by_rank.values())))
            layout, known = choose_layout(name, module.kinds[name], [shape], None, None, folder.path)
            tensors[name] = Tensor(
                name, shape, layout, Cut.whole(shape), module.kinds[name], {MODULE: dtype}, None, (0,), aliases, known
            )
        pieces[name, MODULE] = {ALONE: tuple(replace(f, dp=0) for f in next(iter(by_rank.values())))}
    for alias, target in module.aliases.items():
        if target in tensors and alias not in tensors[target].aliases:
            tensors[target] = replace(tensors[target], aliases=(*tensors[target].aliases, alias))


def _groups(
    folder: StepFolder,
    common: Mapping[str, Any],
    trainable: Mapping[tuple[int, int], Any],
    scalars: Mapping[str, Any],
    wrapper: Wrapper,
) -> tuple[ParameterGroup, ...]:
    """Parameter groups: tensors from the model files, hyperparameters from what the universal folder has of them."""
    options = [{k: v for k, v in g.items() if k != "params"} for g in common.get("param_groups") or ()]
    ids = [list(g["params"]) for g in common.get("param_groups") or ()]
    stages: list[list[tuple[Mapping[str, Any] | None, tuple[str, ...]]]] = []
    for p in range(folder.mesh.pp):
        buffers = [list(g) for g in folder.models[p, 0].get("param_shapes") or ()]
        if wrapper is Wrapper.ZERO3 and ids:
            joined = [tuple(n for i in members for n in buffers[i]) for members in ids]
        else:
            joined = [tuple(b) for b in buffers]
        if options and len(joined) != len(options):
            raise CheckpointError(
                f"{folder.path}: pp stage {p} has {len(joined)} parameter groups, {OPTIMIZER} has {len(options)}: "
                "ckptlab cannot tell which are missing there"
            )
        stages.append(list(zip(options, joined, strict=True)) if options else [(None, names) for names in joined])
    groups, _ = match_groups(folder.path, stages)
    steps = _zero3_steps(common)
    return tuple(replace(g, scalars=next((scalars[n] for n in g.tensors if scalars.get(n)), steps)) for g in groups)


def _zero3_steps(common: Mapping[str, Any]) -> dict[str, Any]:
    """Stage 3 stores no step beside the tensors; the optimizer's own state has it."""
    state = (common.get("optimizer_state_dict") or {}).get("state") or {}
    return next(({"step": s["step"]} for s in state.values() if "step" in s), {})


def _layers(folder: StepFolder, module: ModuleWeights, tensors: Mapping[str, Tensor]) -> ModuleWeights:
    """A universal folder has no layer files: the layers of a pipeline are told from the tensors' names, and a tied
    module is taken to stand right before the first of them."""
    if not folder.is_pipeline:
        return module
    numbered: dict[int, int] = {}
    for name, tensor in tensors.items():
        head = name.split(".", 1)[0]
        if head.isdigit():
            numbered.setdefault(int(head), tensor.stages[0])
    module.layer_keys = {i: f"{i}." for i in sorted(numbered)}
    module.layer_stages = dict(numbered)
    tied = sorted({".".join(n.split(".")[:2]) + "." for n in tensors if n.startswith("tied_modules.")})
    for offset, prefix in enumerate(reversed(tied)):
        layer = min(numbered, default=len(tied)) - 1 - offset
        module.layer_keys = {layer: prefix, **module.layer_keys}
        module.layer_stages[layer] = 0
    return module
