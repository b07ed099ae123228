"""Carrying out file plans towards a URL: each file is drawn into a temporary one of this machine, which is needed since
checksums stand before what they cover, and goes up from there.

A marker goes up first and is removed last; as long as it is there, ckptlab takes the destination for none. On threads
of this process nothing else is visible until all is up: the uploads are completed together, at the end, where the store
can hold them back. Workers elsewhere complete each file themselves. A failure removes what went up.
"""

from __future__ import annotations

import os
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

from ckptlab import far, paths, pool
from ckptlab.convert import manifest
from ckptlab.convert.journal import JOURNAL, Done, crc_of, first_line
from ckptlab.convert.sources import Run, Seen, Source, Verified, unchanged
from ckptlab.errors import CheckpointError, DestinationError
from ckptlab.formats import fileplan
from ckptlab.formats.checksum import crc32
from ckptlab.formats.fileplan import FilePlan
from ckptlab.stored import add_read, observed

PIECE = 16 << 20  # bytes that are drawn at a time


@dataclass(frozen=True)
class Uploaded:
    """What went up: each file's size and checksum, bytes of the source that were compared, the files beside."""

    files: Mapping[str, Done]
    verified: int
    beside: tuple[str, ...]


@dataclass
class _Uploads:
    """What is up, and what waits to be completed, of threads that share it."""

    held: list[tuple[str, far.Upload]] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def hold(self, path: str, upload: far.Upload) -> None:
        with self.lock:
            self.held.append((path, upload))

    def complete(self, last: Callable[[str], bool]) -> None:
        """Complete them, the last ones last."""
        self.held.sort(key=lambda one: last(one[0]))
        while self.held:
            self.held[0][1].commit()
            self.held.pop(0)

    def discard(self) -> None:
        for _, upload in self.held:
            with suppress(Exception):  # what cannot be discarded was never visible
                upload.discard()


class _Result(NamedTuple):
    name: str
    done: Done
    runs: list[Run]


def run(
    plans: Sequence[FilePlan],
    destination: str,
    identity: Mapping[str, Any],
    *,
    latest: str | None,
    on: pool.Workers,
    progress: bool,
    check: Callable[[str], None] | None,
    source: Source | None,
    verify: bool,
    beside: Sequence[str],
) -> Uploaded:
    """Write every file and let the destination appear. See `execute.run`; DestinationError if it exists already."""
    marker, said = f"{destination}/{JOURNAL}", first_line(identity)
    if paths.exists(destination) and not (paths.is_file(marker) and paths.text(marker) == said):
        raise DestinationError(f"{destination} exists already: remove it, or name another destination")
    uploads = _Uploads()
    targets = {plan.name: f"{destination}/{plan.name}" for plan in plans}
    up = [marker]
    try:
        _begin(marker, said, destination)
        stamp = source.stamp() if source is not None else []
        verified = Verified(source) if source is not None and verify else None
        elsewhere = isinstance(pool.executor_of(on), Executor)
        work = partial(_upload, verify=verified is not None, uploads=None if elsewhere else uploads)
        done: dict[str, Done] = {}
        up += targets.values() if elsewhere else ()
        ordered = sorted(plans, key=lambda plan: plan.nbytes == 0)
        with pool.progress(sum(plan.size for plan in plans), "writing", "B", progress) as bar:
            tasks = ((plan, targets[plan.name]) for plan in ordered)
            for result in pool.run(work, tasks, on=on, size=lambda task: task[0].size, bar=bar, ordered=False):
                done[result.name] = result.done
                if verified is not None:
                    verified.add(result.runs)
        if verified is not None:
            for gap in pool.run(_sum, verified.gaps(), on=on, ordered=False):
                verified.add([gap])
        if source is not None:
            unchanged(stamp, source)
        up += targets.values()
        indices = {targets[plan.name] for plan in plans if plan.nbytes == 0}
        uploads.complete(lambda path: path in indices)
        _arrived(destination, plans)
        if check is not None:
            check(destination)
        up.append(f"{destination}/{manifest.MANIFEST}")
        far.write(up[-1], manifest.text({name: one[:2] for name, one in done.items()}).encode())
    except BaseException:
        uploads.discard()
        for path in up:
            with suppress(OSError):  # the first error is the one to be told
                far.remove([path])
        raise
    parent = paths.parent(destination)
    copied = copy_beside(beside, parent)
    if latest is not None and parent != destination:
        far.write(f"{parent}/{latest}", os.path.basename(destination).encode())
    far.remove([marker])
    return Uploaded(done, verified.nbytes if verified else 0, copied)


def _begin(marker: str, said: str, destination: str) -> None:
    try:
        far.write(marker, said.encode())
    except OSError as error:
        raise DestinationError(f"{destination} cannot be written: {error.strerror}") from error


def copy_beside(files: Iterable[str], folder: str) -> tuple[str, ...]:
    """Copy files into a far folder, each under its own name, where nothing has that name; returns the names."""
    copied = []
    for file in files:
        path = f"{folder}/{os.path.basename(file)}"
        if not paths.exists(path):
            paths.copy(file, path)
            copied.append(os.path.basename(file))
    return tuple(copied)


def _upload(task: tuple[FilePlan, str], verify: bool, uploads: _Uploads | None) -> _Result:
    """Draw a file and send it up. uploads: takes it, to be completed later; None: it is complete at once."""
    plan, target = task
    seen = Seen()
    with tempfile.TemporaryDirectory(prefix="ckptlab-") as folder:
        path = os.path.join(folder, "file")
        with observed(seen) if verify else nullcontext():
            found = [one.write(seen.crc_of if verify else crc32) for one in plan.pieces(path, PIECE)]
        crc = fileplan.seal(path, plan, [s for one in found for s in one.sums])
        if uploads is None:
            paths.copy(path, target)
        else:
            upload = far.Upload(target)
            uploads.hold(target, upload)
            upload.send(path)
    odd = sum((one.odd for one in found), Counter[str]())
    return _Result(plan.name, Done(plan.size, crc, dict(odd)), seen.runs)


def _arrived(destination: str, plans: Sequence[FilePlan]) -> None:
    """CheckpointError where a file is not there, or not as long as it was planned."""
    far.list_below(paths.absolute(destination))
    for plan in plans:
        path = f"{destination}/{plan.name}"
        size = paths.size(path) if paths.is_file(path) else None
        if size != plan.size:
            there = "is not there" if size is None else f"has {size:,} bytes"
            raise CheckpointError(f"{path} went up with {plan.size:,} bytes and {there}: repeat the command")


def _sum(gap: tuple[str, int, int]) -> Run:
    path, offset, nbytes = gap
    crc = crc_of(path, offset, nbytes)
    add_read(nbytes)
    return Run(path, offset, nbytes, crc)
