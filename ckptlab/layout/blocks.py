"""Layouts as jax's PartitionSpec and torch's placements can say them: axes cut a dim into equal blocks, outside in.

`(tp out) in` can be said, and `(dp tp out)`; `(3 tp out)` cannot, nor can `(out tp)`, unequal parts or uneven widths.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import accumulate
from operator import mul
from typing import Any, Protocol

from ckptlab.errors import LayoutError
from ckptlab.layout.notation import Name, Node, Number, Product, names
from ckptlab.layout.solve import RESERVED
from ckptlab.mesh import Mesh


class Line(Protocol):
    """What a layout says that is needed here: its dims, the tree of each, and sizes by name."""

    @property
    def text(self) -> str: ...
    @property
    def dims(self) -> tuple[str, ...]: ...
    @property
    def tree(self) -> tuple[Node, ...]: ...
    @property
    def sizes(self) -> tuple[tuple[str, int | tuple[int, ...]], ...]: ...


def equal_blocks(layout: Line, mesh: Mesh | None = None) -> tuple[tuple[str, ...], ...]:
    """For each dim the mesh axes that cut it, slowest first; of a split axis its parts.

    mesh: None takes the names that notation reserves for axes, whatever their degrees. LayoutError where blocks of
    equal size do not say it.
    """
    uneven = {name for name, width in layout.sizes if isinstance(width, tuple) and len(set(width)) > 1}
    cuts = []
    for dim, node in zip(layout.dims, layout.tree, strict=True):
        axes: tuple[str, ...] = ()
        inside = False  # behind a length: an axis there cuts each of several parts on its own
        for factor in node.factors if isinstance(node, Product) else (node,):
            found = [leaf for name in names(factor) for leaf in _leaves(name, mesh)]
            if isinstance(factor, Name) and found and not inside:
                axes += tuple(found)
            elif not (isinstance(factor, Name) and _is_axis(factor.text, mesh)) and factor != Number(1):
                inside = True
            if inside and found:
                raise LayoutError(
                    f"dim {dim!r} of {layout.text!r} is cut over {', '.join(found)} part by part, which no sharding "
                    "into equal blocks says: take the dim apart first, or take shards, which have a dim for the axis"
                )
        if axes and uneven.intersection(names(node)):
            raise LayoutError(
                f"dim {dim!r} of {layout.text!r} is cut unevenly over {', '.join(axes)}, which no sharding into equal "
                "blocks says: take shards, which have a dim for the axis"
            )
        cuts.append(axes)
    return tuple(cuts)


def dims_of_axes(layout: Line, devices: Any) -> tuple[tuple[int | None, bool], ...]:
    """For each axis of a mesh, ours or torch's, the dim that it cuts (None: the tensor is replicated over it), and
    whether it is one of pp or of dp, over which replicas are copies in any case.

    LayoutError as `equal_blocks`; where the axes cut a dim in another order than the mesh has them; and where the mesh
    has several pp stages, of which the tensor lives on its own.
    """
    mesh = devices if isinstance(devices, Mesh) else Mesh.from_device_mesh(devices)
    order = tuple(mesh.axes if devices is mesh else devices.mesh_dim_names)
    cuts = equal_blocks(layout, mesh)
    for dim, axes in zip(layout.dims, cuts, strict=True):
        if list(axes) != sorted(axes, key=order.index):
            raise LayoutError(
                f"dim {dim!r} of {layout.text!r} is cut over {', '.join(axes)}, outside in, but the mesh has its axes "
                f"as {', '.join(order)}: torch cuts a dim in the order of the mesh"
            )
    found = {axis: i for i, axes in enumerate(cuts) for axis in axes}
    if mesh["pp"] > 1 and not set(mesh.leaves("pp")) & found.keys():
        raise LayoutError(
            f"{layout.text!r} on {mesh}: a tensor lives on its own pp stages, and placements cannot say which: give "
            'the mesh of one stage, mesh.replace(pp=1) or device_mesh["dp", "tp"]'
        )
    copied = {*mesh.leaves("pp"), *mesh.leaves("dp")}
    return tuple((found.get(axis), axis in copied) for axis in order)


def strided_behind(degrees: Iterable[int], factor: int) -> int | None:
    """Behind how many of the axes that cut a dim, of these degrees, torch puts one that it strides by a split factor (a
    `_StridedShard`): those of which the factor is the product. None where it is of none."""
    return next((count for count, n in enumerate(accumulate(degrees, mul, initial=1)) if n == factor), None)


def _is_axis(name: str, mesh: Mesh | None) -> bool:
    return name in RESERVED or (mesh is not None and name in mesh)


def _leaves(name: str, mesh: Mesh | None) -> list[str]:
    """The axes of degree above 1 (without a mesh, all) that a name stands for; none for a length."""
    if mesh is None:
        return [name] if name in RESERVED else []
    return [leaf for leaf in mesh.leaves(name) if mesh[leaf] > 1] if name in mesh else []
