"""What kind of checkpoint a path holds, and which folder of it to open."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass

from ckptlab.errors import CheckpointError
from ckptlab.formats.dcp.format import DCP
from ckptlab.formats.deepspeed import names

LATEST = "latest"
LATEST_UNIVERSAL = "latest_universal"
_DEPTH = 4  # how far below a folder checkpoints are looked for


@dataclass(frozen=True)
class Location:
    """A folder (or file) that a reader opens; `format` is "deepspeed", "universal", "dcp" or "safetensors"."""

    path: str
    format: str

    def __str__(self) -> str:
        return f"{self.path} ({self.format})"


def locate(path: str | os.PathLike[str]) -> Location:
    """Find the checkpoint that a user means.

    A step folder, the folder that holds `latest` (or `latest_universal`), a universal folder, a folder or file of
    safetensors, or a folder with exactly one of these somewhere below it. CheckpointError lists what was found
    otherwise.
    """
    path = os.path.abspath(os.path.expanduser(os.fspath(path)))
    if os.path.isfile(path):
        if path.endswith(".safetensors"):
            return Location(path, "safetensors")
        raise CheckpointError(f"{path}: a single file: give the folder that holds the checkpoint")
    if not os.path.isdir(path):
        raise CheckpointError(f"{path}: no such file or folder")
    here = at(path)
    if here is not None:
        return here
    below = list(dict.fromkeys(_below(path, _DEPTH)))
    if len(below) == 1:
        return below[0]
    if not below:
        raise CheckpointError(
            f"{path}: no checkpoint here: neither a DeepSpeed step folder, `latest`, `zero/`, DCP nor safetensors "
            "in it or below"
        )
    listed = "\n".join(f"  {found}" for found in below[:20])
    raise CheckpointError(f"{path}: holds {len(below)} checkpoints: open one of them:\n{listed}")


def at(path: str) -> Location | None:
    """The checkpoint that is this very folder, or that a `latest` in it points to."""
    content = set(os.listdir(path))
    if any((n := names.parse(c)) and n.kind in ("optim", "layer") for c in content):
        return Location(path, "deepspeed")
    if "zero" in content and os.path.isdir(os.path.join(path, "zero")):
        return Location(path, "universal")
    if any((n := names.parse(c)) and n.kind in ("model", "zero3_model") for c in content):
        return Location(path, "deepspeed")
    for pointer, kind in ((LATEST, "deepspeed"), (LATEST_UNIVERSAL, "universal")):
        if pointer in content:
            return Location(_follow(path, pointer, content), kind)
    shards = DCP().recognise(path)
    if shards is not None:
        return Location(shards, "dcp")
    if any(c.endswith(".safetensors") for c in content):
        return Location(path, "safetensors")
    return None


def _follow(path: str, pointer: str, content: set[str]) -> str:
    file = os.path.join(path, pointer)
    with open(file, encoding="utf-8", errors="replace") as f:
        tag = f.read(4096).strip()
    target = os.path.join(path, tag)
    if not tag or os.path.isabs(tag) or not os.path.isdir(target):
        tags = sorted((c for c in content if os.path.isdir(os.path.join(path, c))), key=_natural)
        there = f"there {'is' if len(tags) == 1 else 'are'} {', '.join(tags)}" if tags else "there are no folders"
        raise CheckpointError(f"{file}: names {tag!r}, which is no folder in {path}; {there}: open one of them")
    return target


def _below(path: str, depth: int) -> Iterator[Location]:
    for entry in sorted((e for e in os.scandir(path) if e.is_dir()), key=lambda e: _natural(e.name)):
        try:
            found = at(entry.path)
        except (CheckpointError, PermissionError):
            continue
        if found is not None:
            yield found
        elif depth > 1:
            yield from _below(entry.path, depth - 1)


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]
