"""Safetensors → a catalog of whole tensors.

The format: eight bytes of length, a JSON header, then the data (https://github.com/huggingface/safetensors).
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ckptlab import paths
from ckptlab.catalog import MASTER, PARAM, Catalog, Extents, Fragment, Tensor
from ckptlab.errors import CheckpointError, LayoutError
from ckptlab.findings import Faults, Finding, Where, contradiction
from ckptlab.formats.safefile import DTYPES, Header, read_header
from ckptlab.formats.weights import OPTIMIZERS, indexed, missing, of_several_ranks, optimizer_left_out, unnumbered
from ckptlab.layout import Layout
from ckptlab.mesh import Mesh
from ckptlab.plan import Holder, Placement
from ckptlab.plan.grid import Grid, grid, neutral_axes, uncut
from ckptlab.sharding.strategies import dim_names
from ckptlab.stored import Stored
from ckptlab.words import number_of, shorten, some

INDEX = "model.safetensors.index.json"
_SHOWN = 200  # characters of a name that an error shows
_HEAD = 1 << 16  # bytes at the start of far files that are fetched together: most headers
_MODEL = re.compile(r"model(?:-\d+-of-\d+)?\.safetensors")
# what quantised weights are called, or what stands beside them: GPTQ and AWQ, bitsandbytes, compressed-tensors and fp8,
# ExLlama, MXFP4, MLX
_CODES = (
    *(".qweight", ".scales", ".SCB", ".absmax", ".weight_packed", ".weight_scale", ".weight_scale_inv"),
    *(".q_weight", "_blocks"),
)
_QUANTISED = ".quant_state."
_SHARD = re.compile(r"shard-(?P<rank>\d{5})-(?P<of>model-\d{5}-of-\d{5})\.safetensors")


def read_safetensors(path: str, faults: Faults) -> Catalog | None:
    """A file or folder of safetensors: whole tensors, no optimizer; one state, master or param by dtype.

    What torch's distributed writer left in boxes, a file a rank, is one tensor each, cut over axes (`shard`) that stand
    for whatever its mesh was. None where `faults` was told of files that are missing, damaged or contradictory.
    """
    index: dict[str, str] = {}
    if alone := paths.is_file(path):
        folder, file = os.path.split(path)
        names = [file]
    else:
        folder = path
        names, index = _files(path, faults)
    paths.ahead((os.path.join(folder, file), 0, _HEAD) for file in names)
    headers = {file: found for file in names if (found := faults.read(folder, file, read_header)) is not None}
    headers = headers if alone or index else _of_one_model(headers)
    names = list(headers) if not faults.failed else names
    for finding in _contradictions(folder, headers, index):
        faults.report(finding)
    often = Counter(name for header in headers.values() for name in header)
    wholes: dict[str, Stored] = {}  # nothing that could contradict these, and there may be very many
    boxes: dict[str, list[tuple[str, Stored, tuple[int, ...] | None]]] = {}
    for file, header in headers.items():
        for name, stored in header.items():
            if often[name] == 1 and name not in header.offsets:
                wholes[name] = stored
            else:
                boxes.setdefault(name, []).append((file, stored, header.offsets.get(name)))
    grids: dict[str, tuple[tuple[int, ...], Grid]] = {}
    for name, held in boxes.items():
        with faults.caught("contradiction", *(file for file, _, _ in held)):
            grids[name] = _one(folder, name, held)
    if faults.failed:
        return None
    degrees, axes = neutral_axes({name: one.counts for name, (_, one) in grids.items()})
    mesh = Mesh(**degrees)
    tensors: dict[str, Tensor] = {}
    placements: dict[tuple[str, str], tuple[Placement, ...]] = {}
    pieces: dict[tuple[str, str], dict[Holder, tuple[Fragment, ...]]] = {}
    known: dict[tuple[tuple[int, ...], np.dtype], _Whole] = {}
    for name in often:
        if name in wholes:
            stored = wholes[name]
            alike = stored.shape, stored.dtype
            if alike not in known:
                known[alike] = _Whole.of(*alike, mesh)
            one = known[alike]
            tensors[name] = Tensor(name, stored.shape, one.layout, one.places[0].cut, "parameter", one.states)
            placements[name, one.state] = one.places
            pieces[name, one.state] = {one.holder: (Fragment(0, stored),)}
            continue
        (shape, cells), held = grids[name], boxes[name]
        layout, place, box_of = _placed(cells, axes[name], shape, mesh)
        state, states = _state(held[0][1].dtype)
        tensors[name] = Tensor(name, shape, layout, place.cut, "parameter", states)
        placements[name, state] = (place,)
        pieces[name, state] = {
            holder: () if box is None else (Fragment(0, held[box][1]),) for holder, box in box_of.items()
        }
    beside = of_several_ranks(folder, names[0]) if alone else _beside(folder, names)
    for finding in (*_remarks(headers, tensors), *beside):
        faults.report(finding)
    return Catalog(
        path,
        "safetensors",
        mesh,
        tensors,
        placements,
        Extents(pieces),
        findings=tuple(faults.findings),
        files=tuple(names),
    )


@dataclass(frozen=True)
class _Whole:
    """What tensors of one shape and dtype have in common that are stored whole."""

    layout: Layout
    places: tuple[Placement]
    holder: Holder
    state: str
    states: Mapping[str, np.dtype]

    @staticmethod
    def of(shape: tuple[int, ...], dtype: np.dtype, mesh: Mesh) -> _Whole:
        layout, place, box_of = _placed(uncut(shape), (None,) * len(shape), shape, mesh)
        (holder,) = box_of
        return _Whole(layout, (place,), holder, *_state(dtype))


def _state(dtype: np.dtype) -> tuple[str, Mapping[str, np.dtype]]:
    """The state that a tensor of that dtype is, and its states."""
    state = MASTER if dtype == np.float32 else PARAM
    return state, {state: dtype}


def _one(
    folder: str, name: str, boxes: Sequence[tuple[str, Stored, tuple[int, ...] | None]]
) -> tuple[tuple[int, ...], Grid]:
    """The shape and the grid of what files hold of a tensor. CheckpointError where they make no tensor."""
    files, said = some([file for file, _, _ in boxes], 4), shorten(name, _SHOWN)
    starts = [start for _, _, start in boxes if start is not None]
    sizes = [stored.shape for _, stored, _ in boxes]
    if len(boxes) > 1 and len(starts) < len(boxes):
        raise CheckpointError(
            f"{folder}: {said} stands in {files}, and nothing in them says how they make one tensor: open one of the "
            "files, or put the others elsewhere"
        )
    kinds = {(stored.dtype.name, len(stored.shape)) for _, stored, _ in boxes}
    if len(kinds) > 1:
        raise CheckpointError(f"{folder}: {said} in {files}: boxes of different dtypes or numbers of dims: {kinds}")
    starts = starts or [(0,) * len(sizes[0])]
    shape = tuple(
        max(start[d] + size[d] for start, size in zip(starts, sizes, strict=True)) for d in range(len(sizes[0]))
    )
    try:
        return shape, grid(shape, starts, sizes)
    except LayoutError as error:
        raise CheckpointError(
            f"{folder}: {said} in {files}: {error}: a file of another rank is missing, or is not of this checkpoint"
        ) from None


def _placed(
    boxes: Grid, axes: Sequence[str | None], shape: tuple[int, ...], mesh: Mesh
) -> tuple[Layout, Placement, dict[Holder, int | None]]:
    """The layout of a grid whose dims are cut over these axes, where it lies, and which box each holder has."""
    layout = _layout(boxes, axes, mesh)
    cut = layout.resolve(shape, mesh)
    place = Placement(cut, at={axis: 0 for axis in mesh if mesh[axis] > 1 and axis not in cut.axes})
    box_of: dict[Holder, int | None] = {}
    for holder in place.holders:
        cell = tuple(0 if axis is None else holder[axis] for axis in axes)
        has = all(k < n for k, n in zip(cell, boxes.counts, strict=True))
        box_of[holder] = int(boxes.cells[cell]) if has else None
    return layout, place, box_of


def _layout(boxes: Grid, axes: Sequence[str | None], mesh: Mesh) -> Layout:
    """The layout of a grid whose dims are cut over these axes."""
    names, terms, sizes = dim_names(len(axes)), [], {}
    for name, axis, edges in zip(names, axes, boxes.edges, strict=True):
        terms.append(name if axis is None else f"({axis} {name})")
        widths = np.diff(edges).tolist()
        if axis is not None and (len(set(widths)) > 1 or len(widths) < mesh[axis]):
            sizes[name] = [*widths, *[0] * (mesh[axis] - len(widths))]
    return Layout(" ".join(terms), dims=names, sizes=sizes)


def _contradictions(folder: str, headers: Mapping[str, Header], index: Mapping[str, str]) -> Iterator[Finding]:
    """What the index, or the numbers in files' names, say otherwise than the files."""
    for name, file in index.items():
        if file in headers and name not in headers[file] and name not in headers[file].unknown:
            path, said = os.path.join(folder, INDEX), shorten(name, _SHOWN)
            yield contradiction(path, f"{path}: says that {said} is in {file}, which does not hold it", name)
    shards: dict[str, set[int]] = {}
    for file in headers:
        if found := _SHARD.fullmatch(file):
            shards.setdefault(found["of"], set()).add(int(found["rank"]))
    for of, ranks in shards.items():
        lost = [f"shard-{i:05d}-{of}.safetensors" for i in range(1, max(ranks)) if i not in ranks]
        if lost and any(header.offsets for header in headers.values()) and len(headers) > 1:
            yield missing(folder, lost, "the files of all ranks")


def _remarks(headers: Mapping[str, Header], tensors: Mapping[str, Tensor]) -> Iterator[Finding]:
    unknown = {name: kind for header in headers.values() for name, kind in header.unknown.items()}
    if unknown:
        kinds = ", ".join(sorted(set(unknown.values())))
        yield Finding(
            "unknown-dtype",
            "warning",
            Where(tensors=tuple(unknown)),
            f"one of {', '.join(DTYPES)}",
            f"{number_of(len(unknown), 'tensor')} of dtype {kinds}, which numpy cannot say: {some([*unknown], 4)}",
            "they are left out; read them with the program that wrote them",
            "headers",
        )
    empty = tuple(name for name, tensor in tensors.items() if 0 in tensor.shape)
    if empty:
        yield Finding(
            "no-elements",
            "warning",
            Where(tensors=empty),
            "tensors with elements",
            f"{number_of(len(empty), 'tensor')} without elements: {some(empty, 4)}",
            "a ZeRO-3 model that was saved without gathering its parameters leaves them so: export it again",
            "headers",
        )
    if quantised := tuple(name for name in tensors if name.endswith(_CODES) or _QUANTISED in name):
        yield Finding(
            "quantised",
            "info",
            Where(tensors=quantised),
            "weights as numbers",
            f"weights are quantised: {some(quantised, 4)}",
            "nothing, to look at them or to keep them: what is stored is codes and scales, and no element of these is "
            "one of the model's weights",
            "headers",
        )
    if any(header.offsets for header in headers.values()):
        yield Finding(
            "shapes-inferred",
            "info",
            Where(tuple(headers)),
            "shapes of whole tensors",
            "boxes of tensors: how large the whole ones are, and how many ranks there were, no file says; they are as "
            "large as the boxes here reach",
            "see that the files of all ranks are here",
            "headers",
        )


def _files(path: str, faults: Faults) -> tuple[list[str], dict[str, str]]:
    """The names of a folder's files, those in its index or all; and what the index says: tensor → file."""
    names = sorted(n for n in paths.names(path) if n.endswith(".safetensors"))
    index: dict[str, str] = {}
    expected = f"the files of {INDEX}"
    if paths.is_file(os.path.join(path, INDEX)):
        index = faults.read(path, INDEX, indexed) or {}
        names = sorted(set(index.values())) or names
        lost = [n for n in names if not paths.is_file(os.path.join(path, n))]
    else:
        lost, expected = unnumbered(names), "as many files as their names say"
    if lost or not names:
        faults.report(missing(path, lost or ["every .safetensors file"], expected))
    return [n for n in names if n not in lost], index


def _of_one_model(headers: Mapping[str, Header]) -> dict[str, Header]:
    """The files that are called as a model's are, if no other has a tensor of theirs; else all."""
    model = {file: header for file, header in headers.items() if _MODEL.fullmatch(file)}
    held = {name for header in model.values() for name in header}
    others = (name for file, header in headers.items() if file not in model for name in header)
    return dict(headers) if not model or any(name in held for name in others) else model


def _beside(folder: str, names: Sequence[str]) -> Iterator[Finding]:
    """What else is in the folder, and is not read."""
    here = sorted(paths.names(folder))
    if others := [n for n in here if n.endswith(".safetensors") and n not in names]:
        found = f"the model is taken to be {some(names, 2)}; {some(others, 4)} beside left alone"
        todo = "open one of the others by itself if that is the one you mean"
        yield Finding("other-weights", "info", Where(tuple(others)), "files of one model", found, todo, "headers")
    if optimizers := [n for n in here if OPTIMIZERS.fullmatch(n)]:
        yield optimizer_left_out(optimizers, tuple(optimizers))
