"""The values of a stored tensor as shades, and who holds them in which file."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from ckptlab.arguments import explained
from ckptlab.catalog import Catalog
from ckptlab.draw import Drawing
from ckptlab.draw.heat import Side, heat
from ckptlab.viewed import Viewed
from ckptlab.viz.sampled import CELLS, Sampled, sample
from ckptlab.words import number_of, shape_text

MARGIN, NARROW = 120, 4  # pixels: beside a picture, and the narrowest cell
SATURATED = 0.01  # share of the cells that are of full strength


@explained
def values(
    model: Viewed | Catalog,
    name: str,
    state: str | None = None,
    *,
    where: Mapping[str, int | slice] | None = None,
    rank: int | None = None,
    width: float | None = None,
) -> Drawing:
    """The elements of one state of a tensor (None: its first), read now, as shades: orange above 0, blue below.

    Lines are where other ranks, or another place in a file, begin. where: what of it, by dim: slices, and of dims
    before the last two an index (default 0): `where={"out": slice(0, 16), "in": slice(0, 8)}`. Of a large tensor each
    cell shows the element that is largest in size, NaN before all, and the picture says of how many; it is read in
    pieces. rank: what it holds stands out. width: of the page, in pixels (None: as wide as it likes).

    Cells: class `value`, of many `region` (what one rank has); data-rank, data-start. Tooltips of single cells tell
    value, index, rank, file and bytes. UnsupportedError of a model on paper or a target, InputError for a window that
    is not there.
    """
    catalog = model.held if isinstance(model, Viewed) else model
    across = CELLS if width is None else min(CELLS, max(int(width - MARGIN) // NARROW, 8))
    found = sample(catalog, name, state, where, (CELLS, across))
    return drawn(found, f"{catalog[name].name} · {state or next(iter(catalog[name].states))}", rank, width)


def drawn(
    found: Sampled, title: str, rank: int | None = None, width: float | None = None, *, tips: bool = True
) -> Drawing:
    """The picture of a table that was read; without tips whoever shows it tells of the cells."""
    dims, window = ("", "", *found.dims)[-2:], ((0, 1), (0, 1), *found.window)[-2:]
    rows, columns = (Side(d, a, b, s) for d, (a, b), s in zip(dims, window, found.steps, strict=True))
    size = np.abs(found.values[np.isfinite(found.values)])
    full = float(np.quantile(size, 1 - SATURATED)) if size.size else 0.0
    full = full or float(size.max(initial=0.0))
    marked = None if rank is None else [k for k, place in enumerate(found.places) if rank in place.ranks]
    none = marked is not None and not np.isin(found.owner, marked).any()

    def tip(i: int, j: int) -> str:
        place = found.places[int(found.place[i, j])]
        value = f"{list(found.index(i, j))} = {found.values[i, j]:.9g}"
        most = "largest here: " if found.steps != (1, 1) else ""
        return f"{most}{value} · {place.text(int(found.at[i, j]))}"

    return heat(
        found.values,
        found.owner,
        rows,
        columns,
        who={k: place.ranks for k, place in enumerate(found.places)},
        full=full,
        tip=tip if tips else None,
        marked=marked,
        title=title,
        notes=[*_notes(found), *([f"rank {rank} holds nothing of what is shown"] if none else [])],
        width=width,
    )


def _notes(found: Sampled) -> list[str]:
    shown = [b - a for a, b in found.window[-2:]]
    said = []
    if lead := [f"{dim} {a}" for dim, (a, _) in zip(found.dims[:-2], found.window[:-2], strict=True)]:
        said.append(f"at {' · '.join(lead)}")
    if math.prod(found.steps) > 1:
        of = shape_text(found.steps[-len(shown) :])
        cells = shape_text(found.values.shape[-len(shown) :])
        said.append(f"{shape_text(shown)} elements in {cells} cells: each shows the largest in size of {of}")
    told = f"{found.dtype} from {found.lowest:.4g} to {found.highest:.4g}".replace("-", "−")
    for count, what in ((found.nan, "NaN"), (found.infinite, "infinite element")):
        if count:
            told += f", {f'{count:,} NaN' if what == 'NaN' else number_of(count, what)}"
    return [*said, told]
