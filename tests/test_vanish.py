"""Disks and mounts that go away in the middle of a conversion: an error with the file's name, the source as it was, no
destination, and a repeat that gives what an undisturbed one gives.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from compare import GPT, ZERO3, digest
from helpers.command import refused, run

from ckptlab import stored
from ckptlab.convert import execute
from ckptlab.errors import CheckpointError
from ckptlab.stored import Stored


def command(source: Path, out: Path, form: str = "deepspeed") -> list[str]:
    return ["convert", str(source), str(out), "--to", form, "--workers", "1"]


def at_call(monkeypatch: pytest.MonkeyPatch, name: str, number: int, first: Callable[..., Any]) -> None:
    """Have something done before so many calls of a function of `os`, each time from then on where it raises."""
    called, real = [0], getattr(os, name)

    def instead(*given: Any, **named: Any) -> Any:
        called[0] += 1
        if called[0] >= number:
            first(*given)
        return real(*given, **named)

    monkeypatch.setattr(os, name, instead)


def failing(number: int) -> Callable[..., None]:
    def fail(of: Any, *_: Any) -> None:
        raise OSError(number, os.strerror(number), of if isinstance(of, str) else None)

    return fail


def same_as_undisturbed(source: Path, out: Path, form: str) -> bool:
    """Whether a repeat ends well and gives the same bytes as one from the beginning, in the same place."""
    assert run(*command(source, out, form)).exit_code == 0
    repeated = digest(out)
    shutil.rmtree(out)
    assert run(*command(source, out, form)).exit_code == 0
    return repeated == digest(out)


@pytest.mark.parametrize(
    ("form", "name", "number", "code"),
    [
        ("deepspeed", "pwrite", 20, errno.EIO),
        ("universal", "pwrite", 20, errno.ESTALE),
        ("safetensors", "pwrite", 3, errno.EIO),
        ("dcp", "pwrite", 20, errno.EIO),
        ("deepspeed", "posix_fallocate", 2, errno.EIO),
        ("universal", "ftruncate", 1, errno.ESTALE),
        ("dcp", "fsync", 1, errno.EIO),
        ("deepspeed", "replace", 2, errno.ESTALE),
    ],
)
def test_a_destination_that_fails(
    form: str, name: str, number: int, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(execute, "PIECE", 4096)
    source, before = GPT / "global_step3", digest(GPT)
    out = tmp_path / "out"
    with monkeypatch.context() as patched:
        at_call(patched, name, number, failing(code))
        said = refused(*command(source, out, form))
    assert os.strerror(code) in said
    assert f"{tmp_path}/out.partial" in said
    assert not out.exists()
    assert digest(GPT) == before
    assert same_as_undisturbed(source, out, form)


def cut(file: Path) -> None:
    os.truncate(file, 4096)


def replaced(file: Path) -> None:
    shutil.copy(file, f"{file}.new")
    os.replace(f"{file}.new", file)


def folder_removed(file: Path) -> None:
    shutil.rmtree(file.parent)


@pytest.mark.parametrize(
    ("form", "happens"),
    [
        ("deepspeed", cut),
        ("universal", cut),
        ("dcp", os.remove),
        ("universal", os.remove),
        ("safetensors", replaced),
        ("deepspeed", folder_removed),
    ],
)
def test_a_source_that_goes_away(
    form: str, happens: Callable[[Path], object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(execute, "PIECE", 4096)
    source, kept = Path(shutil.copytree(ZERO3, tmp_path / "run")) / "global_step3", tmp_path / "kept"
    shutil.copytree(source, kept)
    file, out = sorted(source.glob("*optim_states.pt"))[-1], tmp_path / "out"
    with monkeypatch.context() as patched:
        once = iter([happens])
        at_call(patched, "pwrite", 5, lambda *_: [act(file) for act in once])
        said = refused(*command(source, out, form))
    assert str(source) in said
    assert not out.exists()
    shutil.rmtree(source, ignore_errors=True)
    shutil.copytree(kept, source)
    shutil.rmtree(f"{out}.partial")
    assert same_as_undisturbed(source, out, form)


@pytest.mark.parametrize("form", ["deepspeed", "universal"])
def test_a_destination_that_somebody_removes(form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(execute, "PIECE", 4096)
    source, out = GPT / "global_step3", tmp_path / "out"
    with monkeypatch.context() as patched:
        once = iter([Path(f"{out}.partial")])
        at_call(patched, "pwrite", 20, lambda *_: [shutil.rmtree(folder) for folder in once])
        said = refused(*command(source, out, form))
    assert f"{out}.partial" in said
    assert not out.exists()
    assert same_as_undisturbed(source, out, form)


def test_a_scalar_is_read_and_not_mapped(tmp_path: Path) -> None:
    """A mapped page that cannot be read (a mount that died) ends the process: what few bytes are wanted is read."""
    file = tmp_path / "numbers"
    np.array([3.5, 7], np.float32).tofile(file)
    one = Stored(str(file), 4, np.dtype(np.float32), (), ())
    before = dict(stored._mapped_files._files)
    assert stored.scalar(one) == 7
    assert dict(stored._mapped_files._files) == before
    os.truncate(file, 6)
    with pytest.raises(CheckpointError, match="has 6 bytes, but a tensor in it ends at byte 8"):
        stored.scalar(one)
