"""What `stats` and `updates` found, as text and as HTML with a small histogram in each row."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from html import escape
from typing import Any

import numpy as np
import xarray as xr

from ckptlab.arrays.coordinates import rank_dims
from ckptlab.describe.page import folded, page, scrolled, table_html
from ckptlab.describe.text import NAMES, WIDTH, aligned
from ckptlab.shown import shows
from ckptlab.views.accessor import Table, by_row, row_count, row_keys, row_places
from ckptlab.words import more, number_of, shorten

ROWS = 200  # rows that a notebook shows
TEXT_ROWS = 60  # rows that a terminal shows
_COLUMNS = {
    "elements": "elements",
    "norm": "norm",
    "mean": "mean",
    "std": "std",
    "min": "min",
    "max": "max",
    "zero_share": "zeros",
    "subnormal_share": "subnormal",
    "nan": "NaN",
    "inf": "Inf",
    "stable_rank": "stable rank",
    "effective_rank": "eff. rank",
    "update_ratio": "update/weight",
    "update_rms": "update rms",
    "update_max": "largest",
    "second_moment_low": "v from",
    "second_moment_high": "to",
    "dead_share": "dead",
}
_SHARES = {"zero_share", "subnormal_share", "dead_share"}
_ONLY_IF_ANY = {"subnormal_share", "nan", "inf"}  # columns that are left out where all are 0


def statistics_text(found: xr.Dataset, *, everything: bool = False) -> str:
    """A table for a terminal. everything: all rows, no name cut."""
    header, rows, sides = _table(found, None if everything else TEXT_ROWS)
    if not everything and rows:
        others = sum(max(map(len, column)) + 2 for column in list(zip(header, *rows, strict=True))[1:])
        rows = [[shorten(name, max(NAMES, WIDTH - others)), *rest] for name, *rest in rows]
    return "\n".join([*aligned([header, *rows], sides), *more(row_count(found) - len(rows), " rows")])


def statistics_html(found: xr.Dataset) -> str:
    """A table for a notebook, each row with its histogram, stacks of layers with their norms over depth."""
    header, rows, sides = _table(found, ROWS)
    cells = [[escape(cell) for cell in row] for row in rows]
    if "histogram" in found:
        header, sides = [*header, "histogram, by powers of two"], sides + "l"
        counts = found["histogram"].transpose(*row_keys(found), "bin").values
        places = itertools.islice(row_places(found), ROWS)
        cells = [[*row, bars(counts[place])] for row, place in zip(cells, places, strict=True)]
    left = (f"<div>{line}</div>" for line in more(row_count(found) - len(rows), " rows"))
    table = scrolled(table_html(header, cells, sides, escaped=True))
    return page(_title(found), [folded("norm by layer", _curves(found)), table, *left])


def _title(found: xr.Dataset) -> str:
    words = {"tensor": {"layer": "stack"}.get(by := str(found.attrs.get("by", "tensor")), by)}
    words |= {axis: f"{axis} rank" for axis in rank_dims(found)}
    counts = {dim: found.sizes[dim] for dim in row_keys(found)}
    if "layer" in counts:  # -1 is where tensors stand that are no layer's
        counts["layer"] = int((found["layer"] >= 0).sum())
    said = [number_of(count, words.get(dim, dim)) for dim, count in counts.items()]
    for name, what in (("nan", "NaN"), ("inf", "infinite")):
        if name in found:
            said.append(f"{int(found[name].sum()):,} {what}")
    return "Statistics: " + ", ".join(said)


# -------------------------------------------------------------------------------- rows


def _table(found: xr.Dataset, limit: int | None) -> tuple[list[str], list[list[str]], str]:
    """Header, rows and sides ("l" or "r") of the table."""
    keys = row_keys(found)
    shown = [name for name in _COLUMNS if name in found and not (name in _ONLY_IF_ANY and not (found[name] > 0).any())]
    values = [by_row(found, found[name]) for name in shown]
    rows = []
    for place in itertools.islice(row_places(found), limit):
        labels = [_label(key, found[key].values[i]) for key, i in zip(keys, place, strict=True)]
        rows.append(labels + [_cell(name, column[place].item()) for name, column in zip(shown, values, strict=True)])
    return [*keys, *(_COLUMNS[name] for name in shown)], rows, "l" * len(keys) + "r" * len(shown)


def _label(key: str, value: Any) -> str:
    return "–" if key == "layer" and value < 0 else str(value)


def _cell(name: str, value: Any) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    if math.isnan(value):
        return ""
    if name in _SHARES:
        return f"{100 * value:.3g} %" if value else "0"
    return f"{value:.3g}"


# -------------------------------------------------------------------------------- small plots


def bars(counts: np.ndarray, width: int = 150, height: int = 18) -> str:
    """Counts as an SVG of bars side by side, from the first to the last that is not 0; the tallest is full height."""
    held = np.flatnonzero(counts)
    if not len(held):
        return ""
    shown = counts[held[0] : held[-1] + 1]
    heights = height * shown / shown.max()
    step = width / max(len(shown), 16)
    path = "".join(
        f"M{i * step:.1f} {height}v{-h:.1f}h{step * 0.9:.1f}V{height}" for i, h in enumerate(heights) if h >= 0.05
    )
    return _svg(width, height, f'<path d="{path}" fill="currentColor" opacity=".7"/>')


def line(values: Sequence[float] | np.ndarray, width: int = 120, height: int = 24) -> str:
    """Values as an SVG line over their index, from the smallest (bottom) to the largest; NaN are gaps."""
    y = np.asarray(values, float)
    if np.isfinite(y).sum() < 2:
        return ""
    low, high = np.nanmin(y), np.nanmax(y)
    scaled = (y - low) / (high - low) if high > low else np.full(len(y), 0.5)
    points, pen = [], "M"
    for i, at in enumerate(scaled):
        if not np.isfinite(at):
            pen = "M"
            continue
        points.append(f"{pen}{2 + i * (width - 4) / (len(y) - 1):.1f} {height - 2 - at * (height - 4):.1f}")
        pen = "L"
    return _svg(width, height, f'<path d="{"".join(points)}" fill="none" stroke="currentColor" stroke-width="1.5"/>')


def _svg(width: int, height: int, content: str) -> str:
    return f'<svg width="{width}" height="{height}" viewBox="0 0 {width} {height}">{content}</svg>'


def _curves(found: xr.Dataset) -> str:
    """For each stack of layers its norm over depth, state by state, with the range that it takes."""
    if found.attrs.get("by") != "layer" or "norm" not in found or {"step", *rank_dims(found)} & set(found.sizes):
        return ""
    deep = found["norm"].sel(layer=found["layer"] >= 0)
    rows = []
    for stack in found["tensor"].values:
        cells = [escape(str(stack))]
        for state in found["state"].values:
            y = deep.sel(tensor=stack, state=state).values
            held = y[np.isfinite(y)]
            drawn = line(y)
            cells.append(f"{drawn}<br>{held.min():.3g} … {held.max():.3g}" if drawn else "")
        if any(cells[1:]):
            rows.append(cells)
    header = ["tensor", *map(str, found["state"].values)]
    return scrolled(table_html(header, rows, "l" * len(header), escaped=True))


shows(Table, text=lambda of: statistics_text(of.dataset), html=lambda of: statistics_html(of.dataset))
