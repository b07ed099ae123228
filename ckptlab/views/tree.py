"""The tree of a view: an xarray DataTree that says where a name that it lacks has gone."""

from __future__ import annotations

import difflib
from typing import Any

import xarray as xr

from ckptlab.catalog.stacks import split, without_number
from ckptlab.errors import UnknownNameError
from ckptlab.words import some


class DataTree(xr.DataTree):
    """A DataTree with a node a tensor. What one looks for there by the model's own name may be a layer of a stack, or a
    state that is called otherwise: UnknownNameError (a KeyError) says so."""

    __slots__ = ()

    def __getitem__(self, key: Any) -> Any:
        """As xarray's."""
        try:
            return super().__getitem__(key)
        except KeyError:
            if not isinstance(key, str):
                raise
            raise UnknownNameError(_lacking(self, key)) from None


def _lacking(tree: xr.DataTree, key: str) -> str:
    before, number, after = split(key)
    stack = without_number(before, after)
    if number is not None and stack in tree.children:
        return (
            f"{key!r} is a layer of a stack here: [{stack!r}].sel(layer={number}); by the model's own names with "
            "stack=False"
        )
    there = [str(name) for name in (*tree.children, *tree.data_vars, *tree.coords)]
    near = difflib.get_close_matches(key, there, n=3)
    return f"no node or variable is called {key!r}: " + (
        f"did you mean {' or '.join(near)}?" if near else f"there are {some(there, 6)}"
    )
