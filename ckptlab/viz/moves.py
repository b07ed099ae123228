"""A plan: how many bytes go from which rank to which, its rows summed over blocks of ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from ckptlab.aliases import Int64
from ckptlab.arguments import explained
from ckptlab.draw import Drawing, Side, Traffic, matrix
from ckptlab.draw import flow as flow_drawing
from ckptlab.draw.blocks import blocks, span
from ckptlab.mesh import Mesh
from ckptlab.plan import Plan
from ckptlab.reshaping import Reshape
from ckptlab.shown import shows
from ckptlab.words import size

RANKS = 16  # rows or columns of the matrix


@explained
def plan(
    plan: Plan | Reshape, source: Mesh | None = None, target: Mesh | None = None, *, width: float | None = None
) -> Drawing:
    """Who sends how much to whom: a matrix from source (down) to target (across) with the sums at its edges.

    width: of the page, in pixels (None: as wide as it likes). Of many ranks, each row or column is a pp stage if the
    mesh of that side is given and has several, else a block of ranks; the picture says which. Framed is what does not
    change rank. Cells: class `move` (`none` where nothing goes), data-source, data-target (`3` or `0-7`), data-bytes,
    data-kept.
    """
    plan, source, target = _between(plan, source, target)
    most = RANKS if width is None else min(max(int((width - 170) // 46), 4), RANKS)
    return _drawn(
        matrix, plan, _side("source", plan.sources, source, RANKS), _side("target", plan.targets, target, most), width
    )


@explained
def flow(
    plan: Plan | Reshape, source: Mesh | None = None, target: Mesh | None = None, *, width: float | None = None
) -> Drawing:
    """Who sends how much to whom, as bands from source (left) to target (right) that are as wide as they carry bytes.

    Ranks, stages and blocks are those of `plan`, and so are colours: a source's band has that of its row's sum.
    Outlined is what does not change rank. width: of the page, in pixels. Cells: class `flow`, data-source, data-target,
    data-bytes, data-kept; class `end`, data-source or data-target, data-bytes.
    """
    plan, source, target = _between(plan, source, target)
    sides = (_side("source", plan.sources, source, RANKS), _side("target", plan.targets, target, RANKS))
    return _drawn(flow_drawing, plan, *sides, width)


def _drawn(draw: Callable[..., Drawing], plan: Plan, rows: Side, columns: Side, width: float | None) -> Drawing:
    table, kept = _summed(plan, rows, columns)
    title = f"{plan.sources:,} → {plan.targets:,} ranks: {size(plan.sent)} read, {size(plan.moved)} change rank"
    notes = []
    for what, side, ranks in (("source", rows, plan.sources), ("target", columns, plan.targets)):
        if len(side.labels) < ranks:
            notes.append(f"{ranks:,} {what} ranks in {len(side.labels):,} {side.name.removeprefix(what).strip()}")
    return draw(Traffic(table.tolist(), kept.tolist(), rows, columns), title=title, notes=notes, width=width)


def moved(plan: Plan | Reshape) -> Plan:
    """The plan itself, or that of a reshape."""
    return plan.plan if isinstance(plan, Reshape) else plan


def _between(plan: Plan | Reshape, source: Mesh | None, target: Mesh | None) -> tuple[Plan, Mesh | None, Mesh | None]:
    """The plan and its meshes, which a reshape knows."""
    if isinstance(plan, Reshape):
        return plan.plan, source or plan.source.mesh, target or plan.mesh
    return plan, source, target


def _side(what: str, ranks: int, mesh: Mesh | None, most: int) -> Side:
    """Ranks one by one; of many the pp stages (their ranks are neighbours, pp being slowest), or blocks."""
    if mesh is not None and ranks > most and 1 < mesh.pp <= most and mesh.axes[0] == "pp":
        step = ranks // mesh.pp
        stages = range(mesh.pp)
        return Side(f"{what} pp stages", [f"pp {k}" for k in stages], [range(k * step, (k + 1) * step) for k in stages])
    found = blocks(ranks, most)
    name = f"{what} rank" if len(found) == ranks else f"{what} blocks"
    return Side(name, [span(b) for b in found], found)


def _summed(plan: Plan, rows: Side, columns: Side) -> tuple[Int64, Int64]:
    """(rows, columns) bytes from each to each, and those of them that do not change rank."""
    i, j = _place(rows.ranks)[plan.source], _place(columns.ranks)[plan.target]
    nbytes = plan.count * plan.read_size[plan.tensor]
    table, kept = np.zeros((2, len(rows.ranks), len(columns.ranks)), np.int64)
    np.add.at(table, (i, j), nbytes)
    own = plan.source == plan.target
    np.add.at(kept, (i[own], j[own]), nbytes[own])
    return table, kept


def _place(ranks: Sequence[range]) -> Int64:
    """Rank → the row or column in which it is: they hold all ranks, one after the other."""
    return np.repeat(np.arange(len(ranks)), [len(block) for block in ranks])


shows(Plan, html=lambda shown: plan(shown)._repr_html_())
