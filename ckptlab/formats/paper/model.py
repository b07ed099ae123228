"""Models on paper: a transformer described by a few numbers, laid out on a mesh as Megatron and ZeRO do, without files.

The catalog that comes of it is like that of a checkpoint with nothing stored behind it: its layouts, flat buffers and
plans are worked out by the same code. ZeRO: Rajbhandari et al. 2020, arXiv:1910.02054.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from functools import lru_cache

import numpy as np

from ckptlab.catalog import (
    DTYPES,
    MASTER,
    PARAM,
    ZERO_STAGES,
    Catalog,
    ParameterGroup,
    Tensor,
    Training,
    whole_placements,
)
from ckptlab.errors import ReshapeError
from ckptlab.findings import Finding
from ckptlab.formats.paper.drawn import drawn
from ckptlab.layout import Cut, Layout
from ckptlab.mesh import Mesh
from ckptlab.sharding.stages import balanced, stage_of
from ckptlab.sharding.transformer import EMBEDDING, HEAD, NORM, PaperModel

OPTIMIZER = (MASTER, "exp_avg", "exp_avg_sq")  # Adam's


def laid_out(model: PaperModel, mesh: Mesh, zero_stage: int = 1) -> Catalog:
    """The model laid out on a mesh (pp, dp, tp) under a ZeRO stage: see `drawn`. Fewer kv heads than tp ranks are held
    by several each: tp is then split into `kv` and `rep`. ReshapeError, with every reason, where it cannot be."""
    if reasons := list(_problems(model, mesh, zero_stage)):
        raise ReshapeError(f"this model cannot be laid out on {mesh}:\n" + "\n".join(f"  - {r}" for r in reasons))
    replicated = 1 < model.keys < mesh.tp
    if replicated and "kv" not in mesh:
        mesh = mesh.split("tp", kv=model.keys, rep=mesh.tp // model.keys)
    catalog = _whole(model, mesh.replace(**dict.fromkeys(mesh.leaves("dp"), 1)), mesh.get("ep", 1), replicated)
    return replace(drawn(catalog, mesh, zero_stage), findings=tuple(_findings(mesh, zero_stage)))


@lru_cache(maxsize=64)
def _whole(model: PaperModel, mesh: Mesh, experts: int, replicated: bool) -> Catalog:
    """The model in whole tensors, with the layouts and stages that they have on a mesh, however many copies it has."""
    starts = balanced([0, *[1] * model.layers, 0, 0], mesh.pp)
    states = {s: np.dtype(np.float32) for s in OPTIMIZER} | {PARAM: DTYPES[model.dtype]}
    over = "kv" if replicated else "tp"
    layouts: dict[tuple[str, tuple[int, ...]], Layout] = {}  # layers of a stage have the same
    tensors = {}
    for name, shape in model.shapes.items():
        layer, _, rest = name.removeprefix("layers.").partition(".")
        kind = (rest if layer.isdigit() else name, _stages(model, name, starts))
        if kind not in layouts:
            layouts[kind] = _layout(model, name, mesh.tp, experts, over).replace(stages=kind[1])
        aliases = (HEAD,) if name == EMBEDDING and model.tied else ()
        whole = Cut.whole(shape)
        tensors[name] = Tensor(name, shape, layouts[kind], whole, "parameter", states, 0, aliases=aliases)
    told = Training(
        dtype=model.dtype,
        groups=(ParameterGroup({}, tuple(tensors)),),
        layer_stages={i: stage_of(1 + i, starts) for i in range(model.layers)},
        heads=model.heads,
        kv_heads=model.keys,
        layouts_told=True,
        numbers={f.name: getattr(model, f.name) for f in fields(model)},
    )
    kept = whole_placements(tensors, [(name, state) for name in tensors for state in states])
    return Catalog(f"paper model ({model})", "paper", Mesh(), tensors, kept, training=told)


def _problems(model: PaperModel, mesh: Mesh, zero_stage: int) -> Iterator[str]:
    if zero_stage not in ZERO_STAGES:
        yield f"ZeRO stage {zero_stage}: expected 0, 1, 2 or 3"
    if mesh.pp > model.layers:
        yield f"pp {mesh.pp}: more stages than the {model.layers} transformer layers"
    if model.heads % mesh.tp and model.heads > 1:
        yield f"tp {mesh.tp}: {model.heads} attention heads are not divisible by it"
    if model.keys % mesh.tp and mesh.tp % model.keys:
        yield f"tp {mesh.tp}: {model.keys} key/value heads are not divisible by it, nor it by them"
    if model.experts and model.experts % mesh.get("ep", 1):
        yield f"ep {mesh['ep']}: {model.experts} experts are not divisible by it"
    if model.heads == 1 and mesh.tp > 1:
        yield f"tp {mesh.tp}: one attention head cannot be cut"


def _stages(model: PaperModel, name: str, starts: Sequence[int]) -> tuple[int, ...]:
    """The pp stages that hold a tensor: the tied embedding is on the first and on the last."""
    last = len(starts) - 1
    if name == EMBEDDING:
        return tuple(dict.fromkeys((0, last))) if model.tied else (0,)
    return (last,) if name in (NORM, HEAD) else (stage_of(1 + int(name.split(".")[1]), starts),)


def _layout(model: PaperModel, name: str, tp: int, experts: int, keys_over: str) -> Layout:
    shape = model.shapes[name]
    layout = model.layout(name, [shape], keys_over, "ep" if experts > 1 else "")
    assert layout is not None  # Megatron has a layout for every name
    if name in (EMBEDDING, HEAD) and shape[0] % tp:
        layout = layout.replace(padded={0: -(-shape[0] // tp) * tp})
    return layout


def _findings(mesh: Mesh, zero_stage: int) -> Iterator[Finding]:
    if zero_stage >= 2 and mesh.pp > 1:
        found = f"DeepSpeed's pipeline engine trains with ZeRO-1 only, not with ZeRO-{zero_stage}"
        yield Finding("pipeline-zero", "warning", found=found, about="target")
