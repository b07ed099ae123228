"""What the optimizer files of a step folder hold: parameter groups, and where every tensor lies in their flat buffers.

Three writers, told apart by their keys (see `Wrapper`). The order of tensors in memory is that of `param_shapes` in the
model file; the stored `param_slice_mappings` are only checked against it, since DeepSpeed writes wrong ones under
`round_robin_gradients`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

import numpy as np

from ckptlab.catalog import DTYPES, MASTER, FlatGroup, Gradients, Notice, ParameterGroup
from ckptlab.errors import CheckpointError, UnsupportedError
from ckptlab.formats.deepspeed.files import Rank, StepFolder
from ckptlab.plan import FlatBuffer, Holder
from ckptlab.stored import Stored

Shapes = Mapping[str, tuple[int, ...]]
Partitions = Mapping[tuple[tuple[Holder, int, int], str], Mapping[Holder, tuple[Stored, ...]]]

EXTRAS = ("clip_grad", "loss_scaler", "dynamic_loss_scale", "overflow")


class Wrapper(Enum):
    """Which of DeepSpeed's optimizer wrappers wrote the files."""

    BF16 = "BF16_Optimizer"  # fp32 and moments both padded, padding on the last dp rank
    ZERO12 = "ZeRO-1/2"  # fp32 without padding, moments with it
    ZERO3 = "ZeRO-3"  # every tensor cut by itself


def gradients(wrapper: Wrapper, dtype: str, stage: int | None) -> Gradients:
    """How DeepSpeed 0.19 keeps gradients. BF16_Optimizer adds them up in float32 in flat buffers that dp does not cut
    (runtime/bf16_optimizer.py, `fp32_groups_gradients_flat`). Otherwise they have the weights' dtype, and dp cuts them
    from ZeRO-2 on (runtime/zero/stage_1_and_2.py, `partition_grads`; stage3.py, `grad_partitions_flat_buffer`), unless
    the run's config says `grad_accum_dtype`, which is not looked at.
    """
    if wrapper is Wrapper.BF16:
        return Gradients(DTYPES["fp32"], cut=False, flat=True)
    cut = (stage or 0) >= 2
    return Gradients(DTYPES[dtype], cut=cut, flat=cut)


@dataclass(frozen=True)
class OptimizerFiles:
    """The optimizer's side of a checkpoint.

    `elastic`: no hyperparameters were stored; `round_robin`: see the module; `extras`: what else the files say
    (`clip_grad`, `loss_scaler`, …).
    """

    wrapper: Wrapper
    zero_stage: int
    groups: tuple[ParameterGroup, ...]
    flat_groups: tuple[FlatGroup, ...]
    partitions: Partitions
    elastic: bool
    round_robin: bool
    extras: Mapping[str, Any]
    notices: tuple[Notice, ...]


@dataclass(frozen=True)
class _RankBuffers:
    """One file's flat buffers: for each buffer its states, its scalars and its parameter group's index on the stage."""

    states: tuple[Mapping[str, Stored], ...]
    scalars: tuple[Mapping[str, Any], ...]
    group_of: tuple[int, ...]
    options: tuple[Mapping[str, Any] | None, ...]


def read_optimizer(folder: StepFolder) -> OptimizerFiles:
    """Parameter groups and flat buffers of every rank. CheckpointError where lengths contradict the shapes."""
    first = folder.optims[0, 0][0]["optimizer_state_dict"]
    wrapper = _wrapper(folder, first)
    config = folder.models[0, 0].get("ds_config") or {}
    zero_config = config.get("zero_optimization") or {}
    stage = zero_config.get("stage", 1)
    stage = (
        3 if wrapper is Wrapper.ZERO3 else 1 if wrapper is Wrapper.BF16 else _stage_number(first["zero_stage"], stage)
    )
    elastic = isinstance(first.get("base_optimizer_state"), Sequence)
    round_robin = wrapper is Wrapper.ZERO12 and bool(zero_config.get("round_robin_gradients")) and folder.mesh.dp > 1

    buffers = {
        rank: tuple(_rank_buffers(folder, rank, d, wrapper) for d in range(folder.mesh.dp)) for rank in folder.optims
    }
    shapes = {rank: _shapes(folder, rank) for rank in folder.models}
    stages = [_stage_groups(folder, p, shapes[p, 0], buffers[p, 0][0]) for p in range(folder.mesh.pp)]
    groups, index = match_groups(folder.path, stages)
    flat_groups: list[FlatGroup] = []
    partitions: dict[tuple[tuple[Holder, int, int], str], Mapping[Holder, tuple[Stored, ...]]] = {}
    notices: list[Notice] = []
    scalars: dict[int, Mapping[str, Any]] = {}
    for p in range(folder.mesh.pp):
        for b, local_group in enumerate(buffers[p, 0][0].group_of):
            flats: dict[Holder, FlatBuffer] = {}
            stored: dict[Holder, list[Mapping[str, Stored]]] = {}
            for t in range(folder.mesh.tp):
                holder = Holder(pp=p, tp=t)
                stored[holder] = [rank.states[b] for rank in buffers[p, t]]
                flats[holder] = _flat_buffer(folder, (p, t), b, wrapper, shapes[p, t][b], stored[holder])
            first_rank = next(iter(stored.values()))[0]
            number = index[p][local_group]
            sub = sum(g.stage == p and g.group == number for g in flat_groups)
            dtypes = {s: one.dtype for s, one in first_rank.items()}
            group = FlatGroup(Holder(pp=p), number, flats, dtypes, sub)
            flat_groups.append(group)
            for s in dtypes:
                partitions[group.key, s] = {h: tuple(one[s] for one in row) for h, row in stored.items()}
            if wrapper is not Wrapper.ZERO3:
                notices += _check_mappings(folder, p, b, list(flats.values()), round_robin)
            scalars.setdefault(index[p][local_group], buffers[p, 0][0].scalars[b])
    _same_step(folder, buffers)
    return OptimizerFiles(
        wrapper,
        stage,
        tuple(replace(g, scalars=scalars.get(i, {})) for i, g in enumerate(groups)),
        tuple(flat_groups),
        partitions,
        elastic,
        round_robin,
        {k: first[k] for k in EXTRAS if k in first},
        tuple(dict.fromkeys(notices)),
    )


def _wrapper(folder: StepFolder, state: Mapping[str, Any]) -> Wrapper:
    if "fp32_flat_groups" in state:
        return Wrapper.ZERO3
    if "single_partition_of_fp32_groups" in state:
        return Wrapper.ZERO12 if "zero_stage" in state else Wrapper.BF16
    raise UnsupportedError(
        f"{folder.name_of('optim', (0, 0))}: neither 'single_partition_of_fp32_groups' nor 'fp32_flat_groups': "
        f"found {', '.join(map(str, state))}; ckptlab knows ZeRO-1, 2, 3 and BF16_Optimizer"
    )


def _stage_number(value: Any, default: int) -> int:
    """ZeroStageEnum(n), as a placeholder or as a plain number."""
    args = getattr(value, "args", None)
    return int(args[0]) if args else int(value) if isinstance(value, int) else default


def _shapes(folder: StepFolder, rank: Rank) -> list[Shapes]:
    """Shapes of a rank's trainable tensors, one mapping a flat buffer, in memory order."""
    stored = folder.models[rank].get("param_shapes")
    if stored is None:
        raise UnsupportedError(
            f"{folder.name_of('model', rank)}: no param_shapes: ckptlab needs them to know the buffers"
        )
    stored = [stored] if isinstance(stored, Mapping) else stored
    return [{name: tuple(int(n) for n in shape) for name, shape in group.items()} for group in stored]


def _rank_buffers(folder: StepFolder, rank: Rank, d: int, wrapper: Wrapper) -> _RankBuffers:
    where = folder.name_of("optim", rank, d)
    state_dict = folder.optims[rank][d]["optimizer_state_dict"]
    if wrapper is Wrapper.ZERO3:
        base, masters = state_dict["optimizer_state_dict"], state_dict["fp32_flat_groups"]
    else:
        base, masters = state_dict["base_optimizer_state"], state_dict["single_partition_of_fp32_groups"]
    options: list[Mapping[str, Any] | None]
    if isinstance(base, Mapping):
        by_id, param_groups = base["state"], base["param_groups"]
        ids = [list(g["params"]) for g in param_groups]
        options = [{k: v for k, v in g.items() if k != "params"} for g in param_groups]
    else:  # elastic: a list of states, one a group, and no hyperparameters
        by_id, ids, options = dict(enumerate(base)), [[i] for i in range(len(base))], [None] * len(base)
    group_of = [g for g, members in enumerate(ids) for _ in members]
    order = [i for members in ids for i in members]
    if sorted(order) != list(range(len(masters))):
        raise CheckpointError(
            f"{where}: {len(masters)} fp32 buffers, but the parameter groups name buffers {order}: the file is "
            "inconsistent"
        )
    shapes = _shapes(folder, rank)
    if len(shapes) != len(masters):
        raise CheckpointError(
            f"{where}: {len(masters)} fp32 buffers where {folder.name_of('model', rank)} lists {len(shapes)} groups "
            "of shapes: "
            "they come from different runs"
        )
    states, scalars = [], []
    for i, master in enumerate(masters):
        arrays = {MASTER: master}
        single: dict[str, Any] = {}
        for key, value in by_id.get(i, {}).items():
            if isinstance(value, Stored) and value.shape and value.numel >= master.numel:
                arrays[key] = value
            else:
                single[key] = value
        states.append(arrays)
        scalars.append(single)
    return _RankBuffers(
        tuple(states), tuple(scalars), tuple(g for _, g in sorted(zip(order, group_of, strict=True))), tuple(options)
    )


def _flat_buffer(
    folder: StepFolder, rank: Rank, b: int, wrapper: Wrapper, shapes: Shapes, per_dp: Sequence[Mapping[str, Stored]]
) -> FlatBuffer:
    """The geometry of buffer `b` on one (pp, tp) rank, checked against the lengths of what every dp rank stores."""
    names, dp = tuple(shapes), folder.mesh.dp
    counts = tuple(math.prod(s) for s in shapes.values())
    if wrapper is Wrapper.ZERO3:
        flat = FlatBuffer.per_tensor(names, counts, dp)
    else:
        state_dict = folder.optims[rank][0]["optimizer_state_dict"]
        alignment = state_dict.get("param_alignment_paddings")
        partition = per_dp[0][MASTER].numel
        if wrapper is Wrapper.ZERO12:
            partition += int(state_dict["group_paddings"][b])
        flat = FlatBuffer.contiguous(names, counts, dp, alignment[b] if alignment else None, partition)
    for d, states in enumerate(per_dp):
        whole = flat.size(d)
        filled = whole - (flat.padding(d) if flat.partition is not None else 0)
        for state, stored in states.items():
            if not filled <= stored.numel <= whole:
                raise CheckpointError(
                    f"{folder.name_of('optim', rank, d)}: {state} of group {b} ({names[0] if names else 'empty'} …) "
                    "has "
                    f"{stored.numel:,} elements, expected {filled:,}"
                    + (f" to {whole:,}" if whole != filled else "")
                    + f" from the shapes in {folder.name_of('model', rank)}: the two files do not belong together"
                )
    return flat


def _stage_groups(
    folder: StepFolder, stage: int, shapes: Sequence[Shapes], buffers: _RankBuffers
) -> list[tuple[Mapping[str, Any] | None, tuple[str, ...]]]:
    """(options, names) of each parameter group of a stage; at ZeRO-3 a group's sub-groups are joined."""
    joined: list[list[str]] = [[] for _ in buffers.options]
    for g, names in zip(buffers.group_of, shapes, strict=True):
        joined[g] += names
    return [(options, tuple(names)) for options, names in zip(buffers.options, joined, strict=True)]


def match_groups(
    path: str, stages: Sequence[Sequence[tuple[Mapping[str, Any] | None, tuple[str, ...]]]]
) -> tuple[tuple[ParameterGroup, ...], list[list[int]]]:
    """The run's parameter groups out of what each pp stage has of them.

    DeepSpeed drops a group that is empty on a stage, so that an index means nothing across stages: groups are matched
    by their hyperparameters, and where those repeat by order. Returns the groups (tensors in stage order) and, for each
    stage, the global index of each local group.
    """
    merged: list[tuple[str, Mapping[str, Any] | None, list[str]]] = []
    index: list[list[int]] = []
    for local in stages:
        used: list[int] = []
        for position, (options, names) in enumerate(local):
            key = _key(options)
            free = [i for i, (k, _, _) in enumerate(merged) if k == key and i not in used]
            if options is None:
                free = [position] if position < len(merged) else []
                if index and len(local) != len(index[0]):
                    raise CheckpointError(
                        f"{path}: pp stages have {len(index[0])} and {len(local)} parameter groups and no "
                        "hyperparameters to "
                        "match them by (elastic checkpoint): resave it without elastic_checkpoint"
                    )
            shared = [i for i in free if set(names) & set(merged[i][2])]
            if not free:
                after = max(used, default=-1) + 1
                merged.insert(after, (key, options, []))
                index = [[i + (i >= after) for i in row] for row in index]
                used = [i + (i >= after) for i in used]
                free = [after]
            chosen = (shared or free)[0]
            used.append(chosen)
            known = set(merged[chosen][2])
            merged[chosen][2].extend(n for n in names if n not in known)
        index.append(used)
    return tuple(ParameterGroup(options or {}, tuple(names)) for _, options, names in merged), index


def _key(options: Mapping[str, Any] | None) -> str:
    return repr(sorted((options or {}).items(), key=lambda kv: str(kv[0])))


def _check_mappings(
    folder: StepFolder, stage: int, b: int, flats: Sequence[FlatBuffer], round_robin: bool
) -> Iterable[Notice]:
    """Compare the stored slice mappings with the geometry."""
    for t, flat in enumerate(flats):
        expected = [_spans(flat, d) for d in range(folder.mesh.dp)]
        for d in range(folder.mesh.dp):
            stored = folder.optims[stage, t][d]["optimizer_state_dict"].get("param_slice_mappings")
            if not stored or b >= len(stored):
                continue
            found = {n: (int(a.start), int(a.numel)) for n, a in stored[b].items() if int(a.numel) > 0}
            if found == expected[d]:
                continue
            where = folder.name_of("optim", (stage, t), d)
            if found in expected:
                raise CheckpointError(
                    f"{where}: holds the partition of dp rank {expected.index(found)}, not of {d}: the files were "
                    "swapped or "
                    "renamed. Put them back under their own names"
                )
            reason = (
                "as DeepSpeed writes them under round_robin_gradients. Its own ds_to_universal goes by them and "
                "scrambles the weights"
                if round_robin
                else "for no reason that ckptlab knows"
            )
            yield Notice(
                "slice-mappings",
                f"{folder.path}: param_slice_mappings contradict param_shapes, {reason}; "
                "ckptlab reads by param_shapes, the order in memory",
            )


def _spans(flat: FlatBuffer, d: int) -> dict[str, tuple[int, int]]:
    """name → (start, count) in dp rank d's partition."""
    return {flat.names[i]: (int(start), int(count)) for i, _, start, count in flat.within(d)}


def _same_step(folder: StepFolder, buffers: Mapping[Rank, tuple[_RankBuffers, ...]]) -> None:
    """Every rank must have made the same number of steps."""
    seen: dict[float, str] = {}
    for rank, per_dp in buffers.items():
        for d, one in enumerate(per_dp):
            for scalars in one.scalars:
                if (step := scalar(scalars.get("step"))) is not None:
                    seen.setdefault(step, folder.name_of("optim", rank, d))
    if len(seen) > 1:
        (a, where_a), (b, where_b), *_ = seen.items()
        raise CheckpointError(
            f"{where_b}: optimizer step {b:g} where {where_a} has step {a:g}: one of them comes from another step. "
            "Put back the file of this step"
        )


def scalar(value: Any) -> float | None:
    """A step count, stored as a number or as a one-element tensor."""
    if isinstance(value, Stored):
        return float(np.asarray(value.map(), dtype=np.float64).reshape(-1)[0]) if value.numel == 1 else None
    return float(value) if isinstance(value, (int, float)) else None
