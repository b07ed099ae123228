"""A plan: how many bytes go from which rank to which."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ckptlab.draw import Drawing, Side
from ckptlab.mesh import Mesh
from ckptlab.plan import Plan
from ckptlab.plan.picture import RANKS, in_blocks, picture

if TYPE_CHECKING:
    from ckptlab.checkpoint import Reshape


def plan(plan: Plan | Reshape) -> Drawing:
    """Who sends how much to whom: a matrix from source (down) to target (across) with the sums at its edges.

    Of many ranks, each row or column is a pp stage if the mesh is known and has several, else a block of ranks; the
    picture says which. Framed is what does not change rank. Cells: class `move` (`none` where nothing goes),
    data-source, data-target (`3` or `0-7`), data-bytes, data-kept.
    """
    if isinstance(plan, Plan):
        return picture(plan)
    return picture(plan.plan, _side("source", plan.source.mesh), _side("target", plan.target.mesh))


def _side(what: str, mesh: Mesh) -> Side:
    """Ranks one by one, of many the pp stages (their ranks are neighbours, pp being slowest)."""
    if mesh.size <= RANKS or not 1 < mesh.pp <= RANKS or mesh.axes[0] != "pp":
        return in_blocks(what, mesh.size)
    step = mesh.size // mesh.pp
    ranks = [range(k * step, (k + 1) * step) for k in range(mesh.pp)]
    return Side(f"{what} pp stages", [f"pp {k}" for k in range(mesh.pp)], ranks)
