"""Which drawings show what a checkpoint holds of one state of a tensor."""

from __future__ import annotations

from ckptlab import viz
from ckptlab.catalog import Catalog


def layout(catalog: Catalog, name: str, state: str, rank: int | None = None) -> str:
    """The tensor as its holders have it; copies on the dp ranks are shown where the state is not cut over dp. SVG."""
    tensor, mesh = catalog[name], catalog.mesh
    if catalog.is_flat(tensor.name, state):
        placement = catalog.placement(tensor.name, state)
        mesh = mesh.replace(**dict.fromkeys((*mesh.leaves("pp"), *placement.data, *placement.at), 1))
    place = {} if rank is None else catalog.mesh.coordinate(rank)
    at = {axis: k for axis, k in place.items() if mesh.get(axis, 1) > 1}
    return viz.tensor(tensor.layout, tensor.shape, mesh, rank=at or None, name=tensor.name).svg


def buffer(catalog: Catalog, name: str, state: str, rank: int) -> str:
    """The flat buffers that hold the state, for the tp of a rank and its pp stage (or the tensor's own); SVG, empty
    where it is in none."""
    tensor, at = catalog[name], catalog.mesh.coordinate(rank)
    if not catalog.is_flat(tensor.name, state):
        return ""
    holders = catalog.placement(tensor.name, state).holders
    mine = next((h for h in holders if h.within(at)), holders[0])
    return viz.flat(catalog.flat(tensor.name, mine)[0], **mine).svg
