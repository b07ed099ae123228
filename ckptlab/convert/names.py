"""Names inside of a checkpoint become names of files: what must never leave the destination, or fall on one another."""

from __future__ import annotations

import os
from collections.abc import Iterable

from ckptlab.convert.journal import JOURNAL, TEMPORARY
from ckptlab.convert.manifest import MANIFEST
from ckptlab.errors import DestinationError
from ckptlab.words import brief

_LONGEST_NAME, _LONGEST_PATH = 255 - len(TEMPORARY), 4000  # bytes; Linux' limits are 255 and 4096


def checked(names: Iterable[str], destination: str) -> None:
    """DestinationError, with the name, where names cannot all be files of one folder."""
    files: set[str] = set()
    folders: set[str] = {""}
    for name in names:
        if reason := _wrong(name, destination):
            raise DestinationError(f"{destination}: {brief(name)} cannot be the name of a file in it: {reason}")
        if name in files:
            raise DestinationError(f"{destination}: two files of it would be called {brief(name)}")
        files.add(name)
        folder = os.path.dirname(name)
        while folder not in folders:
            folders.add(folder)
            folder = os.path.dirname(folder)
    if both := sorted(files & folders):
        raise DestinationError(f"{destination}: {brief(both[0])} would be a file and a folder: two names collide")


def _wrong(name: str, destination: str) -> str | None:
    parts = name.split("/")
    if any(part in ("", ".", "..") for part in parts):
        return "it is absolute, or has a part that is empty, '.' or '..', and would lead elsewhere"
    if "\0" in name:
        return "it holds a NUL"
    try:
        sizes = [len(os.fsencode(part)) for part in parts]
    except UnicodeEncodeError:
        return "it is no text that a file system can hold (lone surrogates)"
    if max(sizes) > _LONGEST_NAME or sum(sizes) + len(sizes) + len(os.fsencode(destination)) > _LONGEST_PATH:
        return "it is too long for a file system"
    if name in (JOURNAL, MANIFEST) or name.endswith(TEMPORARY):
        return "ckptlab keeps a file of that name itself"
    return None
