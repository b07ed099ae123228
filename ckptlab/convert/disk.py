"""Disks: how files get there, and when they are."""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any

from ckptlab import pool
from ckptlab.errors import DestinationError
from ckptlab.formats import fileplan
from ckptlab.words import size as sized

_AT_ONCE = 8  # files that are waited for at a time: they share the disk's flushes
_START_WRITING = 2  # SYNC_FILE_RANGE_WRITE


def allocate(folder: str, files: Mapping[str, int]) -> None:
    """Make files of zeros (path → bytes), whose room is then there. DestinationError where it is not: none is made."""
    made = []
    try:
        for path, nbytes in files.items():
            made.append(path)
            fileplan.allocate(path, nbytes)
    except OSError as error:
        for path in made:
            if os.path.exists(path):
                os.remove(path)
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        found = os.statvfs(folder)
        needed = sum(-(-nbytes // found.f_frsize) for nbytes in files.values()) * found.f_frsize  # in whole blocks
        raise DestinationError(
            f"{folder}: {sized(needed)} are to be written, and there is room for "
            f"{sized(found.f_bavail * found.f_frsize)} ({os.strerror(error.errno)}): make room and repeat the command"
        ) from None


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
        os.fsync(handle)
    except OSError as error:
        raise OSError(error.errno, os.strerror(error.errno or 0), path) from None
    finally:
        os.close(handle)


def boot() -> str:
    """What tells this run of the machine from others: what was written in another may have been lost with it."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return file.read().strip()
    except OSError:
        return ""
