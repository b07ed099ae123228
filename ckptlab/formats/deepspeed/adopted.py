"""A checkpoint of another kind as DeepSpeed's writers need their source: with the model file that an engine would have
saved for it on one rank.

Weights, optimizer states, groups and the step are the source's. What an engine keeps beside (its scheduler, random
states, the program's client state) is not in it, and begins anew.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ckptlab.catalog import MASTER, PARAM, Catalog, ParameterGroup, Tensor
from ckptlab.errors import ReshapeError
from ckptlab.formats.deepspeed.experts import Experts, layer_of
from ckptlab.formats.deepspeed.files import StepFolder
from ckptlab.formats.deepspeed.groups import GROUP, degree_named
from ckptlab.formats.deepspeed.modelfile import ModelFile
from ckptlab.formats.deepspeed.module import ModuleWeights, by_names
from ckptlab.formats.deepspeed.names import VERSION, in_pipeline
from ckptlab.formats.deepspeed.optimfile import Wrapper
from ckptlab.formats.deepspeed.read import Native
from ckptlab.layout import without
from ckptlab.layout.notation import names
from ckptlab.mesh import Mesh
from ckptlab.stored import Stored, row_major_strides, scalar
from ckptlab.words import some

ZERO_STAGE = 1  # where nobody says another


def adopted(source: Catalog, tensors: Mapping[str, Tensor] | None = None, pipeline: bool = False) -> Catalog:
    """The source itself where DeepSpeed wrote it; else the same tensors over the same bytes, with what DeepSpeed's
    writers ask for. tensors: those of the target, whose layouts are then taken. pipeline: as the pipeline engine would
    have saved it, whose tensors go by the numbers of layers.

    ReshapeError, with every reason, where an engine could not resume from it.
    """
    if isinstance(source.private, Native):
        return source
    if reasons := [*_reasons(source), *(_unnumbered(source) if pipeline else ())]:
        raise ReshapeError(
            f"{source.path}: DeepSpeed cannot resume from this {source.format} checkpoint:\n"
            + "\n".join(f"  - {reason}" for reason in reasons)
        )
    tp = any("tp" in names(node) for t in source.tensors.values() for node in t.layout.tree)
    held = {name: _tensor(t, tp, (tensors or {}).get(name)) for name, t in source.tensors.items()}
    groups = tuple(
        replace(group, scalars=_scalars(group.scalars), apart={n: _scalars(its) for n, its in group.apart.items()})
        for group in _apart(source.groups)
    )
    stage = source.zero_stage if source.zero_stage is not None else ZERO_STAGE
    training = replace(source.training, mesh=Mesh(), groups=groups, zero_stage=stage, layouts_told=False)
    model = _model_file(source, held, stage)
    told = {degree for group in groups if (degree := degree_named(group.name))}
    experts = Experts.named(source.tensors, told.pop() if len(told) == 1 else 1)
    head = ModelFile.of(source.path, {**model, "module": None} if pipeline and not experts else model)
    folder = StepFolder(source.path, Mesh(), {(0, 0): (head,)}, experts=experts)
    module = by_names(ModuleWeights(), held) if pipeline else ModuleWeights()
    native = Native(folder, Wrapper.NONE, False, module, {}, False)
    return replace(source, tensors=held, training=training, private=native)


def _reasons(source: Catalog) -> Iterator[str]:
    if not source.groups:
        yield "it holds weights alone, and no optimizer that could be resumed"
        return
    members = {name: i for i, group in enumerate(source.groups) for name in group.tensors}
    if lost := [name for name in members if name not in source.tensors]:
        yield f"its parameter groups name tensors that it does not hold: {some(lost, 4)}"
    if free := [t.name for t in source.tensors.values() if t.kind == "parameter" and t.name not in members]:
        yield f"tensors that are in no parameter group: {some(free, 4)}: as whose the optimizer steps them is not told"
    trained = [source.tensors[name] for name in members if name in source.tensors]
    for tensor in trained:
        kept = {state: np.dtype(d) for state, d in tensor.states.items() if state != PARAM}
        if MASTER not in kept:
            yield f"{tensor.name} has no float32 master weight, which DeepSpeed steps"
            break
        if odd := [f"{state} of {dtype}" for state, dtype in kept.items() if dtype != np.float32]:
            yield f"{tensor.name} keeps {some(odd, 4)}: DeepSpeed's optimizers keep float32"
            break
    for group in source.groups:
        states = {frozenset(source.tensors[n].states) - {PARAM} for n in group.tensors if n in source.tensors}
        if len(states) > 1:
            said = sorted(" and ".join(sorted(one)) for one in states)
            yield f"tensors of one parameter group keep different states: {some(said, 4)}"
    experts = Experts.named(source.tensors, 1)
    for layer, total in experts.total.items():
        if gaps := [n for n, held in experts.tensors(layer, source.tensors) if not held]:
            yield f"expert {gaps[0]} of {layer}*, of which there are {total} by their numbers, has no tensor"


def _apart(groups: Sequence[ParameterGroup]) -> Iterator[ParameterGroup]:
    """The parameter groups as DeepSpeed trains them: experts in groups behind the others
    (`split_params_into_different_moe_groups_for_optimizer`)."""
    behind = []
    for group in groups:
        experts = tuple(name for name in group.tensors if layer_of(name))
        if not experts or len(experts) == len(group.tensors):
            yield group
            continue
        yield replace(group, tensors=tuple(name for name in group.tensors if not layer_of(name)))
        behind.append(replace(group, options={**group.options, "name": GROUP.format(1), "moe": True}, tensors=experts))
    yield from behind


def _unnumbered(source: Catalog) -> Iterator[str]:
    names = (n for t in source.tensors.values() for n in (t.name, *t.aliases))
    if others := [n for n in names if not in_pipeline(n)]:
        yield (
            f"{some(others, 2)} {'is' if len(others) == 1 else 'are'} in no layer of a pipeline, whose names begin "
            "with its number: the run was of no pipeline engine; leave pp and pipeline= out, or rename them"
        )


def _tensor(tensor: Tensor, tp_is_told: bool, target: Tensor | None) -> Tensor:
    """The same with a layout over tp alone, known where the source speaks of tp at all."""
    others = [axis for axis in tensor.cut.mesh.axes if axis != "tp"]
    layout = without(tensor.layout if target is None else target.layout, others)
    known = tensor.layout_known and tp_is_told
    rank = {MASTER: 0, PARAM: 2}
    states = dict(sorted(tensor.states.items(), key=lambda item: (rank.get(item[0], 1), item[0])))
    return replace(tensor, layout=layout.replace(stages=(0,)), stages=(0,), states=states, layout_known=known)


def _scalars(kept: Mapping[str, Any]) -> dict[str, Any]:
    """What is kept once, numbers as tensors: as torch's optimizers count."""
    found = {}
    for name, value in kept.items():
        number = scalar(value) if name == "step" else None
        found[name] = value if number is None else np.array(number, np.float32)
    return found


def _schedule(client: Mapping[str, Any], step: int) -> dict[str, Any]:
    """How far the learning rate's schedule is, for DeepSpeed's schedulers and for torch's: an engine that has one fails
    without."""
    own = client.get("lr_scheduler") if "lr_scheduler" in client else None
    told = dict(own) if isinstance(own, Mapping) and type(own.get("last_epoch")) is int else {}
    return {"last_epoch": step, "lr_lambdas": [], **told, "last_batch_iteration": told.get("last_epoch", step) - 1}


def _model_file(source: Catalog, tensors: Mapping[str, Tensor], stage: int) -> dict[str, Any]:
    """What an engine on one rank would have in its model file; tensors are just named there."""
    dtype, step = source.training.dtype or "fp32", source.training.step or 0
    engine = {"bf16": {"enabled": False}} if dtype == "fp32" else {dtype: {"enabled": True}}
    module = {
        name: Stored(source.path, 0, next(iter(t.states.values())), t.shape, row_major_strides(t.shape))
        for t in tensors.values()
        for name in (t.name, *t.aliases)
        if not layer_of(t.name)  # they have files of their own
    }
    return {
        "module": module,
        "buffer_names": [t.name for t in tensors.values() if t.kind == "buffer"],
        "optimizer": None,
        "param_shapes": None,
        "frozen_param_shapes": None,
        "shared_params": {alias: t.name for t in tensors.values() for alias in t.aliases},
        "frozen_param_fragments": None,
        "lr_scheduler": _schedule(source.client, step),
        "data_sampler": None,
        "random_ltd": None,
        "sparse_tensor_module_names": [],
        "skipped_steps": 0,
        "global_steps": step,
        "global_samples": 0,
        "dp_world_size": 1,
        "mp_world_size": 1,
        "checkpoint_parallel_dimensions": {"pp_degree": 1, "tp_degree": 1},
        "ds_config": {"zero_optimization": {"stage": stage}, **engine},
        "ds_version": VERSION,
        "iteration": step,
    }
