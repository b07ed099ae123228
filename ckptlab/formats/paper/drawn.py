"""A target on paper, drawn from any source by its tensors' layouts alone: over whatever axes, with no files.

Shards lie over dp as ZeRO lays them (stage 0: whole on each dp rank; 1 and 2: the optimizer's states in flat buffers;
3: each tensor by itself, and no param). Where a layout names dp itself, its cut is all there is, as under FSDP2: each
rank holds a shard in all states. Where it names a part of dp (`ep` of experts, `shard` of HSDP), flat buffers are cut
over the rest.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ckptlab.catalog import (
    DTYPES,
    MASTER,
    PARAM,
    ZERO_STAGES,
    Catalog,
    FlatGroup,
    Gradients,
    ParameterGroup,
    Tensor,
    placements_of,
)
from ckptlab.errors import LayoutError, ReshapeError
from ckptlab.mesh import Mesh
from ckptlab.plan import Holder, Placement
from ckptlab.sharding.stages import dealt


def drawn(source: Catalog, mesh: Mesh, zero_stage: int) -> Catalog:
    """What the ranks of a mesh would hold of a source, by the layouts of its tensors (see `sharding.relaid`).

    Stages are those that a layout says, else the source's where pp stays, else layers are dealt evenly by the first
    number in their names, what comes before them to the first stage and what comes behind to the last. ReshapeError for
    a layout that does not fit.
    """
    if zero_stage not in ZERO_STAGES:
        raise ReshapeError(f"ZeRO stage {zero_stage}: expected 0, 1, 2 or 3")
    stages = dealt(source, mesh.pp)
    made: dict[Any, Tensor] = {}  # layers of a kind lie alike, and are worked out once a stage
    tensors = {}
    for name, tensor in source.tensors.items():
        held = tuple(source.held(name))
        kind = (id(tensor.layout), tensor.shape, stages[name], tensor.kind, tuple(tensor.states.items()), held)
        if kind not in made:
            made[kind] = _tensor(source, tensor, mesh, stages[name], zero_stage)
        like = made[kind]
        its_own = (tensor.group, like.stages, tensor.aliases, tensor.layout_known)
        tensors[name] = Tensor(name, tensor.shape, like.layout, like.cut, tensor.kind, like.states, *its_own)
    training = source.training
    groups = source.groups or (ParameterGroup({}, tuple(n for n, t in tensors.items() if t.kind == "parameter")),)
    flat_groups = tuple(_flat_groups(tensors, groups, mesh, zero_stage)) if zero_stage else ()
    flat = {name: group.dtypes for group in flat_groups for name in group.names}
    outside = {(n, s): t.stages for n, t in tensors.items() for s in t.states if s not in flat.get(n, ())}
    cut = zero_stage >= 2
    return Catalog(
        path=source.path,
        format="paper",
        mesh=mesh,
        tensors=tensors,
        placements=placements_of(tensors, flat_groups, outside),
        flat_groups=flat_groups,
        training=replace(
            training,
            mesh=mesh,
            zero_stage=zero_stage,
            groups=groups,
            gradients=None if training.dtype is None else Gradients(DTYPES[training.dtype], cut=cut, flat=cut),
        ),
    )


def _tensor(source: Catalog, tensor: Tensor, mesh: Mesh, stages: tuple[int, ...], zero_stage: int) -> Tensor:
    layout = tensor.layout.on_stages(stages)
    try:
        cut = layout.resolve(tensor.shape, mesh)
    except LayoutError as error:
        raise ReshapeError(f"{source.path}: {tensor.name}: {error}") from None
    states = {state: tensor.states[state] for state in source.held(tensor.name)}
    if MASTER in states and tensor.kind == "parameter" and source.training.dtype is not None:
        states.setdefault(PARAM, DTYPES[source.training.dtype])
        if zero_stage == 3 and Placement(cut, stages).data:
            del states[PARAM]  # made from the master's fragments
    return replace(tensor, layout=layout, cut=cut, states=states, stages=stages)


def _flat_groups(
    tensors: Mapping[str, Tensor], groups: Sequence[ParameterGroup], mesh: Mesh, zero_stage: int
) -> Iterator[FlatGroup]:
    """Those of a group and a stage that have the same states and are spread over the same ranks, together."""
    spread: dict[int, tuple[str, ...]] = {}  # a cut → the axes over which its shards have fragments
    for stage in range(mesh.pp):
        for index, group in enumerate(groups):
            alike: dict[Any, list[str]] = {}
            for name in group.tensors:
                tensor = tensors[name]
                if stage not in tensor.stages:
                    continue
                if id(tensor.cut) not in spread:
                    spread[id(tensor.cut)] = Placement(tensor.cut, tensor.stages).data
                data = spread[id(tensor.cut)]
                states = tuple(state for state in tensor.states if state != PARAM)
                if states and data:
                    alike.setdefault((data, states), []).append(name)
            for sub, names in enumerate(alike.values()):
                yield FlatGroup.laid_out(Holder(pp=stage), index, names, tensors, mesh, zero_stage, sub)
