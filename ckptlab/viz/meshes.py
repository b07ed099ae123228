"""A mesh: its ranks in a tp × pp × dp block."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ckptlab.arguments import explained
from ckptlab.draw import Drawing
from ckptlab.draw import grid as draw_grid
from ckptlab.errors import MeshError
from ckptlab.mesh import Mesh
from ckptlab.shown import shows
from ckptlab.viewed import Viewed
from ckptlab.viz.neighbours import Devices
from ckptlab.words import number_of


@explained
def mesh(
    mesh: Mesh | Viewed | Any,
    *,
    highlight: Mapping[str, int] | int | None = None,
    group: str | None = None,
    width: float | None = None,
) -> Drawing:
    """Every rank of a mesh: a grid for each pp stage (and coordinate on axes other than dp and tp), dp down, tp across.

    Or of a torch DeviceMesh or a `jax.sharding.Mesh`, with the ranks (ids of devices) that it has where: its last axis
    across, the one before down.

    highlight: a rank, or a coordinate (`{"tp": 1}`: all ranks there) that stands out. group: the axis whose process
    groups are framed, each in its own colour. width: of the page, in pixels. Cells: class `rank`, data-rank, data-tp,
    data-pp, data-dp, data-group. Raises MeshError for a rank or an axis that the mesh does not have.
    """
    mesh = mesh.held.mesh if isinstance(mesh, Viewed) else mesh
    if not isinstance(mesh, Mesh):
        return _of_neighbour(Devices.of(mesh), highlight, group, width)
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


def _of_neighbour(
    devices: Devices, highlight: Mapping[str, int] | int | None, group: str | None, width: float | None
) -> Drawing:
    names, numbers = list(devices.degrees), devices.numbers
    if unknown := [
        axis for axis in (*(highlight if isinstance(highlight, Mapping) else ()), group) if axis and axis not in names
    ]:
        raise MeshError(f"this mesh has no axis {unknown[0]!r}; its axes are {', '.join(names)}")
    marked = []
    if isinstance(highlight, int):
        marked = [highlight] if highlight in numbers else []
        if not marked:
            raise MeshError(f"rank {highlight} is not on this mesh, which has {numbers.size} ranks")
    elif highlight is not None:
        marked = numbers[tuple(highlight.get(axis, slice(None)) for axis in names)].ravel().tolist()
    groups: list[list[int]] = []
    if group is not None:
        groups = np.moveaxis(numbers, names.index(group), -1).reshape(-1, devices.degrees[group]).tolist()
    degrees = " · ".join(f"{axis} {n}" for axis, n in devices.degrees.items())
    return draw_grid(
        devices.degrees,
        names[:-2],
        names[-2:-1],
        names[-1:],
        marked=marked,
        groups=groups,
        along=group or "",
        title=f"{degrees} ({number_of(numbers.size, 'rank')})",
        width=width,
        numbers=numbers.ravel().tolist(),
    )


shows(Mesh, html=lambda shown: mesh(shown)._repr_html_())
