"""`.ckptlab` of xarray's Datasets and trees: what that of a DataArray does (`arrays.operations`), of every variable at
once; and of a Dataset of statistics its table, its worst rows, its plots."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np
import xarray as xr

from ckptlab.arguments import explained
from ckptlab.arrays.backends import Backend
from ckptlab.arrays.operations import Accessor
from ckptlab.errors import CheckpointError, LayoutError
from ckptlab.layout import Layout
from ckptlab.mesh import Mesh
from ckptlab.plain import plain
from ckptlab.registry import Registry
from ckptlab.shown import Shown

if TYPE_CHECKING:
    from matplotlib.figure import Figure

T = TypeVar("T")

PLOTS: Registry[Callable[..., Figure]] = Registry(
    "plot",
    "ckptlab.plots",
    CheckpointError,
    {name: f"ckptlab.analysis.plots:{name}" for name in ("norms", "histograms", "drift", "spectrum")},
)
"""What draws a Dataset of statistics, (Dataset, **options) → Figure."""

INNER = ("bin", "rank")  # dims that are no key of a row


class Table(Shown):
    """Statistics for people: in a notebook with small plots, in a terminal as text."""

    def __init__(self, dataset: xr.Dataset) -> None:
        self.dataset = dataset

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as `ckptlab stats --json` prints them: {by, dims, rows: [{a key for each dim, coordinate and
        variable}]}; what is infinite or NaN is text, histograms are lists of [low, high, count] of the bins that hold
        something."""
        found = self.dataset
        keys = row_keys(found)
        names = (*keys, *found.coords, *found.data_vars)
        told = {str(name): found[name] for name in names if name not in (*INNER, "present")}
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


@explained
class _Each(ABC, Generic[T]):
    """The operations on arrays, of every variable of a thing."""

    def __init__(self, held: T) -> None:
        self._held = held

    @abstractmethod
    def _map(self, change: Callable[[xr.DataArray], xr.DataArray]) -> T:
        """The same with every variable changed."""

    def merge(self, layout: Layout | str | None = None, **options: Any) -> T:
        """The wholes that these shards make: `ckptlab.merge` of every variable, by the layout of each where none is
        given."""
        return self._map(lambda array: Accessor(array).merge(layout, **options))

    def split(self, layout: Layout | str | Mesh | None = None, mesh: Mesh | None = None, **options: Any) -> T:
        """The shards of these wholes on a mesh: `ckptlab.split` of every variable; the mesh alone does where they have
        layouts."""
        return self._map(lambda array: Accessor(array).split(layout, mesh, **options))

    def to(self, backend: Backend | str | None = None, device: Any = None) -> T:
        """The same on a backend and device: `ckptlab.to` of every variable."""
        return self._map(lambda array: Accessor(array).to(backend, device))


@explained
@xr.register_datatree_accessor("ckptlab")
class TreeAccessor(_Each[xr.DataTree]):
    """`.ckptlab` of every DataTree: the operations of `ckptlab.merge`, `split` and `to` on all its variables."""

    def _map(self, change: Callable[[xr.DataArray], xr.DataArray]) -> xr.DataTree:
        return self._held.map_over_datasets(lambda node: node.map(change, keep_attrs=True) if len(node) else node)


@explained
@xr.register_dataset_accessor("ckptlab")
class DatasetAccessor(_Each[xr.Dataset]):
    """`.ckptlab` of every Dataset: the operations of `ckptlab.merge`, `split` and `to` on all its variables; of one
    that `ckptlab.stats` or `ckptlab.updates` made its table and plots, CheckpointError on any other."""

    def _map(self, change: Callable[[xr.DataArray], xr.DataArray]) -> xr.Dataset:
        return self._held.map(change, keep_attrs=True)

    @property
    def layout(self) -> Layout:
        """The layout of its variables. LayoutError where they have none, or not one and the same."""
        found = list({layout: None for array in self._held.values() for layout in (Accessor(array).layout,)})
        if len(found) != 1:
            raise LayoutError(f"its variables have {len(found)} layouts: take that of one of them")
        return found[0]

    def _statistics(self) -> xr.Dataset:
        if "elements" not in self._held or "tensor" not in self._held.dims:
            held = ", ".join(map(str, self._held.data_vars)) or "nothing"
            raise CheckpointError(f"no Dataset of statistics (it holds {held}): ckptlab.stats makes one of it")
        return self._held

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
        there = found[figure].where(_there(found))
        sizes = abs(there).max([d for d in there.dims if d != "tensor"])
        order = (-sizes).argsort().values  # NaN last
        return found.isel(tensor=order[: min(count, int(sizes.notnull().sum()))])

    def plot(self, kind: str = "norms", **options: Any) -> Figure:
        """A plot by its name, "norms", "histograms", "drift", "spectrum" or a package's, with its options."""
        return PLOTS.get(kind)(self._statistics(), **options)


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
    return found["present"] if "present" in found else xr.ones_like(found["elements"], bool)


def row_count(found: xr.Dataset) -> int:
    """How many rows there are."""
    return int(_there(found).sum())
