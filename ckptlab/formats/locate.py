"""Which checkpoint a path means: every format is asked, here, then below."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

from ckptlab import paths
from ckptlab.errors import CheckpointError, CkptlabError
from ckptlab.formats.format import Listing, Match
from ckptlab.formats.registered import FORMATS, every, get
from ckptlab.words import some

UNFINISHED = "ckptlab-journal.json"  # stands in a far folder as long as it is not whole
_ASKED = 50  # files of a folder that is no checkpoint that formats are asked of
_MOST = 10_000  # folders that are looked into
_DEPTH = 4  # how far below a folder checkpoints are looked for


def locate(path: str | os.PathLike[str], storage_options: Mapping[str, Any] | None = None) -> Match:
    """Find the checkpoint that a user means: what a format recognises at the path itself, else the one that is below.

    Weights alone are taken if no training checkpoint stands below them. CheckpointError otherwise, as where both are
    there: it lists what was found.
    """
    path = paths.absolute(path, storage_options)
    try:
        if not paths.exists(path):
            raise CheckpointError(f"{path}: no such file or folder")
        return _found(path)
    except OSError as error:
        raise CheckpointError(f"{error.filename or path}: cannot be read: {error.strerror or error}") from error


def _found(path: str) -> Match:
    here = at(path)
    found = [match for match in here if not match.weights_only]
    broken: list[CheckpointError] = []
    if not found and paths.is_folder(path):
        below = list({(paths.real(m.path), m.format): m for m in _below(path, _DEPTH, broken, [_MOST])}.values())
        held = [match for match in here if get(match.format).reads]
        found = [*held, *(match for match in _best(below) if not (held and match.weights_only))]
    found = found or here
    if len(found) == 1:
        return found[0]
    if broken and not found:
        raise broken[0]
    if not found and paths.is_file(path):
        raise CheckpointError(f"{path}: a single file that no format knows: give the folder that holds the checkpoint")
    if not found:
        known = ", ".join(format.name for format in every() if format.reads)
        hint = f"; {some(alone, 4)} may open by itself" if (alone := list(_alone(path))) else ""
        raise CheckpointError(
            f"{path}: no checkpoint here or below: no format that ckptlab reads ({known}) knows it{hint}"
        )
    listed = "\n".join(f"  {match}" for match in found[:20])
    nodes = len({os.path.basename(match.path) for match in found}) == 1 and not any(m.weights_only for m in found)
    hint = ", or, where they are the parts that several nodes wrote of one, all together" if nodes else ""
    raise CheckpointError(f"{path}: holds {len(found)} checkpoints: open one of them{hint}:\n{listed}")


def at(path: str) -> list[Match]:
    """What the formats recognise at this very path: weights alone only if that is all, and what none of them reads only
    if nothing else is."""
    listing = Listing(path)
    if paths.is_far(path) and UNFINISHED in listing.names:
        raise CheckpointError(
            f"{path}: a conversion writes it, or was interrupted while it did ({UNFINISHED} is there): repeat it, or "
            "remove what is there"
        )
    known = sorted(every(), key=lambda format: not format.reads)
    found: list[Match] = []
    for format in known:
        if not format.reads and any(not match.weights_only for match in found):
            break  # a training checkpoint, of perhaps very many files
        try:
            match = format.recognise(listing)
        except (CkptlabError, OSError):
            raise
        except Exception as broken:
            if FORMATS.is_own(format.name):
                raise
            warnings.warn(
                f"{path}: format {format.name!r} cannot say whether this is one of its checkpoints "
                f"({type(broken).__name__}: {broken}), and is left out: update or uninstall its package",
                stacklevel=2,
            )
            continue
        if match is not None:
            found.append(match)
    return _best(found)


def _best(found: list[Match]) -> list[Match]:
    """Those that go before the others: training checkpoints, else weights, else weights that no format reads."""
    training = [match for match in found if not match.weights_only]
    return training or [match for match in found if get(match.format).reads] or found


def _alone(path: str) -> Iterator[str]:
    """Files of a near folder that some format reads one at a time, as what Lightning calls last.ckpt."""
    files = [e.name for e in paths.entries(path) if e.is_file] if not paths.is_far(path) else []
    for name in sorted(files)[:_ASKED]:
        with suppress(CheckpointError):
            if any(get(match.format).reads for match in at(os.path.join(path, name))):
                yield name


def _below(path: str, depth: int, broken: list[CheckpointError], left: list[int]) -> Iterator[Match]:
    """What lies below a folder. left: how many more folders are looked into; CheckpointError where they do not do."""
    folders = sorted((e for e in paths.entries(path) if e.is_folder), key=lambda e: natural(e.name))
    left[0] -= len(folders)
    if left[0] < 0:
        raise CheckpointError(
            f"{path}: this is one of more than {_MOST} folders to search: name the checkpoint's, or one nearer to it"
        )
    for entry in folders:
        try:
            found = at(entry.path)
            deeper = [] if found or depth == 1 else list(_below(entry.path, depth - 1, broken, left))
        except OSError:  # not ours to look into, or gone by now
            continue
        except CheckpointError as error:
            if left[0] < 0:
                raise
            broken.append(error)
            continue
        yield from [*found, *deeper]


def natural(name: str) -> list[tuple[int, str]]:
    """A key that sorts step9 before step10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]
