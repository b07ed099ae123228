"""A state dict in one file of torch.save, or in several with an index → a catalog of whole tensors."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from ckptlab import paths
from ckptlab.catalog import ALONE, MASTER, PARAM, Catalog, Extents, Fragment, Tensor, whole_placements
from ckptlab.errors import CheckpointError
from ckptlab.findings import Faults, Finding, Where
from ckptlab.formats.torch.torchfile import is_unread, read_contents, ready
from ckptlab.formats.weights import OPTIMIZERS, indexed, missing, of_several_ranks, optimizer_left_out, unnumbered
from ckptlab.layout import Cut
from ckptlab.mesh import Mesh
from ckptlab.sharding.strategies import replicated
from ckptlab.stored import Stored
from ckptlab.words import number_of, some

_KEYS = ("state_dict", "model_state_dict", "module", "model", "params")  # under which programs put a state dict
_OPTIMIZERS = re.compile(r"(?:last_)?optim(?:izer)?s?(?:_state|_states|_state_dict)?")  # … and that of an optimizer


def read_weights(path: str, faults: Faults, weights: re.Pattern[str], index: re.Pattern[str]) -> Catalog | None:
    """The tensors of a file, or of all files of a folder whose names match, or that an index names: no mesh, no
    optimizer; one state, master or param by dtype. Names of one tensor (tied) are aliases. None where `faults` was told
    of files that are missing or damaged."""
    folder, files = os.path.split(path) if paths.is_file(path) else (path, "")
    names = [files] if files else _files(path, weights, index, faults)
    tensors: dict[str, Tensor] = {}
    pieces: dict[tuple[str, str], dict[Any, tuple[Fragment, ...]]] = {}
    for file in ready(names, lambda name: os.path.join(folder, name)):
        contents = faults.read(folder, file, read_contents)
        if contents is None:
            continue
        found: dict[str, Stored] = {}
        with faults.caught("odd-header", file):
            found, unread = _tensors(os.path.join(folder, file), contents.value)
            if left := [f"{file}: {key}" for key in _optimizers(contents.value)]:
                faults.report(optimizer_left_out(left, (file,)))
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
    beside = [name for name in paths.names(folder) if OPTIMIZERS.fullmatch(name)] if not files else []
    if beside:
        faults.report(optimizer_left_out(sorted(beside), tuple(sorted(beside))))
    for finding in of_several_ranks(folder, files) if files else ():
        faults.report(finding)
    if faults.failed:
        return None
    placements = whole_placements(tensors, pieces)
    said = tuple(faults.findings)
    return Catalog(path, "torch", Mesh(), tensors, placements, Extents(pieces), findings=said, files=tuple(names))


def _tensors(path: str, content: Any) -> tuple[dict[str, Stored], tuple[str, ...]]:
    """The state dict in a file: the object itself, or what stands under a key that programs use; and the names of those
    that are not read."""
    places = [content, *(content.get(key) for key in _KEYS)] if isinstance(content, Mapping) else []
    state = content.get("state") if isinstance(content, Mapping) else None  # composer's
    for place in [*places, state.get("model") if isinstance(state, Mapping) else None]:
        if isinstance(place, Mapping):
            found = {name: v for name, v in place.items() if isinstance(v, Stored) and isinstance(name, str)}
            if found:
                return found, tuple(str(name) for name, v in place.items() if is_unread(v))
    if places and {"state", "param_groups"} <= content.keys():
        raise CheckpointError(f"{path}: the state of an optimizer, without weights: open the folder that holds them")
    raise CheckpointError(
        f"{path}: no tensors by name, neither in the object itself nor under {', '.join(_KEYS)}: found a "
        f"{type(content).__name__}"
    )


def _optimizers(content: Any) -> Iterator[str]:
    """The keys under which a file keeps what an optimizer holds."""
    state = content.get("state") if isinstance(content, Mapping) else None
    for place, before in ((content, ""), (state, "state.")):
        for key, value in place.items() if isinstance(place, Mapping) else ():
            if isinstance(key, str) and _OPTIMIZERS.fullmatch(key) and isinstance(value, (Mapping, list)) and value:
                yield before + key


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


def _files(path: str, weights: re.Pattern[str], index: re.Pattern[str], faults: Faults) -> list[str]:
    """The files in an index, or all that match."""
    here = sorted(paths.names(path))
    names = [n for n in here if weights.fullmatch(n)]
    told = next((n for n in here if index.fullmatch(n)), None)
    expected = f"the files of {told}" if told else "as many files as their names say"
    if told is not None:
        names = sorted(set((faults.read(path, told, indexed) or {}).values())) or names
    if lost := [n for n in names if n not in here] if told else unnumbered(names):
        faults.report(missing(path, lost, expected))
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
