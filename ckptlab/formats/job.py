"""What a writer makes and a conversion runs: the files of a checkpoint, each with what fills it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class FileJob:
    """One output file: `name` is its path within the destination, `write(path)` makes it, `nbytes` are the bytes of
    tensor data that it draws from the source."""

    name: str
    write: Callable[[str], object]
    nbytes: int = 0
