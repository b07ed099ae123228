"""Files that lie under another's name, and bytes that are there twice: what was copied or swapped after it was saved.

torch calls the folder in a file's zip as the file was called, and writes a CRC-32 beside each storage: both are known
from headers. Bytes are compared only where size and CRC-32 are the same.
"""

from __future__ import annotations

import filecmp
import os
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from typing import NamedTuple

import numpy as np

from ckptlab import paths
from ckptlab.catalog import MASTER, PARAM, Catalog
from ckptlab.errors import CkptlabError
from ckptlab.findings import Finding, Where
from ckptlab.formats.torch.torchfile import Contents
from ckptlab.stored import Stored
from ckptlab.words import number_of, some

_NAMELESS = (".distcp", ".safetensors")
_TAIL = 1 << 12  # bytes at the end of a file, among which checksums of what is in it may stand
_FEW = 4  # elements that may be the same by chance
_NEVER_ALIKE = {MASTER, "exp_avg", "exp_avg_sq"}  # states of one tensor
_PUT_BACK = "put back the file that was saved under this name; if there is none, go back to an earlier step"


def renamed(files: Mapping[str, Contents], told: Collection[str]) -> Iterator[Finding]:
    """A finding on each file that was saved under the name of another one of them, unless something is told of it
    already."""
    for name, contents in files.items():
        saved = os.path.join(os.path.dirname(name), f"{contents.saved_as}.pt")
        if saved != name and saved in files and name not in told:
            yield Finding(
                "renamed-file",
                "error",
                Where(files=(name,)),
                "a file that was saved under its own name",
                f"{name} was saved as {os.path.basename(saved)}: it was copied over, or swapped",
                _PUT_BACK,
            )


def twins(catalog: Catalog) -> Iterator[Finding]:
    """A finding on files of many ranks' tensors, which name no rank, that are the same from the first byte to the last:
    ranks do not store alike. (Where each tensor has a file of its own, steps and what is one number throughout do.)"""
    sizes: dict[tuple[int, bytes], list[str]] = defaultdict(list)
    for name in catalog.files if len(catalog.files) > 1 and not paths.is_far(catalog.path) else ():
        path = paths.join(catalog.path, name)
        if name.endswith(_NAMELESS) and (size := paths.size(path)):
            sizes[size, paths.read(path, max(size - _TAIL, 0), min(size, _TAIL))].append(name)
    alike = {name for names in sizes.values() if len(names) > 1 for name in names}
    telling = _telling(catalog, alike) if alike else set()
    for (size, _), names in sizes.items():
        first, *others = names
        for other in others:
            if telling.issuperset((first, other)) and filecmp.cmp(
                os.path.join(catalog.path, first), os.path.join(catalog.path, other), shallow=False
            ):
                yield Finding(
                    "doubled-data",
                    "error",
                    Where(files=(first, other)),
                    "what each rank stored, in a file of its own",
                    f"{other} is {first} once more, {size:,} bytes",
                    _PUT_BACK,
                )


def _telling(catalog: Catalog, files: Collection[str]) -> set[str]:
    """Those of the files that hold elements which no other tensor has by chance."""
    of = {paths.join(catalog.path, name): name for name in files}
    found: set[str] = set()
    for by_holder in catalog.stored.pieces.values():
        for holder in by_holder:
            try:
                held = [(of[f.stored.path], f.stored) for f in by_holder[holder] if f.stored.path in of]
            except CkptlabError:  # a damaged item, of which is said where elements are read
                continue
            found |= {n for n, stored in held if n not in found and stored.numel >= _FEW and not _constant(stored)}
        if len(found) == len(of):
            break
    return found


class _Held(NamedTuple):
    """What is stored of some tensors in one state, by one holder (`of`: whose parts may follow one another)."""

    names: tuple[str, ...]
    state: str
    of: object
    stored: Stored


def doubled(catalog: Catalog, sums: Mapping[tuple[str, int], int]) -> Iterator[Finding]:
    """Findings on masters and moments of different tensors, or of different parts of one flat buffer, that have the
    same bytes, as training never leaves them. sums: the CRC-32 by file and first byte. What is the same number
    throughout is left out."""
    alike: dict[tuple[np.dtype, int, int], list[_Held]] = defaultdict(list)
    for held in _held(catalog):
        crc = sums.get((held.stored.path, held.stored.offset))
        if crc and held.stored.numel >= _FEW and held.stored.contiguous:
            alike[held.stored.dtype, held.stored.numel, crc].append(held)
    found: dict[tuple[str, str], list[str]] = {}
    for first, *others in alike.values():
        for other in others:
            if _apart(first, other) and _same(first.stored, other.stored):
                pair = os.path.basename(first.stored.path), os.path.basename(other.stored.path)
                names = sorted({*first.names[:1], *other.names[:1]})
                found.setdefault(pair, []).append(f"{first.state} of {some(names, 4)}")
    for pair, what in found.items():
        files = tuple(dict.fromkeys(pair))
        yield Finding(
            "doubled-data",
            "error",
            Where(files=files),
            "masters and moments of their own for every tensor and rank",
            f"{number_of(len(what), 'tensor')} with the bytes of another ({some(list(files), 4)}): {some(what, 4)}",
            _PUT_BACK,
        )


def _held(catalog: Catalog) -> Iterator[_Held]:
    for (name, state), by_holder in catalog.stored.pieces.items():
        if state != PARAM and name in catalog.tensors and catalog.tensors[name].group is not None:
            for holder, fragments in by_holder.items():
                yield from (_Held((name,), state, (name, holder), f.stored) for f in fragments)
    for group in catalog.flat_groups:
        for state in group.dtypes:
            for holder, partitions in catalog.stored.partitions.get((group.key, state), {}).items():
                for d, stored in enumerate(partitions):
                    names = tuple(group.names[i] for i in group.flats[holder].within(d)[:, 0].tolist())
                    yield _Held(names, state, (group.key, holder), stored)


def _apart(a: _Held, b: _Held) -> bool:
    """Whether the two are no copies of each other by right, as those of replicas and of tied tensors are."""
    if (a.stored.path, a.stored.offset) == (b.stored.path, b.stored.offset):
        return False
    if a.names == b.names and a.state != b.state and not {a.state, b.state} <= _NEVER_ALIKE:
        return False  # AMSGrad's greatest mean while it grows, ASGD's and others' averages of weights before they begin
    return a.state != b.state or a.of == b.of or not set(a.names) & set(b.names)


def _same(a: Stored, b: Stored) -> bool:
    """The same bits, and not one number throughout."""
    bits = a.flat.view(np.uint8).reshape(a.numel, -1)
    return np.array_equal(bits, b.flat.view(np.uint8).reshape(b.numel, -1)) and not _constant(a)


def _constant(stored: Stored) -> bool:
    """Whether it is one number throughout."""
    elements = np.ascontiguousarray(stored.map()).reshape(-1)
    bits = elements.view(np.uint8).reshape(stored.numel, -1)
    return not bool((bits != bits[0]).any())
