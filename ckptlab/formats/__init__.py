"""Formats: what is stored, read and written. One folder each; read format.py first, then registered.py,
where a new one gets its name.

`torch` is what several of them are written in: pickles and zips, read without torch and without executing anything.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from ckptlab.arguments import kind_of
from ckptlab.catalog import Catalog
from ckptlab.errors import CheckpointError, InputError
from ckptlab.findings import Faults, Finding, Strict, Where
from ckptlab.formats.format import Format, Listing, Match
from ckptlab.formats.locate import locate
from ckptlab.formats.registered import FORMATS, every, get
from ckptlab.mesh import Mesh
from ckptlab.sharding.rules import unmatched
from ckptlab.sharding.strategies import Strategy, denied
from ckptlab.words import some

__all__ = ["FORMATS", "Format", "Listing", "Match", "every", "found", "get", "locate", "read", "read_at"]


Paths = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]


def read(
    path: Paths,
    strategy: Strategy | None = None,
    storage_options: Mapping[str, Any] | None = None,
    mesh: Mesh | None = None,
) -> Catalog:
    """The catalog of the checkpoint at a path (see `locate`), or at several that hold parts of one, as the nodes of a
    run leave them. Headers only; nothing in it is executed. storage_options: of the file system behind a URL. mesh: the
    run's, for a format that does not say it.

    Raises the first error that its reader finds.
    """
    catalog = read_at(found(path, storage_options), Strict(), strategy, mesh)
    assert catalog is not None, "a reader that has no catalog has reported why"
    return catalog


def found(path: Paths, storage_options: Mapping[str, Any] | None = None) -> Match:
    """What a path means, or several that hold parts of one checkpoint. CheckpointError where their kinds differ."""
    if isinstance(path, (str, os.PathLike)):
        return locate(path, storage_options)
    if not isinstance(path, (list, tuple)):
        raise InputError(f"expected a path, or a list of paths, not {kind_of(path)}")
    if not path:
        raise CheckpointError("no path is given: expected at least one folder")
    first, *others = (locate(one, storage_options) for one in path)
    if odd := [match for match in others if match.format != first.format]:
        raise CheckpointError(f"{odd[0]} is no part of {first}: what is opened together is parts of one checkpoint")
    return replace(first, also=tuple(dict.fromkeys(m.path for m in others if m.path != first.path)))


def read_at(match: Match, faults: Faults, strategy: Strategy | None = None, mesh: Mesh | None = None) -> Catalog | None:
    """The catalog of what a format matched; None where `faults` was told of an error."""
    format = get(match.format)
    with _uncollected():
        if mesh is not None:
            catalog = format.read_on(mesh, match.path, faults, strategy)
        elif match.also:
            catalog = format.read_parts(match, faults, strategy)
        else:
            catalog = format.read(match.path, faults, strategy)
    if catalog is None or strategy is None:
        return catalog
    against, why, todo = denied(strategy, {name: tensor.shape for name, tensor in catalog.tensors.items()})
    if against:
        where, fits = Where(tensors=against), "a strategy that fits the tensors' shapes"
        message = f"{match.path}: {some(against, 1)}: {why}: {todo}"
        faults.report(Finding("strategy-denied", "error", where, fits, why, todo, "headers", message))
    if idle := unmatched(strategy, catalog.tensors):
        faults.report(idle)
        catalog = replace(catalog, findings=(*catalog.findings, idle))
    return catalog


@contextmanager
def _uncollected() -> Iterator[None]:
    """No search for cycles of garbage meanwhile: what headers tell stays, and Python would go through all of it again
    and again, a fifth of the time that opening hundreds of files takes."""
    collected = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collected:
            gc.enable()
