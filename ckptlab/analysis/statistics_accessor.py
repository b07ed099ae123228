"""What a Dataset of statistics can say of itself: `found.stats` is its table, in a notebook with small plots."""

from __future__ import annotations

from typing import Any

import xarray as xr


@xr.register_dataset_accessor("stats")
class Statistics:
    """The statistics in a Dataset that `ckptlab.stats` or `ckptlab.adam` made, for people: a table, plots, plain
    values."""

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
