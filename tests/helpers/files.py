"""Faults planted in copies of real checkpoints, each where a disk, a copy or a run would leave it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest

from ckptlab import stored as storage
from ckptlab.catalog import Catalog
from ckptlab.formats import read
from ckptlab.formats.torch import torchfile
from ckptlab.plan import Holder
from ckptlab.stored import Stored


def copy(case: Path, to: Path) -> Path:
    """A copy of a case's step folder that may be damaged."""
    return Path(shutil.copytree(case / "global_step3", to / "run"))


def refuse_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on no element of a stored tensor is read: AssertionError."""

    def refuse(*args: Any) -> NoReturn:
        raise AssertionError(f"{args[0]} is read")

    monkeypatch.setattr(storage._mapped_files, "get", refuse)
    monkeypatch.setattr(Stored, "read_one", refuse)


def overwrite(stored: Stored, element: int, values: Any) -> None:
    """Write values over the elements of a stored tensor from `element` on, in its file."""
    array = np.atleast_1d(np.asarray(values)).astype(stored.dtype)
    assert element + array.size <= stored.numel
    with open(stored.path, "r+b") as file:
        file.seek(stored.offset + element * stored.dtype.itemsize)
        file.write(array.tobytes())


def held(
    catalog: Catalog, name: str, state: str, stage: int | None = None, tp: int = 0, element: int = 0
) -> tuple[Stored, int]:
    """Where an element of the flattened shard of a rank is stored: the tensor, and its place there."""
    stage = catalog.placement(name, state).stages[0] if stage is None else stage
    for fragment in catalog.fragments(name, state, Holder(pp=stage, tp=tp)):
        if fragment.start <= element < fragment.start + fragment.count:
            return fragment.stored, element - fragment.start
    raise AssertionError(f"element {element} of {name} is not stored")


def poke(folder: Path, name: str, state: str, value: float, **place: int) -> None:
    """Change one element of a state of a tensor."""
    stored, at = held(read(folder), name, state, **place)
    overwrite(stored, at, value)


def flip(folder: Path, name: str, state: str, bit: int, **place: int) -> None:
    """Flip one bit of the byte in which an element of a state begins (little-endian: its lowest)."""
    stored, at = held(read(folder), name, state, **place)
    offset = stored.offset + at * stored.dtype.itemsize + bit // 8
    with open(stored.path, "r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1 << bit % 8]))


def fill(folder: Path, name: str, state: str, value: float) -> None:
    """Make every element of a state the same, on every rank that holds some of it."""
    catalog = read(folder)
    for placement in catalog.placements[name, state]:
        for holder in placement.holders:
            for fragment in catalog.fragments(name, state, holder):
                overwrite(fragment.stored, 0, np.full(fragment.count, value))


def edit(file: Path, change: Callable[[Any], Any]) -> None:
    """Change the object in a file of torch; what `change` returns, if anything, takes its place."""
    content = torchfile.read(file)
    changed = change(content)
    torchfile.write(file.with_suffix(".new"), content if changed is None else changed)
    os.replace(file.with_suffix(".new"), file)


def swap(a: Path, b: Path) -> None:
    """Give each of two files the other's name."""
    aside = a.with_suffix(".aside")
    a.rename(aside)
    b.rename(a)
    aside.rename(b)


def cut(file: Path, share: float) -> None:
    """Leave only the beginning of a file."""
    os.truncate(file, int(file.stat().st_size * share))
