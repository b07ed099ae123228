"""Columns of boxes, one a stage, boxes that are the same thing linked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ckptlab.draw.colours import colour
from ckptlab.draw.svg import Drawing, cell, drawing, element, fitted, noted, rect, tail, text, width_of
from ckptlab.words import elements

_WIDTH, _HEIGHT, _GAP = 216.0, 42.0, 50.0


@dataclass(frozen=True)
class Box:
    """One thing in a stage: its size fills it, relative to the largest; boxes with one `link` are one thing."""

    label: str
    size: int
    detail: str = ""
    link: str = ""
    data: Mapping[str, object] = field(default_factory=dict)


def pipeline(
    columns: Sequence[tuple[str, Sequence[Box]]],
    *,
    title: str = "",
    notes: Sequence[str] = (),
    width: float | None = None,
) -> Drawing:
    """(label, boxes) of each stage, in the order in which data flows."""
    left = 24 if any(box.link for _, boxes in columns for box in boxes) else 2
    largest = max([box.size for _, boxes in columns for box in boxes] + [1])
    top = 28.0 if title else 6.0
    parts = [text(0, 8, title, "title")] if title else []
    linked: dict[str, list[tuple[float, float]]] = {}
    deepest = 0
    for i, (label, boxes) in enumerate(columns):
        x, y = left + i * (_WIDTH + _GAP), top + 20
        parts.append(text(x + _WIDTH / 2, top + 6, label, "middle strong stage-label"))
        for box in boxes:
            parts.append(_box(box, x, y, largest, colour(i)))
            if box.link:
                linked.setdefault(box.link, []).append((x, y))
            y += _HEIGHT + 6
        deepest = max(deepest, len(boxes))
        if i:
            parts.append(_arrow(x - _GAP - _WIDTH / 2 + 36, top + 6, _GAP + _WIDTH - 72))
    height = top + 20 + deepest * (_HEIGHT + 6)
    parts += [_link(places, k, height) for k, places in enumerate(linked.values()) if len(places) > 1]
    height += 12 + 8 * sum(len(places) > 1 for places in linked.values())
    said, height, broad = noted(notes, height, width)
    total = max(left + 6 + len(columns) * (_WIDTH + _GAP) - _GAP, broad)
    return drawing(title or "stages", [*parts, *said], total, height + 2)


def _box(box: Box, x: float, y: float, largest: int, tint: str) -> str:
    kind = "layer tied" if box.link else "layer"
    dashed: dict[str, Any] = {"stroke_dasharray": "5 3"} if box.link else {}
    tip = f"{box.label} · {box.size:,} elements{f' · {box.detail}' if box.detail else ''}"
    frame = cell((x, y, _WIDTH, _HEIGHT), tint, tip, kind=kind, data=box.data, rx="4", fill_opacity=".12", **dashed)
    share = rect(x + 1, y + _HEIGHT - 6, (_WIDTH - 2) * box.size / largest, 5, fill=tint, class_="share overlay")
    size = elements(box.size)
    name = text(x + 7, y + 12, tail(box.label, _WIDTH - 14), "box-label")
    detail = text(x + 7, y + 26, fitted(box.detail, _WIDTH - 20 - width_of(size, 10)), "small quiet")
    return frame + share + name + text(x + _WIDTH - 7, y + 26, size, "small quiet end") + detail


def _arrow(x: float, y: float, length: float) -> str:
    path = f"M{x:.1f} {y:.1f}h{length:.1f}m-5 -4l5 4l-5 4"
    return element("path", d=path, class_="line", stroke_width="1.5")


def _link(places: Sequence[tuple[float, float]], k: int, bottom: float) -> str:
    """A line below the columns that joins boxes which are one tensor."""
    depth = bottom + 4 + 8 * k
    style = {"fill": "none", "stroke": colour(5), "stroke_width": "2", "class_": "tie overlay"}
    found = []
    out = 7 + 6 * (k % 3)
    for x, y in places:
        found.append(element("path", d=f"M{x:.1f} {y + _HEIGHT / 2:.1f}h-{out}V{depth:.1f}", **style))
    found.append(element("path", d=f"M{places[0][0] - out:.1f} {depth:.1f}H{places[-1][0] - out:.1f}", **style))
    return "".join(found)
