"""Plots that a person would make anyway, each in one call: norms over depth, histograms, drift, spectra.

Each takes what `ckptlab.stats` gave, or what it takes (a checkpoint, a view, a run), and returns matplotlib's Figure,
of which nothing has been shown or saved. matplotlib is loaded when a plot is made. Colours are those of Okabe and Ito
("Color universal design", 2008) and matplotlib's viridis and PuOr, which colour-blind people tell apart.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from ckptlab.analysis.rows import View
from ckptlab.analysis.statistics import stats
from ckptlab.arguments import explained
from ckptlab.arrays.coordinates import rank_dims
from ckptlab.checkpoint import Checkpoint
from ckptlab.draw.pyplot import pyplot
from ckptlab.errors import CheckpointError, InputError
from ckptlab.words import shorten

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["drift", "histograms", "norms", "spectrum"]

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000", "#8A8A8A")
MARKERS = "osD^vP*X"  # one for each colour
LINES = 8  # stacks that one panel of norms names
ROWS = 60  # tensors that a heat map shows
FARTHEST = 10.0  # log2 of a ratio that is drawn like every larger one
ROUNDING = 1e-12  # log2 of a ratio that sums in float64 may give where nothing drifts
SPARSE = 1e-3  # share of all elements below which octaves around 0 are drawn as one


@explained
def norms(
    found: View | xr.Dataset, *, tensors: str | None = None, states: Sequence[str] | None = None, over: str = "layer"
) -> Figure:
    """The norm of every stack of layers over depth, a panel for each state, on a logarithmic axis.

    over: "step" draws it over the steps of a run instead, all layers of a stack together; otherwise a run's last step
    is shown. Of `shards()` a norm is the mean of those of the tp ranks, and the plot says so. tensors: a regular
    expression that names must hold; without it the 8 largest stacks are shown.
    CheckpointError where no tensor is one of several layers, or of steps where there is no run.
    """
    if over not in ("layer", "step"):
        raise CheckpointError(f"over={over!r}: expected 'layer' or 'step'")
    table = _only(_statistics(found, ["norm", "layer"]), tensors)
    values = _over_steps(table) if over == "step" else _over_layers(table)
    wanted = _states(values.to_dataset(name="norm"), states)
    values = _largest(table, values)
    figure, axes = _panels(len(wanted), sharex=True)
    mean = _mean_of(rank_dims(table))
    for axis, state in zip(axes, wanted, strict=True):
        for i, name in enumerate(values["tensor"].values):
            y = values.sel(tensor=name, state=state)
            look: dict[str, Any] = {"color": COLOURS[i], "marker": MARKERS[i], "markersize": 4}
            axis.plot(values[over], y, label=shorten(str(name), 36), **look)
        _logarithmic(axis)
        axis.set(title=state, xlabel=over, ylabel="norm" + mean)
        axis.xaxis.set_major_locator(pyplot().MaxNLocator(integer=True))
    _legend(figure, axes[0], f"Norms by {over}{mean}" + (_of_step(table) if over == "layer" else ""))
    return figure


@explained
def histograms(
    found: View | xr.Dataset,
    *,
    tensors: str | None = None,
    states: Sequence[str] | None = None,
    over: str | None = None,
) -> Figure:
    """How the elements are distributed over powers of two, a panel for each state; of a run, a line for each step.

    tensors: a regular expression that names must hold; the elements of all that do are counted together. over: another
    dim ("tp", "layer", "tensor") to draw a line for each of. Bins lie side by side: negative octaves, positive ones,
    and between them one for 0 and for those octaves next to it that together hold less than 0.1 % of the elements.
    So a bell curve shows two humps: the octaves near 0 are narrow, and few elements are in them.
    """
    table = _only(_statistics(found, ["histogram"]), tensors)
    if over is None:
        over = "step" if "step" in table.dims else None
    if over is not None and over not in table["histogram"].dims:
        raise CheckpointError(f"over={over!r}: these statistics have {', '.join(map(str, table['histogram'].dims))}")
    wanted = _states(table, states)
    figure, axes = _panels(len(wanted))
    for axis, state in zip(axes, wanted, strict=True):
        every = table["histogram"].sel(state=state)
        counts = every.sum([dim for dim in every.dims if dim not in ("bin", over)])
        if not int(counts.sum()):
            axis.set(title=f"{state}: no elements")
            continue
        counts = _gathered(counts.transpose(..., "bin"))
        lines = [(None, counts)] if over is None else [(k, counts.sel({over: k})) for k in counts[over].values]
        for i, (key, line) in enumerate(lines):
            share = line.values / max(int(line.sum()), 1)
            look = {"color": _shade(i, len(lines))}
            look |= {"fill": True, "alpha": 0.7} if key is None else {"linewidth": 1.6, "label": f"{over} {key}"}
            axis.stairs(share, **look)
        _bin_ticks(axis, counts)
        axis.set(title=state, xlabel="element", ylabel="share of the elements", ylim=(0, None))
    _legend(figure, axes[0], "Distribution of the elements" + (f", {tensors}" if tensors else ""))
    return figure


@explained
def drift(
    found: View | xr.Dataset,
    *,
    state: str | None = None,
    statistic: str = "norm",
    over: str | None = None,
    tensors: str | None = None,
    replicas: bool = False,
) -> Figure:
    """A heat map (tensor × rank): how far each rank's shard lies from the median of all, as a ratio of two.

    over: a mesh axis (of the shards view) or "step" (of a run: how far from the first one); by default whichever there
    is. state: the master weight if not said. statistic: "norm", "std", "max", … A checkpoint is looked at through
    `shards()`. replicas: only tensors that every rank holds whole, which should not drift at all; shards of those
    that are cut differ anyway. The 60 tensors that drift most are shown, the one that does so most on top.
    """
    if isinstance(found, Checkpoint):
        found = found.shards()
    table = _statistics(found, [])
    if statistic not in table or "state" not in table[statistic].dims or table[statistic].dtype.kind not in "iuf":
        raise CheckpointError(f"statistic={statistic!r}: expected 'norm', 'std', 'max' or another figure of a tensor")
    table = _only(table, tensors)
    over = over or next((str(d) for d in ("step", *rank_dims(table)) if d in table.dims), "tp")
    if over not in table.dims:
        raise CheckpointError(f"over={over!r}: take shards() of a checkpoint for an axis, or a run (open_run) for step")
    if replicas:
        table = table.isel(tensor=_replicated(table))
    state = _states(table, None if state is None else [state])[0]
    sizes = abs(table[statistic].sel(state=state))
    averaged = [str(dim) for dim in sizes.dims if dim not in ("tensor", over)]
    values = sizes.mean(averaged).transpose("tensor", over)
    reference = values.isel({over: 0}) if over == "step" else values.median(over)
    ratio = (values / reference).where(reference > 0)
    with np.errstate(divide="ignore"):
        apart = ratio.copy(data=np.log2(ratio.values)).clip(-FARTHEST, FARTHEST)
    most = abs(apart).max(over).fillna(-1).values
    shown = np.argsort(-most, kind="stable")[:ROWS]
    apart = apart.isel(tensor=shown[most[shown] >= 0])
    figure, (axis,) = _panels(1, width=4.5 + 0.35 * apart.sizes[over], height=1.6 + 0.2 * max(apart.sizes["tensor"], 4))
    limit = max(float(abs(apart).max()) if apart.size else 0.0, ROUNDING)
    image = axis.imshow(apart, cmap="PuOr", vmin=-limit, vmax=limit, aspect="auto", interpolation="nearest")
    axis.set_yticks(range(apart.sizes["tensor"]), [shorten(str(n), 44) for n in apart["tensor"].values], fontsize=7)
    axis.set_xticks(range(apart.sizes[over]), [str(k) for k in apart[over].values])
    against = f"{over} {table[over].values[0]}" if over == "step" else f"the median over {over}"
    axis.set(xlabel=over if over == "step" else f"{over} rank")
    if not (abs(apart) > ROUNDING).any():
        axis.set_title("no drift", fontsize=9)
    figure.suptitle(f"Drift of {statistic}{_mean_of(averaged)}, {state}" + (", replicas" if replicas else ""))
    figure.colorbar(image, ax=axis, label=f"log2 of the ratio to {against}")
    return figure


@explained
def spectrum(
    found: View | xr.Dataset, *, tensors: str | None = None, state: str | None = None, top: int = 64
) -> Figure:
    """The largest singular values of each matrix by rank, relative to the first, on logarithmic axes.

    tensors: a regular expression that names must hold; without it the 8 matrices with the most elements are shown.
    state: the master weight if not said. top: how many values are computed, where `found` does not hold them.
    """
    if not isinstance(found, xr.Dataset) or "singular_values" not in found:
        found = stats(found, spectrum=top, histogram=False, states=None if state is None else [state])
    table = _last_step(_only(found, tensors))
    state = _states(table, None if state is None else [state])[0]
    values = table["singular_values"].sel(state=state)
    matrices = [str(n) for n in values["tensor"].values if np.isfinite(values.sel(tensor=n)).any()]
    if not matrices:
        raise CheckpointError(f"no tensor here is a matrix with a spectrum of {state}")
    sizes = table["numel"] if "numel" in table.coords else xr.zeros_like(table["tensor"], int)
    matrices = sorted(matrices, key=lambda name: -int(sizes.sel(tensor=name)))[:LINES]
    figure, (axis,) = _panels(1, width=6.5, height=4.2)
    for i, name in enumerate(matrices):
        one = values.sel(tensor=name)
        axes = rank_dims(one)
        lines = one.stack(at=axes).transpose("at", ...) if axes else [one]
        for t, line in enumerate(lines):
            y = line.values[np.isfinite(line.values)]
            label = shorten(name, 36) if t == 0 else None
            colour, marker = COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]
            axis.plot(np.arange(1, len(y) + 1), y / y[0], color=colour, marker=marker, markersize=3, label=label)
    axis.set(xscale="log", xlabel="rank of the singular value", ylabel="relative to the largest", ylim=(None, 1.05))
    if axis.get_ylim()[0] < 0.05:
        _logarithmic(axis)
    else:
        axis.set_ylim(0, 1.05)
    _legend(figure, axis, f"Spectrum, {state}")
    return figure


def __dir__() -> list[str]:
    return sorted(__all__)


# ------------------------------------------------------------------ what the plots share


def _statistics(found: Any, needed: Sequence[str]) -> xr.Dataset:
    """The statistics themselves, or those of whatever they are of."""
    if isinstance(found, xr.Dataset) and "elements" in found:
        missing = [name for name in needed if name not in found.variables]
        if missing:
            raise CheckpointError(f"these statistics have no {missing[0]!r}: take others, or give what they are of")
        return found
    return stats(found, histogram="histogram" in needed)


def _over_layers(table: xr.Dataset) -> xr.DataArray:
    """Norms with the dims (tensor: stack, layer, state), of a run at its last step, the mean of tp ranks."""
    deep = _last_step(_by_layer(table))
    if "layer" in deep.dims:
        deep = deep.isel(layer=deep["layer"].values >= 0)
    if "layer" not in deep.dims or not deep.sizes["layer"] or not deep.sizes["tensor"]:
        raise CheckpointError("no tensor here is one of several layers: there is no curve over depth to draw")
    return _norms_of_ranks(deep)


def _over_steps(table: xr.Dataset) -> xr.DataArray:
    """Norms with the dims (tensor: stack, step, state): of all layers of a stack together."""
    if "step" not in table.dims:
        raise CheckpointError("over='step': take a run (open_run), or statistics of one")
    squares = _norms_of_ranks(table) ** 2
    if "layer" in squares.dims:
        squares = squares.sum("layer", min_count=1)
    elif "stack" in table.coords:
        of_stack = xr.DataArray(table["stack"].values, dims="tensor", name="of_stack")
        squares = squares.groupby(of_stack).sum(min_count=1).rename(of_stack="tensor")
        squares = squares.sel(tensor=list(dict.fromkeys(table["stack"].values)))
    return squares**0.5


def _largest(table: xr.Dataset, values: xr.DataArray) -> xr.DataArray:
    """The stacks that have the most elements, in their own order."""
    sizes: dict[str, int] = dict.fromkeys(map(str, values["tensor"].values), 0)
    counts = table["elements"].max([d for d in table["elements"].dims if d != "tensor"])
    for name, count in zip(table["stack" if "stack" in table.coords else "tensor"].values, counts.values, strict=True):
        if name in sizes:
            sizes[str(name)] += int(count)
    kept = set(sorted(sizes, key=lambda name: -sizes[name])[:LINES])
    return values.isel(tensor=[i for i, name in enumerate(sizes) if name in kept])


def _mean_of(dims: Sequence[str]) -> str:
    return f" (mean over {', '.join(dims)})" if dims else ""


def _norms_of_ranks(table: xr.Dataset) -> xr.DataArray:
    values = table["norm"].reset_coords(drop=True)
    return values.mean(rank_dims(values))


def _by_layer(table: xr.Dataset) -> xr.Dataset:
    """Norms with the dims (tensor: stack, layer, …) out of those by tensor."""
    if "layer" in table.dims:
        return table
    deep = table.isel(tensor=table["layer"].values >= 0)
    pairs = list(zip(deep["stack"].values, deep["layer"].values, strict=True))
    stacks, layers = list(dict.fromkeys(s for s, _ in pairs)), sorted({int(n) for _, n in pairs})
    values = deep["norm"].transpose("tensor", ...)
    filled = np.full((len(stacks), len(layers), *values.shape[1:]), np.nan)
    for (stack, layer), value in zip(pairs, values.values, strict=True):
        filled[stacks.index(stack), layers.index(int(layer))] = value
    rest = {dim: table[dim] for dim in values.dims[1:]}
    return xr.Dataset(
        {"norm": (("tensor", "layer", *values.dims[1:]), filled)}, {"tensor": stacks, "layer": layers, **rest}
    )


def _only(table: xr.Dataset, tensors: str | None) -> xr.Dataset:
    """The tensors whose names hold a pattern. CheckpointError, with some names, if none does."""
    if tensors is None:
        return table
    try:
        pattern = re.compile(tensors)
    except re.error as error:
        raise InputError(f"tensors={tensors!r} is no regular expression: {error}") from None
    kept = [i for i, name in enumerate(table["tensor"].values) if pattern.search(str(name))]
    if not kept:
        names = ", ".join(map(str, table["tensor"].values[:4]))
        raise CheckpointError(f"no tensor's name matches {tensors!r}: there are {names}, …")
    return table.isel(tensor=kept)


def _replicated(table: xr.Dataset) -> list[int]:
    """Which tensors no mesh axis cuts, by their layouts. CheckpointError where there is none."""
    if "layout" not in table.coords:
        raise CheckpointError("replicas=True: these statistics do not tell layouts: take them of shards()")
    found = [i for i, text in enumerate(table["layout"].values) if text and not re.search(r"\btp\b", str(text))]
    if not found:
        raise CheckpointError("replicas=True: every tensor here is cut over tp")
    return found


def _states(table: xr.Dataset, states: Sequence[str] | None) -> list[str]:
    known = [str(state) for state in table["state"].values]
    wanted = known if states is None else [states] if isinstance(states, str) else list(states)
    unknown = [state for state in wanted if state not in known]
    if unknown or not wanted:
        raise CheckpointError(f"no state {unknown[0] if unknown else ''!r}: there are {', '.join(known)}")
    return wanted


def _last_step(table: xr.Dataset) -> xr.Dataset:
    return table.isel(step=-1) if "step" in table.dims else table


def _of_step(table: xr.Dataset) -> str:
    return f", step {int(table['step'].values[-1])}" if "step" in table.dims else ""


def _panels(count: int, width: float = 0.0, height: float = 0.0, **options: Any) -> tuple[Figure, list[Axes]]:
    """A figure of some panels, two in a row."""
    columns = min(count, 2)
    rows = math.ceil(count / columns)
    size = (width or 4.8 * columns, height or 3.2 * rows + 0.6)
    figure, axes = pyplot().subplots(rows, columns, figsize=size, squeeze=False, layout="constrained", **options)
    flat = list(axes.ravel())
    for empty in flat[count:]:
        empty.set_visible(False)
    return figure, flat[:count]


def _logarithmic(axis: Axes) -> None:
    """A logarithmic y axis, where something on it is above 0."""
    if any((np.asarray(line.get_ydata(), float) > 0).any() for line in axis.get_lines()):
        axis.set_yscale("log")
    axis.grid(True, alpha=0.25, linewidth=0.6)


def _legend(figure: Figure, axis: Axes, title: str) -> None:
    handles, labels = axis.get_legend_handles_labels()
    if labels:
        columns = min(len(labels), max(int(figure.get_figwidth() / 3), 1))
        figure.legend(handles, labels, loc="outside lower center", ncols=columns, fontsize=8, frameon=False)
    figure.suptitle(title)


def _shade(i: int, of: int) -> Any:
    """The i-th of some colours: told apart if they are few, a ramp if they are many."""
    if of <= len(COLOURS):
        return COLOURS[i]
    return pyplot().colormaps["viridis"](0.95 * i / (of - 1))


def _gathered(counts: xr.DataArray) -> xr.DataArray:
    """Counts (…, bin) without empty bins at the ends, and with the sparse octaves around 0 in the bin for 0."""
    low, high = counts["bin_low"].values, counts["bin_high"].values
    total = counts.values.reshape(-1, len(low)).sum(0)
    zero = np.flatnonzero((low == 0) & (high == 0))
    values = counts.values
    kept = np.ones(len(low), bool)
    if len(zero):
        magnitude = np.maximum(np.abs(low), np.abs(high))
        order = np.unique(magnitude)
        inside = np.array([total[(magnitude <= m) & (magnitude > 0)].sum() for m in order])
        sparse = order[inside < SPARSE * total.sum()]
        floor = sparse[-1] if len(sparse) else 0.0
        near = magnitude <= floor
        kept = ~near
        kept[zero[0]] = True
        values = values.copy()
        values[..., zero[0]] = values[..., near | (magnitude == 0)].sum(-1)
        low, high = np.where(magnitude == 0, -floor, low), np.where(magnitude == 0, floor, high)
        total = np.where(magnitude == 0, total[near | (magnitude == 0)].sum(), total) * kept
    held = np.flatnonzero(total)
    kept[: held[0]], kept[held[-1] + 1 :] = False, False
    others = {dim: counts[dim] for dim in counts.dims if dim != "bin"}
    edges = {"bin_low": ("bin", low[kept]), "bin_high": ("bin", high[kept])}
    return xr.DataArray(values[..., kept], {**others, **edges}, counts.dims)


def _bin_ticks(axis: Axes, counts: xr.DataArray) -> None:
    """Name some of the bins that lie side by side: by the edge that is nearer to 0, the one around it by both."""
    low, high = counts["bin_low"].values, counts["bin_high"].values
    around = np.flatnonzero((low <= 0) & (high >= 0) & (low == -high))
    step = max(round(len(low) / 6), 1)
    first = int(around[0]) if len(around) else 0
    places = [i for i in range(len(low)) if (i - first) % step == 0]
    labels = []
    for i in places:
        if len(around) and i == first:
            labels.append(f"±{_power(high[i])}" if high[i] else "0")
        else:
            labels.append(_power(low[i] if low[i] >= 0 else high[i]))
    axis.set_xticks([i + 0.5 for i in places], labels, fontsize=8)


def _power(value: float) -> str:
    mantissa, exponent = math.frexp(abs(value))
    sign = "−" if value < 0 else ""
    return rf"${sign}2^{{{exponent - 1}}}$" if mantissa == 0.5 else f"{value:.3g}"
