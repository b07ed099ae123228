"""Numbers as shades: a table of values, the borders between those who hold them drawn over it."""

from __future__ import annotations

import base64
import itertools
import struct
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ckptlab.aliases import Int64
from ckptlab.draw.blocks import listed
from ckptlab.draw.svg import UID, Drawing, Own, cell, drawing, element, noted, rect, tail, text, width_of
from ckptlab.words import ranges

ABOVE, BELOW, NAN = "#d55e00", "#0072b2", "#cc79a7"
ALONE = 1_024  # cells that are elements of their own, with a tooltip each; more are one image
FINE = 0.4  # share of borders between cells from which they are not drawn
REGIONS = 512  # rectangles of one owner that have a tooltip each
_WIDTH, _HEIGHT, _STRONG = 560.0, 360.0, 0.75

Float64 = NDArray[np.float64]
Run = tuple[int, int, int]
"""Cells of one row that one owner has: the first, the one behind the last, the owner."""


@dataclass(frozen=True)
class Side:
    """Rows or columns: what they are, the index of the first element, that behind the last, elements in a cell."""

    name: str
    start: int
    stop: int
    step: int

    def label(self, k: int) -> str:
        """The index of cell k, or its first and last."""
        first = self.start + k * self.step
        last = self.behind(k + 1) - 1
        return f"{first:,}" if first == last else f"{first:,}–{last:,}"

    def behind(self, k: int) -> int:
        """The index behind the cells before k."""
        return min(self.start + k * self.step, self.stop)


@dataclass(frozen=True)
class _Table:
    """Where the cells stand on the page: the corner of the first, how wide and high one is, how many there are; `who`
    are the ranks of each owner."""

    rows: Side
    columns: Side
    who: Mapping[int, Sequence[int]]
    corner: tuple[float, float]
    across: float
    down: float
    shape: tuple[int, int]

    @property
    def area(self) -> tuple[float, float, float, float]:
        return self.box(0, 0, *self.shape)

    def box(self, i: int, j: int, stop: int | None = None, end: int | None = None) -> tuple[float, float, float, float]:
        """The place of the cells from row i and column j to before `stop` and `end` (None: of one cell)."""
        high, wide = (1 if stop is None else stop - i), (1 if end is None else end - j)
        x, y = self.corner[0] + j * self.across, self.corner[1] + i * self.down
        return x, y, wide * self.across, high * self.down

    def data(self, i: int, j: int, owner: int) -> dict[str, object]:
        """Of cells from row i and column j on: the ranks that hold them, and the first index of both sides."""
        first = f"{self.rows.start + i * self.rows.step},{self.columns.start + j * self.columns.step}"
        return {"rank": listed(self.who[owner]), "start": first}


def heat(
    values: Float64,
    owner: Int64,
    rows: Side,
    columns: Side,
    *,
    who: Mapping[int, Sequence[int]],
    full: float,
    tip: Callable[[int, int], str] | None,
    marked: Collection[int] | None = None,
    title: str = "",
    notes: Sequence[str] = (),
    width: float | None = None,
) -> Drawing:
    """A table of values, orange above 0 and blue below, as strong as they are large (at `full`, of full strength).

    owner: a number for who holds each cell, `who` the ranks of each; where it changes a line is drawn. marked: owners
    that stand out. tip: what is said of a cell (None: nothing, and whoever shows the picture says it). Cells: class
    `value` with a tooltip each, of many the regions of one owner, class `region`; data-rank, data-start (the first
    index of both sides). The frame, class `heat`, has data-rows and data-columns, of cells.
    """
    high, wide = values.shape
    left = max(width_of(rows.name), *(width_of(rows.label(k), 10) for k in (0, high // 2, high - 1))) + 14
    held = _bands(owner)
    said = [_told(runs, who) for _, _, runs in held]
    right = max(width_of(label, 10) for label in ["on rank", *said]) + 14 if len(who) > 1 else 6.0
    room = max((width or _WIDTH + left + right) - left - right, 80.0)
    few = high * wide <= ALONE
    alone = few and tip is not None
    across = min(room / wide, 46.0)
    down = min(_HEIGHT / high, 20.0 if few else across, 20.0) if high > 1 else 24.0
    top = (24.0 if title else 4.0) + 34
    table = _Table(rows, columns, who, (left, top), across, down, (high, wide))
    area = table.area
    strength = np.minimum(np.abs(values) / full, 1.0) if full else np.zeros(values.shape)
    faint = np.ones(values.shape) if marked is None else np.where(np.isin(owner, list(marked)), 1.0, 0.3)
    title = title if width is None else tail(title, width, 14)
    parts = [text(0, 8, title, "title")] if title else []
    parts += _sides(table)
    if alone and tip is not None:
        parts += _cells(table, values, strength * faint, owner, tip)
    else:
        parts += [_image(values, strength * faint, area), *_written(table, values)]
    parts += _regions(table, held, "none" if alone else "all")
    frame: dict[str, Any] = {"fill": "none", "stroke": "currentColor", "stroke_width": "1.25"}
    parts.append(rect(*area, class_="heat overlay", data_rows=high, data_columns=wide, **frame))
    lines, fine = _borders(table, owner)
    parts.append(lines)
    for (i, stop, _), label in zip(held, said, strict=True):
        if label and (stop - i) * down >= 9 and len(who) > 1:
            parts.append(text(left + area[2] + 8, top + (i + stop) / 2 * down, label, "small quiet held-by"))
    if len(who) > 1 and any(said):
        parts.append(text(left + area[2] + 8, top - 10, "on rank", "small quiet"))
    bottom = top + area[3] + 12
    legend, defs, end = _legend(full, left, bottom, bool(np.isnan(values).any()))
    parts += legend
    bottom += 24
    lines_said = ["lines: where other ranks, or another place in a file, begin"] if not fine and len(who) > 1 else []
    lines_said += ["who holds it changes within cells: those lines are not drawn"] if fine else []
    below, bottom, broad = noted([*notes, *lines_said], bottom, width)
    parts += below
    total = max(left + area[2] + right, end, width_of(title, 14), broad)
    return drawing(title or "values", parts, total if width is None else min(total, max(width, 160)), bottom + 2, defs)


def _sides(table: _Table) -> list[str]:
    """Names of both sides, and indices: of every cell that has room, else of the first and the last."""
    rows, columns, (high, wide) = table.rows, table.columns, table.shape
    x, y, w, _ = table.area
    found = [text(x + w / 2, y - 26, columns.name, "middle dim")]
    each = max(width_of(columns.label(k), 10) for k in (0, wide - 1)) + 6
    step = max(int(each // table.across) + 1, 1)
    for k in range(0, wide, step):
        found.append(text(x + (k + 0.5) * table.across, y - 9, columns.label(k), "small quiet middle"))
    if not rows.name:
        return found
    found.append(text(x - 8, y - 9, rows.name, "end dim"))
    for k in range(0, high, max(int(12 // table.down) + 1, 1)):
        found.append(text(x - 6, y + (k + 0.5) * table.down, rows.label(k), "small quiet end"))
    return found


def _cells(
    table: _Table, values: Float64, strength: Float64, owner: Int64, tip: Callable[[int, int], str]
) -> Iterator[str]:
    for i, j in itertools.product(*map(range, values.shape)):
        value = float(values[i, j])
        data = table.data(i, j, int(owner[i, j]))
        fill = NAN if value != value else ABOVE if value > 0 else BELOW
        opacity = f"{0.9 if value != value else 0.7 * float(strength[i, j]):.3f}"
        look: dict[str, Any] = {"fill_opacity": opacity, **({} if table.down >= 14 else {"stroke_opacity": ".12"})}
        yield cell(table.box(i, j), fill, tip(i, j), kind="value", label=_short(value), data=data, **look)


def _written(table: _Table, values: Float64) -> Iterator[str]:
    """The numbers themselves, where cells have room for them."""
    if table.across < 40 or table.down < 12:
        return
    for (i, j), value in np.ndenumerate(values):
        x, y, w, h = table.box(i, j)
        yield text(x + w / 2, y + h / 2, _short(float(value)), "small middle")


def _short(value: float) -> str:
    """A number in two digits or so: `0.012`, `−1.3`, `2e-5`."""
    if value != value:
        return "NaN"
    if not np.isfinite(value):
        return str(value).replace("-", "−").replace("inf", "∞")
    said = f"{value:.2g}" if 1e-3 <= abs(value) < 1e4 or not value else f"{value:.0e}".replace("e-0", "e-")
    return said.replace("e+0", "e").replace("-", "−", 1) if value < 0 else said.replace("e+0", "e")


def _image(values: Float64, strength: Float64, area: tuple[float, float, float, float]) -> str:
    """All cells as the points of one picture; what is small is clear, so that the page's ground shows."""
    pixels = np.zeros((*values.shape, 4), np.uint8)
    pixels[..., :3] = np.where((values > 0)[..., None], _rgb(ABOVE), _rgb(BELOW))
    pixels[..., 3] = np.rint(255 * _STRONG * np.nan_to_num(strength))
    pixels[np.isnan(values)] = [*_rgb(NAN), 255]
    said = f"data:image/png;base64,{base64.b64encode(_png(pixels)).decode()}"
    x, y, w, h = area
    where = {"x": x, "y": y, "width": w, "height": h, "preserveAspectRatio": "none"}
    return element("image", href=Own(said), style="image-rendering:pixelated", class_="overlay", **where)


def _rgb(colour: str) -> list[int]:
    return [int(colour[i : i + 2], 16) for i in (1, 3, 5)]


def _png(pixels: NDArray[np.uint8]) -> bytes:
    """A PNG of (rows, columns, 4) bytes."""
    high, wide, _ = pixels.shape
    lines = np.concatenate([np.zeros((high, 1), np.uint8), pixels.reshape(high, -1)], axis=1).tobytes()

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = struct.pack(">IIBBBBB", wide, high, 8, 6, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(lines, 9)) + chunk(b"IEND", b"")


def _bands(owner: Int64) -> list[tuple[int, int, list[Run]]]:
    """Rows that are held alike, from above: the first, the one behind the last, the runs of owners in them."""
    found: list[tuple[int, int, list[Run]]] = []
    for i, row in enumerate(owner):
        if i and np.array_equal(row, owner[i - 1]):
            found[-1] = (found[-1][0], i + 1, found[-1][2])
            continue
        begins = [0, *(np.flatnonzero(row[1:] != row[:-1]) + 1).tolist(), len(row)]
        found.append((i, i + 1, [(a, b, int(row[a])) for a, b in itertools.pairwise(begins)]))
    return found


def _told(runs: Sequence[Run], who: Mapping[int, Sequence[int]]) -> str:
    """`0 | 2`: who holds a row, from left to right; nothing where they are many."""
    return " | ".join(ranges(who[k]) for _, _, k in runs) if len(runs) <= 4 else ""


def _regions(table: _Table, bands: Sequence[tuple[int, int, list[Run]]], events: str) -> Iterator[str]:
    """What one owner has, rectangle by rectangle, with a tooltip each where cells have none."""
    if sum(len(runs) for _, _, runs in bands) > REGIONS:
        return
    rows, columns = table.rows, table.columns
    for i, stop, runs in bands:
        for j, end, k in runs:
            first = [rows.start + i * rows.step, columns.start + j * columns.step]
            last = [rows.behind(stop) - 1, columns.behind(end) - 1]
            ranks = table.who[k]
            told = f"{'rank' if len(ranks) == 1 else 'ranks'} {ranges(ranks)} · {first} to {last}"
            box, data = table.box(i, j, stop, end), table.data(i, j, k)
            yield cell(box, "none", told, kind="region", data=data, stroke="none", pointer_events=events)


def _borders(table: _Table, owner: Int64) -> tuple[str, bool]:
    """Lines between cells of different owners; and whether there are so many that none is drawn."""
    across, down = table.across, table.down
    x, y = table.corner
    beside, below = owner[:, 1:] != owner[:, :-1], owner[1:] != owner[:-1]
    if any(at.sum() > FINE * at.size + n for at, n in zip((beside, below), owner.shape, strict=True)):
        return "", True
    path = []
    for j, column in enumerate(beside.T):
        for i, stop in _true(column):
            path.append(f"M{x + (j + 1) * across:.1f} {y + i * down:.1f}V{y + stop * down:.1f}")
    for i, line in enumerate(below):
        for j, stop in _true(line):
            path.append(f"M{x + j * across:.1f} {y + (i + 1) * down:.1f}H{x + stop * across:.1f}")
    style: dict[str, Any] = {"fill": "none", "stroke": "currentColor", "stroke_width": "1.75"}
    return element("path", d="".join(path), class_="cut overlay", **style) if path else "", False


def _true(flags: NDArray[np.bool_]) -> Iterator[tuple[int, int]]:
    """Runs of true: the first, the one behind the last."""
    edges = np.flatnonzero(np.diff(np.r_[False, flags, False].astype(np.int8)))
    yield from zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True)


def _legend(full: float, x: float, y: float, nan: bool) -> tuple[list[str], list[str], float]:
    """The scale: shades from the lowest to the highest; what they need among the definitions; where it ends."""
    low, high = f"≤ {_short(-full)}" if full else "", f"≥ {_short(full)}" if full else "all 0"
    begin = x + width_of(low, 10) + 6
    stops = "".join(
        element("stop", offset=f"{at}%", stop_color=tint, stop_opacity=strength)
        for at, tint, strength in ((0, BELOW, _STRONG), (50, BELOW, 0.0), (50, ABOVE, 0.0), (100, ABOVE, _STRONG))
    )
    fill = Own(f"url(#{UID}scale)")
    found = [text(begin - 6, y + 6, low, "small quiet end")]
    if full:
        style: dict[str, Any] = {"stroke": "currentColor", "stroke_opacity": ".4", "class_": "scale overlay"}
        found.append(rect(begin, y, 120, 12, fill=fill, **style))
        found.append(text(begin + 60, y + 6, "0", "small quiet middle"))
    end = begin + (126 if full else 0)
    found.append(text(end, y + 6, high, "small quiet"))
    end += width_of(high, 10) + 16
    if nan:
        found += [rect(end, y, 12, 12, fill=NAN, class_="scale overlay"), text(end + 18, y + 6, "NaN", "small quiet")]
        end += 50
    return found, [element("linearGradient", stops, id=Own(f"{UID}scale"))], end
