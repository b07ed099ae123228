"""What each file of a step folder says, in one form whatever DeepSpeed's version: parsed once, odd values refused.

Every reader after this works on these values; nobody else takes the dictionaries apart.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from functools import cached_property
from typing import Any

import numpy as np

from ckptlab.catalog import MASTER
from ckptlab.errors import CheckpointError, UnsupportedError
from ckptlab.formats.torch.torchfile import is_unread
from ckptlab.stored import Stored, scalar
from ckptlab.words import brief

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]
Content = Mapping[str, Any]

EXTRAS = ("clip_grad", "loss_scaler", "dynamic_loss_scale", "overflow")
_BIG = 1 << 62  # beyond any number of elements
_CODES = (np.dtype(np.int8), np.dtype(np.uint8))  # of quantised states, which mean nothing without their scales
_IN_PARTS = "local_sub_partitions_of_fp32_groups"
_BY_GROUP = ("group_paddings", "partition_count")  # what an optimizer file has a list of, an entry a group
_DEEP = 64  # dictionaries in one another, in a module


class Wrapper(Enum):
    """Which of DeepSpeed's optimizer wrappers wrote the files."""

    BF16 = "BF16_Optimizer"  # fp32 and moments both padded, padding on the last dp rank
    ZERO12 = "ZeRO-1/2"  # fp32 without padding, moments with it
    ZERO3 = "ZeRO-3"  # every tensor cut by itself
    WHOLE = "without ZeRO"  # whole tensors, in the model file
    NONE = "none"  # weights alone


@dataclass(frozen=True)
class Header:
    """A dictionary in a file, its values taken out by the form that DeepSpeed gives them.

    `path` is the file's, `at` the keys that lead to the dictionary. Each method raises a CheckpointError that names
    both where a value has another form.
    """

    path: str
    values: Content
    at: str = ""

    @classmethod
    def of(cls, path: str, value: Any, at: str = "") -> Header:
        if not isinstance(value, Mapping):
            raise CheckpointError(
                f"{path}: {at + ': ' if at else ''}expected a dictionary, found {shown(value)}: {_ODD}"
            )
        return cls(path, value, at)

    def __contains__(self, key: str) -> bool:
        return self.values.get(key) is not None

    def odd(self, key: str, expected: str) -> CheckpointError:
        """The error on a value of another form."""
        where = f"{self.at}.{key}" if self.at else key
        return CheckpointError(
            f"{self.path}: {where}: expected {expected}, found {shown(self.values.get(key))}: {_ODD}"
        )

    def integer(self, key: str, least: int = 0) -> int:
        value = self.values.get(key)
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or not least <= value < _BIG:
            raise self.odd(key, f"an integer of at least {least}")
        return int(value)

    def refuse_newer(self, known: int) -> None:
        """UnsupportedError where `version` is a later one than is known."""
        if (version := self.integer("version")) > known:
            raise UnsupportedError(
                f"{self.path}: {self.at} is of version {version}, ckptlab knows version {known}: a newer ckptlab may "
                "read it"
            )

    def inside(self, key: str) -> Header:
        """The dictionary of a key; an empty one where there is none."""
        value = self.values.get(key)
        return Header.of(self.path, {} if value is None else value, f"{self.at}.{key}" if self.at else key)

    def several(self, key: str) -> list[Any]:
        """The list of a key; an empty one where there is none."""
        value = self.values.get(key)
        if value is None:
            return []
        if not isinstance(value, (list, tuple)):
            raise self.odd(key, "a list")
        return list(value)

    def dictionaries(self, key: str) -> list[Header]:
        return [Header.of(self.path, v, f"{self.at}.{key}" if self.at else key) for v in self.several(key)]

    def integers(self, key: str, least: int = 0) -> list[int]:
        return [Header(self.path, {key: v}, self.at).integer(key, least) for v in self.several(key)]

    def names(self, key: str) -> tuple[str, ...]:
        value = self.values.get(key)
        found = sorted(value) if isinstance(value, (set, frozenset)) else self.several(key)
        if not all(isinstance(v, str) for v in found):
            raise self.odd(key, "a list of names")
        return tuple(found)

    def aliases(self, key: str) -> dict[str, str]:
        inside = self.inside(key).values
        if not all(isinstance(k, str) and isinstance(v, str) for k, v in inside.items()):
            raise self.odd(key, "names of names")
        return dict(inside)

    def stored(self, key: str) -> dict[str, Stored]:
        """The tensors of a dictionary by name; what is no tensor is left out."""
        return _tensors(self.inside(key))

    def groups(self) -> list[tuple[dict[str, Any], list[int]]]:
        """(hyperparameters, parameters by number) of each of torch's `param_groups`."""
        groups = self.dictionaries("param_groups")
        return [({k: v for k, v in g.values.items() if k != "params"}, g.integers("params")) for g in groups]

    def states(self) -> dict[Any, Content]:
        """What torch's `state` keeps of each parameter, by its number."""
        state = self.inside("state")
        return {i: Header.of(self.path, v, f"{state.at}.{i}").values for i, v in state.values.items()}

    def shapes(self, key: str) -> dict[str, Shape]:
        return _shapes(self, key, self.inside(key).values)

    def shape_groups(self, key: str) -> tuple[Shapes, ...] | None:
        """Shapes, one mapping a group (DeepSpeed before 0.6 wrote one group as a bare mapping); None if there are
        none."""
        value = self.values.get(key)
        groups = [value] if isinstance(value, Mapping) else value
        if groups is None:
            return None
        if not isinstance(groups, (list, tuple)) or not all(isinstance(g, Mapping) for g in groups):
            raise self.odd(key, "shapes by name, one dictionary a group")
        return tuple(_shapes(self, key, g) for g in groups)


_ODD = "not as DeepSpeed writes it. Put back this run's own file"


def shown(value: Any) -> str:
    """A value in a message: its type, and what it is if that is short."""
    plain = isinstance(value, (int, float, str, type(None))) and len(repr(value)) <= 40
    return repr(value) if plain else f"a {type(value).__name__}"


def _shapes(header: Header, key: str, group: Mapping[Any, Any]) -> dict[str, Shape]:
    found = {}
    for name, shape in group.items():
        whole = isinstance(shape, (list, tuple)) and all(
            isinstance(n, (int, np.integer)) and 0 <= n < _BIG for n in shape
        )
        if not isinstance(name, str) or not whole or math.prod(shape) >= _BIG:
            raise header.odd(key, f"the shape of {name}" if isinstance(name, str) else "names")
        found[name] = tuple(map(int, shape))
    return found


def _refuse_unread(path: str, values: Iterable[tuple[Any, Any]]) -> None:
    for name, value in values:
        if is_unread(value):
            raise UnsupportedError(
                f"{path}: {brief(name)} is made by {value.callee}: a sparse or quantised tensor, or one of a class of "
                "its own, which ckptlab does not read: save it again as a plain one"
            )


def _tensors(header: Header) -> dict[str, Stored]:
    _refuse_unread(header.path, header.values.items())
    found = {k: v for k, v in header.values.items() if isinstance(v, Stored)}
    if not all(isinstance(name, str) for name in found):
        raise CheckpointError(f"{header.path}: {header.at}: a tensor without a name: {_ODD}")
    return found


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
            int(size) if isinstance(size, (int, float)) and 1 <= size < _BIG else None,
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
        shapes, frozen = header.shape_groups("param_shapes"), header.shapes("frozen_param_shapes")
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
                raise CheckpointError(f"{module.path}: {module.at}: a tensor without a name: {_ODD}")
            found[at] = value
            continue
        _refuse_unread(module.path, [(".".join(map(str, at)), value)])
        if isinstance(value, Mapping):
            if len(at) > _DEEP:
                raise CheckpointError(f"{module.path}: {module.at}: nested deeper than {_DEEP} dictionaries: {_ODD}")
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
    return _tensors(Header.of(path, content))


def expert_optimizer(path: str, content: Any) -> WholeOptimizer | None:
    """What an expert parallel rank's own file keeps of its optimizer; None at ZeRO 1 and 2, which have others."""
    return WholeOptimizer.of(Header.of(path, content).inside("optimizer"))


@dataclass(frozen=True)
class OptimizerFile:
    """An optimizer file: its flat buffers, each with its states, its scalars, and its parameter group's index.

    `options[group]`: hyperparameters (None in an elastic checkpoint, which has none). `spans[buffer]`: name → (start,
    count) by `param_slice_mappings`, where they are written. `alignment` and `paddings` are DeepSpeed's
    `param_alignment_paddings` and (of ZeRO-1 and 2) `group_paddings`. `shapes`: param_shapes, which DeepSpeed before
    0.6 kept here. `parts[buffer]`: what ZeRO-1 before DeepSpeed 0.4 has of a buffer, which is cut into pieces that are
    dealt to dp ranks in turn: piece i of a rank is the buffer's piece i * dp + rank. `states` then are the first ones.
    """

    path: str
    content: Content
    wrapper: Wrapper
    stage: int | None
    states: tuple[Mapping[str, Stored], ...]
    scalars: tuple[Mapping[str, Any], ...]
    group_of: tuple[int, ...]
    options: tuple[Mapping[str, Any] | None, ...]
    elastic: bool
    alignment: tuple[tuple[int, ...], ...]
    paddings: tuple[int, ...]
    spans: tuple[Mapping[str, tuple[int, int]], ...]
    shapes: tuple[Shapes, ...] | None
    parts: tuple[tuple[Mapping[str, Stored], ...], ...] = ()

    @classmethod
    def of(cls, path: str, content: Any) -> OptimizerFile:
        whole = Header.of(path, content)
        header = whole.inside("optimizer_state_dict")
        if _IN_PARTS in header:
            return cls._in_parts(whole, header)
        wrapper = _wrapper(path, header)
        zero3 = wrapper is Wrapper.ZERO3
        masters = header.several("fp32_flat_groups" if zero3 else "single_partition_of_fp32_groups")
        if not all(isinstance(m, Stored) for m in masters):
            raise header.odd("fp32_flat_groups" if zero3 else "single_partition_of_fp32_groups", "a list of tensors")
        by_id, ids, options = _base(header, "optimizer_state_dict" if zero3 else "base_optimizer_state")
        order = [i for members in ids for i in members]
        if sorted(order) != list(range(len(masters))):
            raise CheckpointError(
                f"{path}: {len(masters)} fp32 buffers, but the parameter groups name buffers {order[:20]}: the file is "
                "inconsistent"
            )
        buffers = []
        for i, master in enumerate(masters):
            arrays, single = elementwise(path, by_id.get(i, {}), master.numel)
            buffers.append(({MASTER: master, **arrays}, single))
        group_of = [g for g, members in enumerate(ids) for _ in members]
        args = getattr(header.values.get("zero_stage"), "args", ())  # ZeroStageEnum(n) is a placeholder
        stage = args[0] if isinstance(args, tuple) and args else header.values.get("zero_stage")
        alignment = header.several("param_alignment_paddings")
        return cls(
            path,
            whole.values,
            wrapper,
            stage if isinstance(stage, int) and stage in (1, 2, 3) else None,
            tuple(arrays for arrays, _ in buffers),
            tuple(single for _, single in buffers),
            tuple(g for _, g in sorted(zip(order, group_of, strict=True))),
            tuple(options),
            isinstance(header.values.get("base_optimizer_state"), (list, tuple)),
            tuple(tuple(Header(path, {"paddings": a}, header.at).integers("paddings")) for a in alignment),
            tuple(header.integers("group_paddings")) if wrapper is Wrapper.ZERO12 else (),
            () if zero3 else tuple(_spans(h) for h in header.dictionaries("param_slice_mappings")),
            header.shape_groups("param_shapes") or whole.shape_groups("param_shapes"),
        )

    @classmethod
    def _in_parts(cls, whole: Header, header: Header) -> OptimizerFile:
        """A file of ZeRO-1 before DeepSpeed 0.4 (`runtime/zero/stage1.py`): elastic, a list of states a group and no
        hyperparameters, or with those of torch's optimizer, which has a parameter for each piece."""
        groups, key = header.several(_IN_PARTS), "base_optimizer_state"
        if not all(isinstance(g, (list, tuple)) and g and all(isinstance(m, Stored) for m in g) for g in groups):
            raise header.odd(_IN_PARTS, "a list of tensors a group")
        elastic = isinstance(header.values.get(key), (list, tuple))
        options: list[Mapping[str, Any] | None] = [None] * len(groups)
        states: list[list[Content]]
        if elastic:
            listed = [Header(header.path, {key: one}, header.at) for one in header.several(key)]
            states = [[one.values for one in of_group.dictionaries(key)] for of_group in listed]
        else:
            base = header.inside(key)
            options, by_id = [options for options, _ in base.groups()], base.states()
            states = [[by_id.get(i, {}) for i in members] for _, members in base.groups()]
        if [len(held) for held in states] != [len(g) for g in groups]:
            raise header.odd(key, f"a state for each of {', '.join(str(len(g)) for g in groups)} pieces")
        kept = [
            [(m, *elementwise(whole.path, one, m.numel)) for m, one in zip(g, held, strict=True)]
            for g, held in zip(groups, states, strict=True)
        ]
        parts = tuple(tuple({MASTER: m, **arrays} for m, arrays, _ in group) for group in kept)
        return cls(
            whole.path,
            whole.values,
            Wrapper.ZERO12,
            1,
            tuple(group[0] for group in parts),
            tuple(group[0][2] for group in kept),
            tuple(range(len(groups))),
            tuple(options),
            elastic,
            (),
            (),
            (),
            whole.shape_groups("param_shapes"),
            parts,
        )

    def padding(self, buffer: int) -> int:
        """Elements at the end of a buffer's partition that are in no tensor, as `group_paddings` says; else 0."""
        said = self.state_dict.get("group_paddings")
        one = said[buffer] if isinstance(said, (list, tuple)) and buffer < len(said) else 0
        return one if isinstance(one, int) and 0 <= one <= self.states[buffer][MASTER].numel else 0

    def reordered(self, order: Sequence[int]) -> OptimizerFile:
        """With its groups, of which each has one buffer, in another order."""

        def taken(of: Any) -> Any:
            return type(of)(of[i] for i in order) if len(of) == len(order) else of

        said = {k: taken(self.state_dict[k]) for k in _BY_GROUP if isinstance(self.state_dict.get(k), (list, tuple))}
        kept = {field: taken(getattr(self, field)) for field in ("states", "scalars", "options")}
        kept |= {field: taken(getattr(self, field)) for field in ("alignment", "paddings", "spans")}
        return replace(self, content={**self.content, "optimizer_state_dict": {**self.state_dict, **said}}, **kept)

    @cached_property
    def name(self) -> str:
        """The file's own name."""
        return os.path.basename(self.path)

    @property
    def state_dict(self) -> Content:
        """The optimizer's own part of the file."""
        return self.content["optimizer_state_dict"]

    @property
    def steps(self) -> tuple[float, ...]:
        """The steps that its buffers name, each once; torch keeps a float."""
        found = {s for one in self.scalars if (s := scalar(one.get("step"))) is not None}
        return tuple(sorted(int(s) if s.is_integer() else s for s in found))


def order_of(
    options: Sequence[Mapping[str, Any] | None], wanted: Sequence[Mapping[str, Any] | None]
) -> list[int] | None:
    """Which of a rank's parameter groups goes where, in the order of another rank's; None where they are in order, or
    not the same ones. DeepSpeed puts the names of groups of experts into a set, whose order differs from process to
    process (`split_params_into_different_moe_groups_for_optimizer`)."""
    names, those = ([str((g or {}).get("name")) for g in one] for one in (options, wanted))
    if names == those or sorted(names) != sorted(those):
        return None
    left = {name: iter([i for i, own in enumerate(names) if own == name]) for name in names}
    return [next(left[name]) for name in those]


def _wrapper(path: str, state: Header) -> Wrapper:
    if "fp32_flat_groups" in state.values:
        return Wrapper.ZERO3
    if "single_partition_of_fp32_groups" in state.values:
        return Wrapper.ZERO12 if "zero_stage" in state.values else Wrapper.BF16
    raise UnsupportedError(
        f"{path}: neither 'single_partition_of_fp32_groups' nor 'fp32_flat_groups': "
        f"found {', '.join(map(str, state.values))}; ckptlab knows ZeRO-1, 2, 3 and BF16_Optimizer"
    )


def _base(header: Header, key: str) -> tuple[dict[Any, Content], list[list[int]], list[Mapping[str, Any] | None]]:
    """The state of each buffer, and the buffers and hyperparameters of each parameter group."""
    if isinstance(header.values.get(key), (list, tuple)):  # elastic: a state a group, and no hyperparameters
        listed = [h.values for h in header.dictionaries(key)]
        return dict(enumerate(listed)), [[i] for i in range(len(listed))], [None] * len(listed)
    base = header.inside(key)
    groups = base.groups()
    return base.states(), [members for _, members in groups], [options for options, _ in groups]


def elementwise(path: str, state: Content, numel: int | None) -> tuple[dict[str, Stored], dict[str, Any]]:
    """(states with an element for each of the master's, numbers that are kept once) of what an optimizer keeps.

    numel: elements of the master, of which ZeRO-1 and 2 leave the padding out; None: not known. UnsupportedError where
    something is neither: the codes and scales of 8-bit optimizers, the rows and columns of factored ones.
    """
    arrays: dict[str, Stored] = {}
    single: dict[str, Any] = {}
    _refuse_unread(path, state.items())
    for key, value in state.items():
        several = isinstance(value, Stored) and bool(value.shape) and (numel is None or not value.numel == 1 != numel)
        (arrays if several else single)[key] = value
    lengths = Counter(a.numel for a in arrays.values())
    usual = max(lengths, key=lambda n: (lengths[n], n), default=0)
    odd = [k for k, a in arrays.items() if a.numel != usual or a.numel < (numel or 0) or a.dtype in _CODES]
    if odd:
        told = ", ".join(f"{key} {arrays[key].dtype.name} {arrays[key].shape}" for key in arrays)
        raise UnsupportedError(
            f"{path}: an optimizer whose states are not element for element those of its weights ({told}): 8-bit "
            "(codes, scales and code books) or factored. ckptlab cannot open it: save it with an optimizer of plain "
            "states, or its weights alone"
        )
    return arrays, single


@dataclass(frozen=True)
class WholeOptimizer:
    """What a model file keeps of an optimizer that trains without ZeRO, group after group.

    `masters[group]`: float32 weights, one for each parameter, or all in one flat tensor if `fused` (DeepSpeed's
    FP16_Optimizer around a fused Adam); None where the module's own weights are what the optimizer steps.
    `states[group]`: what is kept for each parameter (of the flat tensor), `scalars[group]` what is kept once.
    Parameters have no names.
    """

    content: Content
    masters: tuple[tuple[Stored, ...], ...] | None
    states: tuple[tuple[Mapping[str, Stored], ...], ...]
    scalars: tuple[Mapping[str, Any], ...]
    options: tuple[Mapping[str, Any], ...]
    fused: bool

    @classmethod
    def of(cls, header: Header) -> WholeOptimizer | None:
        """None where there is none, or just a copy of what the optimizer files hold (BF16_Optimizer without ZeRO)."""
        if not header.values or "base_optimizer_state" in header:
            return None
        fused = "fp32_groups_flat" in header
        key = "fp32_groups_flat" if fused else "fp32_groups"
        masters: list[Any] | None = [g if isinstance(g, (list, tuple)) else [g] for g in header.several(key)]
        if not all(isinstance(m, Stored) for group in masters or () for m in group):
            raise header.odd(key, "tensors, group by group")
        wrapped = "optimizer_state_dict" in header
        masters = masters if key in header else None
        base = header.inside("optimizer_state_dict") if wrapped else header
        if "param_groups" not in base or (wrapped and masters is None):
            raise UnsupportedError(
                f"{header.path}: an optimizer of another kind in the model file: found "
                f"{', '.join(map(str, header.values))}"
            )
        groups, by_id = base.groups(), base.states()
        counts = [len(members) for _, members in groups]
        if masters is not None and [len(m) for m in masters] != counts:
            raise header.odd(key, f"a master weight for each of {counts} parameters")
        kept = [
            [
                elementwise(header.path, by_id.get(i) or {}, None if masters is None else masters[g][k].numel)
                for k, i in enumerate(members)
            ]
            for g, (_, members) in enumerate(groups)
        ]
        return cls(
            header.values,
            None if masters is None else tuple(map(tuple, masters)),
            tuple(tuple(arrays for arrays, _ in group) for group in kept),
            tuple(next((single for _, single in group if single), {}) for group in kept),
            tuple(options for options, _ in groups),
            fused,
        )

    def ordered_as(self, other: WholeOptimizer) -> WholeOptimizer:
        """With its groups in the order of another rank's (see `order_of`)."""
        order = order_of(self.options, other.options)
        if order is None:
            return self
        fields = ("states", "scalars", "options", *(() if self.masters is None else ("masters",)))
        taken: dict[str, Any] = {field: tuple(getattr(self, field)[i] for i in order) for field in fields}
        return replace(self, **taken)


def _spans(mapping: Header) -> dict[str, tuple[int, int]]:
    """name → (start, count) of what a slice mapping says that the file holds."""
    found = {}
    for name, address in mapping.values.items():
        told = getattr(address, "attributes", {})
        start, count = told.get("start"), told.get("numel")
        if not isinstance(name, str) or not isinstance(start, int) or not isinstance(count, int):
            raise mapping.odd(name, "a start and a number of elements")
        if count > 0:
            found[name] = (start, count)
    return found
