"""A folder of torch.distributed.checkpoint → `Catalog`."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterator, Mapping
from functools import cached_property, partial
from typing import Any

from ckptlab import paths
from ckptlab.catalog import Catalog, ParameterGroup
from ckptlab.errors import CheckpointError, UnsupportedError
from ckptlab.findings import Faults, Strict
from ckptlab.formats.dcp import labels, megatron, ranks
from ckptlab.formats.dcp.assemble import Client, Found, Lazy, assemble, step_of
from ckptlab.formats.dcp.boxes import Grid, grid_of
from ckptlab.formats.dcp.folder import boxes_of, chunks_of, metadata_files, read_folder
from ckptlab.formats.dcp.items import found_by_key, number_at, object_at
from ckptlab.formats.dcp.keys import Keys, sort_keys
from ckptlab.formats.dcp.marks import ABOUT, DATA, MODEL_FOLDER, OPTIMIZER_FOLDER
from ckptlab.formats.dcp.metadata import LABELS, METADATA, Entry, Metadata
from ckptlab.formats.dcp.numbered import by_number
from ckptlab.formats.dcp.said import Said
from ckptlab.formats.dcp.styles import found_style
from ckptlab.mesh import Mesh
from ckptlab.sharding.strategies import Strategy
from ckptlab.words import brief

_FILES, _EACH = 64, 2  # of how many files, and how many in each, steps are looked at


def read_dcp(
    path: str | os.PathLike[str],
    strategy: Strategy | None = None,
    faults: Faults | None = None,
    mesh: Mesh | None = None,
) -> Catalog:
    """Open a DCP folder, accelerate's pair of them, or Megatron-core's `torch_dist`: headers only, nothing executed.

    strategy: layouts in which mesh axes are named, (dp out) in; mesh: the run's, where those follow from it. Raises as
    `ckptlab.open` does.
    """
    path = os.fspath(path)
    said = Said(faults or Strict(), path)
    names = set(paths.names(path))
    if "model" in ranks.files_of(names):
        return assemble(ranks.find(path, said), said, strategy, mesh)
    about = os.path.join(path, ABOUT)
    backend = _backend(about) if paths.is_file(about) else None
    folders = _folders(path)
    read = [read_folder(os.path.join(path, folder), said) for folder in folders]
    files = tuple(
        os.path.normpath(os.path.join(folder, name))
        for folder, metadata in zip(folders, read, strict=True)
        for name in (*metadata_files(set(paths.names(metadata.folder))), *metadata.files)
    )
    if backend is not None:
        return assemble(megatron.find(path, read[0], files, said), said, strategy, mesh)
    return assemble(_find(path, read, files, said), said, strategy, mesh)


def _backend(about: str) -> str:
    """What Megatron-core says of how a folder is written. UnsupportedError for what is not DCP."""
    try:
        backend = json.loads(paths.text(about)).get("sharded_backend")
    except (ValueError, AttributeError) as error:
        raise CheckpointError(f"{about}: is no JSON object ({error}): copy it again") from None
    if backend != "torch_dist":
        raise UnsupportedError(
            f"{about}: its sharded backend is {brief(backend)}; ckptlab reads torch_dist: load it with Megatron-core "
            "and save it with --ckpt-format torch_dist"
        )
    return "torch_dist"


def _folders(path: str) -> list[str]:
    """The folders below that make up one checkpoint; "" for the path itself."""
    names = set(paths.names(path))
    if metadata_files(names):
        return [""]
    models = sorted(n for n in names if n.startswith(MODEL_FOLDER))
    optimizers = sorted(n for n in names if n.startswith(OPTIMIZER_FOLDER) and n[len(OPTIMIZER_FOLDER) :].isdigit())
    if len(models) > 1 or len(optimizers) > 1:
        raise UnsupportedError(
            f"{path}: holds {len(models)} models: open the folder of one of them: {', '.join(models)}"
        )
    inside = {n: set(paths.names(os.path.join(path, n))) for n in (*models, *optimizers)}
    found = [n for n, files in inside.items() if metadata_files(files)]
    lost = [n for n, files in inside.items() if n not in found and any(map(DATA.fullmatch, files))]
    if lost or not found:
        raise CheckpointError(
            f"{os.path.join(path, *lost[:1])}: .metadata is missing, which is written last: the save did not end, or "
            "the file was not copied (its name begins with a dot)"
        )
    return found


def _grid(metadata: Metadata, key: str, said: Said) -> Grid | None:
    """The grid of a tensor's chunks; None where they make up no whole tensor, which is said."""
    with said.caught("dcp-chunks", f"{metadata.folder}: {key}"):
        return grid_of(boxes_of(metadata, metadata.tensors[key]))
    return None


def _find(path: str, read: list[Metadata], files: tuple[str, ...], said: Said) -> Found:
    of = {key: metadata for metadata in read for key in (*metadata.tensors, *metadata.blobs)}
    tensors = {key: e.path for m in read for key, e in m.tensors.items()}
    keys = sort_keys(tensors, {key: b.path for m in read for key, b in m.blobs.items()})
    found = Found(path, files=files, private=found_style(keys, tensors, len(read)))
    if keys.untold:
        said.warn(
            "dcp-optimizers",
            f"{path}: several optimizers, and parameters of the same names: whose {' and '.join(keys.untold)} is "
            "cannot be told. Its states are left with what the program put in",
        )
    if keys.alike:
        said.warn(
            "dcp-models",
            f"{path}: {' and '.join(keys.alike)} have tensors of the same names, and nothing tells which of them the "
            f"optimizer steps: taken to be {keys.alike[0]}",
        )
    _same_items(keys, of, found)
    for name, key in keys.weights.items():
        if (grid := _grid(of[key], key, said)) is not None:
            found.weights[name] = grid
    scalars: dict[str, dict[str, Any]] = {}
    plain = _scalar_states(keys, of)
    whose = _numbered(keys, of, plain, said)
    for name, states in ((whose.get(name, name), states) for name, states in keys.states.items()):
        for state, key in states.items():
            if state in plain:
                scalars.setdefault(name, {})[state] = partial(number_at, of[key], of[key].tensors[key])
            elif (grid := _grid(of[key], key, said)) is not None:
                found.states.setdefault(name, {})[state] = grid
    for name, states in ((whose.get(name, name), states) for name, states in keys.others.items()):
        for state, key in states.items():
            scalars.setdefault(name, {})[state] = partial(object_at, of[key], of[key].blobs[key])
    _steps_agree(path, keys, of, said)
    found.optimizer = bool(keys.states or keys.listed or keys.flat or keys.whole_groups)
    found.groups = _groups(keys, of, scalars, whose)
    found.client = Client({at: partial(_client, of[key], key) for key, at in keys.client.items()})
    found.step = _step(found)
    told = next((m.extra[LABELS] for m in read if LABELS in m.extra), None)
    if told is not None:
        labels.put(found, told, os.path.join(path, METADATA))
    return found


def _numbered(keys: Keys, of: Mapping[str, Metadata], plain: Collection[str], said: Said) -> Mapping[str, str]:
    """Number → name of an optimizer's parameters that go by numbers; nothing where they go by names."""
    if not keys.states or not all(name.isdecimal() and name not in keys.weights for name in keys.states):
        return {}
    shapes = {
        int(name): of[key].tensors[key].shape
        for name, states in keys.states.items()
        for state, key in states.items()
        if state not in plain
    }
    order: dict[str, int] = {}
    for metadata in {id(m): m for m in of.values()}.values():  # the program's, which chunks of several ranks are not in
        order |= {key: i for i, key in enumerate(metadata.extra["order"], len(order)) if isinstance(key, str)}
    weights = sorted(keys.weights.items(), key=lambda one: order.get(one[1], len(order)))
    found = by_number(list(map(int, keys.states)), shapes, {name: of[key].tensors[key].shape for name, key in weights})
    if found is None:
        said.remark(
            "dcp-no-names",
            f"{said.path}: the optimizer's states are numbered, and do not have the shapes of the model's tensors in "
            "their order: whose they are cannot be told, and they go by their numbers",
        )
    return {str(number): name for number, name in (found or {}).items()}


def _same_items(keys: Keys, of: Mapping[str, Metadata], found: Found) -> None:
    """Weights of which every item is another's too become aliases of it: ckptlab writes tied tensors so."""
    known: dict[Any, str] = {}
    for name, key in list(keys.weights.items()):
        entry = of[key].tensors[key]
        lies = (of[key].folder, entry.shape, entry.starts.tobytes(), entry.file.tobytes(), entry.offset.tobytes())
        first = known.setdefault(lies, name) if len(entry.starts) else name
        if first != name and any(found_by_key(of[key], file) for file in set(entry.file.tolist())):
            continue
        if first != name and first not in keys.states and name in keys.states:
            first, name = name, first  # the one that the optimizer knows
            known[lies] = first
        if first != name:
            del keys.weights[name]
            found.aliases.setdefault(first, []).append(name)


def _steps_agree(path: str, keys: Keys, of: Mapping[str, Metadata], said: Said) -> None:
    """A step stands beside each parameter's moments, strewn over the files: those of one save agree."""
    by_file: dict[str, list[str]] = {}
    for key in (states["step"] for states in keys.states.values() if "step" in states):
        entry = of[key].tensors[key]
        if entry.shape == () and len(entry.file):
            by_file.setdefault(of[key].path(int(entry.file[0])), []).append(key)
    steps = {}
    for file, held in list(by_file.items())[:_FILES]:
        if paths.is_file(file):
            steps[os.path.basename(file)] = max(number_at(of[key], of[key].tensors[key]) for key in held[:_EACH])
    if len(set(steps.values())) > 1:
        low, high = min(steps, key=lambda f: steps[f]), max(steps, key=lambda f: steps[f])
        said.warn(
            "dcp-steps-apart",
            f"{path}: the optimizer's step is {steps[low]:g} in {low} and {steps[high]:g} in {high}: the files are of "
            "different saves, unless some parameters were not trained in every step",
        )


def _scalar_states(keys: Keys, of: Mapping[str, Metadata]) -> set[str]:
    """The states that are one number for each tensor: `step`, and others without dims whatever the tensor has."""
    shapes: dict[str, set[tuple[int, ...]]] = {}
    for states in keys.states.values():
        for state, key in states.items():
            shapes.setdefault(state, set()).add(of[key].tensors[key].shape)
    return {state for state, found in shapes.items() if found == {()} and (state == "step" or len(keys.states) > 1)}


def _client(metadata: Metadata, key: str) -> Any:
    if key in metadata.blobs:
        return object_at(metadata, metadata.blobs[key])
    found = chunks_of(metadata, metadata.tensors[key])
    return found[0] if len(found) == 1 else found


def _groups(
    keys: Keys,
    of: Mapping[str, Metadata],
    scalars: Mapping[str, Mapping[str, Any]],
    whose: Mapping[str, str],
) -> tuple[ParameterGroup, ...]:
    """The parameter groups: as a list, or each parameter's options, those with equal ones together. whose: the names of
    parameters that go by numbers."""
    made: list[tuple[dict[str, Any], tuple[str, ...]]] = []
    for key in keys.whole_groups:
        groups = object_at(of[key], of[key].blobs[key]) if key in of[key].blobs else None
        for group in groups if isinstance(groups, list) else ():
            if isinstance(group, dict):
                made.append(_group(group, keys.above[key]))
    for (optimizer, _), options in sorted(keys.listed.items()):
        made.append(_group(_values(options, of), keys.above[optimizer]))
    together: dict[str, tuple[dict[str, Any], list[str]]] = {}
    for name, options in keys.flat.items():
        values = _values(options, of)
        together.setdefault(repr(sorted(values.items())), (values, []))[1].append(name)
    order = {name: i for i, name in enumerate(keys.weights)}  # options are strewn over ranks; weights less so
    made += [
        (values, tuple(sorted(names, key=lambda n: order.get(n, len(order))))) for values, names in together.values()
    ]
    named = ((options, tuple(whose.get(name, name) for name in names)) for options, names in made)
    return tuple(ParameterGroup(options, names, *_scalars_of(names, scalars)) for options, names in named)


def _values(options: Mapping[str, str], of: Mapping[str, Metadata]) -> dict[str, Any]:
    blobs = ((option, of[key], of[key].blobs.get(key)) for option, key in options.items())
    return {option: object_at(metadata, blob) for option, metadata, blob in blobs if blob is not None}


def _group(options: Mapping[str, Any], above: str) -> tuple[dict[str, Any], tuple[str, ...]]:
    names = options.get("params")
    names = tuple(f"{above}{name}" for name in names) if isinstance(names, list | tuple) else ()
    return {k: v for k, v in options.items() if k != "params"}, names


def _scalars_of(names: tuple[str, ...], scalars: Mapping[str, Mapping[str, Any]]) -> tuple[dict[str, Any], Apart]:
    """What the first of a group's tensors that has any has, and the tensors that have others."""
    held = {name: scalars[name] for name in names if name in scalars}
    first = {state: read() for state, read in next(iter(held.values()), {}).items()}
    return first, Apart(held, first)


class Apart(Mapping[str, Mapping[str, Any]]):
    """Tensor → its scalars, of the tensors of a group that have others than the first: `step`, where some were not
    trained in every step. There is an item for each tensor, which are read when one is first asked for."""

    def __init__(self, held: Mapping[str, Mapping[str, Lazy]], first: Mapping[str, Any]) -> None:
        self._held, self._first = held, first

    @cached_property
    def _found(self) -> dict[str, dict[str, Any]]:
        numbers = (read.args for its in self._held.values() for read in its.values() if isinstance(read, partial))
        entries = [(metadata, entry) for metadata, entry in numbers if isinstance(entry, Entry) and len(entry.file)]
        paths.ahead((m.path(int(e.file[0])), int(e.offset[0]), int(e.offset[0] + e.length[0])) for m, e in entries)
        found = {name: {state: read() for state, read in its.items()} for name, its in self._held.items()}
        return {name: its for name, its in found.items() if its != self._first}

    def __getitem__(self, name: str) -> Mapping[str, Any]:
        return self._found[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._found)

    def __len__(self) -> int:
        return len(self._found)


def _step(found: Found) -> int | None:
    """The training step: the program's own word, else the optimizer's."""
    for root in ("train_state", "trainer_state"):
        state = found.client.get(root) if root in found.client else None
        if isinstance(state, dict) and type(state.get("step")) is int:
            return int(state["step"])
    return step_of(found.groups)
