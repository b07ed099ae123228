"""Ranks as an oblique block: a slanted sheet for each coordinate on the slowest axes, one below the other."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ckptlab.draw.axes import held_at, kind_of, placed
from ckptlab.draw.blocks import each, fill, listed, notes, thinned, tip
from ckptlab.draw.colours import colour, ink
from ckptlab.draw.svg import Drawing, drawing, element, noted, telling, text, width_of
from ckptlab.words import ranges

SHEETS, ROWS, COLUMNS = 8, 8, 8  # the most that are drawn one by one along each side
CELLS = 128
_DOWN, _SLANT, _GAP = 24.0, 15.0, 34.0  # of a row: its height, how far it is moved to the left; between sheets

Point = tuple[float, float]


def block(
    degrees: Mapping[str, int],
    sheets: Sequence[str],
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    marks: Sequence[int] = (),
    groups: Sequence[Sequence[int]] = (),
    along: str = "",
    spoken: Sequence[str] = (),
    title: str = "",
    width: float | None = None,
    numbers: Sequence[int] | None = None,
) -> Drawing:
    """Ranks 0, 1, … (or `numbers`) over axes with `degrees`, the last running fastest; each axis goes to one direction.

    marks: ranks that stand out. groups: lists of ranks, framed together; `along` says what they are.
    spoken: axes in the order in which they are named. Cells are paths of class
    `rank`.
    """
    marked = frozenset(marks)
    sides, ranks = placed(degrees, (sheets, rows, columns), numbers)
    cut = thinned(ranks.shape, (SHEETS, ROWS, COLUMNS), CELLS)
    step = math.prod(len(one[0]) for one in cut)
    group_of = {rank: i for i, group in enumerate(groups) for rank in group}
    down, across = len(cut[1]), len(cut[2])
    labels = (
        [sides[0].label(b) for b in cut[0]],
        [sides[1].label(b) for b in cut[1]],
        [sides[2].label(b) for b in cut[2]],
    )
    left = max([width_of(label) for label in labels[0]] + [0]) + max([width_of(s, 10) for s in labels[1]] + [0]) + 26
    room = 60.0 if width is None else max((width - left - _SLANT * down - 90) / across, 26.0)
    last, letters_of = int(ranks.max()), 12 if step == 1 else 10
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
                held, found, at = held_at(ranks, sides, (panel, row, column), group_of)
                seen.update(found)
                if found:
                    frames.setdefault(found, []).append((i, j))
                at = {axis: at[axis] for axis in spoken or at}
                parts.append(_cell(held, at, found, along, marked, j, _corners(corner, i, i + 1, j, j + 1, wide)))
                texts = (_label(held, len(held)), str(held[0]), "")
                label = next(said for said in texts if width_of(said, letters_of) <= wide - 4)
                on = [ink(colour(j))] if not marked.isdisjoint(held) else []
                letters = ["middle", *(["small"] if len(held) > 1 else []), *on]
                parts.append(text(x + (j + 0.5) * wide, y, label, " ".join(letters)))
            if seen:
                label = named(along, sorted(seen))
                parts.append(text(x + across * wide + 12, y, label, "small quiet group-label"))
                rights.append(width_of(label, 10))
        parts += _frames(frames, corner, wide)
    bottom = corners[-1][1] + high + 8
    said = notes(ranks.size, cut, marked)
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


def _cell(
    held: Sequence[int],
    at: Mapping[str, str],
    groups: Sequence[int],
    along: str,
    marked: frozenset[int],
    hue: int,
    path: str,
) -> str:
    mark = not marked.isdisjoint(held)
    kind = f"cell {kind_of(mark, marked)}"
    said = tip(held, at) + (f" · {named(along, groups)}" if groups else "")
    data: dict[str, object] = {"rank": each(held), **at}
    if groups:
        data["group"] = listed(groups)
    strength = "1" if mark else ".1" if marked else ".32"
    return telling("path", said, data, d=path, class_=kind, fill=colour(hue), fill_opacity=strength)


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
