"""A mesh: its ranks in a tp × pp × dp block."""

from __future__ import annotations

from collections.abc import Mapping

from ckptlab.arguments import explained
from ckptlab.draw import Drawing
from ckptlab.draw import grid as draw_grid
from ckptlab.mesh import Mesh
from ckptlab.shown import shows


@explained
def mesh(
    mesh: Mesh,
    *,
    highlight: Mapping[str, int] | int | None = None,
    group: str | None = None,
    width: float | None = None,
) -> Drawing:
    """Every rank of a mesh: a grid for each pp stage (and coordinate on axes other than dp and tp), dp down, tp across.

    highlight: a rank, or a coordinate (`{"tp": 1}`: all ranks there) that stands out. group: the axis whose process
    groups are framed, each in its own colour. width: of the page, in pixels. Cells: class `rank`, data-rank, data-tp,
    data-pp, data-dp, data-group. Raises MeshError for a rank or an axis that the mesh does not have.
    """
    marked: list[int] = []
    if isinstance(highlight, int):
        mesh.coordinate(highlight)  # refuses a rank that is not there
        marked = [highlight]
    elif highlight is not None:
        marked = mesh.ranks(**highlight)
    groups = mesh.groups(group) if group is not None else []
    return draw_grid(
        mesh.degrees,
        *mesh.directions(),
        marked=marked,
        groups=groups,
        along=group or "",
        title=mesh.title(),
        width=width,
    )


shows(Mesh, html=lambda shown: mesh(shown)._repr_html_())
