"""What a Dataset of statistics can say of itself, under `.ckptlab`: its table, its worst rows, its plots."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

import xarray as xr

from ckptlab.errors import CheckpointError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PLOTS = ("norms", "histograms", "drift", "spectrum")


class Table:
    """Statistics for people: in a notebook with small plots, in a terminal as text."""

    def __init__(self, dataset: xr.Dataset) -> None:
        self._dataset = dataset

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as `ckptlab stats --json` prints them; what is infinite or NaN is text."""
        from ckptlab.describe.statistics import to_dict

        return to_dict(self._dataset)

    def __repr__(self) -> str:
        from ckptlab.describe.statistics import statistics_text

        return statistics_text(self._dataset)

    def _repr_html_(self) -> str:
        from ckptlab.describe.statistics import statistics_html

        return statistics_html(self._dataset)


@xr.register_dataset_accessor("ckptlab")
class Statistics:
    """`.ckptlab` of a Dataset that `ckptlab.stats` or `ckptlab.adam` made. CheckpointError on any other."""

    def __init__(self, dataset: xr.Dataset) -> None:
        self._dataset = dataset

    def _statistics(self) -> xr.Dataset:
        if "elements" not in self._dataset or "tensor" not in self._dataset.dims:
            held = ", ".join(map(str, self._dataset.data_vars)) or "nothing"
            raise CheckpointError(f"no Dataset of statistics (it holds {held}): ckptlab.stats makes one of it")
        return self._dataset

    @property
    def table(self) -> Table:
        """The statistics as a table, a row for each tensor and state."""
        return Table(self._statistics())

    def worst(self, figure: str, count: int = 10) -> xr.Dataset:
        """The statistics of the tensors whose `figure` ("nan", "max", "update_ratio", …) is largest in magnitude
        anywhere, the largest first; tensors without it are left out."""
        found = self._statistics()
        if figure not in found or found[figure].dtype.kind not in "iuf" or "tensor" not in found[figure].dims:
            known = [str(n) for n, v in found.data_vars.items() if v.dtype.kind in "iuf" and "tensor" in v.dims]
            raise CheckpointError(f"no figure {figure!r} of each tensor: there are {', '.join(known)}")
        there = found[figure].where(found["elements"] >= 0)
        sizes = abs(there).max([d for d in there.dims if d != "tensor"])
        order = (-sizes).argsort().values  # NaN last
        return found.isel(tensor=order[: min(count, int(sizes.notnull().sum()))])

    def plot(self, kind: str = "norms", **options: Any) -> Figure:
        """A plot of `ckptlab.plots`: "norms", "histograms", "drift" or "spectrum", with its options."""
        if kind not in PLOTS:
            raise CheckpointError(f"no plot {kind!r}: expected one of {', '.join(PLOTS)}")
        plots = import_module("ckptlab.analysis.plots")  # by name: it stands above the statistics that register this
        drawn: Figure = getattr(plots, kind)(self._statistics(), **options)
        return drawn
