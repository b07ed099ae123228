"""The coordinates of dims that are mesh axes, which tell them from the dims of a tensor."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr

from ckptlab.mesh import STANDARD

ROLE, MESH_AXIS = "role", "mesh axis"


def ranks(along: Mapping[str, int | Sequence[int]]) -> dict[str, xr.Variable]:
    """Axis → the coordinate of a dim that lists ranks along it: all, of a degree, or those that are given."""
    numbers = {axis: np.arange(n) if isinstance(n, int) else n for axis, n in along.items()}
    return {axis: plain((axis,), listed, {ROLE: MESH_AXIS}) for axis, listed in numbers.items()}


def plain(dims: Sequence[str], values: Any, attrs: Mapping[Hashable, Any] | None = None) -> xr.Variable:
    """A coordinate of numbers. xarray need not look what they are, for which it would import dask wherever that is
    installed: longer than all the rest of a view takes."""
    return xr.Variable(dims, np.asarray(values), attrs, fastpath=True)


def rank_dims(array: xr.DataArray | xr.Dataset) -> tuple[str, ...]:
    """The dims that list ranks: those whose coordinate says so, and pp, dp and tp, whoever made them."""
    said = {dim for dim, coordinate in array.coords.items() if coordinate.attrs.get(ROLE) == MESH_AXIS}
    return tuple(str(dim) for dim in array.dims if dim in said or dim in STANDARD)
