"""Change over depth, drawn with matplotlib (an extra)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ckptlab.analysis.measure import Measure
from ckptlab.arguments import explained
from ckptlab.draw.pyplot import pyplot

LINES = 10  # kinds that get a colour and a name: those that changed most


@explained
def plot_depth(measures: Sequence[Measure], state: str, ax: Any = None) -> Any:
    """The relative change |a - b| / |a| of one state by layer, a line for each kind of tensor; the Axes.

    The scale is logarithmic unless nothing changed. Tensors outside layers are dashed lines across. ImportError
    without matplotlib.
    """
    if ax is None:
        _, ax = pyplot().subplots(figsize=(8, 4.5), layout="constrained")
    by_kind: dict[str, list[Measure]] = {}
    for measure in sorted(measures, key=lambda m: m.layer or 0):
        by_kind.setdefault(measure.kind, []).append(measure)
    most = sorted(by_kind, key=lambda kind: -max(m.relative for m in by_kind[kind]))
    for i, kind in enumerate(most):
        style: dict[str, Any] = {"color": "0.75", "linewidth": 0.8, "zorder": 1}
        if i < LINES:
            style = {"color": f"C{i}", "label": kind}
        elif i == LINES:
            style["label"] = f"{len(most) - LINES} others"
        of_kind = by_kind[kind]
        if of_kind[0].layer is None:
            ax.axhline(of_kind[0].relative, linestyle="--", **style)
        else:
            ax.plot([m.layer for m in of_kind], [m.relative for m in of_kind], marker="o", markersize=3, **style)
    if any(m.relative > 0 for m in measures):
        ax.set_yscale("log")
    ax.set_xlabel("layer")
    ax.set_ylabel("|a − b| / |a|")
    ax.set_title(f"change of {state} over depth")
    ax.xaxis.get_major_locator().set_params(integer=True)
    if measures:
        ax.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1.01, 1.0))
    return ax
