"""From files to files: a destination appears whole or not at all, and an interrupted conversion goes on where it
stopped.

A format gives `FilePlan`s. They are carried out in `DESTINATION.partial` beside the destination, piece by piece by
whatever workers there are, each file under a temporary name until it is complete; a journal there says what the
conversion is. When all are done the folder is synced and renamed.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ckptlab import pool
from ckptlab.errors import DestinationError
from ckptlab.formats import fileplan
from ckptlab.formats.fileplan import Checksum, FilePlan, Piece, Sum

JOURNAL = "ckptlab-journal.json"
PIECE = 256 << 20  # bytes of a file from which on several workers write it
_TEMPORARY = ".tmp"  # how a file's name ends until it is complete


@dataclass(frozen=True)
class Report:
    """What a conversion did: `files` of the destination, those `resumed` from an interrupted run, bytes of tensor data,
    the pointer beside the destination that names it (None: none was written), and what was copied `beside` it."""

    destination: str
    latest: str | None
    files: int
    resumed: int
    bytes_written: int
    beside: tuple[str, ...] = ()


class _Journal:
    """The first line says what the conversion is, every further one names a file that is complete.

    The open file is locked, so that a second process does not write into the same folder; a killed one leaves no lock.
    """

    def __init__(self, partial: str, identity: dict[str, Any]) -> None:
        said = json.dumps(identity, sort_keys=True, default=str)
        try:
            os.makedirs(partial, exist_ok=True)
            self.file = Path(partial, JOURNAL).open("a+")  # noqa: SIM115 (open, and locked, until all is done)
        except OSError as e:
            raise DestinationError(f"{partial} cannot be written: {e.strerror}") from None
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.file.close()
            raise DestinationError(f"{partial}: another process is writing this conversion") from None
        self.file.seek(0)
        lines = self.file.read().splitlines()
        if lines[:1] != [said] and (lines or os.listdir(partial) != [JOURNAL]):
            self.file.close()
            raise DestinationError(
                f"{partial} is left from another conversion: remove it, or repeat that conversion to finish it"
            )
        if not lines:
            self._append(said)
        self.done = dict(_entries(lines[1:]))

    def _append(self, line: str) -> None:
        self.file.write(line + "\n")
        self.file.flush()

    def finished(self, name: str, size: int) -> None:
        self._append(json.dumps({"file": name, "size": size}))

    def has(self, partial: str, name: str) -> bool:
        """The file was finished and is still as long as it was."""
        path = os.path.join(partial, name)
        return os.path.isfile(path) and self.done.get(name) == os.path.getsize(path)


def _entries(lines: Iterable[str]) -> Iterator[tuple[str, int]]:
    for line in lines:
        try:
            entry = json.loads(line)
        except ValueError:  # the line that was being written when the run was killed
            continue
        yield entry["file"], entry["size"]


def run(
    plans: Sequence[FilePlan],
    destination: str,
    identity: dict[str, Any],
    *,
    latest: str | None = None,
    workers: pool.Workers = None,
    progress: bool = False,
    check: Callable[[str], None] | None = None,
    beside: Sequence[str] = (),
) -> Report:
    """Write every file and let the destination appear.

    identity: what this conversion is (source, target, options); an interrupted one goes on only if it is the same.
    latest: the name of the file beside the destination that is to hold its name. workers: see `pool.run`; processes
    must see the same folders. check: called with the finished folder before it gets its name; what it raises stops the
    conversion. beside: files to be copied beside the destination; those that are there stay. DestinationError if the
    destination exists or cannot be made.
    """
    destination = os.path.abspath(destination)
    partial = f"{destination}.partial"
    if os.path.lexists(destination):
        raise DestinationError(f"{destination} exists already: remove it, or name another destination")
    journal = _Journal(partial, identity)
    with journal.file:
        todo = [plan for plan in plans if not journal.has(partial, plan.name)]
        _remove_unfinished(partial)
        total, left = (sum(plan.size for plan in some) for some in (plans, todo))
        with pool.progress(total, "writing", "B", progress) as bar:
            if bar is not None:
                bar.update(total - left)
            for name, size in _written(partial, todo, workers, bar):
                journal.finished(name, size)
        if check is not None:
            check(partial)
        copied = _copied(beside, os.path.dirname(destination))
        _finish(partial, destination, latest)
    pointer = latest and os.path.join(os.path.dirname(destination), latest)
    return Report(destination, pointer, len(plans), len(plans) - len(todo), sum(plan.nbytes for plan in todo), copied)


def _copied(files: Iterable[str], folder: str) -> tuple[str, ...]:
    """Copy files into a folder, each under its own name, where nothing has that name; returns the names."""
    copied = []
    for file in files:
        path = os.path.join(folder, os.path.basename(file))
        if not os.path.lexists(path):
            temporary = f"{path}{_TEMPORARY}"
            shutil.copyfile(file, temporary)
            os.replace(temporary, path)
            copied.append(os.path.basename(file))
    return tuple(copied)


def _written(partial: str, plans: Sequence[FilePlan], workers: pool.Workers, bar: Any) -> Iterator[tuple[str, int]]:
    """Write the files; gives the name and the bytes of each as it is complete."""
    by_path = {os.path.join(partial, plan.name) + _TEMPORARY: plan for plan in plans}
    for folder in {os.path.dirname(path) for path in by_path}:
        os.makedirs(folder, exist_ok=True)
    pieces = (piece for path, plan in by_path.items() for piece in plan.pieces(path, PIECE))
    sums: defaultdict[str, list[Sum]] = defaultdict(list)
    arrived: defaultdict[str, int] = defaultdict(int)
    for path, nbytes, found in pool.run(_write, pieces, on=workers, size=_bytes, bar=bar, ordered=False):
        plan = by_path[path]
        sums[path] += found
        arrived[path] += nbytes
        if arrived[path] == plan.size:
            if nbytes < plan.size:
                _complete(path, plan.checksums, sums[path])
            del sums[path]
            yield plan.name, plan.size


def _bytes(piece: Piece) -> int:
    return piece.nbytes


def _write(piece: Piece) -> tuple[str, int, list[Sum]]:
    """Write a piece, and complete the file that it is all of: that may be done here, by many at a time."""
    sums = piece.write()
    if piece.nbytes == piece.size:
        _complete(piece.path, piece.checksums, sums)
    return piece.path, piece.nbytes, sums


def _complete(path: str, checksums: Iterable[Checksum], sums: Iterable[Sum]) -> None:
    """Give a file, all of whose pieces are written, its checksums and its name."""
    fileplan.seal(path, checksums, sums)
    with open(path, "rb") as file:
        os.fsync(file.fileno())
    os.replace(path, path.removesuffix(_TEMPORARY))


def _remove_unfinished(partial: str) -> None:
    for folder, _, files in os.walk(partial):
        for name in files:
            if name.endswith(_TEMPORARY):
                os.remove(os.path.join(folder, name))


def _finish(partial: str, destination: str, latest: str | None) -> None:
    os.remove(os.path.join(partial, JOURNAL))
    for folder, _, _ in os.walk(partial):
        _sync(folder)
    os.rename(partial, destination)
    parent = os.path.dirname(destination)
    if latest is not None:
        temporary = os.path.join(parent, f".{latest}.tmp")
        with open(temporary, "w") as f:
            f.write(os.path.basename(destination))
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, os.path.join(parent, latest))
    _sync(parent)


def _sync(folder: str) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
