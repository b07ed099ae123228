"""Stacked bars: amounts by kind, a total behind each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ckptlab.draw.colours import colour
from ckptlab.draw.svg import Drawing, cell, drawing, element, fitted, noted, swatch, text, width_of
from ckptlab.words import size

_WIDTH, _HEIGHT, _STEP = 520.0, 20.0, 26.0


@dataclass(frozen=True)
class Stack:
    """One bar: bytes by kind."""

    label: str
    amounts: Mapping[str, int]
    data: Mapping[str, object] = field(default_factory=dict)


def bars(
    stacks: Sequence[Stack],
    *,
    title: str = "",
    notes: Sequence[str] = (),
    limit: int | None = None,
    families: Mapping[str, Sequence[str]] | None = None,
    width: float | None = None,
) -> Drawing:
    """Bars to one scale, drawn for a page of a width (pixels; None: as wide as they like); kinds in the order in which
    they first come, which is also that of their colours.

    A kind of which there is nothing is not in the legend, but keeps its colour. limit: bytes at which a dashed line
    stands, where a bar reaches it. families: name → kinds that have a line of their own in the legend, behind that
    name.
    """
    kinds = list(dict.fromkeys(kind for stack in stacks for kind in stack.amounts))
    most = max([sum(stack.amounts.values()) for stack in stacks] + [1])
    left = max([width_of(stack.label) for stack in stacks] + [0]) + 12
    if width is not None:
        left = min(left, max(0.42 * width, 90.0))
    longest = _WIDTH if width is None else max(width - left - 80, 80.0)
    parts = [text(0, 8, title, "title")] if title else []
    y, wide = 28.0 if title else 8.0, 0.0
    family_of = {kind: family for family, members in (families or {}).items() for kind in members}
    begin = left if width is None else 0.0
    right = left + _WIDTH if width is None else width
    x, before = begin, ""
    for k, kind in enumerate(kinds):
        if not any(stack.amounts.get(kind) for stack in stacks):
            continue
        if (family := family_of.get(kind, "")) != before:
            x, y = begin, y + 18 if x > begin else y
            parts.append(text(x, y, f"{family}:", "legend-family quiet"))
            x, before = x + width_of(family) + 14, family
        if x > begin and x + width_of(kind) + 15 > right:
            x, y = begin, y + 18
        parts += [swatch(x, y, colour(k)), text(x + 15, y, kind, "legend")]
        x += width_of(kind) + 34
        wide = max(wide, x)
    y += 18
    at = None
    if limit is not None and limit <= most:  # behind the bars: what is written on them is not struck through
        at = left + longest * limit / most
        dashed: dict[str, Any] = {"stroke": "currentColor", "stroke_width": "2", "stroke_dasharray": "5 3"}
        line = f"M{at:.1f} {y - 4:.1f}V{y + _STEP * len(stacks) - 2:.1f}"
        parts.append(element("path", d=line, class_="limit overlay", **dashed))
        notes = [f"dashed: {size(limit)}", *notes]
    for stack in stacks:
        parts.append(text(left - 8, y + _HEIGHT / 2, fitted(stack.label, left - 12, 12), "end bar-label"))
        x = left
        for k, kind in enumerate(kinds):
            amount = stack.amounts.get(kind, 0)
            if amount:
                length = longest * amount / most
                family = f"{family_of[kind]}, " if kind in family_of else ""
                tip = f"{stack.label} · {family}{kind} · {size(amount)}"
                data = {"kind": kind, "bytes": amount, **stack.data}
                parts.append(
                    cell((x, y, length, _HEIGHT), colour(k), tip, kind="amount", label=size(amount), data=data)
                )
                x += length
        said_total = size(sum(stack.amounts.values()))
        x += 8
        if at is not None and x - 3 < at < x + width_of(said_total):
            x = at + 7  # beyond the dashed line, which would strike it through
        parts.append(text(x, y + _HEIGHT / 2, said_total, "strong total"))
        y += _STEP
    said, y, broad = noted(notes, y, width)
    total = max(left + longest + 76, wide if width is None else 0.0, broad)
    return drawing(title or "bars", [*parts, *said], total if width is None else min(total, width), y + 2)
