"""The facts of a checkpoint and of a plan, as plain dictionaries that go into JSON. Headers only: no data is read."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from ckptlab import paths
from ckptlab.catalog import Catalog, Tensor
from ckptlab.findings import Finding
from ckptlab.formats import get as format_of
from ckptlab.formats.torch.placeholders import Foreign
from ckptlab.mesh import STANDARD, Mesh
from ckptlab.plain import plain
from ckptlab.reshaping import Reshape
from ckptlab.words import brief

MATRIX = 16  # the most ranks a side for which the plan shows who sends how much to whom
_CLIENT_OBJECTS = 100_000  # of a client state, how many objects are looked at


def summary(catalog: Catalog) -> dict[str, Any]:
    """All that `ckptlab info` says, every tensor included.

    Keys: path, format, sharded (its files are those of a mesh's ranks), mesh {axis: degree}, ranks, trained_on (the
    run's mesh, also where a format holds whole tensors; None: not known), zero_stage, optimizer (DeepSpeed's wrapper),
    dtype (what is trained in), step, counts {tensors, trained, frozen, buffers, parameters (elements)}, states [{name,
    dtypes, tensors, bytes}], groups [{name, tensors, elements, options}], aliases {alias: name}, client_state {keys,
    not_imported}, files {count, bytes (on disk)}, findings [{code, severity, text}], tensors [{name, shape, padded
    {dim: rows}, layout (None: not known), replicas, kind, group, stages, states {state: dtype}, elements, aliases}].
    """
    return {**overview(catalog), "tensors": [_tensor(t) for t in catalog.tensors.values()]}


def overview(catalog: Catalog) -> dict[str, Any]:
    """The summary without the list of tensors."""
    training = catalog.training
    return {
        "path": catalog.path,
        "format": catalog.format,
        "sharded": format_of(catalog.format).sharded,
        "mesh": catalog.mesh.degrees,
        "ranks": catalog.mesh.size,
        "trained_on": training.mesh.degrees if training.mesh else None,
        "zero_stage": catalog.zero_stage,
        "optimizer": training.wrapper,
        "dtype": training.dtype,
        "step": training.step,
        "counts": _counts(catalog),
        "states": _states(catalog),
        "groups": [_group(catalog, i) for i in range(len(catalog.groups))],
        "aliases": {alias: t.name for t in catalog.tensors.values() for alias in t.aliases},
        "client_state": {
            "keys": [key if isinstance(key, str) else brief(key) for key in catalog.client],
            "not_imported": sorted(set(_foreign(catalog.client))),
        },
        "files": {"count": len(catalog.files), "bytes": _on_disk(catalog)},
        "findings": briefly(catalog.findings),
    }


def _counts(catalog: Catalog) -> dict[str, int]:
    kinds = [t.kind for t in catalog.tensors.values()]
    elements = sum(t.numel for t in catalog.tensors.values() if t.kind != "buffer")
    return {
        "tensors": len(kinds),
        "trained": kinds.count("parameter"),
        "frozen": kinds.count("frozen"),
        "buffers": kinds.count("buffer"),
        "parameters": elements,
    }


def _states(catalog: Catalog) -> list[dict[str, Any]]:
    """Each state with its dtypes, the number of tensors that have it, and its bytes, each tensor counted once."""
    found: dict[str, dict[str, Any]] = {s: {"name": s, "dtypes": {}, "tensors": 0, "bytes": 0} for s in catalog.states}
    for tensor in catalog.tensors.values():
        elements = tensor.numel
        for state, dtype in tensor.states.items():
            entry = found[state]
            entry["dtypes"][dtype] = None
            entry["tensors"] += 1
            entry["bytes"] += elements * dtype.itemsize
    return [{**entry, "dtypes": [str(d) for d in entry["dtypes"]]} for entry in found.values()]


def _group(catalog: Catalog, index: int) -> dict[str, Any]:
    group = catalog.groups[index]
    return {
        "name": group.name,
        "tensors": len(group.tensors),
        "elements": sum(math.prod(catalog.tensors[n].shape) for n in group.tensors if n in catalog.tensors),
        "options": plain({k: v for k, v in group.options.items() if k != "name"}),
    }


def _tensor(tensor: Tensor) -> dict[str, Any]:
    return {
        "name": tensor.name,
        "shape": list(tensor.shape),
        "padded": {str(dim): n for dim, n in tensor.layout.padded},
        "layout": tensor.layout.text if tensor.layout_known else None,
        "replicas": tensor.layout.replicas,
        "kind": tensor.kind,
        "group": tensor.group,
        "stages": list(tensor.stages),
        "states": {s: str(d) for s, d in tensor.states.items()},
        "elements": tensor.numel,
        "aliases": list(tensor.aliases),
    }


def _foreign(client: Mapping[str, Any]) -> Iterator[str]:
    """Names of the classes whose objects stand in a client state as placeholders."""
    seen: set[int] = set()
    left: list[Any] = [client]
    while left and len(seen) < _CLIENT_OBJECTS:
        value = left.pop()
        if isinstance(value, Foreign):
            yield repr(value.callee)
            parts = [*value.args, *value.kwargs.values(), value.state, *value.elements, *value.items]
        elif isinstance(value, Mapping):
            parts = list(value.values())
        elif isinstance(value, (list, tuple, set, frozenset)):
            parts = list(value)
        else:
            continue
        if id(value) not in seen:
            seen.add(id(value))
            left.extend(parts)


def _on_disk(catalog: Catalog) -> int | None:
    """Bytes of the files; None if some are not there any more."""
    files = [catalog.path] if paths.is_file(catalog.path) else [paths.join(catalog.path, f) for f in catalog.files]
    try:
        return sum(map(paths.size, files))
    except OSError:
        return None


def briefly(findings: Iterable[Finding]) -> list[dict[str, str]]:
    """Findings in short, for people: [{code, severity, text}]."""
    return [{"code": f.code, "severity": f.severity, "text": f.text} for f in findings]


def plan(reshape: Reshape) -> dict[str, Any]:
    """All that `ckptlab plan` says.

    Keys: source {path, format, mesh, ranks, zero_stage, optimizer, dtype}, target (the same, without path and
    format), layers {source, target} (those on each pp stage), layouts [{name, source, target}] of tensors that are cut
    by another one, arranged {axis: [source, target]} of axes that experts alone lie on, vocabulary {true, source,
    target} rows or None, bytes {read, written, moved}, largest_tensor (bytes), files (to be written), moves {by_target
    [{rank, received, own, sources}], matrix [source rank][target rank] in bytes, None for more than 16 ranks}, findings
    [{code, severity, text}].
    """
    source, target = reshape.source, reshape.target
    cost = reshape.cost()
    return {
        "source": {"path": source.path, "format": source.format, **_side(source, source.training.mesh or source.mesh)},
        "target": _side(target, target.mesh),
        "layers": {"source": _layers(source), "target": _layers(target)},
        "layouts": _relaid(source, target),
        "arranged": _arranged(source, target),
        "vocabulary": _vocabulary(source, target),
        "bytes": {"read": cost.read, "written": cost.written, "moved": cost.moved},
        "largest_tensor": cost.largest_tensor,
        "files": len(reshape.files),
        "moves": _moves(reshape),
        "findings": briefly(reshape.check()),
    }


def _side(catalog: Catalog, mesh: Mesh) -> dict[str, Any]:
    return {
        "mesh": mesh.degrees,
        "split": {axis: list(mesh.leaves(axis)) for axis in STANDARD if axis not in mesh.degrees},
        "ranks": mesh.size,
        "zero_stage": catalog.zero_stage,
        "optimizer": catalog.training.wrapper,
        "dtype": catalog.training.dtype,
    }


def _layers(catalog: Catalog) -> list[list[int]]:
    """The pipeline's layers on each stage; empty without a pipeline."""
    stage_of = catalog.training.layer_stages
    stages = max(stage_of.values(), default=-1) + 1
    return [sorted(layer for layer, s in stage_of.items() if s == stage) for stage in range(stages)]


def _relaid(source: Catalog, target: Catalog) -> list[dict[str, str]]:
    """Tensors whose layouts the target says otherwise."""
    texts = [(name, source.tensors[name].layout.text, tensor.layout.text) for name, tensor in target.tensors.items()]
    return [{"name": name, "source": a, "target": b} for name, a, b in texts if a != b]


def _arranged(source: Catalog, target: Catalog) -> dict[str, list[int]]:
    """The degrees on either side, where they differ, of axes of tensors that lie on a mesh of their own of the same
    ranks: experts that are dealt to tp ranks too."""
    found: dict[str, list[int]] = {}
    for name, tensor in target.tensors.items():
        own = [tensor.cut.mesh, source.tensors[name].cut.mesh]
        both = zip(own, (target.mesh, source.mesh), strict=True)
        if any(one.size == of.size and one.axes != of.axes for one, of in both):
            for axis in dict.fromkeys(axis for one in own for axis in one.axes if axis not in STANDARD):
                after, before = (one.get(axis, 1) for one in own)
                if before != after:
                    found[axis] = [before, after]
    return found


def _vocabulary(source: Catalog, target: Catalog) -> dict[str, int] | None:
    for tensor in source.tensors.values():
        for dim, rows in tensor.layout.padded:
            new = dict(target.tensors[tensor.name].layout.padded).get(dim, tensor.shape[dim])
            return {"true": tensor.shape[dim], "source": rows, "target": new}
    return None


def _moves(reshape: Reshape) -> dict[str, Any]:
    """Bytes by rank of the target (from other ranks, from its own); with few ranks, the whole matrix."""
    plan = reshape.plan
    nbytes = plan.count * plan.read_size[plan.tensor]
    received, own = np.zeros((2, plan.targets), np.int64)
    away = plan.source != plan.target
    np.add.at(received, plan.target[away], nbytes[away])
    np.add.at(own, plan.target[~away], nbytes[~away])
    pairs = np.unique(plan.source.astype(np.int64) * plan.targets + plan.target)
    sources = np.bincount(pairs % max(plan.targets, 1), minlength=plan.targets)
    small = max(plan.sources, plan.targets) <= MATRIX
    return {
        "by_target": [
            {"rank": r, "received": int(received[r]), "own": int(own[r]), "sources": int(sources[r])}
            for r in range(plan.targets)
        ],
        "matrix": plan.matrix().tolist() if small else None,
    }
