"""Carrying out file plans towards a URL: each file is drawn into a temporary one of this machine, which is needed since
checksums stand before what they cover, and goes up from there.

A marker goes up first and is removed last; as long as it is there, ckptlab takes the destination for none. On threads
of this process nothing else is visible until all is up: the uploads are completed together, at the end, where the store
can hold them back. Workers elsewhere complete each file themselves. The marker is a journal too: it says which files
were sent, so that a repeated command goes on where a killed one, or a lost connection, stopped. Any other failure
removes what went up.
"""

from __future__ import annotations

import json
import os
import tempfile
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

from ckptlab import far, paths, pool
from ckptlab.convert import manifest, names, parts
from ckptlab.convert.journal import JOURNAL, Done, first_line
from ckptlab.convert.parts import Receipt, Upload
from ckptlab.convert.report import Report, not_finite
from ckptlab.convert.sources import NOTHING, Run, Seen, Source, Verified, unchanged
from ckptlab.errors import CheckpointError, DestinationError
from ckptlab.formats import fileplan
from ckptlab.formats.checksum import crc32
from ckptlab.formats.fileplan import FilePlan
from ckptlab.stored import observed

PIECE = 16 << 20  # bytes that are drawn at a time
EVERY = 5.0  # seconds between two writings of the journal: what is sent after the last one is sent again


@dataclass
class _Uploads:
    """What is up, and what waits to be completed, of threads that share it."""

    held: list[tuple[str, Upload]] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def hold(self, path: str, upload: Upload) -> None:
        with self.lock:
            self.held.append((path, upload))

    def complete(self, last: Callable[[str], bool]) -> None:
        """Complete them, the last ones last."""
        self.held.sort(key=lambda one: last(one[0]))
        while self.held:
            self.held[0][1].commit()
            self.held.pop(0)

    def discard(self, kept: Collection[str] = ()) -> None:
        """Discard all but those of some paths."""
        for path, upload in self.held:
            if path not in kept:
                with suppress(Exception):  # what cannot be discarded was never visible
                    upload.discard()


class _Sent(NamedTuple):
    """A file that is up. receipt: what completes it; None of one that is complete."""

    name: str
    done: Done
    runs: list[Run]
    receipt: Receipt | None


class _Journal:
    """The marker of a destination: what the conversion is, who writes it, and which files were sent."""

    def __init__(self, marker: str, said: str) -> None:
        self._marker, self._by, self._written = marker, uuid.uuid4().hex, time.monotonic()
        self._lines = [said]
        self.told: set[str] = set()  # names of files that it says were sent
        self._new: set[str] = set()
        self.sent: dict[str, _Sent] = {}

    def goes_on(self) -> bool:
        """Whether the destination holds what an interrupted run of the same conversion left; takes it over."""
        lines = paths.text(self._marker).split("\n") if paths.is_file(self._marker) else [""]
        if lines[0] != self._lines[0]:
            return False
        self._lines += lines[2:]
        for line in lines[2:]:
            name, done, runs, receipt = json.loads(line)
            sent = _Sent(name, Done(*done), [Run(*run) for run in runs], receipt and Receipt(*receipt))
            self.sent[sent.name] = sent
        self.told = set(self.sent)
        return True

    def take(self, sent: _Sent) -> None:
        """Note a file; written now and then."""
        self._lines.append(json.dumps(sent))
        self._new.add(sent.name)
        if time.monotonic() - self._written > EVERY:
            self.write()

    def write(self) -> None:
        """Write it. DestinationError where another process has taken the conversion over meanwhile."""
        if not self.is_mine():
            raise DestinationError(f"{self._marker}: another process has taken over this conversion")
        self.begin()

    def begin(self) -> None:
        """Write it, whoever wrote it before."""
        said, *sent = self._lines
        far.write(self._marker, "\n".join([said, json.dumps({"by": self._by}), *sent]).encode())
        self._written = time.monotonic()
        self.told |= self._new

    def is_mine(self) -> bool:
        """Whether nobody else has written it since."""
        far.changed(self._marker)
        lines = paths.text(self._marker).split("\n") if paths.is_file(self._marker) else []
        return len(lines) > 1 and self._by in lines[1]


def run(
    plans: Sequence[FilePlan],
    destination: str,
    identity: Mapping[str, Any],
    latest: str | None,
    on: pool.Workers,
    progress: bool,
    check: Callable[[str], None] | None,
    source: Source,
    verify: bool,
    beside: Sequence[str],
) -> Report:
    """Write every file and let the destination appear. See `execute.run`; DestinationError if it exists already."""
    names.checked((plan.name for plan in plans), destination)
    marker = f"{destination}/{JOURNAL}"
    journal = _Journal(marker, first_line(identity))
    if paths.exists(destination) and not journal.goes_on():
        raise DestinationError(f"{destination} exists already: remove it, or name another destination")
    _begin(journal, destination)
    uploads = _Uploads()
    targets = {plan.name: f"{destination}/{plan.name}" for plan in plans}
    up = [marker]
    try:
        stamp, verified = source.stamp(), Verified(source if verify else NOTHING)
        elsewhere = isinstance(pool.executor_of(on), Executor)
        work = partial(_upload, verify=verified.compares, uploads=None if elsewhere else uploads)
        done: dict[str, Done] = {}
        up += targets.values() if elsewhere else ()

        kept = list(_still_up(journal.sent, {plan.name: plan.size for plan in plans}, targets, uploads))
        parts.abandon(destination, {sent.receipt.upload for sent in kept if sent.receipt is not None})
        for sent in kept:
            done[sent.name] = sent.done
            verified.add(sent.runs)
        ordered = sorted((plan for plan in plans if plan.name not in done), key=lambda plan: plan.nbytes == 0)
        with pool.progress(sum(plan.size for plan in ordered), "writing", "B", progress) as bar:
            tasks = ((plan, targets[plan.name]) for plan in ordered)
            for sent in pool.run(work, tasks, on=on, size=lambda task: task[0].size, bar=bar, ordered=False):
                done[sent.name] = sent.done
                verified.add(sent.runs)
                if elsewhere or sent.receipt is not None:
                    journal.take(sent)
        verified.finish(on)
        unchanged(stamp, source)
        journal.write()
        up += targets.values()
        indices = {targets[plan.name] for plan in plans if plan.nbytes == 0}
        uploads.complete(lambda path: path in indices)
        _arrived(destination, plans)
        if check is not None:
            check(destination)
        up.append(f"{destination}/{manifest.MANIFEST}")
        far.write(up[-1], manifest.text({name: one[:2] for name, one in done.items()}).encode())
    except BaseException as error:
        stays = _stays(journal, error)
        uploads.discard({targets[name] for name in journal.told} if stays else ())
        for path in () if stays else up:
            with suppress(OSError):  # the first error is the one to be told
                far.remove([path])
        raise
    parent = paths.parent(destination)
    copied = copy_beside(beside, parent)
    if latest is not None and parent != destination:
        far.write(f"{parent}/{latest}", os.path.basename(destination).encode())
    far.remove([marker])
    pointer = latest and f"{parent}/{latest}"
    odd, written = not_finite(done.values()), sum(plan.nbytes for plan in ordered)
    return Report(destination, pointer, len(plans), len(kept), written, verified.nbytes, odd, copied)


def _begin(journal: _Journal, destination: str) -> None:
    try:
        journal.begin()
    except OSError as error:
        raise DestinationError(f"{destination} cannot be written: {error.strerror}") from error


def _stays(journal: _Journal, error: BaseException) -> bool:
    """Whether what was sent stays after an error: where it helps a repeated command, since it was a connection (or
    somebody's patience) that was lost, and where another process has it by now."""
    try:
        if not journal.is_mine():
            return True
        if isinstance(error, OSError) or not isinstance(error, Exception):
            journal.write()
            return bool(journal.told)
    except OSError:  # nothing can be removed either
        return True
    return False


def _still_up(
    sent: Mapping[str, _Sent], sizes: Mapping[str, int], targets: Mapping[str, str], uploads: _Uploads
) -> Iterator[_Sent]:
    """Those of the files that an earlier run sent that the store still has, whole; what is to be completed is held."""
    far.list_below(paths.parent(next(iter(targets.values()))))
    asked = [one for one in sent.values() if sizes.get(one.name) == one.done.size]
    with ThreadPoolExecutor(far.AT_ONCE, "ckptlab-uploads") as threads:
        found = threads.map(lambda one: _taken_up(one, targets[one.name]), asked)
        for one, upload in zip(asked, found, strict=True):
            path = targets[one.name]
            if upload is not None:
                uploads.hold(path, upload)
                yield one
            elif paths.is_file(path) and paths.size(path) == one.done.size:  # complete
                yield one


def copy_beside(files: Iterable[str], folder: str) -> tuple[str, ...]:
    """Copy files into a far folder, each under its own name, where nothing has that name; returns the names."""
    copied = []
    for file in files:
        path = f"{folder}/{os.path.basename(file)}"
        if not paths.exists(path):
            paths.copy(file, path)
            copied.append(os.path.basename(file))
    return tuple(copied)


def _taken_up(sent: _Sent, target: str) -> Upload | None:
    return None if sent.receipt is None else parts.taken_up(target, sent.receipt, sent.done.size)


def _upload(task: tuple[FilePlan, str], verify: bool, uploads: _Uploads | None) -> _Sent:
    """Draw a file and send it up. uploads: takes it, to be completed later; None: it is complete at once."""
    plan, target = task
    seen = Seen()
    receipt = None
    with tempfile.TemporaryDirectory(prefix="ckptlab-") as folder:
        path = os.path.join(folder, "file")
        with observed(seen) if verify else nullcontext():
            found = [one.write(seen.crc_of if verify else crc32) for one in plan.pieces(path, PIECE)]
        crc = fileplan.seal(path, plan, [s for one in found for s in one.sums])
        if uploads is None:
            paths.copy(path, target)
        else:
            upload = parts.begin(target)
            uploads.hold(target, upload)
            upload.send(path)
            receipt = upload.receipt
    odd = sum((one.odd for one in found), Counter[str]())
    return _Sent(plan.name, Done(plan.size, crc, dict(odd)), seen.runs, receipt)


def _arrived(destination: str, plans: Sequence[FilePlan]) -> None:
    """CheckpointError where a file is not there, or not as long as it was planned."""
    far.list_below(paths.absolute(destination))
    for plan in plans:
        path = f"{destination}/{plan.name}"
        size = paths.size(path) if paths.is_file(path) else None
        if size != plan.size:
            there = "is not there" if size is None else f"has {size:,} bytes"
            raise CheckpointError(f"{path} went up with {plan.size:,} bytes and {there}: repeat the command")
