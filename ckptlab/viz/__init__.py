"""Drawings of meshes, layouts, families, buffers, checkpoints and plans: pure functions to SVG, from headers or paper.

Each gives a `Drawing`: a notebook shows it, `.svg` is its text, `.save(path)` writes it. Every cell has a tooltip and
`data-*` attributes that say what it stands for. With many ranks neighbours are drawn together, and the picture says so;
`plot_memory` and `plot_plan` plot every rank, with matplotlib.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ckptlab.lazily import loader

if TYPE_CHECKING:
    from ckptlab.draw import Drawing
    from ckptlab.sharding.activations import Activations
    from ckptlab.viz.buffers import flat
    from ckptlab.viz.families import family
    from ckptlab.viz.heatmap import values
    from ckptlab.viz.meshes import mesh
    from ckptlab.viz.model import stages
    from ckptlab.viz.moves import flow, plan
    from ckptlab.viz.placings import placed
    from ckptlab.viz.plots import plot_memory, plot_plan
    from ckptlab.viz.sizes import ACTIVATIONS, KINDS, fullest, memory, memory_by_rank
    from ckptlab.viz.tensors import tensor

_HOMES = {  # no module has the name of what is in it: imported, it would stand here in its place
    "draw": "Drawing",
    "sharding.activations": "Activations",
    "viz.buffers": "flat",
    "viz.families": "family",
    "viz.heatmap": "values",
    "viz.meshes": "mesh",
    "viz.model": "stages",
    "viz.moves": "flow plan",
    "viz.placings": "placed",
    "viz.plots": "plot_memory plot_plan",
    "viz.sizes": "ACTIVATIONS KINDS fullest memory memory_by_rank",
    "viz.tensors": "tensor",
}
__all__, __getattr__ = loader(__name__, _HOMES)  # what shows a checkpoint needs few of them


def __dir__() -> list[str]:
    return sorted(__all__)
