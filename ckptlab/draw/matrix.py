"""Who sends how much to whom: a shaded table with sums at its edges."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ckptlab.draw.blocks import told
from ckptlab.draw.colours import SHADE, colour, strength
from ckptlab.draw.svg import Drawing, cell, drawing, noted, rect, text, width_of
from ckptlab.words import figure, size, unit_of

_HEIGHT, _MARGIN = 26.0, 90.0


@dataclass(frozen=True)
class Side:
    """Rows or columns: what they are called, their labels, and the ranks that each stands for."""

    name: str
    labels: Sequence[str]
    ranks: Sequence[range]


@dataclass(frozen=True)
class Traffic:
    """table[i][j] bytes go from row i to column j; of these kept[i][j] do not change rank."""

    table: Sequence[Sequence[int]]
    kept: Sequence[Sequence[int]]
    rows: Side
    columns: Side

    @property
    def sent(self) -> list[int]:
        return [sum(row) for row in self.table]

    @property
    def received(self) -> list[int]:
        return [sum(column) for column in zip(*self.table, strict=True)]

    def told(self, i: int, j: int) -> tuple[str, dict[str, object]]:
        """The tip and the data of what goes from i to j."""
        nbytes, kept = self.table[i][j], self.kept[i][j]
        stays = f" · {size(kept)} stay on their rank" if kept else ""
        source, target = told(self.rows.ranks[i]), told(self.columns.ranks[j])
        data: dict[str, object] = {"source": source, "target": target, "bytes": nbytes, "kept": kept}
        return f"{self.rows.labels[i]} → {self.columns.labels[j]} · {size(nbytes)}{stays}", data


def matrix(
    traffic: Traffic,
    *,
    title: str = "",
    notes: Sequence[str] = (),
    width: float | None = None,
) -> Drawing:
    """Bytes in cells; a frame says that they do not change rank."""
    table, kept, rows, columns = traffic.table, traffic.kept, traffic.rows, traffic.columns
    most = max([n for row in table for n in row] + [1])
    unit, name = unit_of(most)
    wide = max([width_of(label, 11) for label in columns.labels] + [44 if width is None else 36]) + 8
    margin = _MARGIN if width is None else 46.0
    left = max([width_of(label) for label in rows.labels] + [0]) + 34
    parts = [text(0, 8, title, "title")] if title else []
    down, turned = _HEIGHT * len(rows.labels), width_of(f"from {rows.name}")
    start = 26.0 if title else 4.0
    top = start + max(36.0, turned - down - 22)  # few rows: their side's name reaches above and below them
    across = wide * len(columns.labels)
    parts.append(text(left + across / 2, top - 28, f"to {columns.name}", "middle quiet"))
    middle = min(top + down / 2, top + down + 22 - turned / 2)
    parts.append(text(8, middle, f"from {rows.name}", "middle quiet", transform=_turned(8, middle)))
    for j, label in enumerate(columns.labels):
        parts.append(text(left + (j + 0.5) * wide, top - 10, label, "middle column-label"))
    sums = traffic.sent
    for i, label in enumerate(rows.labels):
        y = top + i * _HEIGHT
        parts.append(text(left - 8, y + _HEIGHT / 2, label, "end row-label"))
        for j, nbytes in enumerate(table[i]):
            box = (left + j * wide + 1, y + 1, wide - 2, _HEIGHT - 2)
            label = figure(nbytes / unit) if nbytes else "·"
            parts.append(_cell(traffic, i, j, box, label, f"{strength(nbytes / most):.3f}"))
        parts += _sum(left + across + 10, y + 6, sums[i], max(sums, default=0), margin, colour(i))
    for j, nbytes in enumerate(traffic.received):
        parts.append(text(left + (j + 0.5) * wide, top + down + 12, size(nbytes), "small middle quiet sum"))
    y = top + down + 24
    said = [f"figures in {name}", *notes]
    own = [(n, all_) for row, whole in zip(kept, table, strict=True) for n, all_ in zip(row, whole, strict=True) if n]
    if any(n == all_ for n, all_ in own):
        said[0] += "; thick frame: stays on the rank where it is"
    if any(n < all_ for n, all_ in own):
        said[0] += "; thin frame: some of it stays on its rank"
    below, y, broad = noted(said, y, width)
    total = max(left + across + margin + 60, broad, width_of(title, 14))
    return drawing(title or "matrix", [*parts, *below], total, y + 2)


def _cell(traffic: Traffic, i: int, j: int, box: tuple[float, float, float, float], label: str, opacity: str) -> str:
    nbytes, kept = traffic.table[i][j], traffic.kept[i][j]
    tip, data = traffic.told(i, j)
    shape = cell(box, SHADE, tip, kind="move" if nbytes else "move none", label=label, data=data, fill_opacity=opacity)
    if not kept:
        return shape
    x, y, w, h = box
    style = {"fill": "none", "stroke": "currentColor", "stroke_width": "2.2" if kept == nbytes else "1.1"}
    return shape + rect(x + 1, y + 1, w - 2, h - 2, class_="own overlay", **style)


def _turned(x: float, y: float) -> str:
    return f"rotate(-90 {x:.1f} {y:.1f})"


def _sum(x: float, y: float, nbytes: int, most: int, margin: float, tint: str) -> list[str]:
    width = margin * nbytes / most if most else 0.0
    bar = rect(x, y, width, _HEIGHT - 12, fill=tint, fill_opacity=".75", class_="sum")
    return [bar, text(x + width + 5, y + (_HEIGHT - 12) / 2, size(nbytes), "small quiet")]
