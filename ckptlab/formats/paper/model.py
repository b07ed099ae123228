"""Models on paper: a transformer described by a few numbers, laid out on a mesh as Megatron and ZeRO do, without files.

The catalog that comes of it is like that of a checkpoint with nothing stored behind it: its layouts, flat buffers and
plans are worked out by the same code. ZeRO: Rajbhandari et al. 2020, arXiv:1910.02054.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields

import numpy as np

from ckptlab.catalog import (
    DTYPES,
    MASTER,
    PARAM,
    ZERO_STAGES,
    Catalog,
    FlatGroup,
    Gradients,
    ParameterGroup,
    Tensor,
    Training,
    placements_of,
)
from ckptlab.errors import LayoutError, ReshapeError
from ckptlab.findings import Finding
from ckptlab.mesh import Mesh
from ckptlab.plan import Holder
from ckptlab.sharding.stages import balanced, stage_of
from ckptlab.sharding.transformer import EMBEDDING, HEAD, NORM, PaperModel

OPTIMIZER = (MASTER, "exp_avg", "exp_avg_sq")  # Adam's


def laid_out(model: PaperModel, mesh: Mesh, zero_stage: int = 1) -> Catalog:
    """The model laid out on a mesh (pp, dp, tp) under a ZeRO stage: 0, all dp ranks hold everything, to 3, each
    tensor cut over dp. ReshapeError, with every reason, where it cannot be."""
    if reasons := list(_problems(model, mesh, zero_stage)):
        raise ReshapeError(f"this model cannot be laid out on {mesh}:\n" + "\n".join(f"  - {r}" for r in reasons))
    starts = balanced([0, *[1] * model.layers, 0, 0], mesh.pp)
    try:
        tensors = {n: _tensor(model, n, _stages(model, n, starts), mesh, zero_stage) for n in model.shapes}
    except LayoutError as error:
        raise ReshapeError(str(error)) from None
    flat_groups = tuple(_flat_groups(tensors, mesh, zero_stage)) if zero_stage else ()
    return Catalog(
        path=f"paper model ({model})",
        format="paper",
        mesh=mesh,
        tensors=tensors,
        placements=placements_of(tensors, flat_groups, _outside(tensors, zero_stage)),
        flat_groups=flat_groups,
        training=Training(
            mesh=mesh,
            zero_stage=zero_stage,
            dtype=model.dtype,
            groups=(ParameterGroup({}, tuple(tensors)),),
            layer_stages={i: stage_of(1 + i, starts) for i in range(model.layers)},
            heads=model.heads,
            kv_heads=model.keys,
            gradients=Gradients(DTYPES[model.dtype], cut=zero_stage >= 2, flat=zero_stage >= 2),
            layouts_told=True,
            numbers={f.name: getattr(model, f.name) for f in fields(model)},
        ),
        findings=tuple(_findings(mesh, zero_stage)),
    )


def _problems(model: PaperModel, mesh: Mesh, zero_stage: int) -> Iterator[str]:
    if zero_stage not in ZERO_STAGES:
        yield f"ZeRO stage {zero_stage}: expected 0, 1, 2 or 3"
    if mesh.pp > model.layers:
        yield f"pp {mesh.pp}: more stages than the {model.layers} transformer layers"
    for count, what in ((model.heads, "attention heads"), (model.keys, "key/value heads")):
        if count % mesh.tp and count > 1:
            yield f"tp {mesh.tp}: {count} {what} are not divisible by it"
    if model.heads == 1 and mesh.tp > 1:
        yield f"tp {mesh.tp}: one attention head cannot be cut"


def _stages(model: PaperModel, name: str, starts: Sequence[int]) -> tuple[int, ...]:
    """The pp stages that hold a tensor: the tied embedding is on the first and on the last."""
    last = len(starts) - 1
    if name == EMBEDDING:
        return tuple(dict.fromkeys((0, last))) if model.tied else (0,)
    return (last,) if name in (NORM, HEAD) else (stage_of(1 + int(name.split(".")[1]), starts),)


def _tensor(model: PaperModel, name: str, stages: tuple[int, ...], mesh: Mesh, zero_stage: int) -> Tensor:
    """ZeRO-3 keeps no module weight: it is made from the master's fragments."""
    shape = model.shapes[name]
    layout = model.layout(name, [shape])
    assert layout is not None  # Megatron has a layout for every name
    layout = layout.replace(stages=stages)
    if name in (EMBEDDING, HEAD) and shape[0] % mesh.tp:
        layout = layout.replace(padded={0: -(-shape[0] // mesh.tp) * mesh.tp})
    states = {s: np.dtype(np.float32) for s in OPTIMIZER} | {PARAM: DTYPES[model.dtype]}
    if zero_stage == 3:
        del states[PARAM]
    aliases = (HEAD,) if name == EMBEDDING and model.tied else ()
    return Tensor(name, shape, layout, layout.resolve(shape, mesh), "parameter", states, 0, stages, aliases)


def _flat_groups(tensors: Mapping[str, Tensor], mesh: Mesh, zero_stage: int) -> Iterator[FlatGroup]:
    for stage in range(mesh.pp):
        names = [t.name for t in tensors.values() if stage in t.stages]
        yield FlatGroup.laid_out(Holder(pp=stage), 0, names, tensors, mesh, zero_stage)


def _outside(tensors: Mapping[str, Tensor], zero_stage: int) -> dict[tuple[str, str], tuple[int, ...]]:
    """The stages of what lies outside flat buffers: at stage 0 everything, at 1 and 2 the module weights, at 3
    nothing."""
    states = () if zero_stage == 3 else (PARAM,) if zero_stage else (*OPTIMIZER, PARAM)
    return {(t.name, state): t.stages for t in tensors.values() for state in states}


def _findings(mesh: Mesh, zero_stage: int) -> Iterator[Finding]:
    if zero_stage >= 2 and mesh.pp > 1:
        found = f"DeepSpeed's pipeline engine trains with ZeRO-1 only, not with ZeRO-{zero_stage}"
        yield Finding("pipeline-zero", "warning", found=found, about="target")
