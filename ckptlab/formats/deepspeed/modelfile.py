"""What a model file says, and a layer file, in one form whatever DeepSpeed's version."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ckptlab.errors import CheckpointError
from ckptlab.formats.deepspeed.header import BIG, ODD, Content, Header, Shape, Shapes, refuse_unread, tensors_of
from ckptlab.formats.deepspeed.optimfile import WholeOptimizer
from ckptlab.stored import Stored

_DEEP = 64  # dictionaries in one another, in a module


@dataclass(frozen=True)
class EngineConfig:
    """What the run's ds_config says that a reader or a target needs; None where it is silent."""

    stage: int | None = None
    round_robin: bool = False
    sub_group_size: int | None = None
    dtype: str | None = None
    data_before_experts: bool = False

    @classmethod
    def of(cls, config: Header) -> EngineConfig:
        zero = config.inside("zero_optimization")
        enabled = {k: bool(config.inside(k).values.get("enabled")) for k in ("bf16", "bfloat16", "fp16") if k in config}
        dtype = "fp32" if enabled else None
        if any(enabled.values()):
            dtype = "bf16" if enabled.get("bf16") or enabled.get("bfloat16") else "fp16"
        size = zero.values.get("sub_group_size")
        return cls(
            zero.integer("stage") if "stage" in zero else None,
            bool(zero.values.get("round_robin_gradients")),
            int(size) if isinstance(size, (int, float)) and 1 <= size < BIG else None,
            dtype,
            bool(config.values.get("use_data_before_expert_parallelism")),
        )


@dataclass(frozen=True)
class ModelFile:
    """A model file: its `content` as stored, and what of it a reader needs.

    `degrees` is (pp, tp), which DeepSpeed before 0.16 did not record; `shapes` are the trained tensors', one mapping a
    flat buffer, in memory order (None: not said, or not yet: see `shapes`); `module` the tensors in it by the names
    that the optimizer knows (None: the pipeline engine keeps them in layer files), `places` where each stands in a
    module that is a tree of dictionaries; `optimizer` what training without ZeRO keeps here.
    """

    path: str
    content: Content
    world: int
    dp: int
    degrees: tuple[int, int] | None
    config: EngineConfig
    shapes: tuple[Shapes, ...] | None
    module: Mapping[str, Stored] | None
    places: Mapping[tuple[str, ...], str]
    optimizer: WholeOptimizer | None
    buffers: frozenset[str]
    shared: Mapping[str, str]
    frozen: Shapes
    frozen_fragments: Mapping[str, Stored]

    @classmethod
    def of(cls, path: str, content: Any) -> ModelFile:
        header = Header.of(path, content)
        for key in ("dp_world_size", "mp_world_size", "global_steps"):
            if key not in header.values:
                raise CheckpointError(f"{path}: no {key!r}: not a model file that DeepSpeed wrote")
        degrees = header.inside("checkpoint_parallel_dimensions")
        shapes, frozen = header.param_shapes(), header.shapes("frozen_param_shapes")
        tree = _tree(header.inside("module"))
        known = {*(n for group in shapes or () for n in group), *frozen}
        names = _names(tree, known) if known and any(len(at) > 1 for at in tree) else {at: ".".join(at) for at in tree}
        return cls(
            path,
            header.values,
            header.integer("mp_world_size", 1),
            header.integer("dp_world_size"),
            (degrees.integer("pp_degree", 1), degrees.integer("tp_degree", 1)) if degrees.values else None,
            EngineConfig.of(header.inside("ds_config")),
            shapes,
            {names[at]: stored for at, stored in tree.items()} if "module" in header else None,
            {at: name for at, name in names.items() if at != (name,)},
            WholeOptimizer.of(header.inside("optimizer")),
            frozenset(header.names("buffer_names")),
            header.aliases("shared_params"),
            frozen,
            header.stored("frozen_param_fragments"),
        )

    @cached_property
    def name(self) -> str:
        """The file's own name."""
        return os.path.basename(self.path)

    @property
    def trained(self) -> dict[str, Shape]:
        """Shard shapes of the tensors that the optimizer of this rank knows, in memory order."""
        return {name: shape for group in self.shapes or () for name, shape in group.items()}


def _tree(module: Header) -> dict[tuple[str, ...], Stored]:
    """The tensors of a module by the keys that lead to each: one, or several where it is a tree of dictionaries."""
    found: dict[tuple[str, ...], Stored] = {}
    left: list[tuple[tuple[str, ...], Any]] = [((), module.values)]
    while left:
        at, value = left.pop()
        if isinstance(value, Stored):
            if not all(isinstance(key, str) for key in at):
                raise CheckpointError(f"{module.path}: {module.at}: a tensor without a name: {ODD}")
            found[at] = value
            continue
        refuse_unread(module.path, [(".".join(map(str, at)), value)])
        if isinstance(value, Mapping):
            if len(at) > _DEEP:
                raise CheckpointError(f"{module.path}: {module.at}: nested deeper than {_DEEP} dictionaries: {ODD}")
            left += [((*at, key), inside) for key, inside in reversed(list(value.items()))]
    return found


def _names(tree: Mapping[tuple[str, ...], Stored], known: set[str]) -> dict[tuple[str, ...], str]:
    """What the tensors of a tree are called where the optimizer knows them: the keys without the first few, which are
    of the program that wrapped the model."""
    deepest = max(len(at) for at in tree)
    for skipped in range(deepest):
        names = {at: ".".join(at[skipped:] or at) for at in tree}
        if known <= set(names.values()) and len(set(names.values())) == len(names):
            return names
    return {at: ".".join(at) for at in tree}


def layer_file(path: str, content: Any) -> dict[str, Stored]:
    """The tensors of a layer file."""
    return tensors_of(Header.of(path, content))
