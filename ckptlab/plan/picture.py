"""What a plan looks like: its rows summed over blocks of ranks, as plain numbers for `draw`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ckptlab.draw import Drawing, Side, matrix
from ckptlab.draw.blocks import blocks, span
from ckptlab.draw.words import size
from ckptlab.plan.compose import Int64, Plan

RANKS = 16  # rows or columns of the matrix


def picture(plan: Plan, sources: Side | None = None, targets: Side | None = None) -> Drawing:
    """A plan drawn. sources and targets: how ranks are put together; without them, in blocks if there are many."""
    rows, columns = sources or in_blocks("source", plan.sources), targets or in_blocks("target", plan.targets)
    table, kept = summed(plan, rows, columns)
    title = f"{plan.sources:,} → {plan.targets:,} ranks: {size(plan.sent)} read, {size(plan.moved)} change rank"
    notes = []
    for what, side, ranks in (("source", rows, plan.sources), ("target", columns, plan.targets)):
        if len(side.labels) < ranks:
            notes.append(f"{ranks:,} {what} ranks in {len(side.labels):,} {side.name.removeprefix(what).strip()}")
    return matrix(table.tolist(), kept.tolist(), rows, columns, title=title, notes=notes)


def in_blocks(what: str, ranks: int) -> Side:
    """Every rank by itself, or blocks of neighbours."""
    found = blocks(ranks, RANKS)
    name = f"{what} rank" if len(found) == ranks else f"{what} blocks"
    return Side(name, [span(b) for b in found], found)


def summed(plan: Plan, rows: Side, columns: Side) -> tuple[Int64, Int64]:
    """(rows, columns) bytes from each to each, and those of them that do not change rank."""
    i, j = _place(rows.ranks, plan.sources)[plan.source], _place(columns.ranks, plan.targets)[plan.target]
    nbytes = plan.count * plan.read_size[plan.tensor]
    table, kept = np.zeros((2, len(rows.ranks), len(columns.ranks)), np.int64)
    np.add.at(table, (i, j), nbytes)
    own = plan.source == plan.target
    np.add.at(kept, (i[own], j[own]), nbytes[own])
    return table, kept


def _place(ranks: Sequence[range], count: int) -> Int64:
    """Rank → the row or column in which it is."""
    found = np.zeros(count, np.int64)
    for k, block in enumerate(ranks):
        found[block.start : block.stop] = k
    return found
