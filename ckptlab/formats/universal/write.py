"""A catalog → the files of a universal folder."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from ckptlab.arrays import Gather, Tally
from ckptlab.catalog import MASTER, MODULE, Catalog, Tensor
from ckptlab.formats.deepspeed import names
from ckptlab.formats.deepspeed.headers import Wrapper
from ckptlab.formats.deepspeed.write import NativeWriter, torch_job
from ckptlab.formats.job import FileJob
from ckptlab.formats.pickles import foreign
from ckptlab.formats.torchfile import Pending
from ckptlab.formats.universal.read import FOLDER, OPTIMIZER
from ckptlab.layout import Cut, cut_dim, equal_parts, sub_parameters


def jobs(source: Catalog, target: Catalog, tally: Tally | None = None) -> list[FileJob]:
    """Every file of the universal folder. `target` says for which mesh, stage and dtype the model files beside are
    made; tensors are whole, whatever the mesh."""
    writer = NativeWriter(source, target, tally)
    made = [_state_job(source, target, t, s, tally) for t in source.tensors.values() for s in _written(t)]
    flat = target.native.wrapper is Wrapper.ZERO3
    for group in target.groups:
        if "step" in group.scalars and not flat:
            made += [torch_job(f"{FOLDER}/{n}/step.pt", partial(_same, group.scalars["step"])) for n in group.tensors]
    for tensor in source.tensors.values():
        if not flat and MODULE in tensor.states and not source.native.is_pipeline:
            names_ = tensor.aliases if tensor.kind == "parameter" else (tensor.name, *tensor.aliases)
            made += [_whole_module(source, tensor, n, tally) for n in names_]
    made.append(torch_job(f"{FOLDER}/{OPTIMIZER}", partial(_common, writer)))
    for p in range(target.mesh.pp):
        for t in range(target.mesh.tp):
            for d in range(target.mesh.dp if flat else 1):
                mp = p * target.mesh.tp + t
                name = names.zero3_model(d, mp) if flat else names.model(mp)
                made.append(torch_job(name, partial(writer.model_file, p, t, d)))
    return made


def _same(value: Any) -> Any:
    return value


def _written(tensor: Tensor) -> list[str]:
    return [s for s in tensor.states if s != MODULE] if tensor.kind == "parameter" else []


def _state_job(source: Catalog, target: Catalog, tensor: Tensor, state: str, tally: Tally | None) -> FileJob:
    dtype = tensor.states[state]
    flat = target.native.wrapper is Wrapper.ZERO3
    shape = (tensor.numel,) if flat else tensor.shape
    leaf = _leaf(source, tensor, state, dtype, shape, tally)
    build = (lambda: leaf) if flat else (lambda: {**loader_keys(source, tensor), "param": leaf})
    return torch_job(f"{FOLDER}/{tensor.name}/{state}.pt", build)


def _whole_module(source: Catalog, tensor: Tensor, name: str, tally: Tally | None) -> FileJob:
    """What DeepSpeed's converter writes of tensors that the optimizer does not know, and of aliases: fp32 alone."""
    state = MASTER if MASTER in tensor.states else MODULE
    leaf = _leaf(source, tensor, state, np.dtype(np.float32), tensor.shape, tally)
    return torch_job(f"{FOLDER}/{name}/{MASTER}.pt", lambda: {"param": leaf})


def _leaf(
    source: Catalog, tensor: Tensor, state: str, dtype: np.dtype, shape: tuple[int, ...], tally: Tally | None
) -> Pending:
    return Pending(
        dtype,
        shape,
        lambda: Gather(source, tensor.name, state, dtype=dtype, tally=tally).chunks(
            Cut.whole(tensor.shape), (), 0, tensor.numel
        ),
    )


def loader_keys(source: Catalog, tensor: Tensor) -> dict[str, Any]:
    """What DeepSpeed's loader needs to cut a whole tensor again: where its tp cut falls, and how."""
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
    target, extras = writer.target, writer.source.native.extras
    state = dict(extras) if writer.source.native.dtype == target.native.dtype else {}
    state |= {"ds_version": writer.folder.models[0, 0].get("ds_version")}
    if target.native.wrapper is not Wrapper.BF16:
        state["zero_stage"] = foreign("deepspeed.runtime.zero.config", "ZeroStageEnum", target.zero_stage)
    groups = writer.groups_on(0)
    state["partition_count"] = (
        target.mesh.dp if target.native.wrapper is Wrapper.ZERO3 else [target.mesh.dp] * len(groups)
    )
    state["param_groups"] = writer.param_groups(groups)
    if target.native.wrapper is Wrapper.ZERO3:
        scalars = {i: dict(target.groups[g.group].scalars) for i, g in enumerate(groups)}
        state["optimizer_state_dict"] = {"state": scalars, "param_groups": state["param_groups"]}
    return state
