"""The checksums that torch.save writes beside every record, and those of the manifest that a conversion leaves: a
flipped bit anywhere in a file shows.

torch's cost more than all other checks together (CRC-32 goes through some 4 GB a second on a core), and the files are
read a second time for them; hence only when asked for.
"""

from __future__ import annotations

import os
from bisect import bisect
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any

from ckptlab import paths, pool
from ckptlab.analysis.checkup.jobs import stored_in
from ckptlab.catalog import Catalog
from ckptlab.convert import manifest
from ckptlab.convert.sources import crc_of
from ckptlab.errors import CheckpointError
from ckptlab.findings import Collecting, Finding, Where
from ckptlab.formats.checksum import crc32_combine
from ckptlab.formats.torch import torchzip
from ckptlab.formats.torch.torchfile import Contents
from ckptlab.formats.torch.torchzip import Summed
from ckptlab.pool import Workers
from ckptlab.words import number_of, some

_PIECE = 1 << 20  # bytes that are read at a time
_PART = 1 << 26  # bytes of a file that one task reads


_Records = tuple[str, tuple[Summed, ...]]


def checksums(
    catalog: Catalog | None, found: Collecting, on: Workers = None, progress: bool = False
) -> Iterator[Finding]:
    """Findings on records whose bytes are not those that were written: those that torch reads, and no others.
    (Safetensors have no checksums.) Of files in which a catalog's tensors lie as many zips (`.distcp`), all records."""
    names = [n for n, contents in found.files.items() if isinstance(contents, Contents)]
    files = [_records(paths.join(found.folder, n), found.files[n].value) for n in names]
    for name in (n for n in (catalog.files if catalog is not None else ()) if n not in found.files):
        path = paths.join(found.folder, name)
        if paths.is_file(path) and paths.read(path, 0, 4) == b"PK\3\4":
            names.append(name)
            files.append((path, tuple(torchzip.summed(path))))
    with pool.progress(sum(map(_bytes, files)), "checksums", "B", progress) as bar:
        results = pool.run(_wrong, files, on=on, size=_bytes, bar=bar)
        for name, (_, records), wrong in zip(names, files, results, strict=True):
            if not records or len(wrong) == len(records) > 1:
                yield _without(name)
            elif wrong:
                yield _damaged(name, wrong, tuple(_held(catalog, found, name, wrong)))


def _records(path: str, content: Any) -> _Records:
    """The records of a file that hold its pickle and the little ones beside it, and those in which tensors lie."""
    starts = sorted({stored.offset for _, stored in stored_in(content)})
    held = (r for r in torchzip.summed(path) if r.size)
    return path, tuple(r for r in held if r.size <= _PIECE or bisect(starts, r.end - 1) > bisect(starts, r.offset - 1))


def _bytes(file: _Records) -> int:
    return sum(record.size for record in file[1])


def _wrong(file: _Records) -> list[Summed]:
    """The records of a file whose checksum is not that of their bytes."""
    path, records = file
    return [record for record in records if crc_of(path, record.offset, record.size) != record.crc]


def _held(catalog: Catalog | None, found: Collecting, name: str, wrong: Sequence[Summed]) -> Iterator[str]:
    """What lies in records: keys of a file that was read, or tensors of the catalog."""
    if name in found.files:
        for key, stored in stored_in(found.files[name].value):
            if any(r.offset <= stored.offset < r.end for r in wrong):
                yield key
    elif catalog is not None:
        path = paths.join(found.folder, name)
        with suppress(CheckpointError):  # a header is damaged, so that what lies behind it cannot be told
            yield from dict.fromkeys(t for r in wrong for t in catalog.lying_in(path, r.offset, r.end))


def _damaged(name: str, wrong: Sequence[Summed], tensors: tuple[str, ...]) -> Finding:
    said = some([record.name for record in wrong], 4)
    return Finding(
        "checksum",
        "error",
        Where(files=(name,), tensors=tensors),
        "the bytes that were written, by the CRC-32 beside each record",
        f"{name}: {number_of(len(wrong), 'record')} with other bytes: {said}",
        "copy the file again from the run's storage, and look after the disk or memory that it went through",
    )


def against_manifest(folder: str, data: bool, on: Workers = None, progress: bool = False) -> tuple[list[Finding], int]:
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
            parts, pool.run(_crc, parts, on=on, size=lambda p: p[2], bar=bar), strict=True
        ):
            sums[path] = crc32_combine(sums.get(path, 0), crc, nbytes)
    other += [name for name in alike if sums.get(os.path.join(folder, name), 0) != listed[name][1]]
    found = [_changed(other)] if other else []
    return found + ([_lost(missing)] if missing else []), total


def _size(path: str) -> int | None:
    return paths.size(path) if paths.is_file(path) else None


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


def _without(name: str) -> Finding:
    return Finding(
        "no-checksums",
        "info",
        Where(files=(name,)),
        "a CRC-32 beside each record",
        f"{name}: no record fits its checksum: it was saved without (torch.serialization.set_crc32_options)",
        "nothing; damage of this file shows only where it contradicts something",
    )
