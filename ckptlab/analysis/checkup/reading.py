"""One pass over the data: windows that fit the processor's cache, read into buffers that are used again.

`pread` into a warm buffer is faster here than touching mapped pages, and holds no memory but the buffers.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Iterable
from contextlib import suppress

import numpy as np

from ckptlab import paths
from ckptlab.analysis.checkup.jobs import Row
from ckptlab.errors import CheckpointError
from ckptlab.stored import Stored, add_read

_OPEN = 32  # files that a reader keeps open


class Reader:
    """Reads elements of stored tensors into arrays of its own. For one thread: its files and buffers are used again."""

    def __init__(self) -> None:
        self._files: OrderedDict[str, int] = OrderedDict()
        self._arena = np.empty(0, np.uint8)

    def buffers(self, rows: Iterable[Row], count: int) -> list[np.ndarray]:
        """An array of `count` elements for each row, valid until the next call."""
        sizes = [-(-count * row.dtype.itemsize // 64) * 64 for row in rows]
        if self._arena.size < sum(sizes):
            self._arena = np.empty(sum(sizes), np.uint8)
        ends = np.cumsum(sizes).tolist()
        return [
            self._arena[end - size : end - size + count * row.dtype.itemsize].view(row.dtype)
            for row, size, end in zip(rows, sizes, ends, strict=True)
        ]

    def row(self, row: Row, lo: int, hi: int, out: np.ndarray) -> None:
        """Elements lo … hi-1 of a flattened shard into `out`. CheckpointError where some are not stored."""
        done = lo
        for fragment in row.fragments:
            first, last = max(lo, fragment.start), min(hi, fragment.start + fragment.count)
            if first < last:
                self.elements(fragment.stored, first - fragment.start, out[first - lo : last - lo])
                done += last - first
        if done != hi:
            raise CheckpointError(
                f"{row.state} of rank {row.rank}: of elements {lo} to {hi} only {done - lo} are stored"
            )

    def elements(self, stored: Stored, start: int, out: np.ndarray) -> None:
        """Elements from `start` on of a stored tensor, as many as `out` has."""
        if not stored.contiguous or paths.is_far(stored.path):
            for lo, piece in stored.pieces(start, start + len(out), len(out)):
                np.copyto(out[lo - start : lo - start + len(piece)], piece)
            add_read(out.nbytes)
            return
        at, raw = stored.offset + start * stored.dtype.itemsize, out.view(np.uint8)
        file, done = self._open(stored.path), 0
        while done < raw.size:
            try:
                got = os.preadv(file, [raw[done:].data], at + done)
            except OSError as error:
                raise OSError(error.errno, error.strerror, stored.path) from None
            if not got:
                raise CheckpointError(
                    f"{stored.path} ends before byte {at + raw.size}, where a tensor in it ends: it was cut since it "
                    "was opened"
                )
            done += got
        add_read(done)

    def _open(self, path: str) -> int:
        if path in self._files:
            self._files.move_to_end(path)
            return self._files[path]
        if len(self._files) >= _OPEN:
            os.close(self._files.popitem(last=False)[1])
        self._files[path] = os.open(path, os.O_RDONLY)
        return self._files[path]

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *raised: object) -> None:
        while self._files:
            with suppress(OSError):  # of a mount that is gone: what was read is told of by whoever read it
                os.close(self._files.popitem()[1])
