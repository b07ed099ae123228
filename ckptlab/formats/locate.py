"""Which checkpoint a path means: every format is asked, here, then below."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator

from ckptlab.errors import CheckpointError
from ckptlab.formats.format import Listing, Match
from ckptlab.formats.registered import every

_DEPTH = 4  # how far below a folder checkpoints are looked for


def locate(path: str | os.PathLike[str]) -> Match:
    """Find the checkpoint that a user means: what a format recognises at the path itself, else the one that is below.

    Weights alone are taken if no training checkpoint stands below them. CheckpointError lists what was found otherwise.
    """
    if "://" in os.fspath(path):
        raise CheckpointError(f"{os.fspath(path)}: ckptlab opens local files and folders only: copy or mount it here")
    path = os.path.abspath(os.path.expanduser(os.fspath(path)))
    if not os.path.exists(path):
        raise CheckpointError(f"{path}: no such file or folder")
    here = at(path)
    found = [match for match in here if not match.weights_only]
    broken: list[CheckpointError] = []
    if not found and os.path.isdir(path):
        below = list(dict.fromkeys(_below(path, _DEPTH, broken)))
        found = [*here, *(match for match in below if not (here and match.weights_only))]
    found = found or here
    if len(found) == 1:
        return found[0]
    if broken and not found:
        raise broken[0]
    if not found and os.path.isfile(path):
        raise CheckpointError(f"{path}: a single file that no format knows: give the folder that holds the checkpoint")
    if not found:
        known = ", ".join(format.name for format in every() if format.reads)
        raise CheckpointError(f"{path}: no checkpoint here or below: no format that ckptlab reads ({known}) knows it")
    listed = "\n".join(f"  {match}" for match in found[:20])
    raise CheckpointError(f"{path}: holds {len(found)} checkpoints: open one of them:\n{listed}")


def at(path: str) -> list[Match]:
    """What the formats recognise at this very path."""
    listing = Listing(path)
    return [match for format in every() if (match := format.recognise(listing)) is not None]


def _below(path: str, depth: int, broken: list[CheckpointError]) -> Iterator[Match]:
    with os.scandir(path) as entries:
        folders = sorted((e for e in entries if e.is_dir()), key=lambda e: natural(e.name))
    for entry in folders:
        try:
            found = at(entry.path)
        except PermissionError:
            continue
        except CheckpointError as error:
            broken.append(error)
            continue
        yield from found
        if not found and depth > 1:
            yield from _below(entry.path, depth - 1, broken)


def natural(name: str) -> list[tuple[int, str]]:
    """A key that sorts step9 before step10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]
