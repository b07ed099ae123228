"""A state dict in one file of torch.save, or in several with an index → a catalog of whole tensors."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from ckptlab import paths
from ckptlab.catalog import ALONE, MASTER, PARAM, Catalog, Extents, Fragment, Tensor, whole_placements
from ckptlab.errors import CheckpointError
from ckptlab.findings import Faults, Finding, Where
from ckptlab.formats.torch.torchfile import is_unread, read_contents, ready
from ckptlab.formats.weights import indexed, missing
from ckptlab.layout import Cut
from ckptlab.mesh import Mesh
from ckptlab.sharding.strategies import replicated
from ckptlab.stored import Stored
from ckptlab.words import number_of, some

_KEYS = ("state_dict", "model_state_dict", "module", "model", "params")  # under which programs put a state dict


def read_weights(path: str, faults: Faults, weights: re.Pattern[str]) -> Catalog | None:
    """The tensors of a file, or of all files of a folder whose names match: no mesh, no optimizer; one state, master or
    param by dtype. Names of one tensor (tied) are aliases. None where `faults` was told of files that are missing or
    damaged."""
    folder, files = os.path.split(path) if paths.is_file(path) else (path, "")
    names = [files] if files else _files(path, weights, faults)
    tensors: dict[str, Tensor] = {}
    pieces: dict[tuple[str, str], dict[Any, tuple[Fragment, ...]]] = {}
    for file in ready(names, lambda name: os.path.join(folder, name)):
        contents = faults.read(folder, file, read_contents)
        if contents is None:
            continue
        found: dict[str, Stored] = {}
        with faults.caught("odd-header", file):
            found, unread = _tensors(os.path.join(folder, file), contents.value)
            if unread:
                faults.report(_unread(file, unread))
        by_place: dict[tuple[int, tuple[int, ...], tuple[int, ...]], str] = {}
        aliases: dict[str, list[str]] = {}
        for name, stored in found.items():
            first = by_place.setdefault((stored.offset, stored.shape, stored.strides), name)
            if first != name and stored.numel:
                aliases.setdefault(first, []).append(name)
        for name, stored in found.items():
            if name in tensors:
                faults.report(_twice(folder, file, name))
            if any(name in others for others in aliases.values()):
                continue
            state = MASTER if stored.dtype == np.float32 else PARAM
            layout, cut = replicated(len(stored.shape)), Cut.whole(stored.shape)
            also = tuple(aliases.get(name, ()))
            tensors[name] = Tensor(name, stored.shape, layout, cut, "parameter", {state: stored.dtype}, aliases=also)
            pieces[name, state] = {ALONE: (Fragment(0, stored),)}
    if faults.failed:
        return None
    placements = whole_placements(tensors, pieces)
    said = tuple(faults.findings)
    return Catalog(path, "torch", Mesh(), tensors, placements, Extents(pieces), findings=said, files=tuple(names))


def _tensors(path: str, content: Any) -> tuple[dict[str, Stored], tuple[str, ...]]:
    """The state dict in a file: the object itself, or what stands under a key that programs use; and the names of those
    that are not read."""
    places = [content, *(content.get(key) for key in _KEYS)] if isinstance(content, Mapping) else []
    for place in places:
        if isinstance(place, Mapping):
            found = {name: v for name, v in place.items() if isinstance(v, Stored) and isinstance(name, str)}
            if found:
                return found, tuple(str(name) for name, v in place.items() if is_unread(v))
    raise CheckpointError(
        f"{path}: no tensors by name, neither in the object itself nor under {', '.join(_KEYS)}: found a "
        f"{type(content).__name__}"
    )


def _unread(file: str, names: tuple[str, ...]) -> Finding:
    return Finding(
        "unknown-dtype",
        "warning",
        Where((file,), names),
        "plain tensors",
        f"{number_of(len(names), 'tensor')} of another kind (sparse, quantised, or of a class of its own): "
        f"{some(list(names), 4)}",
        "they are left out; read them with the program that wrote them",
        "headers",
    )


def _files(path: str, weights: re.Pattern[str], faults: Faults) -> list[str]:
    """The files in an index, or all that match."""
    here = sorted(paths.names(path))
    names = [n for n in here if weights.fullmatch(n)]
    index = next((n for n in here if n.endswith(".bin.index.json")), None)
    if index is not None:
        names = sorted(set((faults.read(path, index, indexed) or {}).values())) or names
    if lost := [n for n in names if n not in here]:
        faults.report(missing(path, lost, f"the files of {index}"))
    return [n for n in names if n in here]


def _twice(folder: str, file: str, name: str) -> Finding:
    found = f"{name} stands in another file too, and nothing says how they make one"
    return Finding(
        "contradiction",
        "error",
        Where((file,), (name,)),
        "each tensor in one file",
        found,
        "open the file that you mean by itself",
        "headers",
        f"{os.path.join(folder, file)}: {found}: open the file that you mean by itself",
    )
