"""What is read is checked on its way, what is written can be checked later, and what is odd in it is said."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import sys
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest
import torch
from compare import GPT, ZERO2, ZERO3
from helpers.command import run
from helpers.files import held, poke

import ckptlab
from ckptlab import convert
from ckptlab.convert import execute, journal, sources
from ckptlab.errors import CheckpointError, DestinationError
from ckptlab.formats import checksum, read
from ckptlab.formats.fileplan import Elements, FilePlan
from ckptlab.formats.finite import not_finite
from ckptlab.formats.torch import torchzip


def flipped(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1 << 5
    path.write_bytes(data)


def records(path: Path) -> dict[str, tuple[int, int]]:
    """Name → first byte and bytes of every record of a `.pt` file."""
    return {record.name: (record.offset, record.size) for record in torchzip.summed(str(path))}


@pytest.mark.slow
@pytest.mark.parametrize("form", ["deepspeed --tp 4 --dp 1", "deepspeed --tp 1 --dp 3", "universal", "safetensors"])
def test_a_bit_that_flipped_in_the_source_stops_the_conversion(
    form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether a record is read straight, in boxes, in columns or in part."""
    monkeypatch.setattr(sources, "_SMALL", 16)
    source = Path(shutil.copytree(GPT, tmp_path / "run")) / "global_step3"
    stored, _ = held(read(source), "3.self_attention.dense.weight", "master", tp=1)
    file = Path(stored.path)
    name, (offset, size) = next((n, r) for n, r in records(file).items() if r[0] <= stored.offset < r[0] + r[1])
    for at in (offset, offset + size // 2, offset + size - 1):
        flipped(file, at)
        result = run("convert", source, tmp_path / "out", "--to", *form.split())
        assert result.exit_code == 2, (at, size)
        assert f"{file}: record '{name}', which holds " in result.stderr
        assert not (tmp_path / "out").exists()
        shutil.rmtree(tmp_path / "out.partial", ignore_errors=True)
        flipped(file, at)
    assert run("convert", source, tmp_path / "out", "--to", *form.split()).exit_code == 0


def test_a_damaged_file_is_taken_as_it_is_where_one_says_so(tmp_path: Path) -> None:
    source = Path(shutil.copytree(ZERO3, tmp_path / "run")) / "global_step3"
    file = next(source.glob("*optim_states.pt"))
    offset, size = max(records(file).values(), key=lambda r: r[1])
    flipped(file, offset + size // 2)
    reshaped = ckptlab.open(source).reshape()
    with pytest.raises(CheckpointError, match="has other bytes than were written"):
        reshaped.save(tmp_path / "out")
    assert reshaped.save(tmp_path / "again", verify=False).verified == 0


def test_a_source_without_checksums_is_read(tmp_path: Path) -> None:
    source = Path(shutil.copytree(ZERO2, tmp_path / "run")) / "global_step3"
    torch.serialization.set_crc32_options(False)
    try:
        for file in source.glob("*.pt"):
            torch.save(torch.load(file, weights_only=False), file)
    finally:
        torch.serialization.set_crc32_options(True)
    assert ckptlab.open(source).reshape(dp=3).save(tmp_path / "out").verified == 0


@pytest.mark.parametrize("form", ["deepspeed", "universal", "safetensors"])
def test_the_manifest_is_that_of_the_files(form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(execute, "PIECE", 4096)
    ckptlab.open(ZERO3).reshape(format=form).save(tmp_path / "out")
    told = json.loads((tmp_path / "out" / convert.MANIFEST).read_text())["files"]
    found = [p for p in (tmp_path / "out").rglob("*") if p.is_file()]
    files = {p.relative_to(tmp_path / "out").as_posix(): p.read_bytes() for p in found}
    files.pop(convert.MANIFEST)
    assert told == {n: {"size": len(data), "crc32": f"{zlib.crc32(data):08x}"} for n, data in files.items()}


def test_bits_that_flip_later_are_found(tmp_path: Path) -> None:
    ckptlab.open(ZERO3).reshape(format="universal").save(tmp_path / "out")
    assert ckptlab.check(tmp_path / "out").healthy
    file = next((tmp_path / "out" / "zero").glob("*/exp_avg_sq.pt"))
    offset, size = max(records(file).values(), key=lambda r: r[1])
    flipped(file, offset + size // 2)
    found = ckptlab.check(tmp_path / "out")
    assert [f.where.files for f in found["changed-file"]] == [(file.relative_to(tmp_path / "out").as_posix(),)]
    assert not ckptlab.check(tmp_path / "out", data=False)["changed-file"]
    flipped(file, offset + size // 2)
    (tmp_path / "out" / convert.MANIFEST).write_text('{"files": {"../../x": {"size": 1, "crc32": "0"}}}')
    assert "outside" in ckptlab.check(tmp_path / "out")["damaged-file"][0].found


def test_what_is_not_finite_is_said(tmp_path: Path) -> None:
    source = Path(shutil.copytree(GPT, tmp_path / "run")) / "global_step3"
    poke(source, "3.self_attention.dense.weight", "exp_avg", float("inf"), tp=1, element=3)
    poke(source, "3.self_attention.dense.weight", "exp_avg", float("nan"), tp=1, element=5)
    for form in ("deepspeed", "universal"):
        report = ckptlab.open(source).reshape(format=form).save(tmp_path / form, verify=False)
        assert report.not_finite == {"3.self_attention.dense.weight: exp_avg": 2}
    result = run("convert", source, tmp_path / "said", "--to", "universal", "--no-verify")
    assert result.exit_code == 0
    assert "2 elements of what was written are NaN or infinite: 3.self_attention.dense.weight: exp_avg" in result.stderr


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64, ml_dtypes.float8_e5m2])
def test_not_finite_is_what_numpy_says(dtype: type) -> None:
    random = np.random.default_rng(0)
    size = np.dtype(dtype).itemsize
    for _ in range(20):
        values = random.integers(0, 256, 100 * size, np.uint8).view(dtype)
        assert not_finite(values) == np.count_nonzero(~np.isfinite(values.astype(np.float64)))
    assert not_finite(np.array([1, -1, 0], dtype)) == 0
    assert not_finite(np.array([np.nan], dtype)) == not_finite(np.array([-np.inf], dtype)) == 1


def test_integers_are_finite_and_complex_numbers_have_two_parts() -> None:
    assert not_finite(np.array([-1, 2**31 - 1], np.int32)) == 0
    assert not_finite(np.array([complex(np.inf, np.nan), 1j], np.complex64)) == 2


@dataclass(frozen=True)
class Slow:
    """Gives bytes, and fails from an element on."""

    content: bytes
    fails: int

    def chunks(self, lo: int, hi: int) -> Iterator[np.ndarray]:
        if hi > self.fails:
            raise OSError(5, "Input/output error")
        yield np.frombuffer(self.content, np.uint8)[lo:hi]


def halfway(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[FilePlan, str]:
    """A conversion of one file of ten pieces that ended after five; the plan of the whole."""
    monkeypatch.setattr(execute, "PIECE", 100)
    content = np.random.default_rng(0).bytes(1000)
    plans = [FilePlan("a", (Elements(Slow(content, n), np.dtype(np.uint8), 0, 1000),)) for n in (500, 1000)]
    with pytest.raises(OSError, match="Input/output error"):
        convert.run([plans[0]], str(tmp_path / "out"), {}, on=1)
    return plans[1], str(tmp_path / "out")


def written(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Where the pieces lie that are written from now on."""
    offsets: list[int] = []
    write = execute.Piece.write
    monkeypatch.setattr(execute.Piece, "write", lambda one, *more: (offsets.append(one.offset), write(one, *more))[1])
    return offsets


def test_a_repeat_goes_on_within_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, out = halfway(tmp_path, monkeypatch)
    offsets = written(monkeypatch)
    convert.run([plan], out, {}, on=1)
    assert offsets == [500, 600, 700, 800, 900]
    assert Path(out, "a").read_bytes() == plan.parts[0].reader.content
    assert ckptlab.convert.manifest.read(out) == {"a": (1000, zlib.crc32(Path(out, "a").read_bytes()))}


def test_what_another_boot_wrote_is_believed_only_where_it_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, out = halfway(tmp_path, monkeypatch)
    with open(f"{out}.partial/a.tmp", "r+b") as file:  # a page that never came to the disk
        os.pwrite(file.fileno(), bytes(100), 200)
    monkeypatch.setattr(journal.disk, "boot", lambda: "another")
    offsets = written(monkeypatch)
    convert.run([plan], out, {}, on=1)
    assert offsets == [200, 500, 600, 700, 800, 900]
    assert Path(out, "a").read_bytes() == plan.parts[0].reader.content


def test_a_full_disk_is_known_at_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "statvfs", lambda folder: SimpleNamespace(f_blocks=9, f_bavail=1, f_frsize=512))
    with pytest.raises(DestinationError, match="there is room for .* make room and repeat"):
        convert.run([FilePlan("a", (Elements(Slow(b"", 0), np.dtype(np.uint8), 0, 1000),))], str(tmp_path / "out"), {})
    assert not list((tmp_path / "out.partial").glob("*.tmp"))


def test_a_disk_that_others_fill_meanwhile_is_named_and_what_is_there_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    room, allocate = [600], os.posix_fallocate

    def filling(handle: int, offset: int, size: int) -> None:
        room[0] -= size
        if room[0] < 0:
            raise OSError(28, "No space left on device")
        allocate(handle, offset, size)

    monkeypatch.setattr(os, "posix_fallocate", filling)
    monkeypatch.setattr(execute, "PIECE", 100)
    plan = FilePlan("a", (Elements(Slow(bytes(range(200)) * 5, 1000), np.dtype(np.uint8), 0, 1000),))
    out = str(tmp_path / "out")
    with pytest.raises(OSError, match=r"No space left on device.*a\.tmp"):
        convert.run([plan], out, {}, on=1)
    room[0] = 400
    convert.run([plan], out, {}, on=1)
    assert Path(out, "a").read_bytes() == bytes(range(200)) * 5


def test_a_source_that_changes_meanwhile_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = Path(shutil.copytree(ZERO2, tmp_path / "run")) / "global_step3"
    file = next(source.glob("*optim_states.pt"))
    gaps = execute.Verified.gaps
    monkeypatch.setattr(execute.Verified, "gaps", lambda self: (os.utime(file), gaps(self))[1])
    with pytest.raises(CheckpointError, match="changed or replaced while it was read"):
        ckptlab.open(source).reshape(dp=3).save(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_interrupted_after_it_got_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reshaped = ckptlab.open(ZERO2).reshape(dp=3)
    appear = execute._appear
    monkeypatch.setattr(execute, "_appear", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        reshaped.save(tmp_path / "out")
    monkeypatch.setattr(execute, "_appear", appear)
    report = reshaped.save(tmp_path / "out")
    assert report.files == report.resumed
    assert (tmp_path / "latest").read_text() == "out"
    assert not (tmp_path / "out" / convert.JOURNAL).exists()
    with pytest.raises(DestinationError, match="exists already"):
        reshaped.save(tmp_path / "out")


def test_sums_of_numbers_put_in_later() -> None:
    data = bytearray(np.random.default_rng(0).bytes(100))
    data[10:14] = data[96:100] = bytes(4)
    crc = zlib.crc32(data)
    data[10:14], data[96:100] = (7).to_bytes(4, "little"), (1 << 31).to_bytes(4, "little")
    assert checksum.with_numbers(crc, 100, [(10, 7), (96, 1 << 31)]) == zlib.crc32(data)


def test_zlib_alone_gives_the_same_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "zlib_ng", None)
    monkeypatch.setitem(sys.modules, "zlib_ng.zlib_ng", None)
    try:
        plain = importlib.reload(checksum)
        assert plain.crc32 is zlib.crc32
        assert plain.combined([(zlib.crc32(b"abc"), 3), (zlib.crc32(b"defgh"), 5)]) == zlib.crc32(b"abcdefgh")
        assert plain.of_zeros(1000) == zlib.crc32(bytes(1000))
    finally:
        monkeypatch.undo()
        importlib.reload(checksum)
