"""The checksums that torch.save writes beside every record: a flipped bit anywhere in a file shows.

They cost more than all other checks together (CRC-32 goes through some 4 GB a second on a core), and the files are
read a second time for them; hence only when asked for.
"""

from __future__ import annotations

import os
import zipfile
from bisect import bisect
from collections.abc import Iterator, Sequence

from ckptlab import pool
from ckptlab.analysis.checkup.jobs import stored_in
from ckptlab.findings import Collecting, Finding, Where
from ckptlab.formats.torch.torchfile import Contents
from ckptlab.pool import Workers
from ckptlab.words import number_of, some

_PIECE = 1 << 20  # bytes that are read at a time


def checksums(found: Collecting, workers: Workers = None, progress: bool = False) -> Iterator[Finding]:
    """Findings on records whose bytes are not those that were written. (Safetensors have no checksums.)"""
    names = [n for n, contents in found.files.items() if isinstance(contents, Contents)]
    paths = [os.path.join(found.folder, n) for n in names]
    with pool.progress(sum(map(os.path.getsize, paths)), "checksums", "B", progress) as bar:
        results = pool.run(_wrong, paths, on=workers, size=os.path.getsize, bar=bar)
        for name, (wrong, records) in zip(names, results, strict=True):
            if wrong:
                yield _without(name) if len(wrong) == records > 1 else _damaged(found, name, wrong)


def _wrong(path: str) -> tuple[list[zipfile.ZipInfo], int]:
    """The records of a file whose checksum is not that of their bytes, and how many records there are."""
    wrong = []
    with zipfile.ZipFile(path) as archive:
        records = [info for info in archive.infolist() if info.file_size]
        for info in records:
            try:
                with archive.open(info) as record:
                    while record.read(_PIECE):
                        pass
            except zipfile.BadZipFile:
                wrong.append(info)
    return wrong, len(records)


def _starts(found: Collecting, name: str) -> list[int]:
    with zipfile.ZipFile(os.path.join(found.folder, name)) as archive:
        return [info.header_offset for info in archive.infolist()]


def _damaged(found: Collecting, name: str, wrong: Sequence[zipfile.ZipInfo]) -> Finding:
    starts = sorted(_starts(found, name))
    hit = {info.header_offset for info in wrong}
    # a tensor lies in the last record that begins before it
    tensors = [k for k, s in stored_in(found.files[name].value) if starts[bisect(starts, s.offset) - 1] in hit]
    said = some([info.filename.partition("/")[2] for info in wrong], 4)
    return Finding(
        "checksum",
        "error",
        Where(files=(name,), tensors=tuple(tensors)),
        "the bytes that were written, by the CRC-32 beside each record",
        f"{name}: {number_of(len(wrong), 'record')} with other bytes: {said}",
        "copy the file again from the run's storage, and look after the disk or memory that it went through",
    )


def _without(name: str) -> Finding:
    return Finding(
        "no-checksums",
        "info",
        Where(files=(name,)),
        "a CRC-32 beside each record",
        f"{name}: no record fits its checksum: it was saved without (torch.serialization.set_crc32_options)",
        "nothing; damage of this file shows only where it contradicts something",
    )
