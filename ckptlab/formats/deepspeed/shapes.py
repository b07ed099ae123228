"""Which tensors the optimizer of each rank knows, in memory order, where its model file does not say it as DeepSpeed
does today: in `param_shapes`, one dictionary a flat buffer.

DeepSpeed before 0.6 kept them in the optimizer files, some wrote one dictionary for several buffers, and training
without ZeRO names no tensor at all: there they are found by what is stored.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from ckptlab.catalog import MASTER
from ckptlab.findings import Faults, Finding, Where
from ckptlab.formats.deepspeed import names
from ckptlab.formats.deepspeed.assigned import Group, Weight, assigned, in_runs
from ckptlab.formats.deepspeed.checks import noted
from ckptlab.formats.deepspeed.experts import layer_of
from ckptlab.formats.deepspeed.files import Rank, StepFolder
from ckptlab.formats.deepspeed.groups import degrees_named
from ckptlab.formats.deepspeed.header import Shapes
from ckptlab.formats.deepspeed.modelfile import ModelFile
from ckptlab.formats.deepspeed.optimfile import OptimizerFile, Wrapper
from ckptlab.mesh import Mesh
from ckptlab.stored import Stored


def told(folder: StepFolder, faults: Faults) -> StepFolder:
    """The folder with `shapes` in every model file, as far as they are known."""
    folder = _spread(folder)
    heads: dict[Rank, tuple[ModelFile, ...]] = {}
    taken = 0  # layers that earlier stages of a pipeline have
    for rank, files in folder.heads.items():
        head, found = files[0], files[0].shapes
        if rank in folder.optims:
            optims = folder.optims[rank]
            if optims[0].parts:  # what is said then lists frozen tensors too, in the module's order
                by_values, taken = _by_values(folder, rank, taken)
                found = by_values or optims[0].shapes
            elif found is None:
                found = optims[0].shapes or _by_spans(folder, rank) or _by_values(folder, rank, 0)[0]
            if found is not None and len(found) == 1 < len(optims[0].states):
                with faults.caught("contradiction", head.name):
                    found = _parted(found[0], optims) or found
        elif found is None and head.optimizer is not None and rank[1] == 0:
            found, taken = _of_stage(folder, rank, Group.of(head.optimizer), taken)
            if found is None:
                faults.report(_unnamed(folder.path, head))
        elif found is None and head.optimizer is not None:  # tp ranks hold the same tensors
            first = heads[rank[0], 0][0].shapes
            every = [one for layer in folder.layers for one in _layer(folder, layer, rank[1])]
            weights = dict([*_weights(folder, rank), *every])
            found = first and tuple({n: weights[n].shape for n in group if n in weights} for group in first)
        elif found is None:
            found = None if folder.is_pipeline else ({name: stored.shape for name, stored in _weights(folder, rank)},)
        heads[rank] = tuple(replace(file, shapes=found) for file in files)
    return replace(folder, heads=heads)


def _spread(folder: StepFolder) -> StepFolder:
    """The folder with experts that are spread over different numbers of ranks, where they train without ZeRO and just
    the names of parameter groups tell it: each layer's over as many as the group has in its name in which the first
    rank's optimizer holds its weights. As it was where that is not unique: the optimizer then has no names either."""
    experts = folder.experts
    local: dict[str, int] = {}
    for p in range(folder.mesh.pp):
        of_first = dict(folder.expert_optims.get((p, 0), ())).get(0)
        degrees = degrees_named(of_first.options) if of_first is not None else []
        if of_first is None or len({n for n in degrees if n}) < 2:
            continue
        wanted = [(group, n) for group, n in zip(Group.of(of_first), degrees, strict=True) if n]
        named = [
            (name, Weight(stored.shape, (stored,), of_experts=True))
            for (_, _, tp), held in sorted(experts.files.items())
            for name, stored in held.items()
            if tp == 0 and experts.stage(name) == p
        ]
        found = assigned(named, [group for group, _ in wanted]) or ()
        local |= {
            layer: experts.total[layer] // degree
            for of_group, (_, degree) in zip(found, wanted, strict=False)
            for name in of_group
            if (layer := layer_of(name))
        }
    if not local:
        return folder
    spread = replace(experts, local={**experts.local, **local})
    return replace(
        folder, experts=spread, mesh=spread.on(Mesh(pp=folder.mesh.pp, dp=folder.mesh.dp, tp=folder.mesh.tp))
    )


def _unnamed(path: str, head: ModelFile) -> Finding:
    found = (
        "the optimizer (without ZeRO) names no tensor, and its order and shapes fit the module in no way, or in "
        "several (frozen tensors of the same shape as trained ones, say): its states are left out, weights are read"
    )
    todo = "save the run again with ZeRO-1, which names them, if the optimizer is needed"
    return noted(path, "optimizer-unnamed", "warning", Where((head.name,)), "states of known tensors", found, todo)


def _parted(joined: Shapes, optims: Sequence[OptimizerFile]) -> tuple[Shapes, ...] | None:
    """Shapes of several buffers in one dictionary, cut where buffers end: by the names that slice mappings list, else
    by the buffers' sizes. None where neither tells."""
    groups = range(len(optims[0].states))
    if all(len(f.spans) == len(groups) for f in optims):
        listed = [{name for f in optims for name in f.spans[b]} for b in groups]
        if sum(map(len, listed)) == len(joined) == len(set().union(*listed)):
            return tuple({n: s for n, s in joined.items() if n in of_buffer} for of_buffer in listed)
    zero3 = optims[0].wrapper is Wrapper.ZERO3
    left, parts = iter(joined.items()), []
    for b in groups:
        stored = sum(f.states[b][MASTER].numel for f in (optims[:1] if zero3 else optims))
        if optims[0].wrapper is Wrapper.BF16:
            stored -= sum(f.padding(b) for f in optims)
        part, held = {}, 0
        while held < stored and (one := next(left, None)) is not None:
            part[one[0]] = one[1]
            held += -(-math.prod(one[1]) // len(optims)) if zero3 else math.prod(one[1])
        if held != stored:
            return None
        parts.append(part)
    return tuple(parts) if next(left, None) is None else None


def _by_spans(folder: StepFolder, rank: Rank) -> tuple[Shapes, ...] | None:
    """Shapes of the tensors that slice mappings list, in memory order: those of the module's weights."""
    optims = folder.optims[rank]
    groups = range(len(optims[0].states))
    if not all(len(f.spans) == len(groups) for f in optims):
        return None
    found = []
    for b in groups:
        spans = (span for f in optims for span in sorted(f.spans[b].items(), key=lambda one: one[1][0]))
        weights = {name: _weight(folder, rank, name) for name, _ in spans}
        if None in weights.values():
            return None
        found.append({name: weight.shape for name, weight in weights.items() if weight is not None})
    return tuple(found)


def _weight(folder: StepFolder, rank: Rank, name: str) -> Stored | None:
    """The module's weight of a tensor that the optimizer knows by that name."""
    if not folder.is_pipeline:
        held = (folder.heads[rank][0].module or {}).get(name)
        of_experts = (tensors.get(name) for (_, _, tp), tensors in folder.experts.files.items() if tp == rank[1])
        return held or next((one for one in of_experts if one and folder.experts.stage(name) == rank[0]), None)
    key = name.partition(".")[2]
    if (layer := names.layer_number(name)) is not None:
        return folder.layers[layer][rank[1]].get(key) if layer in folder.layers else None
    key = key.partition(".")[2]  # tied_modules.KEY.…, in the file of the first layer that has it
    return next((by_tp[rank[1]][key] for by_tp in folder.layers.values() if key in by_tp[rank[1]]), None)


# ---------------------------------------------------------------- tensors without names


def _by_values(folder: StepFolder, rank: Rank, taken: int) -> tuple[tuple[Shapes, ...] | None, int]:
    """Shapes of the tensors in flat buffers of ZeRO-1 and 2 that nothing names: those of the module, whose weights are
    the masters rounded; and how many layers of a pipeline are told with these."""
    optims = folder.optims[rank]
    if optims[0].wrapper is Wrapper.ZERO3:
        return None, taken
    groups = []
    for b in range(len(optims[0].states)):
        parts = tuple(f.states[b][MASTER] for f in optims)
        if optims[0].parts:
            parts = tuple(one[MASTER] for row in zip(*(f.parts[b] for f in optims), strict=False) for one in row)
        padding = sum(f.padding(b) for f in optims) if optims[0].wrapper is Wrapper.BF16 else 0
        groups.append(Group((), parts, sum(p.numel for p in parts) - padding))
    if folder.is_pipeline:
        found, end = _of_stage(folder, rank, groups, taken)
        return found, end if rank[1] == folder.mesh.tp - 1 else taken
    return assigned(list(_weights(folder, rank)), groups), 0


def _weights(folder: StepFolder, rank: Rank) -> Iterator[tuple[str, Weight]]:
    """The weights in the module of a rank in the model's order, each once; then its experts', of ep rank 0."""
    head, seen = folder.heads[rank][0], set()
    for name, stored in (head.module or {}).items():
        place = (stored.offset, stored.shape)
        if name not in head.buffers and name not in head.shared and place not in seen:
            seen.add(place)
            yield name, Weight(stored.shape, (stored,))
    files = {(tp, n): stored for (_, _, tp), tensors in folder.experts.files.items() for n, stored in tensors.items()}
    for layer in folder.experts.fused:
        for name in layer.names:
            parts = tuple(files.pop((rank[1], layer.name(name, e)), None) for e in layer.ranks[0])
            held = tuple(one for one in parts if one is not None)
            if held and len(held) == len(parts):
                yield name, Weight((len(held), *held[0].shape), held, of_experts=True)
    for (tp, name), stored in files.items():
        mine = (folder.experts.stage(name), tp) == rank
        if mine and layer_of(name) and folder.experts.locally(name) == name:
            yield name, Weight(stored.shape, (stored,), of_experts=True)


def _layer(folder: StepFolder, layer: int, tp: int) -> list[tuple[str, Weight]]:
    """The weights of a layer file, without buffers. One that is tied has the name that the training program told, where
    it did."""
    held = folder.layers[layer][tp]
    info = folder.first.content.get("universal_checkpoint_info")
    lists = info.values() if isinstance(info, Mapping) else ()
    patterns = {p for listed in lists if isinstance(listed, (list, tuple)) for p in listed if isinstance(p, str)}
    tied = (prefix for prefix in names.tied(patterns) if any(prefix + key in patterns for key in held))
    prefix = next(tied, f"{layer}.")
    named = ((prefix + key, Weight(stored.shape, (stored,))) for key, stored in held.items())
    return [(name, weight) for name, weight in named if name not in folder.buffers]


def _of_stage(
    folder: StepFolder, rank: Rank, groups: Sequence[Group], taken: int
) -> tuple[tuple[Shapes, ...] | None, int]:
    """The tensors of each of these groups, and how many layers its stage and those before it have.

    A stage of a pipeline has consecutive layers, all of whose tensors are trained; a tied layer of an earlier stage
    stands before them.
    """
    if not folder.is_pipeline:
        named = list(_weights(folder, rank))
        routers = [one for one in named if any(one[0].startswith(layer.router) for layer in folder.experts.fused)]
        orders = [named, [*(one for one in named if one not in routers), *routers]]  # AutoEP's may stand last
        ways = [way for order in orders[: 1 + bool(routers)] if (way := in_runs(order, groups)) is not None]
        return (ways[0] if ways and all(way == ways[0] for way in ways) else None), 0
    layers = list(folder.layers)
    by_shape = [replace(g, masters=()) if g.shapes else g for g in groups]  # copies of tied tensors need not be equal
    for wanted, end in itertools.product((groups, by_shape), range(taken + 1, len(layers) + 1)):
        own = [one for layer in layers[taken:end] for one in _layer(folder, layer, rank[1])]
        for tied in (None, *layers[:taken]):
            copies = [] if tied is None else _layer(folder, tied, rank[1])
            named = [*((n, replace(w, apart=wanted is by_shape)) for n, w in copies), *own]
            named.sort(key=lambda one: not one[0].startswith(names.TIED))
            found = assigned(named, wanted, frozen=False)
            if found is not None:
                return found, end
    return None, taken
