"""A mesh: its ranks in a tp × pp × dp block."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ckptlab.arguments import explained
from ckptlab.draw import Drawing, Ranks, block, grid
from ckptlab.errors import InputError, MeshError
from ckptlab.mesh import Mesh, spoken
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
    node: int | None = None,
    oblique: bool = False,
    width: float | None = None,
) -> Drawing:
    """Every rank of a mesh: a grid for each pp stage (and coordinate on axes other than dp and tp), dp down, tp across.

    Or of a torch DeviceMesh or a `jax.sharding.Mesh`, with the ranks (ids of devices) that it has where: its last axis
    across, the one before down.

    highlight: a rank, or a coordinate (`{"tp": 1}`: all ranks there) that stands out. group: the axis whose process
    groups are framed, each in its own colour. node: how many ranks, of neighbouring numbers, a machine has: nodes are
    framed instead. oblique: as a block, a slanted sheet for each stage. width: of the page, in pixels. Cells: class
    `rank`, data-rank, data-tp, data-pp, data-dp, data-group. Raises MeshError for a rank or an axis that the mesh does
    not have, InputError where groups and nodes are asked for at once.
    """
    mesh = mesh.held.mesh if isinstance(mesh, Viewed) else mesh
    if group is not None and node is not None:
        raise InputError(f"mesh frames one kind of groups: group={group!r} or node={node}, not both")
    if node is not None and node < 1:
        raise InputError(f"mesh takes node=the ranks of a machine, at least 1, not {node}")
    along = f"{group} group" if group else "node"
    if isinstance(mesh, Mesh):
        if isinstance(highlight, int):
            mesh.coordinate(highlight)  # refuses a rank that is not there
        marked = mesh.ranks(**highlight) if isinstance(highlight, Mapping) else [] if highlight is None else [highlight]
        groups = mesh.groups(group) if group is not None else _nodes(range(mesh.size), node)
        ranks, title = Ranks(mesh.degrees, mesh.directions(), marked, groups, along, spoken(mesh.axes)), mesh.title()
    else:
        ranks, title = _of_neighbour(Devices.of(mesh), highlight, group, node, along)
    return (block if oblique else grid)(ranks, title=title + _framed(group, node), width=width)


def _framed(group: str | None, node: int | None) -> str:
    """What is framed, for the title."""
    return f" · groups along {group}" if group else f" · nodes of {node}" if node else ""


def _nodes(ranks: Sequence[int], node: int | None) -> list[list[int]]:
    """The ranks of each machine."""
    machines: dict[int, list[int]] = {}
    for rank in ranks if node else ():
        machines.setdefault(rank // (node or 1), []).append(rank)
    return [machines[k] for k in sorted(machines)]


def _of_neighbour(
    devices: Devices, highlight: Mapping[str, int] | int | None, group: str | None, node: int | None, along: str
) -> tuple[Ranks, str]:
    """The ranks of torch's or jax's mesh, and its title."""
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
    groups = _nodes(numbers.ravel().tolist(), node)
    if group is not None:
        groups = np.moveaxis(numbers, names.index(group), -1).reshape(-1, devices.degrees[group]).tolist()
    degrees = " · ".join(f"{axis} {n}" for axis, n in devices.degrees.items())
    directions = (names[:-2], names[-2:-1], names[-1:])
    ranks = Ranks(devices.degrees, directions, marked, groups, along, numbers=numbers.ravel().tolist())
    return ranks, f"{degrees} ({number_of(numbers.size, 'rank')})"


shows(Mesh, html=lambda shown: mesh(shown)._repr_html_())
