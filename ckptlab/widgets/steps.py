"""A reshape merge by merge, for one tensor: buffers → shards → whole → dealt to stages → new shards → new buffers.

Each step is a picture, a sentence of what happened, and the Python that shows the same of a checkpoint.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ckptlab import viz
from ckptlab.catalog import PARAM, Catalog, Tensor
from ckptlab.mesh import Mesh
from ckptlab.reshaping import Reshape
from ckptlab.words import number_of, ranges, shape_text

HUE = 0  # the colour of the chosen tensor, in every step
SOURCE, TARGET = "ckpt", "reshaped"  # what the code of a step calls the two


@dataclass(frozen=True)
class Step:
    """`pictures` are SVG, side by side; `code` is empty where a model on paper has nothing to show."""

    title: str
    text: str
    pictures: tuple[str, ...]
    code: str = ""


TITLES = ("buffers", "shards", "whole", "stages", "new shards", "new buffers")


def step(reshape: Reshape, name: str, number: int, width: int | None = None) -> Step:
    """The step of that number (see TITLES) for the tensor of that name, drawn for a page of a width (pixels)."""
    tensor, wanted = reshape.source[name], reshape.target.tensors[name]
    make = (
        lambda: _buffers(reshape.source, tensor, SOURCE, width),
        lambda: _shards(reshape.source, tensor, width),
        lambda: _whole(reshape.source, tensor, width),
        lambda: _stages(reshape, tensor, wanted, width),
        lambda: _new_shards(reshape, tensor, wanted, width),
        lambda: _buffers(reshape.target, wanted, TARGET, width),
    )
    return make[number]()


def _buffers(catalog: Catalog, tensor: Tensor, what: str, width: int | None) -> Step:
    """The flat buffer of the tensor on its first stage and tp rank 0."""
    title = TITLES[0] if what == SOURCE else TITLES[-1]
    stage = tensor.stages[0]
    state = next((s for s in tensor.states if s != PARAM), None)
    if state is None or not catalog.is_flat(tensor.name, state):
        text = f"No flat buffer holds {tensor.name}: whoever has a shard of it has the whole shard."
        return Step(title, text, (viz.mesh(catalog.mesh, width=width).svg,))
    holder = catalog.placement(tensor.name, state).holders[0]
    group, index = catalog.flat(tensor.name, holder)
    flat = group.flats[holder]
    ranks = flat.fragments(index)[:, 0].tolist()
    first = (
        "ZeRO-3 cuts every tensor by itself"
        if flat.partition is None
        else "ZeRO lays the tensors of a group one behind the other and cuts the line"
    )
    verb = f"Split over {group.over} again: " if what == TARGET else ""
    text = (
        f"{verb}{first} into {number_of(group.dp, 'equal part')}, one for each {group.over} rank. Shown is {holder}: "
        f"{number_of(len(flat.names), 'tensor')}, {flat.size(0):,} elements a rank. {tensor.name} lies on {group.over} "
        f"{'rank' if len(set(ranks)) == 1 else 'ranks'} {ranges(ranks)}; what is hatched is padding."
    )
    alike = [g for g in catalog.flat_groups if (g.stage, g.group) == (stage, group.group)]
    sub = f"/sub{alike.index(group)}" if len(alike) > 1 else ""
    return Step(
        title,
        text,
        (viz.flat(group, tensor=tensor.name, width=width, **holder).svg,),
        f'{what}.flat()["pp{stage}/group{group.group}{sub}"]',
    )


def _shards(catalog: Catalog, tensor: Tensor, width: int | None) -> Step:
    data = " and ".join(catalog.placement(tensor.name, _state(tensor)).data) or "dp"
    text = (
        f"Merge {data}: the fragments of the {data} ranks are put one behind the other and get their shape back. "
        f"{_each_shard(tensor, catalog.mesh)}"
    )
    picture = _cut(catalog, tensor, width)
    return Step(TITLES[1], text, (picture.svg,), f'{SOURCE}.shards("{_state(tensor)}", stack=False)["{tensor.name}"]')


def _whole(catalog: Catalog, tensor: Tensor, width: int | None) -> Step:
    if tensor.cut.axes:
        text = f"Merge {_over(tensor)}: the shards are put together as the layout {tensor.layout.text} says."
    else:
        text = f"Merge tp: the {number_of(catalog.mesh.tp, 'tp rank')} hold the same, one copy is taken."
    if tensor.layout.padded:
        (dim, rows), *_ = tensor.layout.padded
        text += f" The padding of the vocabulary, {rows - tensor.shape[dim]} rows, is cut off."
    if len(tensor.stages) > 1:
        text += f" Merge pp: the copies on stages {ranges(tensor.stages)} are tied, the first is taken."
    text += " This is the tensor as the model's author wrote it, without a mesh."
    picture = viz.tensor(" ".join(tensor.layout.dims), tensor.shape, Mesh(), name=tensor.name, hue=HUE, width=width)
    return Step(TITLES[2], text, (picture.svg,), f'{SOURCE}.full("{_state(tensor)}", stack=False)["{tensor.name}"]')


def _stages(reshape: Reshape, tensor: Tensor, wanted: Tensor, width: int | None) -> Step:
    before, after = reshape.source.mesh.pp, reshape.target.mesh.pp
    moves = f"goes from stage {_on(tensor)} to stage {_on(wanted)}"
    move = f"{tensor.name} {moves if tensor.stages != wanted.stages else f'stays on stage {_on(tensor)}'}."
    if before == after == 1:
        return Step(
            TITLES[3], "Split pp: there is one stage, before and after.", (viz.stages(reshape.target, width=width).svg,)
        )
    instead = f" instead of {before}" if before != after else ", as before"
    text = f"Split pp: the layers are dealt to {number_of(after, 'stage')}{instead}. {move}"
    after_all = viz.stages(reshape.target, width=width).svg
    if before == after:
        return Step(TITLES[3], text, (after_all,))
    return Step(TITLES[3], text, (viz.stages(reshape.source, width=width).svg, after_all))


def _new_shards(reshape: Reshape, tensor: Tensor, wanted: Tensor, width: int | None) -> Step:
    mesh = reshape.target.mesh
    text = f"Split {_over(wanted)}: the same layout on {_ranks(wanted, mesh)}. {_each_shard(wanted, mesh)}"
    picture = _cut(reshape.target, wanted, width)
    code = f'{TARGET}.shards("{_state(wanted)}", stack=False)["{tensor.name}"]'
    return Step(TITLES[4], text, (picture.svg,), code)


def _cut(catalog: Catalog, tensor: Tensor, width: int | None) -> viz.Drawing:
    """The tensor cut over the axes of its holders alone: whole over dp, on one stage."""
    placement = catalog.placement(tensor.name, _state(tensor))
    if not placement.flats:  # then it lies as its cut says
        return viz.placed(catalog, tensor.name, _state(tensor), hue=HUE, width=width)
    one = dict.fromkeys((*placement.mesh.leaves("pp"), *placement.data, *placement.at), 1)
    layout, mesh = tensor.layout.replace(stages=None), placement.mesh.replace(**one)
    return viz.tensor(layout, tensor.shape, mesh, name=tensor.name, hue=HUE, width=width)


def _over(tensor: Tensor) -> str:
    """The axes that cut a tensor, or tp, which might."""
    return " · ".join(tensor.cut.axes) or "tp"


def _ranks(tensor: Tensor, mesh: Mesh) -> str:
    """`4 tp ranks`."""
    ranks = math.prod(tensor.cut.mesh[axis] for axis in tensor.cut.axes) if tensor.cut.axes else mesh.tp
    return number_of(ranks, f"{_over(tensor)} rank")


def _each_shard(tensor: Tensor, mesh: Mesh) -> str:
    shapes = list(dict.fromkeys(tensor.cut.shard_shape(at) for at in tensor.cut.coordinates()))
    if shapes == [tensor.cut.shape]:
        return f"Each of the {_ranks(tensor, mesh)} has all of it, {shape_text(tensor.cut.shape)}."
    sizes = " or ".join(map(shape_text, shapes[:3]))
    return f"Each of the {_ranks(tensor, mesh)} has a shard of {sizes}."


def _on(tensor: Tensor) -> str:
    return " and ".join(map(str, tensor.stages))


def _state(tensor: Tensor) -> str:
    return next(iter(tensor.states))
