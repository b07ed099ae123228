"""From files to files: a destination appears whole or not at all, and an interrupted conversion goes on where it
stopped.

A writer gives `FileJob`s. They are run into `DESTINATION.partial` beside the destination, each file under a temporary
name until it is complete; a journal there says what the conversion is. When all are done the folder is synced and
renamed.
"""

from __future__ import annotations

import fcntl
import json
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ckptlab.errors import DestinationError
from ckptlab.formats.job import FileJob

JOURNAL = "ckptlab-journal.json"


@dataclass(frozen=True)
class Report:
    """What a conversion did: `files` of the destination, those `resumed` from an interrupted run, bytes of tensor data,
    and the pointer beside the destination that names it (None: none was written)."""

    destination: str
    latest: str | None
    files: int
    resumed: int
    bytes_written: int


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
        self.lock = threading.Lock()
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
        with self.lock:
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
    from tqdm.auto import tqdm  # slow to import

    destination = os.path.abspath(destination)
    partial = f"{destination}.partial"
    if os.path.lexists(destination):
        raise DestinationError(f"{destination} exists already: remove it, or name another destination")
    journal = _Journal(partial, identity)
    with journal.file:
        todo = [j for j in jobs if not journal.has(partial, j.name)]
        total, left = (sum(j.nbytes for j in some) for some in (jobs, todo))
        with tqdm(total=total or None, unit="B", unit_scale=True, disable=not progress, desc="writing") as bar:
            bar.update(total - left)

            def one(job: FileJob) -> None:
                path = os.path.join(partial, job.name)
                os.makedirs(os.path.dirname(path), exist_ok=True)
                temporary = f"{path}.tmp"
                job.write(temporary)
                with open(temporary, "rb") as f:
                    os.fsync(f.fileno())
                os.replace(temporary, path)
                journal.finished(job.name, os.path.getsize(path))
                bar.update(job.nbytes)

            _run_all(one, todo, workers or min(4, os.cpu_count() or 1))
        if check is not None:
            check(partial)
        _finish(partial, destination, latest)
    pointer = latest and os.path.join(os.path.dirname(destination), latest)
    return Report(destination, pointer, len(jobs), len(jobs) - len(todo), left)


def _run_all(one: Callable[[FileJob], None], jobs: Iterable[FileJob], workers: int) -> None:
    """Run the jobs on threads (copying, checksums and writing release the interpreter); the first failure, or an
    interrupt, stops those that have not begun."""
    with ThreadPoolExecutor(workers) as pool:
        futures = [pool.submit(one, job) for job in jobs]
        try:
            for future in as_completed(futures):
                future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


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
