"""Ranks as cells: a grid for each coordinate on the slowest axes, groups outlined, some marked."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from ckptlab.aliases import Int64
from ckptlab.draw.axes import Axes, held_at, kind_of, placed
from ckptlab.draw.blocks import each, fill, listed, notes, span, thinned, tip
from ckptlab.draw.colours import colour
from ckptlab.draw.svg import Drawing, cell, drawing, noted, rect, text, width_of

COLUMNS, ROWS, PANELS = 8, 16, 8  # the most that are drawn one by one along each side
CELLS = 128  # the most cells
_GAP = 26
_Box = tuple[float, float, float, float]


def grid(
    degrees: Mapping[str, int],
    panels: Sequence[str],
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    marks: Collection[int] = (),
    groups: Sequence[Sequence[int]] = (),
    along: str = "",
    spoken: Sequence[str] = (),
    title: str = "",
    width: float | None = None,
    numbers: Sequence[int] | None = None,
) -> Drawing:
    """Ranks 0, 1, … (or `numbers`) over axes with `degrees`, the last running fastest; each axis goes to one direction.

    marks: ranks that stand out. groups: lists of ranks, each outlined in a colour of its own; `along` names them.
    spoken: axes in the order in which they are named.
    """
    marked = frozenset(marks)
    sides, ranks = placed(degrees, (panels, rows, columns), numbers)
    cut = thinned(ranks.shape, (PANELS, ROWS, COLUMNS), CELLS)
    step = math.prod(len(b[0]) for b in cut)
    group_of = {rank: i for i, group in enumerate(groups) for rank in group}
    size = _cell_size(step, ranks.size, len(groups))
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
        parts += _panel(ranks, sides, cut, panel, (x0, y0), size, marked, group_of, along, spoken)
    lines = -(-len(cut[0]) // across)
    height = top + lines * (panel_h + head + _GAP) - _GAP + 6
    total = left + across * pitch - _GAP + 6
    said = notes(ranks.size, cut, marked)
    if groups:
        said.append(f"{len(groups):,} {along}s of {len(groups[0]):,}, each framed in its own colour with its number")
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
    ranks: Int64,
    sides: Sequence[Axes],
    cut: Sequence[Sequence[range]],
    panel: range,
    corner: tuple[float, float],
    size: tuple[float, float],
    marked: frozenset[int],
    group_of: Mapping[int, int],
    along: str,
    spoken: Sequence[str],
) -> list[str]:
    cells: list[str] = []
    outlines: dict[tuple[int, ...], list[tuple[int, int, _Box]]] = {}
    for i, row in enumerate(cut[1]):
        for j, column in enumerate(cut[2]):
            held, found, place = held_at(ranks, sides, (panel, row, column), group_of)
            box = (corner[0] + j * size[0] + 2, corner[1] + i * size[1] + 2, size[0] - 4, size[1] - 4)
            tint = colour(found[0]) if found else colour(j)
            mark = bool(marked.intersection(held))
            data = {"rank": each(held), **place, "count": len(held)}
            if found:
                data["group"] = listed(found)
            said = tip(held, {axis: place[axis] for axis in spoken or place})
            said += f" · {along} {span(found)}" if found else ""
            label = str(held[0]) if len(held) == 1 else _several(held, marked)
            kind = kind_of(mark, marked)
            strong: dict[str, Any] = {} if mark else {"fill_opacity": ".1" if marked else ".32"}
            small = width_of(_several([int(ranks.max())] * len(held), frozenset())) + 8 > box[2] and len(held) > 1
            cells.append(cell(box, tint, said, kind=kind, label=label, data=data, small=small, rx="3", **strong))
            if found:
                outlines.setdefault(found, []).append((i, j, box))
    return cells + [line for found, boxes in outlines.items() for line in _outline(found, boxes)]


def _several(held: Sequence[int], marked: frozenset[int]) -> str:
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
