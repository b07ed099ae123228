"""Every rank at once, however many, with matplotlib: where a plot says more than cells do."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ckptlab.arguments import explained
from ckptlab.draw.colours import colour
from ckptlab.draw.pyplot import pyplot
from ckptlab.plan import Plan
from ckptlab.reshaping import Reshape
from ckptlab.viz.moves import moved
from ckptlab.viz.sizes import Model, ranked, table, titled
from ckptlab.words import size

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@explained
def plot_memory(model: Model, ax: Axes | None = None) -> Axes:
    """Bytes on every rank by kind, stacked; see `memory`. Needs matplotlib (the extra `plots`)."""
    model = ranked(model)
    found, kinds, _ = table(model)
    ax = _axes(ax)
    bottom = np.zeros(len(found), np.int64)
    for k, kind in enumerate(kinds):
        if found[:, k].any():
            ax.bar(np.arange(len(found)), found[:, k], 1.0, bottom, color=colour(k), label=kind)
            bottom += found[:, k]
    ax.set(xlabel="rank", ylabel="bytes", title=titled(model), xlim=(-0.5, max(len(found), 1) - 0.5))
    ax.yaxis.set_major_formatter(lambda value, _: size(value))
    if len(ax.containers):
        ax.legend(frameon=False)
    return ax


@explained
def plot_plan(plan: Plan | Reshape, ax: Axes | None = None) -> Axes:
    """Bytes from every source rank to every target rank, logarithmic; see `plan`. Needs matplotlib."""
    plan, ax = moved(plan), _axes(ax)
    from matplotlib.colors import LogNorm

    matrix = plan.matrix()
    image = ax.imshow(
        np.ma.masked_equal(matrix, 0), cmap="cividis", norm=LogNorm(), aspect="auto", interpolation="nearest"
    )
    ax.set(xlabel="target rank", ylabel="source rank", title=f"{size(plan.sent)} read, {size(plan.moved)} change rank")
    bar = ax.figure.colorbar(image, ax=ax, label="bytes")
    bar.ax.yaxis.set_major_formatter(lambda value, _: size(value))
    return ax


def _axes(ax: Any) -> Axes:
    return pyplot().subplots(figsize=(8, 4), layout="constrained")[1] if ax is None else ax
