"""Tensors beside one another, each a sheet that is cut into strips; what is the same on both sides has one colour."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ckptlab.draw.colours import colour
from ckptlab.draw.svg import Drawing, cell, drawing, rect, swatch, text, width_of

_THICK, _THIN, _LONG, _GAP = 120.0, 34.0, 330.0, 46.0


@dataclass(frozen=True)
class Strip:
    """`length` indices from `start` on: `hue` colours it, `label` says what it is, `tip` says it in full."""

    start: int
    length: int
    hue: int
    label: str
    tip: str
    data: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class Sheet:
    """A tensor of which dim `along` (0: rows, 1: columns) is cut into strips; `across` is the length of the others."""

    name: str
    notation: str
    size: int
    across: int
    along: int
    strips: Sequence[Strip]


def parts(
    left: Sequence[Sheet],
    right: Sequence[Sheet],
    *,
    title: str = "",
    legend: Sequence[tuple[int, str]] = (),
    notes: Sequence[str] = (),
) -> Drawing:
    """What tensors on the left are on the right, all to one scale along the strips. legend: (hue, what it colours)."""
    scale = _LONG / max(sheet.size for sheet in (*left, *right))
    body = [text(0, 8, title, "title")] if title else []
    top = 30.0 if title else 6.0
    x, bottom = 0.0, top
    for column, side in enumerate((left, right)):
        if column:
            body.append(text(x + 6, top + 40, "↔", "title"))
            x += 46
        y, widest, begun = top, 0.0, x
        for sheet in side:
            if y > top and y + sheet.size * scale + 44 > top + 1.25 * _LONG:
                y, begun, widest = top, begun + widest + 22, 0.0
            cells, wide, high = _sheet(sheet, begun, y, scale)
            body += cells
            widest, y = max(widest, wide), y + high + 16
            bottom = max(bottom, y)
        x = begun + widest + 22
    at = 0.0
    for hue, what in legend:
        body += [swatch(at, bottom + 8, colour(hue)), text(at + 16, bottom + 8, what)]
        at += width_of(what) + 40
    bottom += 24 if legend else 0
    for line in notes:
        body.append(text(0, bottom + 6, line, "quiet note"))
        bottom += 18
    widths = [x, at, width_of(title, 14), *(width_of(line) for line in notes)]
    return drawing(title or "parts", body, max(widths), bottom + 4)


def _sheet(sheet: Sheet, x: float, y: float, scale: float) -> tuple[list[str], float, float]:
    """The elements of a tensor, and how wide and high they are."""
    long, wide = sheet.size * scale, _THICK if sheet.across > 1 else _THIN
    body = [text(x, y + 6, sheet.name, "strong"), text(x, y + 21, sheet.notation, "mono quiet")]
    y += 34
    for strip in sheet.strips:
        begin, length = strip.start * scale, strip.length * scale
        box = (x, y + begin, wide, length) if sheet.along == 0 else (x + begin, y, length, wide)
        data = {**strip.data, "start": strip.start, "count": strip.length}
        body.append(cell(box, colour(strip.hue), strip.tip, kind="piece", label=strip.label, data=data))
    width, height = (wide, long) if sheet.along == 0 else (long, wide)
    body.append(rect(x, y, width, height, class_="whole overlay", fill="none", stroke="currentColor"))
    return body, max(width, width_of(sheet.name), width_of(sheet.notation, 13)), height + 34
