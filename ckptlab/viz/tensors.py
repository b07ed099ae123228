"""One tensor, cut by a layout."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ckptlab.arguments import explained, kind_of
from ckptlab.catalog import Tensor
from ckptlab.draw import Drawing
from ckptlab.errors import InputError
from ckptlab.layout import Layout
from ckptlab.mesh import Mesh
from ckptlab.viz.cuts import picture
from ckptlab.viz.neighbours import sharded


@explained
def tensor(
    layout: Layout | str | Tensor | Any,
    shape: Sequence[int] | None = None,
    mesh: Mesh | Any = None,
    *,
    rank: Mapping[str, int] | None = None,
    name: str | None = None,
    hue: int | None = None,
    width: float | None = None,
) -> Drawing:
    """A tensor of a (true) shape as a layout, or a line of notation, cuts it over a mesh; no checkpoint is needed.

    Or a checkpoint's, `ckpt[name]`, as its ranks hold it. Or as torch or jax hold it: a DTensor or its spec, a jax
    array, a NamedSharding (with a shape), a PartitionSpec (with a shape and a mesh, theirs or ours), over any number of
    axes, strided and partial ones included.

    Each coordinate of the cut has its colour, stripes are held by several, sub-parameters are framed and named,
    padding is hatched, copies lie behind as sheets; sizes stand at the edges. rank: a coordinate that stands out; axes
    that do not cut the tensor may be in it. name: what the tensor is called. hue: one colour in tints, by its number,
    instead of one for each coordinate. width: of the page, in
    pixels: the drawing is made smaller, and what stands beside the tensor put below it, to fit.

    Areas are proportional to numbers of elements. Cells: class `piece` (`padding`, `replicated`, `marked`), data-tp …
    (as `0` or `0-3`), data-start and data-shape (one number a dim), data-count, data-part. Raises LayoutError.
    """
    if isinstance(layout, Tensor):
        name, shape, mesh, layout = name or layout.name, layout.shape, layout.cut.mesh, layout.layout
    layout = Layout(layout) if isinstance(layout, str) else layout
    told: dict[str, Any] = {"title": name or "", "rank": rank, "hue": hue, "width": width}
    if not isinstance(layout, Layout):
        theirs = sharded(layout, shape, mesh)
        if theirs is None:
            raise InputError(
                "tensor takes layout=a Layout or a line of notation, a checkpoint's tensor, a DTensor, a jax array, a "
                f"NamedSharding or a PartitionSpec, not {kind_of(layout)}"
            )
        mesh = theirs.cut.mesh
        notes = [
            f"partial over {axis}: what its {mesh[axis]} ranks hold is put together by {op}"
            for axis, op in theirs.partial
        ]
        over = {*theirs.cut.axes, *dict(theirs.partial)}
        return picture(
            theirs.cut,
            theirs.dims,
            [()] * len(theirs.dims),
            notation=theirs.notation,
            notes=notes,
            copies=[(axis, n) for axis, n in mesh.degrees.items() if n > 1 and axis not in over],
            **told,
        )
    if shape is None or mesh is None:
        raise InputError('tensor takes a layout, a shape and a mesh: viz.tensor("(tp out) in", (64, 16), Mesh(tp=2))')
    cut = layout.resolve(shape, mesh)
    parts, inner = layout.parts(shape, mesh), layout.blocks(shape, mesh)
    return picture(cut, layout.dims, parts, notation=layout.text, notes=notes_of(layout), inner=inner, **told)


def notes_of(layout: Layout) -> list[str]:
    """What is said of stages that hold copies, and of copies that are averaged or summed."""
    found = []
    if layout.stages is not None and len(layout.stages) > 1:
        found.append(f"tied: pp stages {', '.join(map(str, layout.stages))} hold copies, {layout.stages[0]} first")
    if layout.replicas in ("mean", "sum"):
        found.append(f"what several hold is {'averaged' if layout.replicas == 'mean' else 'summed'}")
    return found
