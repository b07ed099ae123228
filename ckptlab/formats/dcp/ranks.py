"""FSDP's files of each rank, `model_world_size_4_rank_0.pt` and `optim_world_size_4_rank_0.pt`, as verl and SkyRL leave
them: pickled DTensors, which say on which mesh and how they are cut.

A DTensor is pickled as `_rebuild_from_type_v2(_rebuild_wrapper_subclass, DTensor, …, (None, {_local_tensor, _spec}))`
(torch/_tensor.py, torch/distributed/tensor/_api.py); seen in torch 2.13, older ones by their source.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from ckptlab import paths
from ckptlab.catalog import ParameterGroup
from ckptlab.errors import CheckpointError, UnsupportedError
from ckptlab.formats.dcp.assemble import Client, Found, kept, step_of
from ckptlab.formats.dcp.axes import NEUTRAL, DimAxes, pieces_of
from ckptlab.formats.dcp.boxes import Boxes, Grid, grid_of
from ckptlab.formats.dcp.items import Known
from ckptlab.formats.dcp.marks import FILE, files_of
from ckptlab.formats.dcp.metadata import MOST_NAME, MOST_RANKS, natural
from ckptlab.formats.dcp.numbered import by_number
from ckptlab.formats.dcp.said import Said
from ckptlab.formats.torch import torchfile
from ckptlab.formats.torch.pickles import Foreign
from ckptlab.layout import Layout
from ckptlab.layout.blocks import strided_behind
from ckptlab.mesh import Mesh
from ckptlab.sharding.strategies import dim_names
from ckptlab.stored import Stored
from ckptlab.words import brief


class Axis(NamedTuple):
    """An axis of a pickled mesh: its name, its degree, and by how much the numbers of neighbours on it differ."""

    name: str
    degree: int
    stride: int


@dataclass(frozen=True)
class Sharded:
    """A DTensor: what a rank has of it, the whole's shape, the axes of its mesh, where the rank is on them, and how
    they cut each dim."""

    local: Stored
    shape: tuple[int, ...]
    axes: tuple[Axis, ...] = ()
    at: tuple[int, ...] = ()
    ways: tuple[DimAxes, ...] = ()


class Cutting(NamedTuple):
    """How one mesh axis cuts a tensor: the class of its placement, the dim, and by how many parts it is strided."""

    kind: str
    dim: int
    factor: int


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
        if not isinstance(params, list | tuple) or not all(_is_key(key) for key in params):
            return f"one of its param_groups is {brief(group)}"
    return None


def _is_key(key: Any) -> bool:
    return (type(key) is int) or (type(key) is str and len(key) <= MOST_NAME)


def _by_number(keys: list[int], states: Mapping[int, Any], found: Found) -> dict[int, str] | None:
    one = next(iter(states.values()))
    shapes = {key: _shape(value) for key in keys for value in one.get(key, {}).values() if _shape(value) != ()}
    return by_number(keys, shapes, {name: grid.shape for name, grid in found.weights.items()})


def _shape(value: Any) -> tuple[int, ...]:
    if isinstance(value, Stored):
        return value.shape
    return _sharded(value, 0).shape if isinstance(value, Foreign) else ()


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
            sharded = Sharded(value, value.shape) if isinstance(value, Stored) else _sharded(value, rank)
            shape, local = sharded.shape, sharded.local
            kinds.setdefault((shape, local.dtype), rank)
            if len(kinds) > 1:
                said = " and ".join(f"{dtype} of {shape} on rank {r}" for (shape, dtype), r in kinds.items())
                raise CheckpointError(f"it is {said}: the files are of different runs, or it is no one tensor")
            if isinstance(value, Stored):
                boxes.setdefault((0,) * len(shape), (shape, rank, value))
                continue
            mesh = Mesh(**{axis.name: axis.degree for axis in sharded.axes})
            if mesh.size > max(self.world, 1):
                raise CheckpointError(
                    f"it lies on {mesh}, and there are files of {self.world} ranks: damaged or forged"
                )
            self.meshes.setdefault(sharded.axes)
            spans = [
                pieces_of(n, way, mesh, {a.name: k for a, k in zip(sharded.axes, sharded.at, strict=True)})
                for n, way in zip(shape, sharded.ways, strict=True)
            ]
            sizes = tuple(sum(length for _, length in dim) for dim in spans)
            if sizes != local.shape:
                raise CheckpointError(
                    f"rank {rank} has shape {local.shape}, by its placements it would have {sizes}: damaged, or "
                    "cut in a way that ckptlab does not know"
                )
            start = tuple(dim[0][0] if dim else n for dim, n in zip(spans, shape, strict=True))
            boxes.setdefault(start, (sizes, rank, local))
            if name not in self.layouts and any(way.axes for way in sharded.ways):
                labels = dim_names(len(shape))
                dims = (f"({' '.join(w.axes)} {n})" if w.axes else n for n, w in zip(labels, sharded.ways, strict=True))
                self.layouts[name] = Layout(" ".join(dims), dims=labels)
        if not boxes:
            return None
        ((shape, dtype),) = kinds
        at = np.array(list(boxes), np.int64).reshape(len(boxes), len(shape))
        size = np.array([s for s, _, _ in boxes.values()], np.int64).reshape(at.shape)
        ranks = np.array([rank for _, rank, _ in boxes.values()], np.int64)
        stored = [local for _, _, local in boxes.values()]
        return grid_of(Boxes(shape, dtype, at, size, ranks, Known(stored)))


def _sharded(value: Foreign, rank: int) -> Sharded:
    """A DTensor's placeholder, in the file of a rank. UnsupportedError for another class of tensor."""
    try:
        _, _, made, (_, state) = value.args
        local, spec = state["_local_tensor"], state["_spec"].attributes
        shape, placements, mesh = tuple(made[2]), spec["placements"], spec["mesh"].attributes
        degrees, at, strides = _axes(mesh, rank)
        names = mesh.get("_mesh_dim_names") or mesh.get("mesh_dim_names")
        names = tuple(names or (f"{NEUTRAL}{i}" for i in range(len(degrees))))
        cuts = [Cutting(p.name, p.attributes.get("dim", 0), p.attributes.get("split_factor", 1)) for p in placements]
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, ArithmeticError, RecursionError):
        raise UnsupportedError(
            f"it is a {value.module}.{value.name}, expected a tensor or a DTensor as torch 2.5 to 2.13 pickle it: save "
            "with torch.distributed.checkpoint"
        ) from None
    if (
        type(local) is not Stored
        or not all(type(name) is str and name.isidentifier() and len(name) < 64 for name in names)
        or not len(cuts) == len(names) == len(degrees) == len(set(names))
        or not all(type(n) is int and 0 < n <= MOST_RANKS for n in degrees)
        or not all(map(natural, shape))
        or not all(type(c.dim) is int and -len(shape) <= c.dim < max(len(shape), 1) for c in cuts)
        or not all(type(c.factor) is int and 0 < c.factor <= MOST_RANKS for c in cuts)
    ):
        raise CheckpointError(
            f"a DTensor of shape {brief(shape)} that is placed {brief(cuts)} on {brief(names)} of degrees "
            f"{brief(degrees)}, its part {brief(local)}: the file is damaged or forged; copy it again"
        )
    axes = tuple(map(Axis, names, degrees, strides))
    return Sharded(local, shape, axes, at, _ways(shape, names, degrees, cuts))


def _axes(mesh: Mapping[str, Any], rank: int) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Of each axis of a pickled DeviceMesh the degree, where a rank is on it, and by how much the ranks differ: by what
    each torch keeps, `mesh`, a tensor of ranks (of a part of a mesh, those that have the rank's part), later
    `_layout`."""
    ranks = mesh.get("mesh", mesh.get("_mesh"))
    if isinstance(ranks, Stored):
        if ranks.numel > MOST_RANKS or not ranks.numel:
            raise ValueError(ranks.shape)
        table = np.array(ranks.map()).reshape(ranks.shape)
        here = np.argwhere(table == rank)
        at = here[0] if len(here) == 1 else np.unravel_index(rank % table.size, table.shape)
        first = table[(0,) * table.ndim]
        next_ = (table.take(min(1, n - 1), d)[(0,) * (table.ndim - 1)] for d, n in enumerate(table.shape))
        return table.shape, tuple(map(int, at)), tuple(abs(int(there - first)) for there in next_)
    layout = mesh["_layout"].attributes
    axes = [axis.attributes for axis in layout["axes"]] if "axes" in layout else []
    shapes = [_flat(axis["shape"]) for axis in axes] or [_flat(n) for n in _listed(layout["shape"])]
    strides = [_flat(axis["stride"]) for axis in axes] or [_flat(n) for n in _listed(layout["stride"])]
    places = []
    for shape, stride in zip(shapes, strides, strict=True):
        place = 0
        for n, step in zip(shape, stride, strict=True):
            place = place * n + rank // max(step, 1) % n
        places.append(place)
    return tuple(map(math.prod, shapes)), tuple(places), tuple(min(stride, default=0) for stride in strides)


def _listed(value: Any) -> Any:
    return (value,) if isinstance(value, int) else value


def _flat(shape: Any) -> list[int]:
    return [shape] if isinstance(shape, int) else [n for part in shape for n in _flat(part)]


def _ways(
    shape: tuple[int, ...], names: tuple[str, ...], degrees: tuple[int, ...], cuts: list[Cutting]
) -> tuple[DimAxes, ...]:
    """How each dim is cut. Axes of a dim cut it in mesh order, the first outermost; one that is strided comes after
    those of later axes whose degrees make up its split factor."""
    order: list[list[int]] = [[] for _ in shape]
    for axis in reversed(range(len(cuts))):
        kind, dim, factor = cuts[axis]
        if kind == "Replicate":
            continue
        if kind not in ("Shard", "_StridedShard"):
            raise UnsupportedError(
                f"it is placed as {kind} on {names[axis]}, which says nothing of where its elements are"
            )
        if not shape:
            raise UnsupportedError(f"it has no dims, and {names[axis]} is said to cut one")
        dim = dim % len(shape)
        after = strided_behind((degrees[later] for later in order[dim]), factor)
        if after is None:
            raise UnsupportedError(f"{names[axis]} cuts dim {dim} strided by {factor}, which no other axis does")
        order[dim].insert(after, axis)
    return tuple(DimAxes(tuple(names[axis] for axis in axes)) for axes in order)
