"""What a Dataset of statistics can say of itself: `found.stats` is its table, in a notebook with small plots."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import xarray as xr

from ckptlab.plain import plain
from ckptlab.shown import Shown

INNER = ("bin", "rank")  # dims that are no key of a row


@xr.register_dataset_accessor("stats")
class Statistics(Shown):
    """The statistics in a Dataset that `ckptlab.stats` or `ckptlab.adam` made, for people: a table, plots, plain
    values."""

    def __init__(self, dataset: xr.Dataset) -> None:
        self.dataset = dataset

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as `ckptlab stats --json` prints them: {by, dims, rows: [{a key for each dim, coordinate and
        variable}]}; what is infinite or NaN is text, histograms are lists of [low, high, count] of the bins that hold
        something."""
        found = self.dataset
        keys = row_keys(found)
        told = {str(name): found[name] for name in (*keys, *found.coords, *found.data_vars) if name not in INNER}
        scalars = {name: by_row(found, value) for name, value in told.items() if not set(value.dims) & set(INNER)}
        bins = []
        if "histogram" in found:
            bins = list(zip(found["bin_low"].values.tolist(), found["bin_high"].values.tolist(), strict=True))
        rows = []
        for place in row_places(found):
            row: dict[str, Any] = {name: values[place].item() for name, values in scalars.items()}
            at = dict(zip(keys, place, strict=True))
            if "singular_values" in found:
                top = found["singular_values"].isel(at).values
                row["singular_values"] = top[~np.isnan(top)].tolist()
            if "histogram" in found:
                counts = found["histogram"].isel(at).values
                row["histogram"] = [[*edges, n] for edges, n in zip(bins, counts.tolist(), strict=True) if n]
            rows.append(plain(row))
        return {"by": found.attrs.get("by", "tensor"), "dims": keys, "rows": rows}


def row_keys(found: xr.Dataset) -> list[str]:
    """The dims whose labels name a row, the tensor first."""
    dims = [str(dim) for dim in found.sizes if dim not in INNER]
    return sorted(dims, key=lambda dim: dim != "tensor")


def row_places(found: xr.Dataset) -> Iterator[tuple[int, ...]]:
    """Where there is something to show, along every key."""
    return (tuple(map(int, at)) for at in np.argwhere(by_row(found, _there(found))))


def by_row(found: xr.Dataset, values: xr.DataArray) -> np.ndarray:
    """Values along every key, those that do not depend on one repeated over it."""
    keys = row_keys(found)
    missing = {key: found.sizes[key] for key in keys if key not in values.dims}
    return values.variable.set_dims({**missing, **values.sizes}).transpose(*keys).values


def _there(found: xr.Dataset) -> xr.DataArray:
    return found["elements"] >= 0


def row_count(found: xr.Dataset) -> int:
    """How many rows there are."""
    return int(_there(found).sum())
