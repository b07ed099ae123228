"""The files of a checkpoint one by one: which can be parsed, which are missing, and which should not be there.

Nothing here needs the checkpoint to open: a file that cannot be read is a finding, and the others go on.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from ckptlab.analysis.checkup.finding import Finding, Where
from ckptlab.errors import CheckpointError, CkptlabError, UnsafeFileError, UnsupportedError
from ckptlab.formats import safetensors, torchfile
from ckptlab.formats.deepspeed import names
from ckptlab.formats.deepspeed.names import FileName
from ckptlab.mesh import Mesh
from ckptlab.words import number_of, some

_DIGITS = 6  # of a layer's number: more are none


@dataclass
class Scan:
    """The files of a folder that belong to its checkpoint: by name (relative to `path`), what could be read of them.

    `parsed` takes the names of a DeepSpeed step folder apart; `globals_seen` is what each pickle names.
    """

    path: str
    contents: dict[str, Any] = field(default_factory=dict)
    parsed: dict[str, FileName] = field(default_factory=dict)
    globals_seen: dict[str, frozenset[tuple[str, str]]] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)

    @property
    def heads(self) -> dict[str, Mapping[str, Any]]:
        """The model files that could be read: at ZeRO-3 those of every dp rank."""
        zero3 = any(n.kind == "zero3_model" for n in self.parsed.values())
        return self.of_kind("zero3_model" if zero3 else "model")

    def of_kind(self, kind: str) -> dict[str, Mapping[str, Any]]:
        """The files of one kind that could be read and hold a dictionary."""
        return {
            n: c
            for n, c in self.contents.items()
            if n in self.parsed and self.parsed[n].kind == kind
            if isinstance(c, Mapping)
        }

    def add(self, name: str) -> None:
        """Parse one file of torch; what cannot be read is a finding."""
        try:
            read = torchfile.read_contents(os.path.join(self.path, name))
        except (CkptlabError, OSError) as error:
            self.findings.append(unreadable(name, error, self.path))
            return
        self.contents[name], self.globals_seen[name] = read.value, read.globals_seen


def scan(path: str, form: str) -> Scan:
    """Parse every file of a checkpoint of the format `form` at `path`."""
    if form == "safetensors":
        return _scan_safetensors(path)
    found = Scan(path)
    for name in sorted(e.name for e in os.scandir(path) if e.is_file()):
        if parsed := names.parse(name):
            found.parsed[name] = parsed
            found.add(name)
    for root, folders, files in os.walk(os.path.join(path, "zero")) if form == "universal" else ():
        folders.sort()
        for file in sorted(f for f in files if f.endswith(".pt")):
            found.add(os.path.relpath(os.path.join(root, file), path))
    return found


def _scan_safetensors(path: str) -> Scan:
    found = Scan(os.path.dirname(path) if os.path.isfile(path) else path)
    files = (
        [path] if os.path.isfile(path) else sorted(e.path for e in os.scandir(path) if e.name.endswith(".safetensors"))
    )
    for file in files:
        name = os.path.basename(file)
        try:
            found.contents[name] = safetensors.read_header(file)
        except (CkptlabError, OSError, KeyError, TypeError, ValueError) as error:
            found.findings.append(unreadable(name, error, found.path))
    return found


def unreadable(name: str, error: Exception, folder: str) -> Finding:
    """The finding on a file that cannot be read."""
    said = str(error).replace(f"{folder}{os.sep}", "")
    code, severity = "damaged-file", "error"
    todo = "copy it again from the run's storage; if it is cut there too, go back to an earlier step"
    if isinstance(error, UnsafeFileError):
        code, todo = (
            "unsafe-file",
            "do not load it with anything that unpickles; get it again from where it was written",
        )
    elif isinstance(error, UnsupportedError):
        code, severity, todo = "unsupported-file", "warning", "save it again with a current torch where you trust it"
    elif not isinstance(error, CheckpointError):
        code, todo = "unreadable-file", "see that it can be read (permissions, storage), then check again"
    return Finding(code, severity, Where(files=(name,)), "a complete file that can be read", said, todo)


def mesh_of(found: Scan) -> Mesh | None:
    """The mesh that most of the model files name; where none can be read, the one that the file names span."""
    said = Counter(m for content in found.heads.values() if (m := _mesh_in(found, content)) is not None)
    if said:
        return said.most_common(1)[0][0]
    ranks = [n for n in found.parsed.values() if n.kind in ("model", "zero3_model", "optim")]
    if not ranks:
        return None
    world = max(n.mp for n in ranks) + 1
    tp = max((n.mp + 1 for n in found.parsed.values() if n.kind == "layer"), default=world)
    return Mesh(pp=max(world // tp, 1), dp=max(n.dp for n in ranks) + 1, tp=tp)


def _mesh_in(found: Scan, head: Mapping[str, Any]) -> Mesh | None:
    try:
        world, dp = int(head["mp_world_size"]), int(head["dp_world_size"])
        degrees = head.get("checkpoint_parallel_dimensions")
        layers = (n.mp + 1 for n in found.parsed.values() if n.kind == "layer")
        tp = int(degrees["tp_degree"]) if degrees else max(layers, default=world)
        return Mesh(pp=max(world // tp, 1), dp=dp, tp=tp)
    except (KeyError, TypeError, ValueError, ArithmeticError, CkptlabError):
        return None


def places(found: Scan, mesh: Mesh, *, optimizer: bool = True) -> Iterator[Finding]:
    """Files of ranks that are missing, and files of ranks that the mesh does not have."""
    wanted = _wanted(found, mesh, optimizer)
    for kind, needed in wanted.items():
        missing = [n for n in needed if n not in found.parsed]
        if missing:
            verb = "is" if len(missing) == 1 else "are"
            yield Finding(
                "missing-file",
                "error",
                Where(files=tuple(missing)),
                f"{number_of(len(needed), f'{kind} file')}, for {mesh}",
                f"{some(missing, 4)} {verb} not there",
                "copy the missing files from the storage of the nodes that wrote them",
            )
    known = {n for needed in wanted.values() for n in needed}
    kinds = {"model", "zero3_model", "layer", *(("optim",) if optimizer else ())}
    extra = [n for n, p in found.parsed.items() if p.kind in kinds and n not in known]
    if extra:
        yield Finding(
            "extra-file",
            "warning",
            Where(files=tuple(extra)),
            f"the files of {mesh} and no others",
            f"{some(extra, 4)}: of no rank of that mesh. ckptlab leaves them alone; DeepSpeed's own tools count files "
            "and take them for ranks",
            "move them away: they are left from another run or mesh",
        )


def _wanted(found: Scan, mesh: Mesh, optimizer: bool) -> dict[str, list[str]]:
    """The names that the ranks' files must have, by kind."""
    kinds = {n.kind for n in found.parsed.values()}
    world = range(mesh.pp * mesh.tp)
    if "zero3_model" in kinds:
        wanted = {"model": [names.zero3_model(d, mp) for mp in world for d in range(mesh.dp)]}
    else:
        wanted = {"model": [names.model(mp) for mp in world]}
    if optimizer and ("optim" in kinds or _trained_with_zero(found)):
        prefix = Counter(n.prefix for n in found.parsed.values() if n.kind == "optim").most_common(1)
        usual = prefix[0][0] if prefix else ""
        wanted["optimizer"] = [names.optim(d, mp, usual) for mp in world for d in range(mesh.dp)]
    layers = [n for n in found.parsed.values() if n.kind == "layer"]
    if layers:
        axis = any(n.prefix for n in layers)
        numbers = sorted({n.layer for n in layers} | _layers_named(found))
        wanted["layer"] = [names.layer(i, t if axis else None) for i in numbers for t in range(mesh.tp)]
    return wanted


def _trained_with_zero(found: Scan) -> bool:
    """No optimizer file is there, but the configuration says that there must be."""
    for head in found.heads.values():
        config = head.get("ds_config")
        zero = config.get("zero_optimization") if isinstance(config, Mapping) else None
        if head.get("optimizer") is None and isinstance(zero, Mapping) and zero.get("stage"):
            return True
    return False


def param_shapes(head: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The shapes that a model file lists, one mapping a group; none where they are in no form that a writer uses."""
    stored = head.get("param_shapes")
    groups = [stored] if isinstance(stored, Mapping) else stored if isinstance(stored, list) else []
    return groups if all(isinstance(g, Mapping) for g in groups) else []


def _layers_named(found: Scan) -> set[int]:
    """The layers whose tensors the model files list."""
    numbers = set()
    for head in found.heads.values():
        for group in param_shapes(head):
            firsts = (name.partition(".")[0] for name in group if isinstance(name, str))
            numbers |= {int(first) for first in firsts if first.isdecimal() and len(first) < _DIGITS}
    return numbers
