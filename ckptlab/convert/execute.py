"""Carrying out file plans: in `DESTINATION.partial` beside the destination, piece by piece by whatever workers there
are, each file under a temporary name until it is complete. When all are done the folder is renamed.
"""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from functools import partial as with_arguments
from typing import Any

from ckptlab import paths, pool
from ckptlab.convert import disk, manifest, names
from ckptlab.convert.journal import JOURNAL, TEMPORARY, Done, Journal, finished
from ckptlab.convert.report import Report, not_finite
from ckptlab.convert.sources import NOTHING, Run, Seen, Source, Verified, unchanged
from ckptlab.errors import DestinationError
from ckptlab.formats import fileplan
from ckptlab.formats.fileplan import FilePlan, Piece, Sum, Written
from ckptlab.stored import observed

PIECE = 16 << 20  # bytes that a worker writes for one task: of one file, or of several small ones


def run(
    plans: Sequence[FilePlan],
    destination: str,
    identity: dict[str, Any],
    *,
    latest: str | None = None,
    on: pool.Workers = None,
    progress: bool = False,
    check: Callable[[str], None] | None = None,
    source: Source = NOTHING,
    verify: bool = True,
    sync: bool = True,
    beside: Sequence[str] = (),
) -> Report:
    """Write every file and let the destination appear.

    identity: what this conversion is (source, target, options); an interrupted one goes on only if it is the same.
    latest: the name of the file beside the destination that is to hold its name. on: see `pool.run`; processes
    must see the same folders. check: called with the finished folder before it gets its name; what it raises stops the
    conversion. source: what is read; verify: compare it with the checksums that it carries. sync: wait until all is on
    the disk. beside: files to be copied beside the destination; those that are there stay. DestinationError if the
    destination exists, cannot be made, or has no room.
    """
    destination = paths.absolute(destination)
    if paths.is_far(destination):
        from ckptlab.convert import upload

        return upload.run(plans, destination, identity, latest, on, progress, check, source, verify, beside)
    partial = f"{destination}.partial"
    pointer = latest and os.path.join(os.path.dirname(destination), latest)
    if os.path.lexists(destination):
        if not finished(destination, identity):
            raise DestinationError(f"{destination} exists already: remove it, or name another destination")
        _appear(destination, latest, sync)
        return Report(destination, pointer, len(plans), len(plans), 0)
    names.checked((plan.name for plan in plans), destination)
    journal = Journal(partial, identity)
    with journal.file:
        stamp, verified = source.stamp(), Verified(source if verify else NOTHING)
        todo = [plan for plan in plans if plan.name not in journal.files]
        resumed = len(plans) - len(todo)
        with pool.progress(sum(plan.size for plan in plans), "writing", "B", progress) as bar:
            _write_files(journal, todo, on, bar, verified, sync)
        verified.finish(on)
        unchanged(stamp, source)
        if check is not None:
            check(partial)
        done = journal.files
        manifest.write(partial, {plan.name: done[plan.name][:2] for plan in plans})
        if sync:
            folders = [folder for folder, _, _ in os.walk(partial)]
            files = [os.path.join(partial, name) for name in (*(plan.name for plan in plans), manifest.MANIFEST)]
            disk.sync([*files, *folders])
        copied = _copied(beside, os.path.dirname(destination))
        for plan in plans:  # a worker that was taken for dead may have written a piece once more
            with suppress(FileNotFoundError):
                os.remove(os.path.join(partial, plan.name) + TEMPORARY)
        os.rename(partial, destination)
        _appear(destination, latest, sync)
    odd, written = not_finite(done[plan.name] for plan in plans), sum(plan.nbytes for plan in todo)
    return Report(destination, pointer, len(plans), resumed, written, verified.nbytes, odd, copied)


def _copied(files: Iterable[str], folder: str) -> tuple[str, ...]:
    """Copy files into a folder, each under its own name, where nothing has that name; returns the names."""
    copied = []
    for file in files:
        path = os.path.join(folder, os.path.basename(file))
        if not os.path.lexists(path):
            paths.copy(file, path + TEMPORARY)
            os.replace(path + TEMPORARY, path)
            copied.append(os.path.basename(file))
    return tuple(copied)


def _write_files(
    journal: Journal, plans: Sequence[FilePlan], on: pool.Workers, bar: Any, verified: Verified, sync: bool
) -> None:
    """Write what is not written yet of some files; each gets its name when it is complete."""
    by_path = {os.path.join(journal.partial, plan.name) + TEMPORARY: plan for plan in plans}
    for folder in {os.path.dirname(path) for path in by_path}:
        os.makedirs(folder, exist_ok=True)
    begun = {path for path, plan in by_path.items() if os.path.isfile(path) and os.path.getsize(path) == plan.size}
    disk.room(journal.partial, ((path, plan.size) for path, plan in by_path.items()))
    verified.add(journal.reads)
    sums: defaultdict[str, list[Sum]] = defaultdict(list)
    odd: defaultdict[str, Counter[str]] = defaultdict(Counter)
    arrived: Counter[str] = Counter()

    def arrive(path: str, nbytes: int, found: Written) -> None:
        plan = by_path[path]
        sums[path] += found.sums
        odd[path].update(found.odd)
        arrived[path] += nbytes
        if bar is not None:
            bar.update(nbytes)
        if arrived[path] == plan.size:
            crc = fileplan.seal(path, plan, sums.pop(path))
            os.replace(path, path.removesuffix(TEMPORARY))
            journal.complete(plan.name, Done(plan.size, crc, dict(odd.pop(path))))

    def left() -> Iterator[Piece]:
        for path, plan in by_path.items():
            for piece in plan.pieces(path, PIECE):
                nbytes, found = journal.pieces.get((plan.name, piece.offset), (-1, Written()))
                if path in begun and nbytes == piece.nbytes:
                    arrive(path, nbytes, found)
                else:
                    yield piece

    work = with_arguments(_write, verify=verified.compares, sync=sync)
    for results, error in pool.run(work, _batches(left()), on=on, ordered=False):
        for path, offset, nbytes, found, runs in results:
            verified.add(runs)
            journal.piece(by_path[path].name, offset, nbytes, found, runs)
            arrive(path, nbytes, found)
        if error is not None:
            raise error


def _batches(pieces: Iterable[Piece]) -> Iterator[tuple[Piece, ...]]:
    """Small pieces together, as many as have `PIECE` bytes."""
    held: list[Piece] = []
    size = 0
    for piece in pieces:
        if held and size + piece.nbytes > PIECE:
            yield tuple(held)
            held, size = [], 0
        held.append(piece)
        size += piece.nbytes
    if held:
        yield tuple(held)


_Result = tuple[str, int, int, Written, list[Run]]


def _write(pieces: tuple[Piece, ...], verify: bool, sync: bool) -> tuple[list[_Result], Exception | None]:
    """Write pieces: for each its file, place and bytes, what was found, and what was read for it; and the error that
    the next one ended in."""
    results: list[_Result] = []
    for piece in pieces:
        seen = Seen()
        try:
            if verify:
                with observed(seen):
                    found = piece.write(seen.crc_of)
            else:
                found = piece.write()
        except Exception as error:
            return results, error
        if sync:
            disk.start_writing(piece.path, piece.offset, piece.nbytes)
        results.append((piece.path, piece.offset, piece.nbytes, found, seen.runs))
    return results, None


def _appear(destination: str, latest: str | None, sync: bool) -> None:
    """What follows when a destination has its name: the pointer beside it. The journal goes last, so that whoever is
    interrupted in between can finish."""
    parent = os.path.dirname(destination)
    if latest is not None:
        temporary = os.path.join(parent, f".{latest}.tmp")
        with open(temporary, "w") as f:
            f.write(os.path.basename(destination))
            f.flush()
            if sync:
                os.fsync(f.fileno())
        os.replace(temporary, os.path.join(parent, latest))
    os.remove(os.path.join(destination, JOURNAL))
    if sync:
        disk.sync([parent, destination])
