"""Which drawings show what a checkpoint holds of one state of a tensor."""

from __future__ import annotations

from ckptlab import viz
from ckptlab.catalog import Catalog


def layout(catalog: Catalog, name: str, state: str, rank: int | None = None, width: int | None = None) -> str:
    """The tensor as its holders have it, over dp too where dp cuts it. SVG."""
    shown = state if state in catalog[name].states else None
    return viz.placed(catalog, name, shown, rank=rank, width=width).svg


def buffer(catalog: Catalog, name: str, state: str, rank: int, width: int | None = None) -> str:
    """The flat buffers that hold the state, for the tp of a rank and its pp stage (or the tensor's own); SVG, empty
    where it is in none."""
    tensor = catalog[name]
    if not catalog.is_flat(tensor.name, state):
        return ""
    placement = catalog.placement(tensor.name, state)
    mine = placement.holder(rank) or placement.holders[0]
    return viz.flat(catalog.flat(tensor.name, mine)[0], tensor=None, width=width, **mine).svg
