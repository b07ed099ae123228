"""A catalog → the files of a universal folder."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from ckptlab.arrays import Drawn, Tally
from ckptlab.catalog import MASTER, PARAM, Catalog, Tensor
from ckptlab.formats.deepspeed import names
from ckptlab.formats.deepspeed.cautions import groups_of_stages
from ckptlab.formats.deepspeed.names import FileName
from ckptlab.formats.deepspeed.optimfile import Wrapper
from ckptlab.formats.deepspeed.states import zero_stage
from ckptlab.formats.deepspeed.target import reshape
from ckptlab.formats.deepspeed.universal.read import FOLDER, GROUPS, OPTIMIZER, TIED, file_of
from ckptlab.formats.deepspeed.write import NativeWriter
from ckptlab.formats.fileplan import Elements, FilePlan
from ckptlab.formats.torch import torchfile
from ckptlab.formats.torch.pickles import foreign
from ckptlab.formats.torch.torchfile import Pending
from ckptlab.layout import cut_dim, equal_parts, sub_parameters


def files(source: Catalog, target: Catalog, tally: Tally | None = None) -> Iterator[FilePlan]:
    """Every file of the universal folder. `target` says for which mesh, stage and dtype the model files beside are
    made; tensors are whole, whatever the mesh. So are experts: they are in one model file, under their global names, as
    for ep 1, or, of AutoEP beside AutoTP, whose model files name the ranks, in none."""
    if target.private.experts and not target.private.experts.folded:
        target = reshape(source, target.mesh.joined(), replace(target.private.options, ep=1))
    writer = NativeWriter(source, target, tally)
    flat = target.private.wrapper is Wrapper.ZERO3
    for tensor in source.tensors.values():
        for state in tensor.states if tensor.kind == "parameter" else ():
            if state != PARAM:
                yield _state_file(source, tensor, target.tensors[tensor.name], state, flat, tally)
    for group in target.groups:
        if "step" in group.scalars and not flat:
            for name in group.tensors:
                yield torchfile.plan(f"{FOLDER}/{name}/step.pt", group.scalars["step"])
    for tensor in source.tensors.values():
        if not flat and PARAM in tensor.states and not source.private.is_pipeline:
            for name in tensor.aliases if tensor.kind == "parameter" else (tensor.name, *tensor.aliases):
                yield _whole_module(source, tensor, name, tally)
    yield torchfile.plan(f"{FOLDER}/{OPTIMIZER}", _common(writer))
    for p in range(target.mesh.pp):
        for t in range(target.mesh.tp):
            for d in range(target.mesh.dp if flat else 1):
                file = FileName("zero3_model" if flat else "model", p * target.mesh.tp + t, d)
                model = writer.model_file(p, t, d)
                if target.private.experts:
                    rank = target.mesh.rank(pp=p, dp=d, tp=t)
                    model["module"] |= writer.expert_weights(rank)
                yield torchfile.plan(file.text, model)


def _state_file(source: Catalog, tensor: Tensor, cut: Tensor, state: str, flat: bool, tally: Tally | None) -> FilePlan:
    leaf = _leaf(source, tensor, state, tensor.states[state], (tensor.numel,) if flat else tensor.shape, tally)
    fused = source.private.folder.experts.fused_of(tensor.name)
    of_experts = {"cat_dim": 0, "is_expert_param": True, "ep_num_experts": fused.total} if fused else {}
    if fused:
        leaf = replace(leaf, shape=tensor.shape)  # whole at ZeRO-3 too
    content = leaf if flat and not fused else {**loader_keys(cut), **of_experts, "param": leaf}
    return torchfile.plan(f"{FOLDER}/{tensor.name}/{file_of(state)}.pt", content)


def _whole_module(source: Catalog, tensor: Tensor, name: str, tally: Tally | None) -> FilePlan:
    """What DeepSpeed's converter writes of tensors that the optimizer does not know, and of aliases: fp32 alone."""
    state = MASTER if MASTER in tensor.states else PARAM
    leaf = _leaf(source, tensor, state, np.dtype(np.float32), tensor.shape, tally)
    return torchfile.plan(f"{FOLDER}/{name}/{file_of(MASTER)}.pt", {"param": leaf})


def _leaf(
    source: Catalog, tensor: Tensor, state: str, dtype: np.dtype, shape: tuple[int, ...], tally: Tally | None
) -> Pending:
    drawn = Drawn.whole(source, tensor.name, state, dtype, tally)
    return Pending(dtype, shape, (Elements(drawn, dtype, 0, tensor.numel),))


def loader_keys(tensor: Tensor) -> dict[str, Any]:
    """What DeepSpeed's loader needs to cut a whole tensor again: where the tp cut falls of this tensor of a target, and
    how."""
    keys: dict[str, Any] = {}
    dim, terms = cut_dim(tensor.layout, "tp"), sub_parameters(tensor.layout, "tp")
    if dim is None:
        if not tensor.layout_known:
            keys["cat_dim"] = 0
    elif terms:
        shape = [tuple(terms) if i == dim else n for i, n in enumerate(tensor.shape)]
        fields = {"patterns": [tensor.name], "shape": shape, "partition_dim": dim}
        keys["sub_param_shape"] = foreign(
            "deepspeed.checkpoint.universal_checkpoint", "SubparamShape", state=fields, new=True
        )
    else:
        keys["cat_dim"] = dim
        if (parts := equal_parts(tensor.layout, "tp")) > 1:
            keys["param_n_sub_params"] = parts
    if tensor.layout.padded:
        keys["vocab_tensor"] = True
    return keys


def _common(writer: NativeWriter) -> dict[str, Any]:
    """`optimizer_state.pt`: what the optimizer files say once, hyperparameters included."""
    target = writer.target
    state = dict(writer.extras) if writer.source.private.dtype == target.private.dtype else {}
    state |= {"ds_version": writer.version}
    if target.private.wrapper is not Wrapper.BF16:
        state["zero_stage"] = zero_stage(target.zero_stage)
    parts, zero3 = writer.parts_on(0), target.private.wrapper is Wrapper.ZERO3
    state["partition_count"] = target.mesh.dp if zero3 else [target.mesh.dp] * len(parts)
    state["param_groups"] = writer.param_groups(parts)
    module = writer.source.private.module
    tied = {prefix: layer for layer, prefix in module.layer_keys.items() if prefix.startswith(names.TIED)}
    if tied and not module.assumed:
        state[TIED] = tied
    if stages := groups_of_stages(target):
        state[GROUPS] = stages
        state["param_groups"] = [{**g.options, "params": [i]} for i, g in enumerate(target.groups)]
        state["partition_count"] = [target.mesh.dp] * len(target.groups)
    if zero3:
        scalars = {i: dict(target.groups[part.group.group].scalars) for i, part in enumerate(parts)}
        state["optimizer_state_dict"] = {"state": scalars, "param_groups": state["param_groups"]}
    return state
