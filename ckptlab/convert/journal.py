"""The journal of a conversion: what it is, which pieces of which files are written, which files are complete.

The first line is what the conversion is; each further one is JSON. What was written before the machine last stopped is
read again before it is believed, since nothing is waited for on its way to the disk until the end.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ckptlab.convert import disk
from ckptlab.convert.sources import Run, crc_of
from ckptlab.errors import DestinationError
from ckptlab.formats.fileplan import Sum, Written
from ckptlab.formats.locate import UNFINISHED
from ckptlab.paths import naming

JOURNAL = UNFINISHED
TEMPORARY = ".tmp"  # how a file's name ends until it is complete


class Done(NamedTuple):
    """A complete file: its bytes, their CRC-32, and how many elements of what are NaN or infinite."""

    size: int
    crc: int
    odd: dict[str, int]


class Journal:
    """Keeps what is done in the folder `partial`, and knows what an interrupted run of the same conversion did.

    The open file is locked, so that a second process does not write into the same folder; a killed one leaves no lock.
    `files`: those that are complete. `pieces`: (file, offset) → bytes and what was found, of the others. `reads`: the
    runs of source files that were read for either.
    """

    def __init__(self, partial: str, identity: dict[str, Any]) -> None:
        said = first_line(identity)
        try:
            os.makedirs(partial, exist_ok=True)
            self.file = Path(partial, JOURNAL).open("a+")  # noqa: SIM115 (open, and locked, until all is done)
        except OSError as e:
            raise DestinationError(f"{partial} cannot be written: {e.strerror}") from None
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.file.close()
            raise DestinationError(f"{partial}: another process is writing this conversion") from None
        self.file.seek(0)
        lines = self.file.read().split("\n")
        if lines[0] != said and (lines != [""] or os.listdir(partial) != [JOURNAL]):
            self.file.close()
            raise DestinationError(
                f"{partial} is left from another conversion: remove it, or repeat that conversion to finish it"
            )
        self.partial = partial
        self.files: dict[str, Done] = {}
        self.pieces: dict[tuple[str, int], tuple[int, Written]] = {}
        self.reads: list[Run] = []
        self._take(lines[1:])
        if lines[-1]:  # the line that was being written when the run was killed
            self._write("\n")
        if lines == [""]:
            self._write(said + "\n")
        self._append({"boot": disk.boot()})

    def _append(self, entry: dict[str, Any]) -> None:
        self._write(json.dumps(entry) + "\n")

    def _write(self, text: str) -> None:
        """Past Python's buffers: what does not fit on the disk would be tried again when the file is closed."""
        left = text.encode()
        with naming(self.file.name):
            while left:
                left = left[os.write(self.file.fileno(), left) :]

    def piece(self, name: str, offset: int, nbytes: int, found: Written, runs: list[Run]) -> None:
        """A piece of a file is written, and these runs of the source were read for it."""
        self._append({"piece": [name, offset, nbytes, found.sums, found.odd, runs]})

    def complete(self, name: str, done: Done) -> None:
        """A file is whole and has its name."""
        self.files[name] = done
        self._append({"file": [name, *done]})

    def _take(self, lines: list[str]) -> None:
        here = disk.boot()
        trusted = False
        for entry in _entries(lines):
            if "boot" in entry:
                trusted = bool(here) and entry["boot"] == here
            elif "file" in entry:
                name, size, crc, odd = entry["file"]
                if self._holds(name, 0, size, size, crc, trusted):
                    self.files[name] = Done(size, crc, odd)
            elif "piece" in entry:
                name, offset, nbytes, sums, odd, runs = entry["piece"]
                found = Written([Sum(*s) for s in sums], Counter(odd))
                self.reads += [Run(*run) for run in runs]
                if trusted or self._holds(name + TEMPORARY, offset, nbytes, None, found.crc, trusted):
                    self.pieces[name, offset] = nbytes, found

    def _holds(self, name: str, offset: int, nbytes: int, size: int | None, crc: int, trusted: bool) -> bool:
        """Whether a file is there, of its size, and still has these bytes."""
        path = os.path.join(self.partial, name)
        if not os.path.isfile(path) or size not in (None, os.path.getsize(path)):
            return False
        return trusted or crc_of(path, offset, nbytes) == crc


def first_line(identity: Mapping[str, Any]) -> str:
    """What a journal begins with: what a conversion is."""
    return json.dumps(identity, sort_keys=True, default=str)


def finished(folder: str, identity: dict[str, Any]) -> bool:
    """Whether a destination is this conversion's, which was interrupted after that: its journal is still there."""
    try:
        with open(os.path.join(folder, JOURNAL)) as file:
            return file.readline().rstrip("\n") == first_line(identity)
    except OSError:
        return False


def _entries(lines: list[str]) -> Iterator[dict[str, Any]]:
    for line in lines:
        try:
            yield json.loads(line)
        except ValueError:  # cut when the run was killed
            continue
