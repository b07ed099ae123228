"""What an optimizer's file says, and what a model file keeps of an optimizer that trains without ZeRO: in one form
whatever DeepSpeed's version."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from functools import cached_property
from typing import Any

import numpy as np

from ckptlab.catalog import MASTER
from ckptlab.errors import CheckpointError, UnsupportedError
from ckptlab.formats.deepspeed.header import Content, Header, Shapes, refuse_unread
from ckptlab.stored import Stored, scalar

EXTRAS = ("clip_grad", "loss_scaler", "dynamic_loss_scale", "overflow")
_CODES = (np.dtype(np.int8), np.dtype(np.uint8))  # of quantised states, which mean nothing without their scales
_IN_PARTS = "local_sub_partitions_of_fp32_groups"
_BY_GROUP = ("group_paddings", "partition_count")  # what an optimizer file has a list of, an entry a group


class Wrapper(Enum):
    """Which of DeepSpeed's optimizer wrappers wrote the files."""

    BF16 = "BF16_Optimizer"  # fp32 and moments both padded, padding on the last dp rank
    ZERO12 = "ZeRO-1/2"  # fp32 without padding, moments with it
    ZERO3 = "ZeRO-3"  # every tensor cut by itself
    WHOLE = "without ZeRO"  # whole tensors, in the model file
    NONE = "none"  # weights alone


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
        in_parts = _IN_PARTS in header
        wrapper = Wrapper.ZERO12 if in_parts else _wrapper(path, header)
        buffers, group_of, options = _in_parts(header) if in_parts else _buffers(header, wrapper)
        kept = [[(m, *elementwise(path, state, m.numel)) for m, state in pieces] for pieces in buffers]
        parts = tuple(tuple({MASTER: m, **arrays} for m, arrays, _ in pieces) for pieces in kept)
        args = getattr(header.values.get("zero_stage"), "args", ())  # ZeroStageEnum(n) is a placeholder
        stage = args[0] if isinstance(args, tuple) and args else header.values.get("zero_stage")
        stage = stage if isinstance(stage, int) and stage in (1, 2, 3) else None
        alignment = header.several("param_alignment_paddings")
        spans = [] if wrapper is Wrapper.ZERO3 else header.dictionaries("param_slice_mappings")
        return cls(
            path,
            whole.values,
            wrapper,
            1 if in_parts else stage,
            tuple(pieces[0] for pieces in parts),
            tuple(pieces[0][2] for pieces in kept),
            group_of,
            tuple(options),
            isinstance(header.values.get("base_optimizer_state"), (list, tuple)),
            tuple(tuple(Header(path, {"paddings": a}, header.at).integers("paddings")) for a in alignment),
            tuple(header.integers("group_paddings")) if wrapper is Wrapper.ZERO12 and not in_parts else (),
            tuple(map(_spans, spans)),
            header.param_shapes() or whole.param_shapes(),
            parts if in_parts else (),
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


Options = list[Mapping[str, Any] | None]  # hyperparameters of each parameter group, None where there are none
Buffers = list[list[tuple[Stored, Content]]]  # (master, state) of each piece of each buffer


def _buffers(header: Header, wrapper: Wrapper) -> tuple[Buffers, tuple[int, ...], Options]:
    """The buffers, each in one piece, the parameter group of each, and the groups' hyperparameters."""
    zero3 = wrapper is Wrapper.ZERO3
    key = "fp32_flat_groups" if zero3 else "single_partition_of_fp32_groups"
    masters = header.several(key)
    if not all(isinstance(m, Stored) for m in masters):
        raise header.odd(key, "a list of tensors")
    by_id, ids, options = _base(header, "optimizer_state_dict" if zero3 else "base_optimizer_state")
    order = [i for members in ids for i in members]
    if sorted(order) != list(range(len(masters))):
        raise CheckpointError(
            f"{header.path}: {len(masters)} fp32 buffers, but the parameter groups name buffers {order[:20]}: the file "
            "is inconsistent"
        )
    group_of = {i: g for g, members in enumerate(ids) for i in members}
    places = range(len(masters))
    return [[(masters[i], by_id.get(i, {}))] for i in places], tuple(group_of[i] for i in places), options


def _base(header: Header, key: str) -> tuple[dict[Any, Content], list[list[int]], Options]:
    """The state of each buffer, and the buffers and hyperparameters of each parameter group."""
    if isinstance(header.values.get(key), (list, tuple)):  # elastic: a state a group, and no hyperparameters
        listed = [h.values for h in header.dictionaries(key)]
        return dict(enumerate(listed)), [[i] for i in range(len(listed))], [None] * len(listed)
    base = header.inside(key)
    groups = base.groups()
    return base.states(), [members for _, members in groups], [options for options, _ in groups]


def _in_parts(header: Header) -> tuple[Buffers, tuple[int, ...], Options]:
    """The same of ZeRO-1 before DeepSpeed 0.4 (`runtime/zero/stage1.py`), whose buffers are in pieces: elastic, a list
    of states a group and no hyperparameters, or with those of torch's optimizer, which has a parameter for each
    piece."""
    groups, key = header.several(_IN_PARTS), "base_optimizer_state"
    if not all(isinstance(g, (list, tuple)) and g and all(isinstance(m, Stored) for m in g) for g in groups):
        raise header.odd(_IN_PARTS, "a list of tensors a group")
    options: Options = [None] * len(groups)
    if isinstance(header.values.get(key), (list, tuple)):
        listed = [Header(header.path, {key: one}, header.at) for one in header.several(key)]
        states = [[one.values for one in of_group.dictionaries(key)] for of_group in listed]
    else:
        by_id, ids, options = _base(header, key)
        states = [[by_id.get(i, {}) for i in members] for members in ids]
    if [len(held) for held in states] != [len(g) for g in groups]:
        raise header.odd(key, f"a state for each of {', '.join(str(len(g)) for g in groups)} pieces")
    buffers = [list(zip(g, held, strict=True)) for g, held in zip(groups, states, strict=True)]
    return buffers, tuple(range(len(groups))), options


def elementwise(path: str, state: Content, numel: int | None) -> tuple[dict[str, Stored], dict[str, Any]]:
    """(states with an element for each of the master's, numbers that are kept once) of what an optimizer keeps.

    numel: elements of the master, of which ZeRO-1 and 2 leave the padding out; None: not known. UnsupportedError where
    something is neither: the codes and scales of 8-bit optimizers, the rows and columns of factored ones.
    """
    arrays: dict[str, Stored] = {}
    single: dict[str, Any] = {}
    refuse_unread(path, state.items())
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


def expert_optimizer(path: str, content: Any) -> WholeOptimizer | None:
    """What an expert parallel rank's own file keeps of its optimizer; None at ZeRO 1 and 2, which have others."""
    return WholeOptimizer.of(Header.of(path, content).inside("optimizer"))
