"""What arguments and options mean: a checkpoint, a target, workers."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import CancelledError
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

from ckptlab.errors import CkptlabError

if TYPE_CHECKING:
    from ckptlab.checkpoint import Checkpoint
    from ckptlab.formats import Paths
    from ckptlab.pool import Workers
    from ckptlab.reshaping import Reshape

_PATIENCE = 10  # seconds in which a scheduler must answer


def opened(path: Paths, strategy: str | None) -> Checkpoint:
    from ckptlab.checkpoint import open as open_checkpoint

    return open_checkpoint(path, strategy)


@contextmanager
def workers_of(scheduler: str | None, threads: int | None = None) -> Iterator[Workers]:
    """What runs tasks: threads, or the workers of a scheduler."""
    if scheduler is None:
        yield threads
        return
    if threads is not None:
        raise click.UsageError("--workers and --scheduler exclude each other")
    try:
        from distributed import Client
    except ImportError:
        raise CkptlabError("--scheduler needs dask.distributed: pip install distributed") from None
    try:
        client = Client(scheduler, timeout=_PATIENCE, set_as_default=False)
    except (OSError, ValueError) as error:
        raise CkptlabError(f"{scheduler}: no scheduler of dask.distributed answers there ({error})") from None
    try:
        with client:
            yield client
    except Exception as error:  # workers that die again and again, a scheduler that is lost
        if not (isinstance(error, CancelledError) or type(error).__module__.startswith("distributed")):
            raise
        said = str(error) or type(error).__name__
        raise CkptlabError(f"{scheduler}: the cluster gave up: {said}; repeat the command when it is back") from None


def reshaped(ckpt: Checkpoint, options: Mapping[str, Any], form: str | None = None) -> Reshape:
    """The target that the options say; axes that they do not name keep the degree that the run had."""
    given = {k: v for k, v in options.items() if v is not None and v != ()}
    if "param_groups" in given:
        given["param_groups"] = param_groups(given["param_groups"])
    given["strategy"] = target_strategy(given.pop("to_strategy", ()))
    if split := given.pop("split", ()):
        mesh = (ckpt.catalog.training.mesh or ckpt.mesh).joined()
        mesh = mesh.replace(**{axis: given.pop(axis) for axis in ("tp", "pp", "dp", "ep") if axis in given})
        for axis, parts in split:
            mesh = mesh.split(axis, **parts)
        given["mesh"] = mesh
    return ckpt.reshape(format=form, **given)


def target_strategy(said: Sequence[str | tuple[str, str]]) -> Mapping[str, str] | str | None:
    """What --to-strategy says: one strategy, or lines of one."""
    lines = dict(line for line in said if isinstance(line, tuple))
    others = [line for line in said if isinstance(line, str)]
    if len(others) > 1 or (others and lines):
        raise click.UsageError("--to-strategy: one strategy or JSON file, or any number of lines REGEX=NOTATION")
    return others[0] if others else lines or None


def param_groups(path: str) -> tuple[Mapping[str, Any], ...]:
    try:
        with open(path, encoding="utf-8") as file:
            groups = json.load(file)
    except ValueError as error:
        raise CkptlabError(f"{path}: expected a JSON list of objects, one for each parameter group: {error}") from None
    if not isinstance(groups, list) or not all(isinstance(g, dict) for g in groups):
        raise CkptlabError(f"{path}: expected a JSON list of objects, one for each parameter group")
    return tuple(groups)
