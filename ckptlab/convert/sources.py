"""Checking what is read on its way: damaged bytes must not get a good checksum.

torch writes a CRC-32 beside every record. What is read in order, wherever it goes, is summed while it is in the cache;
sums of runs that lie side by side combine, and what of a record was read otherwise (columns, by many) or not at all
(padding) is read once more at the end.
"""

from __future__ import annotations

import os
from bisect import bisect_right, insort
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ckptlab import paths, pool
from ckptlab.errors import CheckpointError
from ckptlab.formats import checksum
from ckptlab.formats.checksum import crc32
from ckptlab.formats.torch import torchzip
from ckptlab.formats.torch.torchzip import Summed
from ckptlab.stored import add_read
from ckptlab.words import some

_STEP = 1 << 20  # bytes that are summed at a time
_SMALL = 1 << 16  # bytes of a record that is read at once: pickles, steps
_PIECE = 1 << 24  # bytes of a gap that are read by one task


class Run(NamedTuple):
    """Bytes of a file that were read one after the other, and their CRC-32; 0 of them: some from there on were read in
    another order."""

    path: str
    offset: int
    nbytes: int
    crc: int


@dataclass(frozen=True)
class Source:
    """What a conversion draws from: its files, and which tensors lie in bytes of one (file, first, end)."""

    files: tuple[str, ...] = ()
    tensors: Callable[[str, int, int], Iterable[str]] = lambda path, lo, hi: ()

    def stamp(self) -> list[tuple[str, int, int, int]]:
        """What shows that a file was changed or replaced: size, time and identity of each."""
        return paths.stamps(self.files)


NOTHING = Source()


class Seen:
    """Observes what is read (`stored.observed`), and sums it; knows the sum of what was read last, so that bytes that
    are written as they were read are summed once."""

    def __init__(self) -> None:
        self.runs: list[Run] = []
        self._last, self._crc = np.empty(0, np.uint8), 0

    def __call__(self, path: str, offset: int, view: np.ndarray | None) -> None:
        if view is None:
            self.runs.append(Run(path, offset, 0, 0))
            return
        raw = view.reshape(-1).view(np.uint8)
        crc = crc32(raw)
        self._last, self._crc = raw, crc
        last = self.runs[-1] if self.runs else None
        if last is not None and last.nbytes and last.path == path and last.offset + last.nbytes == offset:
            joined = checksum.crc32_combine(last.crc, crc, raw.size)
            self.runs[-1] = Run(path, last.offset, last.nbytes + raw.size, joined)
        elif raw.size:
            self.runs.append(Run(path, offset, raw.size, crc))

    def crc_of(self, raw: np.ndarray) -> int:
        """The CRC-32 of bytes."""
        last = self._last
        same = raw.size == last.size and raw.__array_interface__["data"] == last.__array_interface__["data"]
        return self._crc if same else crc32(raw)


class Verified:
    """Puts together what was read of each record of a source's files, and compares; of `NOTHING`, nothing.

    CheckpointError, with file, record and tensors, as soon as a record is known to be other than it was written.
    """

    def __init__(self, source: Source) -> None:
        self._source = source
        self._records: dict[str, list[Summed]] = {}
        self._starts: dict[str, list[int]] = {}
        self._runs: dict[tuple[str, int], list[tuple[int, int, int]]] = {}  # by record: first byte, bytes, CRC-32
        self._covered: dict[tuple[str, int], int] = {}
        self.nbytes = 0
        for path in source.files:
            self._records[path] = sorted(torchzip.summed(path))
            self._starts[path] = [record.offset for record in self._records[path]]
            small = [record for record in self._records[path] if record.size <= _SMALL]
            paths.ahead((path, record.offset, record.end) for record in small)
            with paths.open_binary(path) as file:
                for record in small:
                    self._compare(path, record, crc32(paths.read_at(file, record.size, record.offset)))

    @property
    def compares(self) -> bool:
        """There are checksums to compare with."""
        return any(self._records.values())

    def add(self, runs: Iterable[Run]) -> None:
        """What was read."""
        for run in runs:
            at = bisect_right(self._starts.get(run.path, []), run.offset) - 1
            if at < 0 or run.offset >= self._records[run.path][at].end or self._records[run.path][at].size <= _SMALL:
                continue  # a file without checksums, or known to be right
            record = self._records[run.path][at]
            known = self._runs.setdefault((run.path, at), [])
            place = bisect_right(known, (run.offset, 1 << 63, 0))
            before = known[place - 1] if place else (0, 0, 0)
            after = known[place][0] if place < len(known) else record.end
            inside = before[0] + before[1] <= run.offset and run.offset + run.nbytes <= after
            if not (run.nbytes and inside):  # read before
                continue
            insort(known, (run.offset, run.nbytes, run.crc))
            covered = self._covered[run.path, at] = self._covered.get((run.path, at), 0) + run.nbytes
            if covered == record.size:
                self._compare(run.path, record, checksum.combined((crc, n) for _, n, crc in known))

    def finish(self, on: pool.Workers) -> None:
        """Read what is still to be read."""
        for run in pool.run(_read, self.gaps(), on=on, ordered=False):
            self.add([run])

    def gaps(self) -> Iterator[tuple[str, int, int]]:
        """What is still to be read of records that were begun: file, first byte, bytes."""
        for (path, at), known in list(self._runs.items()):
            record = self._records[path][at]
            done = record.offset
            for start, nbytes, _ in [*known, (record.end, 0, 0)]:
                for lo in range(done, start, _PIECE):
                    yield path, lo, min(_PIECE, start - lo)
                done = start + nbytes

    def _compare(self, path: str, record: Summed, crc: int) -> None:
        self.nbytes += record.size
        if crc == record.crc:
            return
        tensors = sorted(set(self._source.tensors(path, record.offset, record.end)))
        held = f", which holds {some(tensors, 4)}" if tensors else ""
        raise CheckpointError(
            f"{path}: record {record.name!r}{held}, has other bytes than were written (CRC-32 {crc:08x}, expected "
            f"{record.crc:08x}): nothing is made of it. Copy the file again from the run's storage; --no-verify "
            f"(verify=False) takes it as it is"
        )


def _read(gap: tuple[str, int, int]) -> Run:
    path, offset, nbytes = gap
    crc = crc_of(path, offset, nbytes)
    add_read(nbytes)
    return Run(path, offset, nbytes, crc)


def crc_of(path: str, offset: int, nbytes: int) -> int:
    """The CRC-32 of some bytes of a file, as far as it has them."""
    crc, buffer = 0, bytearray(_STEP)
    if paths.is_far(path):
        for start in range(offset, offset + nbytes, _STEP):
            crc = crc32(paths.read(path, start, min(_STEP, offset + nbytes - start)), crc)
        return crc
    handle = os.open(path, os.O_RDONLY)
    try:
        with paths.naming(path):
            while nbytes and (got := os.preadv(handle, [memoryview(buffer)[: min(nbytes, _STEP)]], offset)):
                crc = crc32(memoryview(buffer)[:got], crc)
                offset, nbytes = offset + got, nbytes - got
    finally:
        os.close(handle)
    return crc


def unchanged(before: Sequence[tuple[str, int, int, int]], source: Source) -> None:
    """CheckpointError where a file of the source is not what it was."""
    for then, now in zip(before, source.stamp(), strict=True):
        if then != now:
            raise CheckpointError(
                f"{then[0]}: the file was changed or replaced while it was read: remove what was begun, and convert "
                f"again when nothing writes to it"
            )
