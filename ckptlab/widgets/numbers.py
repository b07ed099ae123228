"""Values for the page: a heat map, and a table that tells the element under the mouse without a kernel."""

from __future__ import annotations

import base64
import math
import os
from collections.abc import Sequence
from html import escape
from typing import Any

import numpy as np

from ckptlab.errors import CkptlabError
from ckptlab.viz.heatmap import drawn
from ckptlab.viz.sampled import Sampled, sample
from ckptlab.widgets.subject import Choice, Subject, one_line

CELLS = (64, 88)  # down and across
DIGITS = {2: 4, 4: 9}  # that tell an element of so many bytes from its neighbours; of more bytes 17


def fits(window: Sequence[Sequence[int]], shape: Sequence[int]) -> bool:
    """Whether a window (nothing: all) is in a tensor of a shape, one index wide in all dims but the last two."""
    if not window:
        return True
    if len(window) != len(shape) or any(len(pair) != 2 for pair in window):
        return False
    inside = all(0 <= a < b <= n for (a, b), n in zip(window, shape, strict=True))
    return inside and all(b - a == 1 for a, b in window[: max(len(shape) - 2, 0)])


def read(subject: Subject, choice: Choice) -> int:
    """How many elements are read for it."""
    shape = subject.tensor(choice).shape
    return math.prod(b - a for a, b in choice.window) if choice.window else math.prod(shape[-2:])


def line(subject: Subject, choice: Choice) -> str:
    """The Python line that draws the same."""
    tensor = subject.tensor(choice)
    slices = [
        f'"{dim}": {a if b - a == 1 and i < len(tensor.shape) - 2 else f"slice({a}, {b})"}'
        for i, (dim, (a, b), n) in enumerate(zip(tensor.layout.dims, choice.window, tensor.shape, strict=False))
        if (a, b) != (0, n)
    ]
    where = f", where={{{', '.join(slices)}}}" if slices else ""
    return f'ckptlab.viz.values({subject.code}, "{choice.tensor}", "{choice.state}"{where})'


def heat_map(subject: Subject, choice: Choice) -> dict[str, Any]:
    """The picture, and what the page tells of each cell; where it cannot be read, why."""
    tensor = subject.tensor(choice)
    where: dict[str, int | slice] = {
        dim: a if i < len(tensor.shape) - 2 else slice(a, b)
        for i, (dim, (a, b)) in enumerate(zip(tensor.layout.dims, choice.window, strict=False))
    }
    try:
        found = sample(subject.catalog, choice.tensor, choice.state, where, CELLS)
    except (CkptlabError, OSError) as error:
        return {"svg": f'<div class="refused">{escape(one_line(error, subject.catalog.path))}</div>'}
    svg = drawn(found, f"{choice.tensor} · {choice.state}", None, choice.width, tips=False).svg
    return {"svg": svg, "grid": {**_grid(found), "shape": list(tensor.shape)}}


def _grid(found: Sampled) -> dict[str, Any]:
    """Cells in the order of rows, as base64 of little-endian numbers: `values` and `at` (where in the shard) of 8
    bytes, `row`, `column` (in the whole) and `place` of 4; `places` say who holds them, and which byte of which file
    element `start` of the shard is."""
    size = found.dtype.itemsize
    return {
        "dims": list(found.dims),
        "window": [list(pair) for pair in found.window],
        "cells": list(found.values.shape),
        "steps": list(found.steps),
        "size": size,
        "digits": DIGITS.get(size, 17),
        "values": _packed(found.values, "<f8"),
        "row": _packed(found.rows, "<i4"),
        "column": _packed(found.columns, "<i4"),
        "place": _packed(found.place, "<i4"),
        "at": _packed(found.at, "<f8"),
        "places": [
            {
                "ranks": list(place.ranks),
                "start": place.start,
                "file": os.path.basename(place.stored.path) if place.stored else None,
                "offset": place.stored.offset if place.stored else 0,
            }
            for place in found.places
        ],
    }


def _packed(table: np.ndarray, dtype: str) -> str:
    return base64.b64encode(table.astype(dtype).tobytes()).decode()
