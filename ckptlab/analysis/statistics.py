"""`stats`: what the numbers of every tensor are like, in one pass over them, as one Dataset.

Tensor by tensor and window by window: memory stays near a window for each thread, whatever the checkpoint's size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr

from ckptlab import pool
from ckptlab.analysis.accumulate import accumulator
from ckptlab.analysis.elements import WINDOW
from ckptlab.analysis.partial import Bins, Partial, merged
from ckptlab.analysis.row import Row
from ckptlab.analysis.rows import View, rows_of
from ckptlab.analysis.spectra import Spectrum, spectrum_of
from ckptlab.analysis.windows import Array, Span, spans
from ckptlab.arguments import explained, positive
from ckptlab.arrays.coordinates import ranks
from ckptlab.catalog import MASTER, PARAM
from ckptlab.errors import CheckpointError
from ckptlab.pool import Workers
from ckptlab.views import accessor  # noqa: F401  (what the Dataset can say of itself)
from ckptlab.words import shape_text

TOP = 16  # singular values that are kept, if not said

_COUNTS: dict[str, Callable[[Partial], int]] = {
    "elements": lambda p: p.count,
    "nan": lambda p: p.nan,
    "inf": lambda p: p.inf,
    "zeros": lambda p: p.zeros,
    "subnormals": lambda p: p.subnormals,
}
_FIGURES: dict[str, tuple[Callable[[Partial], float], str]] = {
    "norm": (lambda p: p.norm, "Euclidean norm of the finite elements"),
    "mean": (lambda p: p.mean if p.finite else np.nan, "mean of the finite elements"),
    "std": (lambda p: p.std, "standard deviation of the finite elements, as a population (ddof=0)"),
    "min": (lambda p: p.low if p.finite else np.nan, "smallest finite element"),
    "max": (lambda p: p.high if p.finite else np.nan, "largest finite element"),
    "zero_share": (lambda p: p.zeros / p.count if p.count else np.nan, "share of elements that are 0 or -0"),
    "subnormal_share": (
        lambda p: p.subnormals / p.count if p.count else np.nan,
        "share of elements that are subnormal in the stored dtype, and not 0",
    ),
}
_BY: dict[str, Callable[[Row], str]] = {
    "tensor": lambda row: row.name,
    "layer": lambda row: row.stack,
    "stack": lambda row: row.stack,
    "kind": lambda row: row.kind,
    "model": lambda row: "buffers" if row.kind == "buffer" else "parameters",
}


@explained
def stats(
    view: View,
    *,
    by: str = "tensor",
    states: Sequence[str] | None = None,
    histogram: bool | Sequence[float] = True,
    spectrum: bool | int = False,
    progress: bool = False,
    on: Workers = None,
    window: int = WINDOW,
) -> xr.Dataset:
    """What the numbers of every tensor are like, as one Dataset with the dims (tensor, state).

    view: a checkpoint or its path, a view of one (`full()`, `shards()`: with a dim more for each mesh axis that it
    has), by name or as a tree, a node of it, an array, or a run (with a dim `step` more). Dask's arrays are taken block
    by block on dask's scheduler; everything else is streamed, in windows of so many elements. on: how many threads
    (None: as many as there are cores), an executor or a dask client. The result is the same on all.

    by: what a row of `tensor` is. "tensor": one tensor, by the model's name, with the coordinates stack (the name that
    it shares with other layers), layer (its number, -1 where it stands alone), kind, group, pp, layout, shape (as text)
    and numel. "layer": stacks, with a dim `layer` more (NaN where a stack has no such layer; a lone tensor stands at
    -1). "stack" and "kind": all tensors of a stack, of a kind taken together; "model": all parameters, frozen ones too,
    in one row, all buffers in another.

    Variables: present (whether a tensor has that state); elements, and how many of them are nan, inf, zeros, subnormals
    (0 where it is not present, so that they add up);
    norm, mean, std, min, max (of the finite elements: what is not finite is counted and left out; NaN where there is
    none); zero_share, subnormal_share (of all elements); dtype (text, "" where there is no such state). xarray has
    methods called mean, std, min and max: take `found["std"]`. `found.ckptlab` has a table, `worst` and `plot`.

    histogram: True for counts of the finite elements in octaves, the same ones for all (dims tensor, state, bin;
    coordinates bin, bin_low, bin_high; see `Bins`; without the octaves that are larger or smaller than any element);
    ascending edges for counts between those, exact but slower; False for none.

    spectrum: of every tensor that is a matrix or more (the first dim against the others together) the largest singular
    values, 16 or as many as are said (dims tensor, state, rank, filled with NaN), stable_rank and effective_rank; see
    `spectra` for how exact they are. spectrum_exact says whether all singular values were computed. Not for rows of
    several tensors. They take far longer than all the rest: on two cores some two seconds for a million elements.

    Sums are float64. Raises CheckpointError for a state or `by` that there is not, or where there is no tensor.
    """
    if by not in _BY:
        raise CheckpointError(f"by={by!r}: expected one of {', '.join(_BY)}")
    if spectrum and by not in ("tensor", "layer"):
        raise CheckpointError(f"by={by!r}: a row of several tensors has no spectrum: take by='tensor' or 'layer'")
    window = positive("window", window)
    rows = rows_of(view, states)
    bins = _bins(histogram)
    if spectrum:
        most = max(TOP, *(math.isqrt(row.numel) for row in rows))  # no matrix has more
        top = TOP if spectrum is True else min(int(spectrum), most)
        if top < 1:
            raise CheckpointError(f"spectrum={spectrum}: expected True, or how many singular values, from 1")
    parts = partials(rows, bins, progress=progress, on=on, window=window)
    table = _Table(rows, by)
    found = table.dataset(parts, bins)
    if spectrum:
        found = found.assign(table.spectra(_spectra(rows, parts, top, window, progress, on), top))
    return found


@dataclass(frozen=True)
class _Task:
    """Some of the elements of a row, the row's number, and what is to be found out."""

    index: int
    span: Span
    dtype: np.dtype
    bins: Bins | None

    def run(self) -> tuple[int, Partial]:
        taken = accumulator(self.dtype, self.bins)
        for window in self.span.windows():
            taken.add(window)
        return self.index, taken.result()


def partials(
    rows: Sequence[Row],
    bins: Bins | None = None,
    *,
    progress: bool = False,
    on: Workers = None,
    window: int = WINDOW,
) -> list[Partial]:
    """The statistics of each row, all of them in one pass."""
    dask_rows = {i for i, row in enumerate(rows) if getattr(row.array, "chunks", None)}
    found = dict(zip(sorted(dask_rows), _of_dask([rows[i] for i in sorted(dask_rows)], bins), strict=True))
    own = [(i, row.array) for i, row in enumerate(rows) if i not in dask_rows]
    tasks = (_Task(i, span, array.dtype, bins) for i, array in own for span in spans(array, window))
    parts: dict[int, list[Partial]] = {}
    with pool.progress(sum(rows[i].numel for i, _ in own), "statistics", " elements", progress) as bar:
        for i, part in pool.run(_Task.run, tasks, on=on, size=lambda task: task.span.count, bar=bar):
            parts.setdefault(i, []).append(part)
    none = Partial(histogram=None if bins is None else np.zeros(bins.size, np.int64))
    return [found.get(i) or merged([none, *parts.get(i, ())]) for i in range(len(rows))]


def _of_dask(rows: Sequence[Row], bins: Bins | None) -> list[Partial]:
    """The same of dask's arrays, on dask's scheduler, block by block."""
    if not rows:
        return []
    import dask

    from ckptlab.analysis.accumulate import partial

    of_block = dask.delayed(partial, pure=True)
    arrays = [row.array.data for row in rows if isinstance(row.array, xr.Variable)]
    blocks = [[of_block(block, bins) for block in array.to_delayed().ravel()] for array in arrays]
    return [merged(parts) for parts in dask.compute(blocks)[0]]


def _bins(histogram: bool | Sequence[float]) -> Bins | None:
    if isinstance(histogram, bool):
        return Bins() if histogram else None
    try:
        edges = np.asarray(list(histogram), np.float64)
    except (TypeError, ValueError):
        edges = np.zeros(0)
    if edges.ndim != 1 or len(edges) < 2 or not np.all(np.diff(edges) > 0):
        raise CheckpointError(f"histogram={histogram!r}: expected True, False or ascending edges, two at least")
    return Bins(tuple(edges.tolist()))


def _spectra(
    rows: Sequence[Row], parts: Sequence[Partial], top: int, window: int, progress: bool, on: Workers
) -> Iterator[tuple[Row, Spectrum | None]]:
    every = enumerate(zip(rows, parts, strict=True))
    finite = [(i, row, part) for i, (row, part) in every if part.finite == part.count > 0]
    tasks = (_Values(i, row.array, top, part.norm, window) for i, row, part in finite)
    with pool.progress(sum(row.numel for _, row, _ in finite), "spectra", " elements", progress) as bar:
        for i, spectrum in pool.run(_Values.run, tasks, on=on, size=lambda task: rows[task.index].numel, bar=bar):
            yield rows[i], spectrum


@dataclass(frozen=True)
class _Values:
    """A tensor whose singular values are to be found, and its row's number."""

    index: int
    array: Array
    top: int
    norm: float
    window: int

    def run(self) -> tuple[int, Spectrum | None]:
        return self.index, spectrum_of(self.array, self.top, self.norm, self.window)


# -------------------------------------------------------------------------------- the Dataset


class _Table:
    """Where each row stands in the Dataset: its place along every dim."""

    def __init__(self, rows: Sequence[Row], by: str) -> None:
        self._rows, self._by = rows, by
        self._members: dict[str, list[Row]] = {}
        for row in rows:
            self._members.setdefault(_BY[by](row), []).append(row)
        self._axes = tuple(dict.fromkeys(axis for row in rows for axis in row.ranks))
        self.labels = self._labels()
        self._index: dict[str, dict[Any, int]] = {d: {x: i for i, x in enumerate(v)} for d, v in self.labels.items()}

    def _labels(self) -> dict[str, list[Any]]:
        """Dim → its labels, in the order of the dims."""
        steps = {row.step for row in self._rows} - {None}
        layers = {row.layer for row in self._rows} if self._by == "layer" else set()
        rank = {MASTER: 0, PARAM: 2}
        states = dict.fromkeys(row.state for row in self._rows)
        found: dict[str, list[Any]] = {
            "step": sorted(steps),
            "tensor": list(self._members),
            "layer": sorted(layers),
            **{axis: sorted({row.ranks[axis] for row in self._rows if axis in row.ranks}) for axis in self._axes},
            "state": sorted(states, key=lambda state: (rank.get(state, 1), state)),
        }
        return {dim: labels for dim, labels in found.items() if labels}

    @property
    def dims(self) -> tuple[str, ...]:
        return tuple(self.labels)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(map(len, self.labels.values()))

    def place(self, row: Row) -> tuple[int, ...]:
        """The row's index along each dim."""
        own = {"step": row.step, "layer": row.layer, "state": row.state, **row.ranks, "tensor": _BY[self._by](row)}
        return tuple(self._index[dim].get(own.get(dim), 0) for dim in self.dims)

    def dataset(self, parts: Sequence[Partial], bins: Bins | None) -> xr.Dataset:
        """Everything but the spectra."""
        at: dict[tuple[int, ...], Partial] = {}
        dtypes = np.full(self.shape, "", object)
        for row, part in zip(self._rows, parts, strict=True):
            place = self.place(row)
            at[place] = at[place].merge(part) if place in at else part
            told = str(row.array.dtype)
            dtypes[place] = told if dtypes[place] in ("", told) else "mixed"
        variables: dict[str, Any] = {}
        variables["present"] = self.dims, self._filled(at, lambda _: True, False)
        for name, count in _COUNTS.items():
            variables[name] = self.dims, self._filled(at, count, 0)
        for name, (figure, meaning) in _FIGURES.items():
            variables[name] = self.dims, self._filled(at, figure, np.nan), {"long_name": meaning}
        variables["dtype"] = self.dims, dtypes.astype(str)
        coordinates: dict[str, Any] = {
            **self.labels,
            **ranks({axis: self.labels[axis] for axis in self._axes}),
            **self._coordinates(),
        }
        if bins is not None:
            counts, more = self._histograms(at, bins)
            variables["histogram"] = (*self.dims, "bin"), counts, {"long_name": "finite elements in the bin"}
            coordinates.update(more)
        return xr.Dataset(variables, coordinates, {"by": self._by})

    def _filled(self, at: dict[tuple[int, ...], Partial], figure: Callable[[Partial], Any], missing: Any) -> np.ndarray:
        array = np.full(self.shape, missing)
        for place, part in at.items():
            array[place] = figure(part)
        return array

    def _coordinates(self) -> dict[str, Any]:
        firsts = [rows[0] for rows in self._members.values()]
        if self._by not in ("tensor", "layer"):
            return {}
        told: dict[str, list[Any]] = {
            "kind": [row.kind for row in firsts],
            "group": [row.group for row in firsts],
            "layout": [row.layout for row in firsts],
            "shape": [shape_text(row.array.shape) for row in firsts],
            "numel": [row.numel for row in firsts],
        }
        if self._by == "tensor":
            told["stack"] = [row.stack for row in firsts]
            told["layer"] = [row.layer for row in firsts]
            told["pp"] = [row.pp for row in firsts]
        return {name: ("tensor", values) for name, values in told.items()}

    def _histograms(self, at: dict[tuple[int, ...], Partial], bins: Bins) -> tuple[np.ndarray, dict[str, Any]]:
        """Counts (*dims, bin) and the bins' coordinates; octaves without those beyond all elements."""
        counts = np.zeros((*self.shape, bins.size), np.int64)
        for place, part in at.items():
            if part.histogram is not None:
                counts[place] = part.histogram
        low, high = bins.bounds()
        if bins.edges is None:
            kept = _kept(np.asarray(counts.reshape(-1, bins.size).any(0)))
            counts, low, high = counts[..., kept], low[kept], high[kept]
        return counts, {"bin": _centres(low, high), "bin_low": ("bin", low), "bin_high": ("bin", high)}

    def spectra(self, found: Iterator[tuple[Row, Spectrum | None]], top: int) -> dict[str, xr.Variable]:
        """The variables of the spectra."""
        values = np.full((*self.shape, top), np.nan)
        stable, effective = np.full(self.shape, np.nan), np.full(self.shape, np.nan)
        exact = np.zeros(self.shape, bool)
        for row, spectrum in found:
            if spectrum is None:
                continue
            place = self.place(row)
            values[place][: len(spectrum.values)] = spectrum.values
            stable[place], effective[place] = spectrum.stable_rank, spectrum.effective_rank
            exact[place] = spectrum.exact
        return {
            "singular_values": xr.Variable((*self.dims, "rank"), values, {"long_name": "largest singular values"}),
            "stable_rank": xr.Variable(self.dims, stable, {"long_name": "stable rank"}),
            "effective_rank": xr.Variable(self.dims, effective, {"long_name": "effective rank"}),
            "spectrum_exact": xr.Variable(self.dims, exact),
        }


def _kept(held: np.ndarray) -> np.ndarray:
    """Which octaves to show: of each sign that has elements, from the smallest to the largest of both; and zero."""
    middle = len(held) // 2
    sides = held[middle - 1 :: -1], held[middle + 1 :]  # ascending in magnitude
    magnitudes = np.flatnonzero(sides[0] | sides[1])
    within = np.zeros(middle, bool)
    if len(magnitudes):
        within[magnitudes[0] : magnitudes[-1] + 1] = True
    negative, positive = (within & side.any() for side in sides)
    return np.concatenate([negative[::-1], [True], positive])


def _centres(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """A number inside each bin: the middle, of an open one its finite edge."""
    middle = (low + high) / 2
    return np.where(np.isfinite(middle), middle, np.where(np.isfinite(low), low, high))
