"""Layouts of one's own for a target: a strategy's, with what the source already knows of a tensor filled in."""

from __future__ import annotations

import math
from dataclasses import replace

from ckptlab.catalog import Catalog, Tensor
from ckptlab.errors import LayoutError, ReshapeError
from ckptlab.layout import Layout, on_degree, with_lengths, without
from ckptlab.layout.notation import names
from ckptlab.mesh import Mesh
from ckptlab.sharding.strategies import Strategy, denied
from ckptlab.words import some


def relaid(
    source: Catalog, mesh: Mesh, strategy: Strategy, cuts: tuple[str, ...] | None = None, uneven: bool = False
) -> Catalog:
    """The source with the layouts that its tensors are to have on `mesh`: the strategy's, or where it has no say their
    own, over those of its axes that the mesh has (and `cuts`, where that is not None). Nothing else is changed: cuts
    and placements are still those of what is stored.

    Lengths of parts (q, k, v) that the strategy leaves open are those of the source's layout; a vocabulary that is
    padded there is padded to what the new cut needs. ReshapeError, with the tensor's name, where a layout does not fit;
    `uneven`: that an axis does not divide a dim is no reason.
    """
    against, why, todo = denied(strategy, {name: tensor.shape for name, tensor in source.tensors.items()})
    if against:
        raise ReshapeError(f"{source.path}: {some(against, 1)}: {why}: {todo}")
    tensors = {}
    for name, tensor in source.tensors.items():
        try:
            tensors[name] = _tensor(tensor, mesh, strategy, cuts, uneven)
        except LayoutError as error:
            raise ReshapeError(f"{source.path}: {name} cannot be laid out as the strategy says: {error}") from None
    training = replace(source.training, layouts_told=False, numbers={})
    return replace(source, tensors=tensors, training=training)


def _tensor(tensor: Tensor, mesh: Mesh, strategy: Strategy, cuts: tuple[str, ...] | None, uneven: bool) -> Tensor:
    layout = strategy.layout(tensor.name, [tensor.shape])
    if layout is None:
        gone = [a for a in tensor.cut.mesh.axes if a not in mesh or (cuts is not None and a not in cuts)]
        layout = without(tensor.layout.on_stages(None), gone)
        for axis in dict.fromkeys(name for node in layout.tree for name in names(node) if name in mesh):
            layout = on_degree(layout, axis, mesh[axis])
    elif len(layout.dims) != len(tensor.shape):
        raise LayoutError(f"{layout.text!r} has {len(layout.dims)} dims, shape {tensor.shape} has {len(tensor.shape)}")
    else:
        layout = with_lengths(layout, tensor.layout, tensor.shape, tensor.cut.mesh)
    if tensor.layout.padded:
        layout = layout.replace(padded={**_padded(tensor, layout, mesh), **dict(layout.padded)})
    if not uneven:
        layout.resolve(tensor.shape, mesh)
    return replace(tensor, layout=layout, layout_known=True)


def _padded(tensor: Tensor, layout: Layout, mesh: Mesh) -> dict[int, int]:
    """Padded sizes on the mesh: the source's where they can be cut, else the next that can. None where no axis cuts the
    dim, or where the layout says itself how long its parts are."""
    found, told = {}, dict(layout.sizes)
    for dim, size in tensor.layout.padded:
        named = list(names(layout.tree[dim]))
        cutting = [name for name in named if name in mesh]
        if not cutting or any(name in told for name in named):
            continue
        degree = math.prod(mesh[name] for name in cutting)
        found[dim] = size if size % degree == 0 else -(-tensor.shape[dim] // degree) * degree
    return found
