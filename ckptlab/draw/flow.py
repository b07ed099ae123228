"""Who sends how much to whom: bands between two columns, as wide as they carry bytes."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from ckptlab.draw.blocks import told
from ckptlab.draw.colours import colour
from ckptlab.draw.matrix import Traffic
from ckptlab.draw.svg import Drawing, cell, drawing, element, noted, telling, text, width_of
from ckptlab.words import size

_HEIGHT, _ACROSS, _BOX, _GAP, _LINE = 300.0, 260.0, 14.0, 7.0, 13.0


def flow(
    traffic: Traffic,
    *,
    title: str = "",
    notes: Sequence[str] = (),
    width: float | None = None,
) -> Drawing:
    """Bytes as bands from rows (left) to columns (right), in the colour of the row; of what does not change rank the
    band has an outline.

    Cells: paths of class `flow`, data-source, data-target, data-bytes, data-kept; boxes of class `end`, data-source or
    data-target, data-bytes.
    """
    table, kept, rows, columns = traffic.table, traffic.kept, traffic.rows, traffic.columns
    sent, received = traffic.sent, traffic.received
    total = max(sum(sent), 1)
    names = [
        [f"{label} · {size(n)}" for label, n in zip(s.labels, sums, strict=True)]
        for s, sums in ((rows, sent), (columns, received))
    ]
    margins = [max([width_of(name, 10) for name in said] + [0]) + 10 for said in names]
    across = _ACROSS if width is None else max(width - sum(margins) - 2 * _BOX, 80.0)
    top = (24.0 if title else 4.0) + 22
    scale = _HEIGHT / total
    places = [_places(sums, scale, top) for sums in (sent, received)]
    left, right = margins[0], margins[0] + _BOX + across
    parts = [text(0, 8, title, "title")] if title else []
    parts.append(text(0, top - 12, f"from {rows.name}", "quiet"))
    parts.append(text(right + _BOX + margins[1] - 4, top - 12, f"to {columns.name}", "quiet end"))
    starts = [[at + sum(row[:j]) * scale for j in range(len(row))] for at, row in zip(places[0], table, strict=True)]
    ends = [
        [at + before * scale for before in accumulate((row[j] for row in table[:-1]), initial=0)]
        for j, at in enumerate(places[1])
    ]
    for i, row in enumerate(table):
        for j, nbytes in enumerate(row):
            if nbytes:
                band = (left + _BOX, starts[i][j], right, ends[j][i], nbytes * scale)
                parts.append(_band(traffic, i, j, band))
    for side, x, sums, at, end in ((rows, left, sent, places[0], True), (columns, right, received, places[1], False)):
        what = "source" if end else "target"
        for k, nbytes in enumerate(sums):
            fill = colour(k) if end else "#888888"
            tip = f"{side.name} {side.labels[k]} · {size(nbytes)} {'read from it' if end else 'received'}"
            data = {what: told(side.ranks[k]), "bytes": nbytes}
            box = (x, at[k], _BOX, max(nbytes * scale, 0.5))
            parts.append(cell(box, fill, tip, kind="end", data=data))
            said = names[0 if end else 1][k]
            place = x - 6 if end else x + _BOX + 6
            parts.append(
                text(place, at[k] + max(nbytes * scale, 8) / 2, said, f"small{' end' if end else ''} flow-label")
            )
    bottom = (
        max(max(at[-1] + max(n[-1] * scale, _LINE) for at, n in zip(places, (sent, received), strict=True)), top) + 8
    )
    stays = "; outlined: stays on the rank where it is" if any(map(any, kept)) else ""
    below, bottom, broad = noted([f"widths are bytes{stays}", *notes], bottom, width)
    parts += below
    whole = max(right + _BOX + margins[1], width_of(title, 14), broad)
    return drawing(title or "flow", parts, whole if width is None else min(whole, max(width, 200)), bottom + 2)


def _places(sums: Sequence[int], scale: float, top: float) -> list[float]:
    """Where boxes begin: behind one another, each with room for a line of text."""
    found, y = [], top
    for nbytes in sums:
        found.append(y)
        y += max(nbytes * scale, _LINE - _GAP + 4) + _GAP
    return found


def _band(traffic: Traffic, i: int, j: int, band: tuple[float, float, float, float, float]) -> str:
    tip, data = traffic.told(i, j)
    whole = telling("path", tip, data, d=_path(band), class_="flow", fill=colour(i), fill_opacity=".4")
    if not (kept := traffic.kept[i][j]):
        return whole
    x, y, end, to, high = band
    outline: dict[str, Any] = {"stroke": "currentColor", "stroke_width": "1.1"}
    own = _path((x, y, end, to, high * kept / traffic.table[i][j]))
    return whole + element("path", d=own, class_="own overlay", fill=colour(i), fill_opacity=".6", **outline)


def _path(band: tuple[float, float, float, float, float]) -> str:
    x, y, end, to, high = band
    high = max(high, 0.4)
    middle = (x + end) / 2
    return (
        f"M{x:.1f} {y:.2f}C{middle:.1f} {y:.2f} {middle:.1f} {to:.2f} {end:.1f} {to:.2f}v{high:.2f}"
        f"C{middle:.1f} {to + high:.2f} {middle:.1f} {y + high:.2f} {x:.1f} {y + high:.2f}Z"
    )
