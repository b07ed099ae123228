"""One tensor, cut by a layout."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ckptlab.arguments import explained
from ckptlab.draw import Drawing
from ckptlab.layout import Layout
from ckptlab.mesh import Mesh
from ckptlab.viz.cuts import picture


@explained
def tensor(
    layout: Layout | str,
    shape: Sequence[int],
    mesh: Mesh,
    *,
    rank: Mapping[str, int] | None = None,
    name: str | None = None,
    width: float | None = None,
) -> Drawing:
    """A tensor of a (true) shape as a layout, or a line of notation, cuts it over a mesh; no checkpoint is needed.

    Each coordinate of the cut has its colour, stripes are held by several, sub-parameters are framed and named,
    padding is hatched, copies lie behind as sheets; sizes stand at the edges. rank: a coordinate that stands out; axes
    that do not cut the tensor may be in it. name: what the tensor is called. width: of the page, in
    pixels: the drawing is made smaller, and what stands beside the tensor put below it, to fit.

    Areas are proportional to numbers of elements. Cells: class `piece` (`padding`, `replicated`, `marked`), data-tp …
    (as `0` or `0-3`), data-start and data-shape (one number a dim), data-count, data-part. Raises LayoutError.
    """
    layout = Layout(layout) if isinstance(layout, str) else layout
    cut = layout.resolve(shape, mesh)
    parts = layout.parts(shape, mesh)
    return picture(
        cut, layout.dims, parts, title=name or "", notation=layout.text, rank=rank, notes=notes_of(layout), width=width
    )


def notes_of(layout: Layout) -> list[str]:
    """What is said of stages that hold copies, and of copies that are averaged."""
    found = []
    if layout.stages is not None and len(layout.stages) > 1:
        found.append(f"tied: pp stages {', '.join(map(str, layout.stages))} hold copies, {layout.stages[0]} first")
    if layout.replicas == "mean":
        found.append("what several hold is averaged")
    return found
