"""Ranks as cells: a grid for each coordinate on the slowest axes, groups outlined, some marked."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from ckptlab.draw.axes import Axes
from ckptlab.draw.blocks import fill, listed, span, thinned
from ckptlab.draw.colours import colour
from ckptlab.draw.ranks import Ranks
from ckptlab.draw.svg import Drawing, cell, drawing, noted, rect, text, width_of

COLUMNS, ROWS, PANELS = 8, 16, 8  # the most that are drawn one by one along each side
CELLS = 128  # the most cells
_GAP = 26
_Box = tuple[float, float, float, float]


def grid(ranks: Ranks, *, title: str = "", width: float | None = None) -> Drawing:
    """Ranks as a grid for each coordinate that goes from sheet to sheet, each group outlined in a colour of its own."""
    sides, groups = ranks.sides, ranks.groups
    cut = thinned(ranks.table.shape, (PANELS, ROWS, COLUMNS), CELLS)
    step = math.prod(len(b[0]) for b in cut)
    size = _cell_size(step, ranks.table.size, len(groups))
    left = max([width_of(sides[1].label(b)) for b in cut[1]] + [0]) + 8
    panel_w, panel_h = len(cut[2]) * size[0], len(cut[1]) * size[1]
    named = max(width_of(sides[0].label(b)) for b in cut[0]) if sides[0].size > 1 else 0.0
    pitch = max(panel_w, named) + _GAP
    across = max(1, min(len(cut[0]), int(((width or 900) - left + _GAP) // pitch)))
    top = 24 if title else 4
    head = (18 if sides[0].size > 1 else 0) + (16 if sides[2].size > 1 else 0)
    parts = [text(0, 8, title, "title")] if title else []
    for p, panel in enumerate(cut[0]):
        x0 = left + (p % across) * pitch + (pitch - _GAP - panel_w) / 2
        y0 = top + head + (p // across) * (panel_h + head + _GAP)
        if sides[0].size > 1:
            parts.append(text(x0 + panel_w / 2, y0 - head + 6, sides[0].label(panel), "middle strong panel-label"))
        if p % across == 0:
            parts += [
                text(left - 6, y0 + (i + 0.5) * size[1], sides[1].label(b), "end quiet row-label")
                for i, b in enumerate(cut[1])
                if sides[1].size > 1
            ]
        parts += [
            text(x0 + (j + 0.5) * size[0], y0 - 8, _short(sides[2], b, size[0]), "middle quiet column-label small")
            for j, b in enumerate(cut[2])
            if sides[2].size > 1
        ]
        parts += _panel(ranks, cut, panel, (x0, y0), size)
    lines = -(-len(cut[0]) // across)
    height = top + lines * (panel_h + head + _GAP) - _GAP + 6
    total = left + across * pitch - _GAP + 6
    said = ranks.notes(cut)
    if groups:
        many = f"{len(groups):,} {ranks.along}s of {len(groups[0]):,}"
        said.append(f"{many}, each framed in its own colour with its number")
    below, height, broad = noted(said, height, width)
    return drawing(title or "ranks", [*parts, *below], max(total, broad, width_of(title, 14)), height + 2)


def _cell_size(step: int, ranks: int, groups: int) -> tuple[float, float]:
    """Room for a rank's number, and on both sides of it for its group's."""
    more = 6.0 + 10.0 * len(str(groups - 1)) if groups else 0.0
    return (46.0 + more, 26.0) if step > 1 else (max(34.0, 8.0 * len(str(ranks - 1)) + 14) + more, 28.0)


def _short(side: Axes, block: range, width: float) -> str:
    label = side.label(block)
    return label if width_of(label, 10) <= width else span(block)


def _panel(
    ranks: Ranks,
    cut: Sequence[Sequence[range]],
    panel: range,
    corner: tuple[float, float],
    size: tuple[float, float],
) -> list[str]:
    cells: list[str] = []
    outlines: dict[tuple[int, ...], list[tuple[int, int, _Box]]] = {}
    for i, row in enumerate(cut[1]):
        for j, column in enumerate(cut[2]):
            one = ranks.cell((panel, row, column))
            held, found = one.held, one.groups
            box = (corner[0] + j * size[0] + 2, corner[1] + i * size[1] + 2, size[0] - 4, size[1] - 4)
            tint = colour(found[0]) if found else colour(j)
            said = one.said + (f" · {ranks.along} {span(found)}" if found else "")
            label = str(held[0]) if len(held) == 1 else _several(held, ranks.marked)
            look: dict[str, Any] = {"rx": "3", **({} if one.marked else {"fill_opacity": one.strength})}
            look["small"] = width_of(_several([int(ranks.table.max())] * len(held))) + 8 > box[2] and len(held) > 1
            data = {**one.data, "count": len(held)}
            cells.append(cell(box, tint, said, kind=one.kind, label=label, data=data, **look))
            if found:
                outlines.setdefault(found, []).append((i, j, box))
    return cells + [line for found, boxes in outlines.items() for line in _outline(found, boxes)]


def _several(held: Sequence[int], marked: frozenset[int] = frozenset()) -> str:
    """A block's label: its first rank and how many more there are, or the one that is marked in it."""
    found = sorted(marked.intersection(held))
    return f"({found[0]})" if len(found) == 1 else f"{held[0]} +{len(held) - 1}"


def _outline(group: tuple[int, ...], boxes: Sequence[tuple[int, int, _Box]]) -> list[str]:
    """One frame around cells that fill a rectangle, else one around each."""
    tint = colour(group[0])
    filled = fill([(i, j) for i, j, _ in boxes])
    frames = [[b for _, _, b in boxes]] if filled else [[b] for _, _, b in boxes]
    found = []
    for frame in frames:
        x, y = min(b[0] for b in frame) - 1, min(b[1] for b in frame) - 1
        w, h = max(b[0] + b[2] for b in frame) - x + 1, max(b[1] + b[3] for b in frame) - y + 1
        style = {"fill": "none", "stroke": tint, "stroke_width": "2.5", "rx": "5"}
        found.append(rect(x, y, w, h, class_="group overlay", data_group=listed(group), **style))
        found.append(text(x + 4, y + 7, span(group), "tiny group-label"))
    return found
