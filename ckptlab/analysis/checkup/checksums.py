"""The checksums that torch.save writes beside every record, and those of the manifest that a conversion leaves: a
flipped bit anywhere in a file shows.

torch's cost more than all other checks together (CRC-32 goes through some 4 GB a second on a core), and the files are
read a second time for them; hence only when asked for.
"""

from __future__ import annotations

import os
import zipfile
import zlib
from bisect import bisect
from collections.abc import Iterator, Sequence

from ckptlab import pool
from ckptlab.analysis.checkup.jobs import stored_in
from ckptlab.convert import manifest
from ckptlab.convert.journal import crc_of
from ckptlab.findings import Collecting, Finding, Where
from ckptlab.formats.checksum import crc32_combine
from ckptlab.formats.torch.torchfile import Contents
from ckptlab.pool import Workers
from ckptlab.words import number_of, some

_PIECE = 1 << 20  # bytes that are read at a time
_PART = 1 << 26  # bytes of a file that one task reads


def checksums(found: Collecting, workers: Workers = None, progress: bool = False) -> Iterator[Finding]:
    """Findings on records whose bytes are not those that were written. (Safetensors have no checksums.)"""
    names = [n for n, contents in found.files.items() if isinstance(contents, Contents)]
    paths = [os.path.join(found.folder, n) for n in names]
    with pool.progress(sum(map(os.path.getsize, paths)), "checksums", "B", progress) as bar:
        results = pool.run(_wrong, paths, on=workers, size=os.path.getsize, bar=bar)
        for name, (wrong, records) in zip(names, results, strict=True):
            if wrong:
                yield _without(name) if len(wrong) == records > 1 else _damaged(found, name, wrong)


def against_manifest(
    folder: str, data: bool, workers: Workers = None, progress: bool = False
) -> tuple[list[Finding], int]:
    """Findings on files that are not as ckptlab wrote them, where it left a manifest, and the bytes that were read.
    data: compare their bytes too, not only their sizes."""
    try:
        listed = manifest.read(folder)
    except (ValueError, OSError) as error:
        return [_no_manifest(folder, str(error))], 0
    if not listed:
        return [], 0
    sizes = {name: _size(os.path.join(folder, name)) for name in listed}
    missing = tuple(name for name, size in sizes.items() if size is None)
    other = [name for name, size in sizes.items() if size is not None and size != listed[name][0]]
    alike = [name for name, size in sizes.items() if size == listed[name][0]] if data else []
    total = sum(listed[name][0] for name in alike)
    parts = [
        (os.path.join(folder, name), lo, min(_PART, listed[name][0] - lo))
        for name in alike
        for lo in range(0, listed[name][0], _PART)
    ]
    sums: dict[str, int] = {}
    with pool.progress(total, "manifest", "B", progress) as bar:
        for (path, _, nbytes), crc in zip(
            parts, pool.run(_crc, parts, on=workers, size=lambda p: p[2], bar=bar), strict=True
        ):
            sums[path] = crc32_combine(sums.get(path, 0), crc, nbytes)
    other += [name for name in alike if sums.get(os.path.join(folder, name), 0) != listed[name][1]]
    found = [_changed(other)] if other else []
    return found + ([_lost(missing)] if missing else []), total


def _size(path: str) -> int | None:
    return os.path.getsize(path) if os.path.isfile(path) else None


def _crc(part: tuple[str, int, int]) -> int:
    return crc_of(*part)


def _changed(names: Sequence[str]) -> Finding:
    return Finding(
        "changed-file",
        "error",
        Where(files=tuple(names)),
        f"the sizes and checksums of {manifest.MANIFEST}",
        f"{number_of(len(names), 'file')} with other bytes than were written: {some(names, 4)}",
        f"convert again, or copy them again; if they were changed on purpose, remove {manifest.MANIFEST}",
    )


def _lost(names: tuple[str, ...]) -> Finding:
    return Finding(
        "missing-file",
        "error",
        Where(files=names),
        f"every file of {manifest.MANIFEST}",
        f"{some(names, 4)} {'is' if len(names) == 1 else 'are'} not there",
        f"convert or copy again; if they were removed on purpose, remove {manifest.MANIFEST}",
    )


def _no_manifest(folder: str, message: str) -> Finding:
    return Finding(
        "damaged-file",
        "warning",
        Where(files=(manifest.MANIFEST,)),
        "a manifest that can be read",
        message.replace(f"{folder}{os.sep}", ""),
        "remove it, or convert again: without it flipped bits are not found",
    )


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
            except (zipfile.BadZipFile, zlib.error, RuntimeError, NotImplementedError, ValueError, EOFError):
                wrong.append(info)  # damaged, encrypted, of a method that nobody knows
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
