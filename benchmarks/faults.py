"""Single faults, one at a time, in copies of whole checkpoints: who finds them?

`python benchmarks/faults.py FOLDER [FOLDER ...] [--foreign FOLDER FOLDER] [--flips 2] [--json FILE]`. Each FOLDER is
what `ckptlab.open` takes, small, and only read. Every fault is planted in a copy, and asked of `check` (beside what it
says of the whole one), of `check --checksums`, and of a conversion. Who gives the same bytes as without the fault is
not harmed; what is left no file tells, or should be mended. --foreign A B: files of B in the place of A's.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import struct
import sys
import tempfile
import traceback
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

import ckptlab
from ckptlab.analysis import check
from ckptlab.catalog import MASTER, PARAM
from ckptlab.convert import manifest
from ckptlab.errors import CkptlabError
from ckptlab.formats.torch import torchzip
from ckptlab.stored import Stored

TARGETS = ("deepspeed", "universal", "dcp", "safetensors")  # the first that the whole checkpoint can be written as
FINDERS = ("check", "convert", "checksums", "harmless", "nobody", "traceback")


class Fault(NamedTuple):
    """What is planted: its kind, where, and what does it to a copy of the folder."""

    kind: str
    where: str
    plant: Callable[[Path], None]


# ------------------------------------------------------------------------------------------------------ what is planted


def _flip(file: str, at: int, bit: int) -> Callable[[Path], None]:
    def plant(root: Path) -> None:
        path = root / file
        with path.open("r+b") as opened:
            opened.seek(at)
            byte = opened.read(1)[0]
            opened.seek(at)
            opened.write(bytes([byte ^ 1 << bit]))

    return plant


def _cut(file: str, size: int, zeros: int = 0) -> Callable[[Path], None]:
    def plant(root: Path) -> None:
        os.truncate(root / file, size)
        os.truncate(root / file, size + zeros)

    return plant


def _swap(a: str, b: str) -> Callable[[Path], None]:
    def plant(root: Path) -> None:
        first, second = (root / a).read_bytes(), (root / b).read_bytes()
        (root / a).write_bytes(second)
        (root / b).write_bytes(first)

    return plant


def _over(source: Path, file: str) -> Callable[[Path], None]:
    return lambda root: (root / file).write_bytes(source.read_bytes()) and None


def _another_run(file: str, tensors: list[Stored], seed: int) -> Callable[[Path], None]:
    """The file as another run of the same model would have saved it: other numbers, checksums that fit them."""

    def plant(root: Path) -> None:
        path = root / file
        data = np.fromfile(path, np.uint8)
        chance = np.random.default_rng(seed)
        for stored in tensors:
            if stored.dtype.itemsize >= 2 and stored.numel > 1 and stored.dtype.kind in "fV" and stored.contiguous:
                place = data[stored.offset : stored.offset + stored.nbytes].view(stored.dtype)
                factor = 1 + 0.1 * chance.standard_normal(place.size)
                place[:] = (place.astype(np.float32) * np.abs(factor)).astype(stored.dtype)
        data.tofile(path)
        if data[:2].tobytes() == b"PK":
            _sum_anew(path)

    return plant


def _sum_anew(path: Path) -> None:
    """Make the checksums of a zip those of its bytes."""
    from ckptlab.formats.checksum import crc32

    data = bytearray(path.read_bytes())
    for record in torchzip.summed(str(path)):
        crc = struct.pack("<I", crc32(data[record.offset : record.end]))
        at = 0
        while (at := data.find(b"PK\1\2", at)) >= 0:
            (length,) = struct.unpack_from("<H", data, at + 28)
            if data[at + 46 : at + 46 + length].decode(errors="replace").partition("/")[2] == record.name:
                data[at + 16 : at + 20] = crc
            at += 4
    path.write_bytes(data)


# ------------------------------------------------------------------------------------------------------- where it is


def _tensors(catalog: ckptlab.catalog.Catalog) -> dict[str, list[tuple[str, Stored]]]:
    """Kind (master, moment, weight) → what is stored of it."""
    found: dict[str, list[tuple[str, Stored]]] = defaultdict(list)

    def kind(state: str) -> str:
        return {MASTER: "master", PARAM: "weight"}.get(state, "moment")

    extents = catalog.stored
    for (name, state), holders in extents.pieces.items():
        for fragments in holders.values():
            found[kind(state)] += [(f"{name}: {state}", f.stored) for f in fragments if f.stored.numel > 1]
    for ((_, group, _), state), parts in extents.partitions.items():
        found[kind(state)] += [(f"group {group}: {state}", s) for held in parts.values() for s in held if s.numel > 1]
    return found


def faults(root: Path, opened: Path, flips: int, chance: random.Random) -> Iterator[Fault]:
    """Every single fault that is tried on a checkpoint; root: the folder that is copied, in which `opened` lies."""
    ckpt = ckptlab.open(opened)
    files = sorted(str(p.relative_to(root)) for p in opened.rglob("*") if p.is_file())
    files = [name for name in files if not name.endswith((".json", ".txt", "latest", ".py", "README.md"))]
    by_file: dict[str, list[Stored]] = defaultdict(list)
    swapped: set[tuple[str, str]] = set()
    for kind, held in _tensors(ckpt.catalog).items():
        for _, stored in held:
            by_file[os.path.relpath(stored.path, root)].append(stored)
        for where, bit in (("sign or exponent", 7), ("lowest bit", 0), ("some bit", None)):
            for what, stored in chance.sample(held, min(flips, len(held))):
                element = chance.randrange(stored.numel) * stored.dtype.itemsize
                at = stored.offset + element + {7: stored.dtype.itemsize - 1, 0: 0}.get(bit, 0)
                file = os.path.relpath(stored.path, root)
                flipped = chance.randrange(8) if bit is None else bit
                yield Fault(f"{kind}, {where}", f"{file}: {what}, byte {at}", _flip(file, at, flipped))
    for file in chance.sample(files, min(2 * flips, len(files))):
        yield from _in_one(root / file, file, flips, chance)
    for file in sorted(chance.sample(files, min(8 * flips, len(files)))):
        size = (root / file).stat().st_size
        yield Fault("missing", file, lambda r, f=file: (r / f).unlink())
        others = [f for f in files if f != file and Path(f).suffix == Path(file).suffix]
        same = [f for f in others if (root / f).stat().st_size == size] or others
        if same:
            other = chance.choice(same)
            if (root / other).read_bytes() != (root / file).read_bytes():
                yield Fault("doubled", f"{other} as {file}", _over(root / other, file))
                if (file, other) not in swapped:
                    swapped.add((other, file))
                    yield Fault("swapped", f"{file}, {other}", _swap(file, other))
        if by_file.get(file):
            yield Fault("another run's", file, _another_run(file, by_file[file], 0))


def _in_one(path: Path, file: str, flips: int, chance: random.Random) -> Iterator[Fault]:
    data, size = path.read_bytes(), path.stat().st_size
    spans: dict[str, tuple[int, int]] = {}
    if data[:4] == b"PK\3\4" and b"PK\5\6" in data[-(1 << 12) :]:
        records = torchzip.summed(str(path))
        pickle = next(r for r in records if r.name.endswith("data.pkl"))
        last = max(r.end for r in records)
        directory = data.find(b"PK\1\2", last)
        large = max(records, key=lambda r: r.size)
        headers = [data.rfind(b"PK\3\4", 0, r.offset) for r in (pickle, large)]
        spans = {
            "pickle": (pickle.offset, pickle.end),
            "zip's directory": (directory, data.rfind(b"PK\5\6")),
            "end of the zip's directory": (data.rfind(b"PK\5\6"), size),
            "local header": (headers[0], headers[0] + 30 + len(pickle.name)),
            "local header of a tensor": (headers[1], headers[1] + 30 + len(large.name)),
        }
    elif path.suffix == ".safetensors":
        length = struct.unpack("<Q", data[:8])[0]
        spans = {"header's length": (0, 8), "header": (8, 8 + length)}
    elif path.suffix == ".distcp" or path.name.endswith("metadata"):
        spans = {"whole file": (0, size)}
    for what, (lo, hi) in spans.items():
        for _ in range(2 * flips):
            at, bit = chance.randrange(lo, hi), chance.randrange(8)
            yield Fault(f"bit of the {what}", f"{file}, byte {at}, bit {bit}", _flip(file, at, bit))
    for kept in (0, 1, min(100, size - 1), size // 2, size - 1):
        yield Fault("cut", f"{file} to {kept} of {size}", _cut(file, kept))
    if size > 8192:
        yield Fault("tail of zeros", file, _cut(file, size - 4096, 4096))


# ------------------------------------------------------------------------------------------------------- who finds it


def _findings(folder: Path, **asked: bool) -> Counter[tuple[str, str]]:
    found = check(folder, on=1, **asked)
    return Counter((f.code, f.found.replace(str(folder), "")) for f in found.findings if f.severity != "info")


def _converted(folder: Path, out: Path, form: str) -> dict[str, tuple[int, int]] | None:
    shutil.rmtree(out, ignore_errors=True)
    shutil.rmtree(f"{out}.partial", ignore_errors=True)
    try:
        ckptlab.open(folder).reshape(format=form).save(out, on=1, sync=False)
        return manifest.read(str(out))
    finally:
        shutil.rmtree(out, ignore_errors=True)
        shutil.rmtree(f"{out}.partial", ignore_errors=True)


class Case:
    """A checkpoint, and what is said of it and made of it when it is whole."""

    def __init__(self, opened: Path, scratch: Path) -> None:
        self.root = opened if opened.is_dir() else opened.parent
        self.name = f"{self.root.parent.name}/{self.root.name}"
        self.copy, self.out = scratch / "run" / self.root.name, scratch / "out"
        self.restore()
        self.plain, self.summed = _findings(self.copy), _findings(self.copy, checksums=True)
        self.forms: dict[str, dict[str, tuple[int, int]] | None] = {}
        for form in TARGETS:
            try:
                self.forms[form] = _converted(self.copy, self.out, form)
                break
            except CkptlabError:
                continue

    def restore(self) -> None:
        shutil.rmtree(self.copy, ignore_errors=True)
        shutil.copytree(self.root, self.copy)

    def finder(self, fault: Fault) -> tuple[str, str]:
        """Who finds it (`FINDERS`), and what is said."""
        fault.plant(self.copy)
        harmless = bool(self.forms)
        try:
            try:
                if more := _findings(self.copy) - self.plain:
                    return "check", str(next(iter(more)))
            except CkptlabError as error:
                return "check", str(error)
            said = ""
            for form, truth in self.forms.items():
                try:
                    harmless &= _converted(self.copy, self.out, form) == truth
                except CkptlabError as error:
                    said = str(error)
            if said:
                return "convert", said
            if more := _findings(self.copy, checksums=True) - self.summed:
                return "checksums", str(next(iter(more)))
            return ("harmless" if harmless else "nobody"), ""
        except Exception:
            return "traceback", traceback.format_exc()
        finally:
            self.restore()


def _foreign(a: Path, b: Path) -> Iterator[Fault]:
    for path in sorted(p for p in a.rglob("*") if p.is_file() and (b / p.relative_to(a)).is_file()):
        file = str(path.relative_to(a))
        if (b / file).read_bytes() != path.read_bytes():
            yield Fault("another step's or run's, real", f"{file} of {b}", _over(b / file, file))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", type=Path)
    parser.add_argument("--foreign", nargs=2, action="append", type=Path, default=[])
    parser.add_argument("--flips", type=int, default=2, help="bits that are flipped in each part of a file")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="where each fault is to be listed")
    options = parser.parse_args(arguments)
    table: dict[str, Counter[str]] = defaultdict(Counter)
    lines = []
    work = [(folder, None) for folder in options.folders] + [tuple(pair) for pair in options.foreign]
    for folder, other in work:
        with tempfile.TemporaryDirectory() as scratch:
            case = Case(folder.resolve(), Path(scratch))
            print(
                f"# {case.name}: {sum(case.plain.values())} findings when whole, written as {list(case.forms)}",
                file=sys.stderr,
            )
            planned = list(
                _foreign(case.root, other.resolve())
                if other
                else faults(case.root, case.root, options.flips, random.Random(f"{options.seed} {case.name}"))
            )
            for fault in planned:
                finder, said = case.finder(fault)
                table[fault.kind][finder] += 1
                lines.append(
                    {"checkpoint": case.name, "kind": fault.kind, "where": fault.where, "finder": finder, "said": said}
                )
                if finder in ("nobody", "traceback"):
                    print(f"{finder}: {case.name}: {fault.kind}: {fault.where}\n{said}", flush=True)
    print(f"| fault | planted | {' | '.join(FINDERS)} |\n|{'---|' * (len(FINDERS) + 2)}")
    for kind, counts in [*table.items(), ("all", sum(table.values(), Counter()))]:
        print(f"| {kind} | {counts.total()} | {' | '.join(str(counts[f] or '') for f in FINDERS)} |")
    if options.json:
        options.json.write_text(json.dumps(lines, indent=1))


if __name__ == "__main__":
    main()
