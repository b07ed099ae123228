"""A folder of DCP's files: `.metadata` and the files that it names, seen to be there and long enough."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator

import numpy as np

from ckptlab import paths
from ckptlab.formats.dcp.boxes import Boxes
from ckptlab.formats.dcp.items import ZIP, EntryItems
from ckptlab.formats.dcp.marks import DATA, METADATA, OF_RANK
from ckptlab.formats.dcp.metadata import Entry, Metadata, read_metadata
from ckptlab.formats.dcp.said import Said
from ckptlab.stored import Stored
from ckptlab.words import some

_SMALL = 1 << 14  # bytes of an item that is fetched along with others, of far files
_SLACK = 60  # seconds for which a copy, or a file system's clock, may put files in another order


def metadata_files(names: frozenset[str] | set[str]) -> list[str]:
    """Which files of a folder say what is in it: `.metadata`, else one of each rank, in their order."""
    if METADATA in names:
        return [METADATA]
    ranks = sorted((int(match[1]), name) for name in names if (match := OF_RANK.fullmatch(name)))
    return [name for _, name in ranks]


def read_folder(folder: str, said: Said) -> Metadata:
    """What `.metadata` says of a folder, and whether its files are there. What is wrong is said."""
    names = set(paths.names(folder))
    metadata = read_metadata(folder, metadata_files(names))
    if METADATA not in names:
        _all_ranks(folder, names, said)
    if metadata.lost:
        said.error(
            "dcp-no-place",
            f"{folder}: .metadata does not say where {some(metadata.lost)} lies: it is cut or forged; copy it again",
        )
    ends = _ends(metadata)
    for i, name in enumerate(metadata.files):
        path = os.path.join(folder, name)
        if not paths.is_file(path):
            said.error("dcp-missing-file", f"{path}: missing: .metadata says that {_first_in(metadata, i)} lies in it")
            continue
        size = paths.size(path)
        if size < ends[i]:
            said.error(
                "dcp-short-file",
                f"{path}: has {size:,} bytes, .metadata says that its items end at byte {ends[i]:,}: it was cut, or "
                "is of another save; copy it again",
            )
        elif size > ends[i] and METADATA in names and paths.read(path, 0, 4) == ZIP and DATA.fullmatch(name):
            said.remark(
                "dcp-longer-file",
                f"{path}: has {size - ends[i]:,} bytes behind the last item that .metadata knows: the file may be of "
                "another save than .metadata",
            )
    others = (name for name in names - set(metadata.files) if DATA.fullmatch(name))
    strangers = sorted(name for name in others if paths.size(os.path.join(folder, name)))
    if strangers:
        said.remark(
            "dcp-extra-file", f"{folder}: {some(strangers)} hold nothing that .metadata names: left from another save"
        )
    paths.ahead(_small(metadata))
    _times(metadata, names, said)
    return metadata


def _small(metadata: Metadata) -> Iterator[paths.Range]:
    """Where what is read at once lies: objects, and tensors of one element."""
    for blob in metadata.blobs.values():
        if blob.length <= _SMALL:
            yield metadata.path(blob.file), blob.offset, blob.offset + blob.length
    for entry in metadata.tensors.values():
        if entry.shape == () and len(entry.file):
            start = int(entry.offset[0])
            yield metadata.path(int(entry.file[0])), start, start + min(int(entry.length[0]), _SMALL)


def boxes_of(metadata: Metadata, entry: Entry) -> Boxes:
    """The chunks of an entry."""
    ranks = metadata.ranks[entry.file] if len(entry.file) else entry.file
    return Boxes(entry.shape, entry.dtype, entry.starts, entry.sizes, ranks, EntryItems(metadata, entry))


def chunks_of(metadata: Metadata, entry: Entry) -> tuple[Stored, ...]:
    """The chunks of an entry as they lie, in the order of where they begin."""
    return tuple(map(EntryItems(metadata, entry), range(len(entry.starts))))


def _times(metadata: Metadata, names: set[str], said: Said) -> None:
    """What says where items lie is written last. (Of far files nobody tells when they were.)"""
    if paths.is_far(metadata.folder):
        return
    there = [name for name in metadata.files if os.path.isfile(os.path.join(metadata.folder, name))]
    written = max(os.stat(os.path.join(metadata.folder, name)).st_mtime for name in metadata_files(names))
    later = {name: os.stat(os.path.join(metadata.folder, name)).st_mtime - written for name in there}
    newer = sorted(name for name, seconds in later.items() if seconds > _SLACK)
    if newer:
        said.remark(
            "dcp-older-metadata",
            f"{metadata.folder}: .metadata, which is written last, is older than {some(newer)}, by "
            f"{max(later.values()):,.0f} seconds: another save into this folder did not end, unless the files "
            "were copied in this order",
        )


def _all_ranks(folder: str, names: set[str], said: Said) -> None:
    ranks = {int(match[1]) for name in names if (match := OF_RANK.fullmatch(name))}
    written = {int(match[1]) for name in names if (match := DATA.fullmatch(name))}
    gaps = (rank for rank in range(max(ranks)) if rank not in ranks)
    missing = [*map(str, sorted({*written - ranks, *itertools.islice(gaps, 8)}))]
    if missing:
        said.error(
            "dcp-missing-file",
            f"{folder}: the metadata of {'rank' if len(missing) == 1 else 'ranks'} {some(missing)} is missing "
            f"(__{missing[0]}.metadata): what they stored cannot be found; copy it again",
        )


def _ends(metadata: Metadata) -> list[int]:
    """Where the last item of each file ends."""
    ends = np.zeros(len(metadata.files), np.int64)
    for entry in metadata.tensors.values():
        np.maximum.at(ends, entry.file, entry.offset + entry.length)
    for blob in metadata.blobs.values():
        ends[blob.file] = max(ends[blob.file], blob.offset + blob.length)
    return [int(n) for n in ends]


def _first_in(metadata: Metadata, file: int) -> str:
    for entry in metadata.tensors.values():
        if file in entry.file:
            return entry.key
    return next((blob.key for blob in metadata.blobs.values() if blob.file == file), "nothing")
