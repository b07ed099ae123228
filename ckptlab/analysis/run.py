"""A training run: its checkpoints of several steps as one, with a dim `step`.

Whole tensors are the same whatever mesh wrote them, so a run that was continued on another mesh is still one run.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import xarray as xr

from ckptlab import paths
from ckptlab.analysis.row import Row
from ckptlab.analysis.rows import rows_of
from ckptlab.arguments import explained
from ckptlab.arrays.dtypes import dtype_called
from ckptlab.arrays.lazy import Converted, Stacked, under, variable
from ckptlab.checkpoint import Checkpoint
from ckptlab.checkpoint import open as open_checkpoint
from ckptlab.errors import CheckpointError, LayoutError, UnknownNameError
from ckptlab.formats import get as format_of
from ckptlab.shown import Shown
from ckptlab.views import Flat, Full, Shards
from ckptlab.views.tree import DataTree

MANY = 8  # skipped folders that an error lists


@dataclass(frozen=True)
class Skipped:
    """A folder that is none of the run's steps, and why."""

    path: str
    reason: str

    def __str__(self) -> str:
        return f"{os.path.basename(self.path)}: {self.reason}"


@explained
def open_run(
    path: str | os.PathLike[str], strategy: Any = None, *, storage_options: Mapping[str, Any] | None = None
) -> Run:
    """Open every checkpoint of a run: headers only.

    path: the folder that the step folders (global_step1000, …) stand in. strategy, storage_options: as for
    `ckptlab.open`. A step that cannot be opened, because it is incomplete or damaged, is skipped, and so is a second
    checkpoint of a step (a universal one beside the native one, say); `Run.skipped` tells which, and why.

    CheckpointError where no checkpoint can be opened.
    """
    folder = paths.absolute(path, storage_options)
    if not paths.is_folder(folder):
        raise CheckpointError(f"{folder}: no such folder: give the one that the step folders stand in")
    opened, skipped = _opened(folder, strategy)
    found: dict[int, Checkpoint] = {}
    for place, ckpt in sorted(opened, key=lambda one: not format_of(one[1].format).sharded):
        step = step_of(ckpt, os.path.basename(place))
        if step is None:
            skipped.append(Skipped(place, "neither the checkpoint nor the name of its folder tells the step"))
        elif step in found:
            other = os.path.relpath(found[step].path, folder)
            skipped.append(Skipped(place, f"is step {step} too, which was taken from {other}"))
        else:
            found[step] = ckpt
    if not found:
        reasons = "".join(f"\n  {one}" for one in skipped[:MANY])
        raise CheckpointError(f"{folder}: no checkpoint stands in it that can be opened{reasons}")
    return Run(folder, dict(sorted(found.items())), tuple(skipped))


def step_of(ckpt: Checkpoint, name: str) -> int | None:
    """The training step: what the checkpoint says, else the last number in the name of its folder."""
    if ckpt.iteration is not None:
        return ckpt.iteration
    numbers = re.findall(r"\d+", name)
    return int(numbers[-1]) if numbers else None


def _opened(folder: str, strategy: Any) -> tuple[list[tuple[str, Checkpoint]], list[Skipped]]:
    """The checkpoints in the folders of a folder, and the folders that cannot be opened."""
    opened, skipped = [], []
    for place in sorted(entry.path for entry in paths.entries(folder) if entry.is_folder):
        try:
            opened.append((place, open_checkpoint(place, strategy)))
        except (CheckpointError, LayoutError) as error:
            skipped.append(Skipped(place, str(error)))
    return opened, skipped


@explained
class Run(Shown, Mapping[int, Checkpoint]):
    """The checkpoints of a run by step, opened by `ckptlab.open_run`. Nothing is read until values are asked for."""

    __eq__, __hash__ = object.__eq__, object.__hash__

    def __init__(self, path: str, checkpoints: Mapping[int, Checkpoint], skipped: tuple[Skipped, ...] = ()) -> None:
        self.path, self.checkpoints, self.skipped = path, checkpoints, skipped

    @property
    def steps(self) -> tuple[int, ...]:
        """The training steps, ascending."""
        return tuple(self.checkpoints)

    @property
    def states(self) -> tuple[str, ...]:
        """Every state that some tensor has at some step."""
        return tuple(dict.fromkeys(state for ckpt in self.checkpoints.values() for state in ckpt.states))

    def __getitem__(self, step: int) -> Checkpoint:
        """The checkpoint of a step; UnknownNameError, with those that there are, if there is none."""
        if not isinstance(step, Hashable) or step not in self.checkpoints:
            raise UnknownNameError(f"{self.path}: no step {step}: there are {', '.join(map(str, self.steps))}")
        return self.checkpoints[step]

    def __iter__(self) -> Iterator[int]:
        return iter(self.checkpoints)

    def __len__(self) -> int:
        return len(self.checkpoints)

    def _ipython_key_completions_(self) -> list[int]:
        return list(self)

    def full(self, state: str | Sequence[str] | None = None, *, dtype: Any = None) -> xr.DataTree:
        """Whole tensors over the steps, lazily: the nodes of `Checkpoint.full` with a dim `step` before all others.

        A node has the steps that hold the tensor in the shape that it has at the last of them, and the states that all
        of those hold; `step` says which they are. A state that changed its dtype is float32 throughout. `layer` has no
        coordinate `pp` where the steps deal it to stages differently. dtype: as for `Checkpoint.full`.
        """
        return self._tree(state, lambda ckpt, states: Full(ckpt.catalog, None, states, dtype_called(dtype)).tree())

    def shards(self, state: str | Sequence[str] | None = None, *, dtype: Any = None) -> xr.DataTree:
        """Tensors as the model-parallel ranks hold them over the steps, lazily: the nodes of `Checkpoint.shards`, as
        `full` has those of whole tensors. Steps that another mesh wrote are other shapes where it cuts otherwise."""
        return self._tree(state, lambda ckpt, states: Shards(ckpt.catalog, None, states, dtype_called(dtype)).tree())

    def flat(self, *, dtype: Any = None) -> xr.DataTree:
        """The optimizer's flat buffers over the steps, lazily: the nodes of `Checkpoint.flat`, as `full` has those of
        whole tensors."""
        return self._tree(None, lambda ckpt, _: Flat(ckpt.catalog.as_stored, None, dtype_called(dtype)).tree())

    def _tree(
        self, state: str | Sequence[str] | None, view: Callable[[Checkpoint, tuple[str, ...] | None], xr.DataTree]
    ) -> xr.DataTree:
        wanted = None if state is None else (state,) if isinstance(state, str) else tuple(state)
        unknown = [s for s in wanted or () if s not in self.states]
        if unknown:
            raise CheckpointError(f"{self.path}: no state {unknown[0]!r}: there are {', '.join(self.states)}")
        trees = {
            step: {
                path: node.to_dataset()
                for path, node in view(ckpt, _known(ckpt, wanted)).subtree_with_keys
                if len(node.data_vars)
            }
            for step, ckpt in self.checkpoints.items()
        }
        nodes = {"/": xr.Dataset(attrs={"path": self.path})}
        for path in dict.fromkeys(path for tree in reversed(trees.values()) for path in tree):
            node = _over_steps({step: tree[path] for step, tree in trees.items() if path in tree})
            if node.data_vars:
                nodes[f"/{path}"] = node
        return DataTree.from_dict(nodes)

    def tensor_rows(self) -> list[Row]:
        """What there is to take statistics of: every state of every whole tensor at every step."""
        return [replace(row, step=step) for step, ckpt in self.checkpoints.items() for row in rows_of(ckpt)]


def _known(ckpt: Checkpoint, wanted: tuple[str, ...] | None) -> tuple[str, ...] | None:
    return None if wanted is None else tuple(s for s in wanted if s in ckpt.states)


def _over_steps(held: Mapping[int, xr.Dataset]) -> xr.Dataset:
    """One node of all steps that hold it alike."""
    last = list(held.values())[-1]
    alike = {step: node for step, node in held.items() if _outline(node) == _outline(last)}
    nodes = list(alike.values())
    variables = {}
    for state in last.data_vars:
        if all(state in node for node in nodes):
            dims = ("step", *map(str, last[state].dims))
            arrays = [a for a in (under(node[state].variable) for node in nodes) if a is not None]
            if not arrays:  # lengths, which headers tell
                variables[state] = xr.Variable(dims, np.stack([node[state].values for node in nodes]))
                continue
            if len({a.dtype for a in arrays}) > 1:
                arrays = [Converted(a, np.dtype(np.float32)) for a in arrays]
            variables[state] = variable(dims, Stacked(arrays), last[state].attrs)
    coordinates = {
        name: values
        for name, values in last.coords.items()
        if all(name in node.coords and node.coords[name].equals(values) for node in nodes)
    }
    return xr.Dataset(variables, {"step": list(alike), **coordinates}, last.attrs)


def _outline(node: xr.Dataset) -> Any:
    """What steps must agree in to stand in one node."""
    layers = tuple(node["layer"].values) if "layer" in node.coords else ()
    return dict(node.sizes), layers, node.attrs.get("name")
