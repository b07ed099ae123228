"""Disks: how files get there, and when they are."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterable
from functools import cache
from typing import Any

from ckptlab import pool
from ckptlab.errors import DestinationError
from ckptlab.paths import naming
from ckptlab.words import size as sized

_AT_ONCE = 8  # files that are waited for at a time: they share the disk's flushes
_START_WRITING = 2  # SYNC_FILE_RANGE_WRITE


def room(folder: str, files: Iterable[tuple[str, int]]) -> None:
    """See that there is room for files (path, bytes), what some have already included. DestinationError where there is
    not."""
    found = os.statvfs(folder)
    if not found.f_blocks:  # a file system that does not say
        return
    needed = 0
    for path, nbytes in files:
        there = os.stat(path).st_blocks * 512 if os.path.exists(path) else 0
        needed += max(-(-nbytes // found.f_frsize) * found.f_frsize - there, 0)  # in whole blocks
    if needed > (left := found.f_bavail * found.f_frsize):
        raise DestinationError(
            f"{folder}: {sized(needed)} are to be written, and there is room for {sized(left)}: make room and repeat "
            "the command"
        )


@cache
def _libc() -> Any:
    try:
        return ctypes.CDLL(None).sync_file_range
    except (OSError, AttributeError):  # not Linux: the files are written when they are waited for
        return None


def start_writing(path: str, offset: int, nbytes: int) -> None:
    """Have bytes of a file written to the disk from now on, without waiting for it."""
    if _libc() is not None:
        handle = os.open(path, os.O_WRONLY)
        _libc()(handle, ctypes.c_longlong(offset), ctypes.c_longlong(nbytes), _START_WRITING)
        os.close(handle)


def sync(paths: Iterable[str]) -> None:
    """Wait until files and folders are on the disk, several at a time."""
    for _ in pool.run(_sync, paths, on=_AT_ONCE, ordered=False):
        pass


def _sync(path: str) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        with naming(path):
            os.fsync(handle)
    finally:
        os.close(handle)


def boot() -> str:
    """What tells this run of the machine from others: what was written in another may have been lost with it."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return file.read().strip()
    except OSError:
        return ""
