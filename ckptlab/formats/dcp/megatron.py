"""What Megatron-core makes of DCP, `torch_dist`: layers stacked along a leading dim, states before names, args beside.

Seen in 0.16.1 and 0.12.3. Each layer (and each expert of it) is a tensor of its own here, under the name that it has
where layers are not stacked: `decoder.layers.3.mlp.linear_fc1.weight`, `….local_experts.1.linear_fc1.weight`.
"""

from __future__ import annotations

import itertools
import math
import os
import re
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np

from ckptlab import paths
from ckptlab.catalog import ParameterGroup
from ckptlab.errors import CheckpointError
from ckptlab.formats.dcp.assemble import Client, Found, kept
from ckptlab.formats.dcp.boxes import Grid, grid_of
from ckptlab.formats.dcp.folder import boxes_of, chunks_of
from ckptlab.formats.dcp.items import EntryItems, object_at
from ckptlab.formats.dcp.marks import ABOUT
from ckptlab.formats.dcp.metadata import MOST_RANKS, Entry, Metadata, natural
from ckptlab.formats.dcp.said import Said
from ckptlab.formats.torch import torchfile
from ckptlab.mesh import Mesh
from ckptlab.stored import Stored
from ckptlab.words import brief

COMMON = "common.pt"

_STATE = re.compile(r"(?:chained_\d+\.)?optimizer\.state\.([^.]+)\.(.+)", re.DOTALL)
_BUFFERS = re.compile(r"(?:chained_\d+\.)?optimizer\.distributed\.", re.DOTALL)
_GATHERED = re.compile(r"(?:chained_\d+\.)?optimizer\.distributed\..*param_state/shard_\d+_\d+", re.DOTALL)
_STACKED = re.compile(r"((?:.*\.)?layers)\.(?!\d+\.)(.+)", re.DOTALL)
_MASTER = {"param": "fp32_param"}  # what 0.16 calls the master, by what 0.12 does
_HALVES = (1, 2)  # SwiGLU's gate and up projection are each cut on their own


def find(path: str, metadata: Metadata, files: tuple[str, ...], said: Said) -> Found:
    """What a `torch_dist` folder holds. The flat buffers of `dp_reshardable`, whose map is not stored, are client
    state."""
    beside = os.path.join(path, COMMON)
    common = torchfile.read(beside) if paths.is_file(beside) else {}
    if not paths.is_file(beside):
        said.warn("dcp-no-common", f"{beside}: missing: arguments, iteration and hyperparameters lie in it")
    if not isinstance(common, dict):
        raise CheckpointError(f"{beside}: holds a {type(common).__name__}, expected a dict: it is no common state")
    args = getattr(common.get("args"), "attributes", {})
    found = Found(path, files=(ABOUT, *((COMMON,) if common else ()), *files))
    found.mesh = _mesh(args, metadata)
    found.axes = (("tp", found.mesh.tp),) if found.mesh.tp > 1 else ()
    found.parts = _HALVES
    found.heads, found.kv_heads = _whole(args, "num_attention_heads"), _whole(args, "num_query_groups")
    found.step = _whole(common, "iteration")
    buffers = [key for key in metadata.tensors if _BUFFERS.match(key)]
    for key, entry in metadata.tensors.items():
        if key in buffers:
            continue
        match = _STATE.fullmatch(key)
        with said.caught("dcp-chunks", f"{path}: {key}"):
            for name, grid in _grids(metadata, entry, match[2] if match else key).items():
                if match:
                    found.states.setdefault(name, {})[_MASTER.get(match[1], match[1])] = grid
                else:
                    found.weights[name] = grid
    found.stages = _stages(found)
    gathered = [key for key in metadata.blobs if _GATHERED.fullmatch(key)]
    found.optimizer = bool(found.states or buffers or gathered) or "optimizer" in common
    found.groups = _groups(common.get("optimizer"), found)
    found.client = _client(common, metadata, buffers)
    if buffers:
        said.remark(
            "dcp-no-map",
            f"{path}: the optimizer was saved as dp_reshardable: {len(buffers)} flat buffers ({buffers[0]}, …) whose "
            "map to tensors is not stored. They are in the client state as they lie, and no states of tensors: save "
            "with --dist-ckpt-optim-fully-reshardable to have those",
        )
    if gathered:
        said.remark(
            "dcp-no-map",
            f"{path}: the optimizer was saved as dp_zero_gather_scatter: an object of flat buffers for each model "
            f"parallel group ({gathered[0]}, …), whose map to tensors is not stored. They are in the client state, and "
            "no states of tensors: save with --dist-ckpt-optim-fully-reshardable to have those",
        )
    return found


def _grids(metadata: Metadata, entry: Entry, key: str) -> dict[str, Grid]:
    """Name → grid of every tensor that a key stands for: one a layer where they are stacked, one an expert."""
    told = metadata.extra.get("mcore_data", {}).get(entry.key)
    whole = told.get("nd_reformulated_orig_global_shape") if isinstance(told, dict) else None
    if whole is not None and not (isinstance(whole, tuple | list) and all(map(natural, whole))):
        raise CheckpointError(f"its shape before it was flattened is {brief(whole)}, expected lengths of dims")
    names, count = _names(key, entry.shape if whole is None else tuple(whole))
    if whole is not None:
        return {names(place): grid for place, grid in _flattened(metadata, entry, tuple(whole), count).items()}
    boxes = boxes_of(metadata, entry)
    if not count:
        return {key: grid_of(boxes)}
    return {names(place): grid_of(one) for place, one in boxes.slices(count).items()}


def _names(key: str, shape: tuple[int, ...]) -> tuple[Any, int]:
    """(place in the stack → name, how many leading dims are stacked) of a key."""
    match = _STACKED.fullmatch(key)
    stacked = match is not None and len(shape) > 1
    before, after = (match[1], match[2]) if match is not None and stacked else ("", key)
    experts = ".experts.experts." in f".{after}" and len(shape) > 1 + stacked

    def name(place: tuple[int, ...]) -> str:
        rest = after.replace("experts.experts.", f"experts.local_experts.{place[-1]}.", 1) if experts else after
        return f"{before}.{place[0]}.{rest}" if stacked else rest

    return name, int(stacked) + int(experts)


def _flattened(metadata: Metadata, entry: Entry, whole: tuple[int, ...], count: int) -> dict[tuple[int, ...], Grid]:
    """What 0.12's `fully_sharded_model_space` makes of a tensor: a grid of equal pieces, each flattened, and a dp
    rank's range of it a chunk: dims (*grid, elements of a piece)."""
    grid, numel = entry.shape[:-1], entry.shape[-1]
    if len(grid) != len(whole) or any(n % k for n, k in zip(whole, grid, strict=True)) or 0 in grid:
        raise CheckpointError(f"a grid of {grid} pieces does not divide a tensor of {whole}: the file is damaged")
    piece = tuple(n // k for n, k in zip(whole, grid, strict=True))
    if math.prod(piece) != numel or any(n != 1 for n in piece[:count]):
        raise CheckpointError(f"pieces of {numel} elements, expected {math.prod(piece)} of {whole} in {grid}")
    chunks: dict[tuple[int, ...], list[tuple[int, int, int]]] = {}
    for i, (start, size) in enumerate(zip(entry.starts.tolist(), entry.sizes.tolist(), strict=True)):
        if any(n != 1 for n in size[:-1]):
            raise CheckpointError(f"a chunk of {size} is no range of one piece")
        chunks.setdefault(tuple(start[:-1]), []).append((start[-1], size[-1], i))
    edges = tuple(np.arange(k + 1, dtype=np.int64) * n for n, k in zip(piece[count:], grid[count:], strict=True))
    items, nobody = EntryItems(metadata, entry), np.full(grid[count:], -1, np.int64)
    made = {}
    for place in itertools.product(*map(range, grid[:count])):
        flat = {}
        for cell in np.ndindex(*grid[count:]):
            ranges = sorted(r for r in chunks.get((*place, *cell), []) if r[1])
            ends = list(itertools.accumulate((n for _, n, _ in ranges), initial=0))
            if [start for start, _, _ in ranges] != ends[:-1] or ends[-1] != numel:
                raise CheckpointError(f"the ranges of piece {(*place, *cell)} do not make up its {numel} elements")
            flat[cell] = [(start, i) for start, _, i in ranges]
        made[place] = Grid(whole[count:], entry.dtype, edges, nobody, nobody, (False,) * len(edges), items, flat)
    return made


def _mesh(args: Mapping[str, Any], metadata: Metadata) -> Mesh:
    """The run's mesh, as far as its args tell: tp, pp, and what is left of the ranks (dp with cp)."""
    tp = _whole(args, "tensor_model_parallel_size") or 1
    pp = _whole(args, "pipeline_model_parallel_size") or 1
    world = metadata.extra.get("ranks") or _whole(args, "world_size") or tp * pp
    if max(world, tp * pp) > MOST_RANKS:
        raise CheckpointError(
            f"{metadata.folder}: its args tell of tp {tp}, pp {pp} and {world} ranks: damaged or forged; copy it again"
        )
    return Mesh(pp=pp, dp=world // (tp * pp) if world % (tp * pp) == 0 else 1, tp=tp)


def _stages(found: Found) -> dict[str, int]:
    """The pp stage of each tensor: that of the ranks that stored its weight."""
    assert found.mesh is not None
    each = found.mesh.size // found.mesh.pp
    ranks = {name: int(grid.ranks.max(initial=0)) for name, grid in found.weights.items()}
    return {name: rank // each for name, rank in ranks.items() if 0 <= rank < found.mesh.size}


def _groups(optimizer: Any, found: Found) -> tuple[ParameterGroup, ...]:
    """The parameter groups of `common.pt`, which does not say whose they are: by Megatron's own rule, expert tensors
    apart, and biases and tensors of one dim where weight decay is multiplied by 0."""
    several = isinstance(optimizer, dict) and any(type(key) is int for key in optimizer)
    made: list[dict[str, Any]] = []
    step = None
    for one in optimizer.values() if several else (optimizer,):
        inner = one.get("optimizer", one) if isinstance(one, dict) else {}
        groups = inner.get("param_groups") if isinstance(inner, dict) else ()
        for options in groups if isinstance(groups, list | tuple) else ():
            if isinstance(options, dict):
                made.append({k: v for k, v in options.items() if k != "params"})
        state = inner.get("state") if isinstance(inner, dict) else None
        common = state.get("common_step") if isinstance(state, dict) else None
        step = np.array(common.map()).item() if isinstance(common, Stored) and common.numel == 1 else step
    keys = [(bool(g.get("is_expert_parallel")), g.get("wd_mult") == 0) for g in made]
    apart = len(set(keys)) == len(keys)
    undecayed = {name: name.endswith(".bias") or len(grid.shape) == 1 for name, grid in found.weights.items()}
    found_groups = []
    for key, options in zip(keys, made, strict=True):
        names = tuple(
            name
            for name in (found.weights if apart else ())
            if ("local_experts" in name if len({k for k, _ in keys}) > 1 else False) == key[0]
            and (undecayed[name] == key[1] or len({d for e, d in keys if e == key[0]}) == 1)
        )
        scalars = {k: v for k, v in (("step", options.get("step", step)),) if v is not None}
        found_groups.append(ParameterGroup({k: v for k, v in options.items() if k not in scalars}, names, scalars))
    return tuple(found_groups)


def _client(common: Mapping[str, Any], metadata: Metadata, buffers: list[str]) -> Client:
    entries: dict[tuple[str | int, ...], Any] = {
        (key,): kept(value) for key, value in common.items() if key != "optimizer"
    }
    entries |= {(key,): partial(object_at, metadata, blob) for key, blob in metadata.blobs.items()}
    entries |= {(key,): partial(chunks_of, metadata, metadata.tensors[key]) for key in buffers}
    return Client(entries)


def _whole(of: Mapping[str, Any], name: str) -> int | None:
    value = of.get(name)
    return value if type(value) is int and value > 0 else None
