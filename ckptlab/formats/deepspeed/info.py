"""What a model file says about its mesh, made to say the target's: configuration, client arguments, layout lists."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from ckptlab.catalog import Catalog, Tensor
from ckptlab.formats.deepspeed.layouts import UniversalInfo
from ckptlab.formats.deepspeed.target import NativeTarget
from ckptlab.formats.pickles import Foreign, foreign

SCALERS = "deepspeed.runtime.fp16.loss_scaler"


def adapt_config(config: Mapping[str, Any], target: Catalog) -> dict[str, Any]:
    """The stored ds_config for the target: stage, dtype and what concerns the flat buffers. Load does not read it."""
    native: NativeTarget = target.native
    adapted = copy.deepcopy(dict(config))
    zero = {**(adapted.get("zero_optimization") or {}), "stage": target.zero_stage}
    zero.pop("elastic_checkpoint", None)
    if native.options.round_robin is not None:
        zero["round_robin_gradients"] = native.options.round_robin
    if native.options.sub_group_size is not None:
        zero["sub_group_size"] = native.options.sub_group_size
    adapted["zero_optimization"] = zero
    if native.options.dtype is not None:
        for key in ("bf16", "bfloat16", "fp16"):
            if key in adapted:
                adapted[key] = {**adapted[key], "enabled": key.startswith(native.dtype[:2]) and native.dtype != "fp32"}
        if native.dtype != "fp32":
            adapted[native.dtype] = {**adapted.get(native.dtype, {}), "enabled": True}
    return adapted


def adapt_client(model: dict[str, Any], own: UniversalInfo | None, target: Catalog, rank: int) -> dict[str, Any]:
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
    found = universal_info(model.get("universal_checkpoint_info"), own, target)
    if found is not None:
        model["universal_checkpoint_info"] = found
    return model


def universal_info(stored: Any, own: UniversalInfo | None, target: Catalog) -> dict[str, Any] | None:
    """`universal_checkpoint_info` for the target; lists are made of layouts that did not come from it."""
    info = dict(stored) if isinstance(stored, Mapping) else None
    if target.mesh.tp > 1 and (own is None or not own.trusted):
        info = {**(info or {"universal_checkpoint_version": 0.4}), **lists_from_layouts(target)}
    if info is None:
        return None
    padded = [t for t in target.tensors.values() if t.layout.padded]
    if padded:
        info["padded_vocab_size"] = padded[0].cut.shape[0]
    if info.get("sub_param_shard_widths"):
        info["sub_param_shard_widths"] = {
            pattern: _shard_widths(
                next((t for t in target.tensors.values() if re.match(pattern, t.name)), None), widths
            )
            for pattern, widths in info["sub_param_shard_widths"].items()
        }
    return info


def _shard_widths(tensor: Tensor | None, stored: Any) -> Any:
    if tensor is None or not tensor.cut.axes:
        return [[sum(row)] for row in stored] if tensor is not None else stored
    dim = next(i for i, d in enumerate(tensor.cut.dims) if d.axes)
    return widths(tensor, dim)


def widths(tensor: Tensor, dim: int) -> list[list[int]]:
    """For each sub-parameter along a cut dim, its width on every tp rank."""
    rows = [tensor.cut.rows(tensor.cut.coordinate({"tp": t}))[dim] for t in range(tensor.cut.mesh.tp)]
    return np.stack([r[:, 2] for r in rows], axis=1).tolist()


def lists_from_layouts(target: Catalog) -> dict[str, Any]:
    """DeepSpeed's regex lists, one pattern a tensor, from the cuts of the target."""
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
        cut = [i for i, d in enumerate(tensor.cut.dims) if d.axes]
        if tensor.layout.padded:
            lists["vocabulary_parameter_patterns"].append(pattern)
            lists["original_vocab_size"] = tensor.shape[0]
        elif not cut:
            key = (
                "parameter_to_average_patterns"
                if tensor.layout.replicas == "mean"
                else "tp_replicated_parameter_patterns"
            )
            lists[key].append(pattern)
        elif len(tensor.cut.rows(tensor.cut.coordinate({"tp": 0}))[cut[0]]) > 1:
            per_rank = widths(tensor, cut[0])
            sizes = tuple(sum(row) for row in per_rank)
            shape = tuple(sizes if i == cut[0] else n for i, n in enumerate(tensor.shape))
            lists["parameter_with_sub_params"].append({"patterns": [pattern], "shape": shape, "partition_dim": cut[0]})
            lists["sub_param_shard_widths"][pattern] = per_rank
        elif cut[0] == 1:
            lists["parameter_with_row_parallelism_patterns"].append(pattern)
    return lists


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
