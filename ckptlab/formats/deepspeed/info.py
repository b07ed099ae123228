"""What a model file says about its mesh, made to say the target's: configuration, client arguments, layout lists."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from ckptlab.catalog import Catalog, Tensor
from ckptlab.formats.deepspeed import autoep, autotp
from ckptlab.formats.deepspeed.groups import GROUP
from ckptlab.formats.deepspeed.optimfile import Wrapper
from ckptlab.formats.deepspeed.target import NativeTarget
from ckptlab.formats.torch.pickles import Foreign, foreign
from ckptlab.layout import Cut, cut_dim

DATA_FIRST = "use_data_before_expert_parallelism"
SCALERS = "deepspeed.runtime.fp16.loss_scaler"


def adapt_config(config: Mapping[str, Any], target: Catalog) -> dict[str, Any]:
    """The stored ds_config for the target: stage, dtype and what concerns the flat buffers. Load does not read it."""
    native: NativeTarget = target.private
    adapted = copy.deepcopy(dict(config))
    zero = {**(adapted.get("zero_optimization") or {}), "stage": target.zero_stage}
    zero.pop("elastic_checkpoint", None)
    if native.options.round_robin is not None:
        zero["round_robin_gradients"] = native.options.round_robin
    if native.options.sub_group_size is not None:
        zero["sub_group_size"] = native.options.sub_group_size
    adapted["zero_optimization"] = zero
    if native.experts.data_first != bool(adapted.get(DATA_FIRST)):
        adapted[DATA_FIRST] = native.experts.data_first
    if native.experts.fused and isinstance(adapted.get("expert_parallel"), dict):
        adapted["expert_parallel"]["autoep_size"] = native.experts.fused[0].ep
    if isinstance(tensor_parallel := adapted.get("tensor_parallel"), dict) and "autotp_size" in tensor_parallel:
        tensor_parallel["autotp_size"] = target.mesh.tp
    if native.options.dtype is not None:
        for key in ("bf16", "bfloat16", "fp16"):
            if key in adapted:
                adapted[key] = {**adapted[key], "enabled": key.startswith(native.dtype[:2]) and native.dtype != "fp32"}
        if native.dtype != "fp32":
            adapted[native.dtype] = {**adapted.get(native.dtype, {}), "enabled": True}
    return adapted


def adapt_client(model: dict[str, Any], told: bool, target: Catalog, rank: int) -> dict[str, Any]:
    """A model file's client state for the target's mesh: `args`, `checkpoint_info`, `universal_checkpoint_info`."""
    mesh = target.mesh
    padded = next((t.cut.shape[0] for t in target.tensors.values() if t.layout.padded), None)
    args = model.get("args")
    if isinstance(args, Foreign) and isinstance(args.state, dict):
        changes = {
            "tensor_model_parallel_size": mesh.tp,
            "pipeline_model_parallel_size": mesh.pp,
            "data_parallel_size": mesh.dp,
            "world_size": mesh.size,
            "rank": rank,
            "zero_stage": target.zero_stage,
            "padded_vocab_size": padded,
        }
        known = {k: v for k, v in changes.items() if k in args.attributes and v is not None}
        model["args"] = args.with_attributes(**known)
    if isinstance(model.get("checkpoint_info"), dict) and padded and "padded_vocab_size" in model["checkpoint_info"]:
        model["checkpoint_info"] = {**model["checkpoint_info"], "padded_vocab_size": padded}
    if (found := universal_info(model.get("universal_checkpoint_info"), told, target, rank)) is None:
        model.pop("universal_checkpoint_info", None)
    else:
        model["universal_checkpoint_info"] = found
    model.pop(autoep.FOLDING, None)  # of the source's mesh
    for held in (model, found or {}):
        for key in (autoep.KEY, autoep.OLD_KEY):
            if held.get(key):
                held[key] = [_autoep(entry, target, rank) for entry in held[key]]
    return model


def _autoep(entry: Mapping[str, Any], target: Catalog, rank: int) -> dict[str, Any]:
    """What AutoEP records of a layer of the target, on one rank of it."""
    (fused,) = (one for one in target.private.experts.fused if one.number == entry["moe_layer_id"])
    mesh, zero3 = target.tensors[fused.names[0]].cut.mesh, target.private.wrapper is Wrapper.ZERO3
    at = mesh.coordinate(rank)
    local = len(fused.ranks[at["ep"]])
    placed = [{"rank": r, "experts": list(held)} for r, held in enumerate(fused.ranks)]
    maps = {name: autotp.map_of(target.tensors[name], "ep") for name in fused.names}
    return {
        **entry,
        "num_local_experts": local,
        "ep_size": fused.ep,
        "expert_placement": {
            "version": autoep.VERSION,
            "num_experts": fused.total,
            "ep_size": fused.ep,
            "ranks": placed,
        },
        "affine_maps": {"version": autotp.VERSION, "params": maps},
        "checkpoint_format": "zero3_partitioned" if zero3 else "per_expert_files",
        "checkpoint_format_version": 1 if zero3 else None,
        "ep_group_name": GROUP.format(fused.ep),
        "ep_rank": at["ep"],
        "expert_data_parallel_rank": at["edp"],
        "expert_data_parallel_world_size": mesh["edp"],
        "global_expert_start": at["ep"] * local,
        "global_expert_end": (at["ep"] + 1) * local,
    }


def universal_info(stored: Any, told: bool, target: Catalog, rank: int) -> dict[str, Any] | None:
    """`universal_checkpoint_info` for the target, in the file of a rank.

    told: the source's own lists said its layouts. Where they did not, lists are made of the layouts; where those cannot
    be said in such lists there is None, so that nobody goes by wrong ones.
    """
    info = dict(stored) if isinstance(stored, Mapping) else None
    if target.mesh.tp > 1 and not told:
        lists = lists_from_layouts(target)
        info = None if lists is None else {**(info or {"universal_checkpoint_version": 0.4}), **lists}
    if info is None or (target.mesh.tp == 1 and info.get("affine_map")):  # AutoTP says nothing where it is off
        return None
    if told and info.get("affine_map"):
        return info | _affine(info, target, rank)
    padded = [t for t in target.tensors.values() if t.layout.padded]
    if padded:
        info["padded_vocab_size"] = padded[0].cut.shape[0]
    if widths := info.get("sub_param_shard_widths"):
        info["sub_param_shard_widths"] = {
            p: [_spread(row, target.mesh.tp) for row in rows] for p, rows in widths.items()
        }
    return info


def _affine(info: Mapping[str, Any], target: Catalog, rank: int) -> dict[str, Any]:
    """What AutoTP says of the target, on a rank: the map of every tensor, and the widths of its sub-parameters. Of all
    experts of a layer it knows those that the rank has, and takes all tp ranks to have them."""
    tensors = {f"^{re.escape(name)}$": tensor for name, tensor in target.tensors.items() if tensor.kind != "buffer"}
    maps = {pattern: autotp.map_of(_as_autotp_sees(tensor, target, rank)) for pattern, tensor in tensors.items()}
    found: dict[str, Any] = {"affine_map": {"version": autotp.VERSION, "params": maps}}
    if widths := info.get("sub_param_shard_widths"):
        found["sub_param_shard_widths"] = {
            pattern: _widths(tensor, dim)
            for pattern in widths
            for tensor in target.tensors.values()
            if re.match(pattern, tensor.name) and (dim := cut_dim(tensor.layout, "tp")) is not None
        }
    return found


def _as_autotp_sees(tensor: Tensor, target: Catalog, rank: int) -> Tensor:
    if target.private.experts.fused_of(tensor.name) is None:
        return tensor
    shape = tensor.cut.shard_shape(tensor.cut.coordinate(tensor.cut.mesh.coordinate(rank)))
    return replace(tensor, shape=shape, cut=Cut.whole(shape, target.mesh))


def _spread(widths: Sequence[int], tp: int) -> list[int]:
    """A sub-parameter's widths for another tp degree: even, as the target's layout cuts it."""
    return list(widths) if len(widths) == tp else [sum(widths) // tp] * tp


def lists_from_layouts(target: Catalog) -> dict[str, Any] | None:
    """DeepSpeed's regex lists, one pattern a tensor, from the target's cuts; None if some cut cannot be said so."""
    lists: dict[str, Any] = {
        "tp_replicated_parameter_patterns": [],
        "parameter_with_row_parallelism_patterns": [],
        "vocabulary_parameter_patterns": [],
        "parameter_with_sub_params": [],
        "sub_param_shard_widths": {},
        "parameter_to_average_patterns": [],
        "parameter_with_2_sub_params_cat_dim_0": [],
    }
    for tensor in target.tensors.values():
        pattern = f"{re.escape(tensor.name)}$"
        dim = cut_dim(tensor.layout, "tp")
        if dim is None:
            if tensor.layout.replicas == "sum":
                return None
            averaged = tensor.layout.replicas == "mean"
            lists["parameter_to_average_patterns" if averaged else "tp_replicated_parameter_patterns"].append(pattern)
            continue
        if tensor.layout.padded:
            lists["vocabulary_parameter_patterns"].append(pattern)
            lists["original_vocab_size"] = tensor.shape[0]
        widths = _widths(tensor, dim)
        if widths is None:
            return None
        if len(widths) > 1:
            sizes = tuple(sum(row) for row in widths)
            shape = tuple(sizes if i == dim else n for i, n in enumerate(tensor.shape))
            lists["parameter_with_sub_params"].append({"patterns": [pattern], "shape": shape, "partition_dim": dim})
            lists["sub_param_shard_widths"][pattern] = widths
        elif dim == 1:
            lists["parameter_with_row_parallelism_patterns"].append(pattern)
        elif dim > 1:
            return None
    return lists


def _widths(tensor: Tensor, dim: int) -> list[list[int]] | None:
    """For each sub-parameter along a cut dim its width on every tp rank; None if the dim is cut in another way."""
    cut = tensor.cut
    held = [autotp.plain_rows(cut.rows(at)[dim]) for at in cut.coordinates()]
    if len({len(rows) for rows in held}) > 1:
        return None
    end = 0
    for part in zip(*held, strict=True):  # rank after rank, part after part, without a gap
        for start, _, width in part:
            if start != end:
                return None
            end += width
    return [[width for *_, width in part] for part in zip(*held, strict=True)] if end == cut.shape[dim] else None


def loss_scaler(dynamic: bool) -> Foreign:
    """DeepSpeed's LossScaler (static, 1.0) or DynamicLossScaler, as a new engine would make it."""
    if not dynamic:
        return foreign(SCALERS, "LossScaler", state={"cur_scale": 1.0, "dynamic": False}, new=True)
    state = {
        "cur_scale": 2.0**16,
        "cur_iter": 0,
        "last_overflow_iter": -1,
        "scale_factor": 2.0,
        "scale_window": 1000,
        "min_scale": 1,
        "delayed_shift": 2,
        "cur_hysteresis": 2,
        "consecutive_hysteresis": False,
        "raise_error_at_min_scale": True,
        "dtype": None,
        "dynamic": True,
    }
    return foreign(SCALERS, "DynamicLossScaler", state=state, new=True)
