"""FSDP's files of each rank, `model_world_size_4_rank_0.pt` and `optim_world_size_4_rank_0.pt`, as verl and SkyRL leave
them: pickled DTensors, which say on which mesh and how they are cut."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ckptlab import paths
from ckptlab.catalog import ParameterGroup
from ckptlab.errors import CheckpointError, UnsupportedError
from ckptlab.formats.dcp.assemble import Client, Found, kept, step_of
from ckptlab.formats.dcp.axes import pieces_of
from ckptlab.formats.dcp.boxes import Boxes, Grid, grid_of
from ckptlab.formats.dcp.dtensors import Axis, Sharded, sharded
from ckptlab.formats.dcp.items import Known
from ckptlab.formats.dcp.marks import FILE, files_of
from ckptlab.formats.dcp.metadata import MOST_NAME
from ckptlab.formats.dcp.numbered import by_number
from ckptlab.formats.dcp.said import Said
from ckptlab.formats.torch import torchfile
from ckptlab.formats.torch.pickles import Foreign
from ckptlab.layout import Layout
from ckptlab.mesh import Mesh
from ckptlab.sharding.strategies import dim_names
from ckptlab.stored import Stored
from ckptlab.words import brief


def find(path: str, said: Said) -> Found:
    """What the files of all ranks hold together. CheckpointError where a rank's is missing."""
    files = files_of(set(paths.names(path)))
    worlds = {int(match[2]) for name in paths.names(path) if (match := FILE.fullmatch(name))}
    if len(worlds) > 1:
        raise CheckpointError(f"{path}: holds files of runs of {sorted(worlds)} ranks: keep those of one")
    world = worlds.pop()
    for kind, by_rank in files.items():
        missing = next((rank for rank in range(world) if rank not in by_rank), None)
        if missing is not None and kind != "extra_state":
            said.error(
                "dcp-missing-file",
                f"{path}: {kind}_world_size_{world}_rank_{missing}.pt is missing: what that rank had cannot be "
                "found; copy it again",
            )
    read = {
        kind: {
            rank: torchfile.read(file)
            for rank, file in torchfile.ready(
                [(rank, os.path.join(path, name)) for rank, name in sorted(by_rank.items())], lambda one: one[1]
            )
        }
        for kind, by_rank in files.items()
    }
    found = Found(path, files=tuple(name for by_rank in files.values() for name in by_rank.values()))
    ranks = _Ranks(world)
    models = read.get("model", {})
    for rank, model in models.items():
        if not isinstance(model, dict) or not all(type(key) is str and len(key) <= MOST_NAME for key in model):
            raise CheckpointError(
                f"{os.path.join(path, files['model'][rank])}: holds no dict of tensors by name: save the model's "
                "state_dict"
            )
    for name in dict.fromkeys(key for model in models.values() for key in model):
        with said.caught("dcp-chunks", f"{path}: {name}"):
            grid = ranks.grid({rank: model.get(name) for rank, model in models.items()}, name)
            if grid is not None:
                found.weights[name] = grid
    for rank, one in read.get("optim", {}).items():
        if (wrong := _no_optimizer(one)) is not None:
            raise CheckpointError(
                f"{os.path.join(path, files['optim'][rank])}: {wrong}, expected the state_dict of an optimizer: "
                "damaged or forged; copy it again"
            )
    _optimizer(read.get("optim", {}), found, ranks, said)
    found.mesh = ranks.mesh(path)
    found.layouts = ranks.layouts
    found.client = Client({(f"rank {rank}",): kept(value) for rank, value in read.get("extra_state", {}).items()})
    return found


def _optimizer(optimizers: Mapping[int, Any], found: Found, ranks: _Ranks, said: Said) -> None:
    """The states and groups of the optimizer's files, keyed by names, or by the number of the parameter."""
    states: dict[int, Any] = {rank: one["state"] for rank, one in optimizers.items()}
    if not states:
        return
    found.optimizer = True
    groups = next(iter(optimizers.values()))["param_groups"]
    keys = [key for group in groups for key in group.get("params", ())]
    numbered = all(type(key) is int for key in keys)
    names = _by_number(keys, states, found) if numbered else {key: str(key) for key in keys}
    if names is None:
        said.remark(
            "dcp-no-names",
            f"{found.path}: the optimizer's states are numbered, and do not have the shapes of the model's tensors in "
            "their order: whose they are cannot be told, and they are left out",
        )
        return
    scalars: dict[str, dict[str, Any]] = {}
    for key, name in names.items():
        for state in dict.fromkeys(s for one in states.values() for s in one.get(key, {})):
            by_rank = {rank: one.get(key, {}).get(state) for rank, one in states.items()}
            first = next((v for v in by_rank.values() if v is not None), None)
            if state == "step" or not isinstance(first, Stored | Foreign):
                scalars.setdefault(name, {})[state] = _number(first)
                continue
            with said.caught("dcp-chunks", f"{found.path}: {state} of {name}"):
                grid = ranks.grid(by_rank, name)
                if grid is not None:
                    found.states.setdefault(name, {})[state] = grid
    made = []
    for group in groups:
        members = tuple(names[key] for key in group.get("params", ()))
        held = {name: scalars[name] for name in members if name in scalars}
        common: dict[str, Any] = next(iter(held.values()), {})
        apart = {name: its for name, its in held.items() if its != common}
        made.append(ParameterGroup({k: v for k, v in group.items() if k != "params"}, members, common, apart))
    found.groups = tuple(made)
    found.step = step_of(found.groups)


def _no_optimizer(value: Any) -> str | None:
    """What is wrong with the content of an optimizer's file; None of one that is as torch's are."""
    if not isinstance(value, dict):
        return f"holds {brief(value)}"
    state, groups = value.get("state"), value.get("param_groups")
    if not isinstance(state, dict) or not isinstance(groups, list | tuple):
        return f"its state is {brief(state)}, its param_groups {brief(groups)}"
    for key, its in state.items():
        if not isinstance(its, dict) or not all(type(one) is str and len(one) <= MOST_NAME for one in its):
            return f"the state of {brief(key)} is {brief(its)}"
    for group in groups:
        params = group.get("params") if isinstance(group, dict) else None
        keys = params if isinstance(params, list | tuple) else (None,)
        if not all(type(key) is int or (type(key) is str and len(key) <= MOST_NAME) for key in keys):
            return f"one of its param_groups is {brief(group)}"
    return None


def _by_number(keys: list[int], states: Mapping[int, Any], found: Found) -> dict[int, str] | None:
    one = next(iter(states.values()))
    shapes = {key: _shape(value) for key in keys for value in one.get(key, {}).values() if _shape(value) != ()}
    return by_number(keys, shapes, {name: grid.shape for name, grid in found.weights.items()})


def _shape(value: Any) -> tuple[int, ...]:
    if isinstance(value, Stored):
        return value.shape
    return sharded(value, 0).shape if isinstance(value, Foreign) else ()


def _number(value: Any) -> Any:
    return np.array(value.map()).reshape(()).item() if isinstance(value, Stored) and value.numel == 1 else value


@dataclass
class _Ranks:
    """What the tensors of a run of `world` ranks tell: `layouts`, by name, and the `meshes` that they lie on."""

    world: int
    layouts: dict[str, Layout] = field(default_factory=dict)
    meshes: dict[tuple[Axis, ...], None] = field(default_factory=dict)

    def mesh(self, path: str) -> Mesh:
        """The mesh of which those that tensors lie on are parts. UnsupportedError where they are of several."""
        axes = {axis: None for mesh in self.meshes for axis in mesh}
        made = Mesh(**{axis.name: axis.degree for axis in sorted(axes, key=lambda axis: -axis.stride)})
        if len({axis.name for axis in axes}) < len(axes) or made.size > max(self.world, 1):
            said = ", ".join(f"{a.name} {a.degree}, ranks {a.stride} apart" for a in axes)
            raise UnsupportedError(f"{path}: its tensors lie on meshes that are no parts of one: {said}")
        return made

    def grid(self, by_rank: Mapping[int, Any], name: str) -> Grid | None:
        """The grid of what ranks have of a tensor; None of what is none."""
        boxes: dict[tuple[int, ...], tuple[tuple[int, ...], int, Stored]] = {}
        kinds: dict[tuple[tuple[int, ...], np.dtype], int] = {}  # and the first rank that has it so
        for rank, value in by_rank.items():
            if not isinstance(value, Stored | Foreign):
                continue
            part = Sharded(value, value.shape) if isinstance(value, Stored) else sharded(value, rank)
            shape, local = part.shape, part.local
            kinds.setdefault((shape, local.dtype), rank)
            if len(kinds) > 1:
                said = " and ".join(f"{dtype} of {shape} on rank {r}" for (shape, dtype), r in kinds.items())
                raise CheckpointError(f"it is {said}: the files are of different runs, or it is no one tensor")
            if isinstance(value, Stored):
                boxes.setdefault((0,) * len(shape), (shape, rank, value))
                continue
            mesh = Mesh(**{axis.name: axis.degree for axis in part.axes})
            if mesh.size > max(self.world, 1):
                raise CheckpointError(
                    f"it lies on {mesh}, and there are files of {self.world} ranks: damaged or forged"
                )
            self.meshes.setdefault(part.axes)
            spans = [
                pieces_of(n, way, mesh, {a.name: k for a, k in zip(part.axes, part.at, strict=True)})
                for n, way in zip(shape, part.ways, strict=True)
            ]
            sizes = tuple(sum(length for _, length in dim) for dim in spans)
            if sizes != local.shape:
                raise CheckpointError(
                    f"rank {rank} has shape {local.shape}, by its placements it would have {sizes}: damaged, or "
                    "cut in a way that ckptlab does not know"
                )
            start = tuple(dim[0][0] if dim else n for dim, n in zip(spans, shape, strict=True))
            boxes.setdefault(start, (sizes, rank, local))
            if name not in self.layouts and any(way.axes for way in part.ways):
                labels = dim_names(len(shape))
                dims = (f"({' '.join(w.axes)} {n})" if w.axes else n for n, w in zip(labels, part.ways, strict=True))
                self.layouts[name] = Layout(" ".join(dims), dims=labels)
        if not boxes:
            return None
        ((shape, dtype),) = kinds
        at = np.array(list(boxes), np.int64).reshape(len(boxes), len(shape))
        size = np.array([s for s, _, _ in boxes.values()], np.int64).reshape(at.shape)
        ranks = np.array([rank for _, rank, _ in boxes.values()], np.int64)
        stored = [local for _, _, local in boxes.values()]
        return grid_of(Boxes(shape, dtype, at, size, ranks, Known(stored)))
