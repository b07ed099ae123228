"""Ranks as an oblique block: a slanted sheet for each coordinate on the slowest axes, one below the other."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ckptlab.draw.blocks import fill, listed, thinned
from ckptlab.draw.colours import colour, ink
from ckptlab.draw.ranks import Cell, Ranks
from ckptlab.draw.svg import Drawing, drawing, element, noted, telling, text, width_of
from ckptlab.words import ranges

SHEETS, ROWS, COLUMNS = 8, 8, 8  # the most that are drawn one by one along each side
CELLS = 128
_DOWN, _SLANT, _GAP = 24.0, 15.0, 34.0  # of a row: its height, how far it is moved to the left; between sheets

Point = tuple[float, float]


def block(ranks: Ranks, *, title: str = "", width: float | None = None) -> Drawing:
    """Ranks as slanted sheets. Cells are paths of class `rank`; groups are framed, and named beside."""
    sides, groups, along = ranks.sides, ranks.groups, ranks.along
    cut = thinned(ranks.table.shape, (SHEETS, ROWS, COLUMNS), CELLS)
    step = math.prod(len(one[0]) for one in cut)
    down, across = len(cut[1]), len(cut[2])
    labels = [[side.label(b) for b in blocks] for side, blocks in zip(sides, cut, strict=True)]
    left = max([width_of(label) for label in labels[0]] + [0]) + max([width_of(s, 10) for s in labels[1]] + [0]) + 26
    room = 60.0 if width is None else max((width - left - _SLANT * down - 90) / across, 26.0)
    last, letters_of = int(ranks.table.max()), 12 if step == 1 else 10
    longest = width_of(_label([last], step), letters_of)
    wide = min(max(max(width_of(label, 10) for label in labels[2]) + 8, longest + 10, 44.0), max(room, 26.0))
    begin = left + _SLANT * down
    top = (26.0 if title else 6.0) + 16
    parts = [text(0, 8, title, "title")] if title else []
    high = down * _DOWN
    corners = [(begin, top + k * (high + _GAP)) for k in range(len(cut[0]))]
    parts += _edges(corners, across * wide, high, _SLANT * down)
    rights = [width_of(named(along, range(len(groups))), 10)] if groups else [0.0]
    for k, (panel, corner) in enumerate(zip(cut[0], corners, strict=True)):
        if sides[0].size > 1:
            parts.append(text(0, corner[1] + high / 2, labels[0][k], "strong panel-label"))
        if k == 0:
            parts += [
                text(corner[0] + (j + 0.5) * wide + 4, corner[1] - 8, label, "small quiet middle column-label")
                for j, label in enumerate(labels[2])
                if label
            ]
        frames: dict[tuple[int, ...], list[tuple[int, int]]] = {}
        for i, row in enumerate(cut[1]):
            x, y = corner[0] - (i + 0.5) * _SLANT, corner[1] + (i + 0.5) * _DOWN
            parts.append(text(x - _SLANT / 2 - 4, y, labels[1][i], "small quiet end row-label"))
            seen: set[int] = set()
            for j, column in enumerate(cut[2]):
                one = ranks.cell((panel, row, column))
                seen.update(one.groups)
                if one.groups:
                    frames.setdefault(one.groups, []).append((i, j))
                parts.append(_cell(one, along, j, _corners(corner, i, i + 1, j, j + 1, wide)))
                texts = (_label(one.held, len(one.held)), str(one.held[0]), "")
                label = next(said for said in texts if width_of(said, letters_of) <= wide - 4)
                letters = "middle" + (" small" if len(one.held) > 1 else "")
                letters += f" {ink(colour(j))}" if one.marked else ""
                parts.append(text(x + (j + 0.5) * wide, y, label, letters))
            if seen:
                label = named(along, sorted(seen))
                parts.append(text(x + across * wide + 12, y, label, "small quiet group-label"))
                rights.append(width_of(label, 10))
        parts += _frames(frames, corner, wide)
    bottom = corners[-1][1] + high + 8
    said = ranks.notes(cut)
    if groups:
        said.append(f"framed: {len(groups):,} {along}{'s' if len(groups) > 1 else ''} of {len(groups[0]):,} ranks")
    below, bottom, broad = noted(said, bottom, width)
    total = max(begin + across * wide + 16 + max(rights), width_of(title, 14), broad)
    return drawing(title or "ranks", [*parts, *below], total, bottom + 2)


def _label(held: Sequence[int], step: int) -> str:
    """`12`, `12 +3` of four."""
    return str(held[0]) if step == 1 else f"{held[0]} +{step - 1}"


def named(along: str, groups: Sequence[int] | range) -> str:
    """`node 3`, `nodes 0–7`."""
    return f"{along} {ranges(groups)}" if len(groups) == 1 else f"{along}s {ranges(groups)}"


def _corners(corner: Point, i: int, stop: int, j: int, end: int, wide: float) -> str:
    """The path around cells from row i and column j to before row `stop` and column `end`."""
    at = [
        (corner[0] + column * wide - row * _SLANT, corner[1] + row * _DOWN)
        for row, column in ((i, j), (i, end), (stop, end), (stop, j))
    ]
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in at) + "Z"


def _cell(one: Cell, along: str, hue: int, path: str) -> str:
    said = one.said + (f" · {named(along, one.groups)}" if one.groups else "")
    look = {"d": path, "class_": f"cell {one.kind}", "fill": colour(hue), "fill_opacity": one.strength}
    return telling("path", said, one.data, **look)


def _edges(corners: Sequence[Point], wide: float, high: float, slant: float) -> Iterator[str]:
    """Lines between the corners of the sheets, which make a block of them."""
    style: dict[str, Any] = {"stroke_dasharray": "2 4", "class_": "line overlay"}
    for (x, above), (_, below) in itertools.pairwise(corners):
        for dx in (0.0, wide, wide - slant, -slant):
            yield element("path", d=f"M{x + dx:.1f} {above + high + 2:.1f}V{below - 2:.1f}", **style)


def _frames(frames: Mapping[tuple[int, ...], Sequence[tuple[int, int]]], corner: Point, wide: float) -> Iterator[str]:
    """One frame around cells of a group that fill a rectangle of a sheet, else one around each."""
    for found, cells in frames.items():
        (i, j), (last, end) = min(cells), max(cells)
        spans = [(i, last + 1, j, end + 1)] if fill(cells) else [(i, i + 1, j, j + 1) for i, j in cells]
        for i, stop, j, end in spans:
            style: dict[str, Any] = {"fill": "none", "stroke": "currentColor", "stroke_width": "2.25"}
            path = _corners(corner, i, stop, j, end, wide)
            yield element("path", d=path, class_="group overlay", data_group=listed(found), **style)
