"""Toy's header, and what lies in the files of ranks."""

from __future__ import annotations

import io
import json
import math
import os
from collections.abc import Iterator, Mapping
from typing import Any

import ml_dtypes  # noqa: F401  (teaches numpy the name bfloat16)
import numpy as np

from ckptlab.arrays import Drawn, Tally, shard_reader
from ckptlab.catalog import Catalog, Extents, Fragment, Tensor, Training
from ckptlab.errors import CheckpointError, LayoutError, ReshapeError
from ckptlab.findings import Faults, Finding, Where
from ckptlab.formats.fileplan import Elements, FilePlan, Literal
from ckptlab.layout import Layout, on_degree
from ckptlab.mesh import Mesh
from ckptlab.plan import Holder, Placement
from ckptlab.sharding.strategies import Strategy
from ckptlab.stored import Stored, row_major_strides

HEADER = "toy.json"
_FIELDS = ("text", "dims", "sizes", "totals", "units", "padded")


def read(path: str, faults: Faults, strategy: Strategy | None) -> Catalog | None:
    header = faults.read(path, HEADER, _header)
    if header is None:
        return None
    mesh = Mesh(**header["mesh"])
    with faults.caught("contradiction", HEADER):
        tensors = dict(_tensors(header, mesh, strategy))
    if faults.failed:
        return None
    places = _placements(tensors)
    pieces: dict[tuple[str, str], dict[Holder, tuple[Fragment, ...]]] = {key: {} for key in places}
    for file, holder in _holders(mesh).items():
        size = sum(_nbytes(tensors, key, place, holder) for key, (place,) in places.items())
        offset = faults.read(path, file, lambda name, size=size: _data(name, size))
        for (name, state), (place,) in places.items() if offset is not None else ():
            dtype, shape = tensors[name].states[state], place.shape(holder)
            stored = Stored(os.path.join(path, file), offset, dtype, shape, row_major_strides(shape))
            pieces[name, state][holder] = (Fragment(0, stored),)
            offset += stored.nbytes
    if faults.failed:
        return None
    extra = sorted(f for f in os.listdir(path) if f.endswith(".npy") and f not in _holders(mesh))
    if extra:
        found = f"{', '.join(extra)}: of no rank of {mesh}"
        faults.report(
            Finding("extra-file", "warning", Where(tuple(extra)), "files of the mesh's ranks", found, about="files")
        )
    return Catalog(
        path, "toy", mesh, tensors, places, Extents(pieces),
        training=Training(mesh=mesh, step=header["step"], layouts_told=strategy is None),
        findings=tuple(faults.findings), files=(HEADER, *_holders(mesh)),
    )  # fmt: skip


def target(source: Catalog, mesh: Mesh) -> Catalog:
    """The same tensors, cut as the same layouts say on another mesh."""
    mesh = mesh if "ring" in mesh else Mesh(ring=1, **mesh)
    tensors = {}
    for name, tensor in source.tensors.items():
        layout = tensor.layout.replace(stages=None)
        for axis in ("ring", "tp"):
            layout = on_degree(layout, axis, mesh[axis])
        try:
            cut = layout.resolve(tensor.shape, mesh)
        except LayoutError as error:
            raise ReshapeError(f"{name} cannot be cut for {mesh}: {error}") from None
        states = {state: tensor.states[state] for state in source.held(name)}
        tensors[name] = Tensor(name, tensor.shape, layout, cut, tensor.kind, states, aliases=tensor.aliases)
    training = Training(mesh=mesh, step=source.training.step, layouts_told=True)
    return Catalog("", "toy", mesh, tensors, _placements(tensors), training=training)


def plans(source: Catalog, target: Catalog, tally: Tally | None) -> Iterator[FilePlan]:
    described = {
        tensor.name: {
            "shape": tensor.shape,
            "kind": tensor.kind,
            "states": {state: np.dtype(dtype).name for state, dtype in tensor.states.items()},
            "layout": {field: getattr(tensor.layout, field) for field in _FIELDS},
        }
        for tensor in target.tensors.values()
    }
    header = {"mesh": dict(target.mesh), "step": target.training.step, "tensors": described}
    yield FilePlan(HEADER, (Literal(json.dumps(header, indent=1).encode()),))
    for file, holder in _holders(target.mesh).items():
        parts = [_elements(source, target, key, place, holder, tally) for key, (place,) in target.placements.items()]
        size = sum(part.nbytes for part in parts)
        yield FilePlan(file, (Literal(_npy(size)), *(part for part in parts if part.nbytes)), nbytes=size)


def _elements(
    source: Catalog, target: Catalog, key: tuple[str, str], place: Placement, holder: Holder, tally: Tally | None
) -> Elements:
    towards = tally and tally.towards(int(place.ranks(holder)[0]))
    one = shard_reader(source, target, *key, holder, towards)
    drawn = Drawn(one, place.cut, place.coordinate(holder))
    return Elements(drawn, np.dtype(one.dtype), 0, math.prod(place.shape(holder)))


def _header(path: str) -> dict[str, Any]:
    try:
        with open(path, encoding="utf-8") as file:
            header = json.load(file)
    except ValueError as error:
        raise CheckpointError(f"{path}: no JSON ({error}): copy it again") from None
    match header:
        case {"mesh": {"tp": int(), "ring": int()}, "step": _, "tensors": dict()}:
            return dict(header)
    raise CheckpointError(f"{path}: expected mesh, step and tensors: it is not toy's, or damaged")


def _tensors(header: Mapping[str, Any], mesh: Mesh, strategy: Strategy | None) -> Iterator[tuple[str, Tensor]]:
    for name, told in header["tensors"].items():
        shape = tuple(told["shape"])
        layout = strategy.layout(name, [shape]) if strategy else None
        layout = layout or Layout(**told["layout"])
        states = {state: np.dtype(dtype) for state, dtype in told["states"].items()}
        yield name, Tensor(name, shape, layout, layout.resolve(shape, mesh), told["kind"], states)


def _placements(tensors: Mapping[str, Tensor]) -> dict[tuple[str, str], tuple[Placement, ...]]:
    return {(t.name, state): (Placement(t.cut),) for t in tensors.values() for state in t.states}


def _holders(mesh: Mesh) -> dict[str, Holder]:
    """File name → who wrote it."""
    return {
        f"ring{ring}_tp{tp}.npy": Holder(pp=0, ring=ring, tp=tp)
        for ring in range(mesh["ring"])
        for tp in range(mesh.tp)
    }


def _nbytes(tensors: Mapping[str, Tensor], key: tuple[str, str], place: Placement, holder: Holder) -> int:
    return math.prod(place.shape(holder)) * tensors[key[0]].states[key[1]].itemsize


def _npy(size: int) -> bytes:
    """What stands in an .npy file before so many bytes."""
    head = io.BytesIO()
    np.lib.format.write_array_header_1_0(head, {"descr": "|u1", "fortran_order": False, "shape": (size,)})
    return head.getvalue()


def _data(path: str, size: int) -> int:
    """Where the bytes begin in a file of a rank, which has `size` of them."""
    head = _npy(size)
    with open(path, "rb") as file:
        found, length = file.read(len(head)), os.path.getsize(path)
    if found != head or length != len(head) + size:
        raise CheckpointError(f"{path}: {length} bytes, expected {len(head)} of a header and {size}: cut, or not toy's")
    return len(head)
