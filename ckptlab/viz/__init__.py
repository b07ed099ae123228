"""Drawings of meshes, layouts, families, buffers, checkpoints and plans: pure functions to SVG, from headers or paper.

Each gives a `Drawing`: a notebook shows it, `.svg` is its text, `.save(path)` writes it. Every cell has a tooltip and
`data-*` attributes that say what it stands for. With many ranks neighbours are drawn together, and the picture says so;
`plot_memory` and `plot_plan` plot every rank, with matplotlib.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ckptlab.draw import Drawing
from ckptlab.sharding.activations import Activations
from ckptlab.viz.buffers import flat
from ckptlab.viz.meshes import mesh
from ckptlab.viz.model import stages
from ckptlab.viz.moves import flow, plan
from ckptlab.viz.placed import placed
from ckptlab.viz.plots import plot_memory, plot_plan
from ckptlab.viz.sizes import ACTIVATIONS, KINDS, fullest, memory, memory_by_rank
from ckptlab.viz.tensors import tensor
from ckptlab.viz.values import values

if TYPE_CHECKING:
    from ckptlab.viz.families import family

__all__ = [
    "ACTIVATIONS",
    "KINDS",
    "Activations",
    "Drawing",
    "family",
    "flat",
    "flow",
    "fullest",
    "memory",
    "memory_by_rank",
    "mesh",
    "placed",
    "plan",
    "plot_memory",
    "plot_plan",
    "stages",
    "tensor",
    "values",
]


def __getattr__(name: str) -> Any:
    """`family`, loaded when it is asked for: what shows a checkpoint needs no families."""
    if name != "family":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from ckptlab.viz.families import family

    return family


def __dir__() -> list[str]:
    return sorted(__all__)
