"""From files to files: a destination appears whole or not at all, and an interrupted conversion goes on where it
stopped.

A writer gives `FileJob`s. They are run into `DESTINATION.partial` beside the destination, each file under a temporary
name until it is complete; a journal there says what the conversion is. When all are done the folder is synced and
renamed.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any

from tqdm.auto import tqdm

from ckptlab.errors import DestinationError

JOURNAL = "ckptlab-journal.json"


@dataclass(frozen=True)
class FileJob:
    """One output file. `name` is its path within the destination, `write(path)` makes it there and returns the bytes of
    tensor data written, `nbytes` is what that will be (0: not known), for the progress bar."""

    name: str
    write: Callable[[str], int]
    nbytes: int = 0


@dataclass(frozen=True)
class Report:
    """What a conversion did: `files` of the destination, those `resumed` from an interrupted run, and bytes of tensor
    data."""

    destination: str
    files: int
    resumed: int
    bytes_written: int


@dataclass
class _Journal:
    path: str
    identity: dict[str, Any]
    done: dict[str, int] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def finished(self, name: str, size: int) -> None:
        with self.lock:
            self.done[name] = size
            with open(self.path, "a") as f:
                f.write(json.dumps({"file": name, "size": size}) + "\n")


def run(
    jobs: Sequence[FileJob],
    destination: str,
    identity: dict[str, Any],
    *,
    latest: str | None = None,
    workers: int | None = None,
    progress: bool = False,
    check: Callable[[str], None] | None = None,
) -> Report:
    """Write every file and let the destination appear.

    identity: what this conversion is (source, target, options); an interrupted one goes on only if it is the same.
    latest: the name of the file beside the destination that is to hold its name. check: called with the finished folder
    before it gets its name; what it raises stops the conversion. DestinationError if the destination exists or cannot
    be made.
    """
    destination = os.path.abspath(destination)
    partial = f"{destination}.partial"
    if os.path.lexists(destination):
        raise DestinationError(f"{destination} exists already: remove it, or name another destination")
    journal = _open_journal(partial, identity)
    todo = [j for j in jobs if not _is_done(partial, j.name, journal)]
    resumed = len(jobs) - len(todo)
    total = sum(j.nbytes for j in jobs)
    with tqdm(total=total or None, unit="B", unit_scale=True, disable=not progress, desc="writing") as bar:
        bar.update(sum(j.nbytes for j in jobs) - sum(j.nbytes for j in todo))

        def one(job: FileJob) -> int:
            path = os.path.join(partial, job.name)
            os.makedirs(os.path.dirname(path), exist_ok=True)
            temporary = f"{path}.tmp"
            written = job.write(temporary)
            with open(temporary, "rb") as f:
                os.fsync(f.fileno())
            os.replace(temporary, path)
            journal.finished(job.name, os.path.getsize(path))
            bar.update(job.nbytes)
            return written

        written = _run_all(one, todo, workers or min(4, os.cpu_count() or 1))
    if check is not None:
        check(partial)
    _finish(partial, destination, latest)
    return Report(destination, len(jobs), resumed, written)


def _run_all(one: Callable[[FileJob], int], jobs: Iterable[FileJob], workers: int) -> int:
    """Run the jobs on threads (copying, checksums and writing release the interpreter); the first failure stops the
    rest."""
    with ThreadPoolExecutor(workers) as pool:
        futures = [pool.submit(one, job) for job in jobs]
        done, pending = wait(futures, return_when=FIRST_EXCEPTION)
        for future in pending:
            future.cancel()
        return sum(f.result() for f in done)


def _open_journal(partial: str, identity: dict[str, Any]) -> _Journal:
    path = os.path.join(partial, JOURNAL)
    said = json.dumps(identity, sort_keys=True, default=str)
    if os.path.isdir(partial):
        try:
            with open(path) as f:
                lines = f.read().splitlines()
            same = bool(lines) and lines[0] == said
        except OSError:
            lines, same = [], False
        if not same:
            raise DestinationError(
                f"{partial} is left from another conversion: remove it, or repeat that conversion to finish it"
            )
        done = {}
        for line in lines[1:]:
            try:
                entry = json.loads(line)
            except ValueError:  # the line that was being written when the run was killed
                continue
            done[entry["file"]] = entry["size"]
        return _Journal(path, identity, done)
    try:
        os.makedirs(partial)
        with open(path, "w") as f:
            f.write(said + "\n")
    except OSError as e:
        raise DestinationError(f"{partial} cannot be made: {e.strerror}") from None
    return _Journal(path, identity)


def _is_done(partial: str, name: str, journal: _Journal) -> bool:
    path = os.path.join(partial, name)
    return os.path.isfile(path) and journal.done.get(name) == os.path.getsize(path)


def _finish(partial: str, destination: str, latest: str | None) -> None:
    os.remove(os.path.join(partial, JOURNAL))
    for folder, _, files in os.walk(partial):
        for name in files:
            if name.endswith(".tmp"):
                os.remove(os.path.join(folder, name))
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


def discard(destination: str) -> None:
    """Remove what an interrupted conversion to that destination left."""
    shutil.rmtree(f"{os.path.abspath(destination)}.partial", ignore_errors=True)
