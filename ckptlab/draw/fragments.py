"""What dp cuts a flattened shard into, drawn where it lies in the tensor: runs of elements as up to three
rectangles."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ckptlab.draw.colours import tinted
from ckptlab.draw.edge import Edge
from ckptlab.draw.svg import cell, rect, text, width_of

Area = tuple[int, int, int, int]
"""First row, row behind the last, first column, column behind the last."""

MOST = 512  # rectangles that are drawn


@dataclass(frozen=True)
class Fragment:
    """`count` elements from `start` of a flattened shard of `shape` (rows, columns).

    `areas` are where they lie in the whole; `place` the coordinate that holds them, axis → number; `hue` and `shade`
    give its colour: of the shard, and of the fragment among those of its shard.
    """

    start: int
    count: int
    shape: tuple[int, int]
    areas: tuple[Area, ...]
    place: Mapping[str, int]
    hue: int
    shade: int

    @property
    def label(self) -> str:
        """`tp 0 dp 1`."""
        return " ".join(f"{axis} {k}" for axis, k in self.place.items())


def rectangles(start: int, count: int, columns: int) -> Iterator[Area]:
    """A run of elements of a matrix in the order of its rows: what is left of a row, whole rows, what begins a row."""
    row, column = divmod(start, columns)
    stop_row, stop_column = divmod(start + count, columns)
    if row == stop_row:
        yield row, row + 1, column, stop_column
        return
    if column:
        yield row, row + 1, column, columns
        row += 1
    if row < stop_row:
        yield row, stop_row, 0, columns
    if stop_column:
        yield stop_row, stop_row + 1, 0, stop_column


def areas_drawn(
    fragments: Sequence[Fragment],
    whole: tuple[float, float, float, float],
    columns: int,
    rows: int,
    marked: Mapping[str, int] | None,
    away: bool,
) -> list[str]:
    """Every fragment's rectangles in the whole (x, y, width, height), the largest with its label."""
    x, y, width, height = whole
    found = []
    for fragment in fragments:
        hit = marked is not None and not away and all(marked.get(a, k) == k for a, k in fragment.place.items())
        kind = " ".join(["piece", "fragment", *(["marked" if hit else "dimmed"] if marked is not None else [])])
        tip = f"{fragment.label} · elements {fragment.start:,}–{fragment.start + fragment.count - 1:,} of its shard"
        data = {**fragment.place, "from": fragment.start, "count": fragment.count}
        largest = max(fragment.areas, key=lambda a: (a[1] - a[0]) * (a[3] - a[2]), default=None)
        faint: dict[str, Any] = {"fill_opacity": ".15"} if "dimmed" in kind else {}
        for area in fragment.areas:
            r0, r1, c0, c1 = area
            box = (
                x + width * c0 / columns,
                y + height * r0 / rows,
                width * (c1 - c0) / columns,
                height * (r1 - r0) / rows,
            )
            label = fragment.label if area is largest else ""
            fill = tinted(fragment.hue, fragment.shade)
            found.append(cell(box, fill, tip, kind=kind, label=label, data=data, **faint))
    return found


def fragment_beside(
    fragments: Sequence[Fragment],
    corner: tuple[float, float],
    whole: tuple[float, float],
    edges: Sequence[Edge],
    rows: Sequence[int],
    columns: Sequence[int],
    marked: Mapping[str, int],
) -> tuple[list[str], tuple[float, float]]:
    """What the marked coordinate holds of its shard, which is outlined to the scale of the whole; and where it ends."""
    mine = [f for f in fragments if all(marked.get(axis, k) == k for axis, k in f.place.items())]
    if not mine:
        return [], corner
    high, wide = mine[0].shape
    across = whole[0] * wide / max(edges[columns[0]].size, 1) if columns else whole[0]
    down = whole[1] * high / max(edges[rows[0]].size, 1) if rows else whole[1]
    x, y = corner
    held = sum(f.count for f in mine)
    said = f"{mine[0].label} holds {held:,} of {high * wide:,}"
    found = [text(x, y - 11, said, "strong shard-label")]
    style = {"fill": "none", "stroke": "currentColor", "stroke_opacity": ".5", "stroke_dasharray": "4 3"}
    found.append(rect(x, y, across, down, class_="shard-outline overlay", **style))
    for fragment in mine:
        tip = f"{fragment.label} · elements {fragment.start:,}–{fragment.start + fragment.count - 1:,} of its shard"
        for r0, r1, c0, c1 in rectangles(fragment.start, fragment.count, wide):
            box = (x + across * c0 / wide, y + down * r0 / high, across * (c1 - c0) / wide, down * (r1 - r0) / high)
            found.append(cell(box, tinted(fragment.hue, fragment.shade), tip, kind="shard", data=dict(fragment.place)))
    return found, (max(x + across + 1, x + width_of(said, 13)), y + down)
