"""Where bytes lie: in folders and files of this machine, or far away, behind any URL that fsspec knows.

A path is a text; one with `://` in it is far. Near ones go straight to the operating system, the others to
`ckptlab.far`. What cannot be reached is an OSError that names the path.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, BinaryIO, NamedTuple, TypeVar, cast

from ckptlab import far
from ckptlab.errors import InputError

T = TypeVar("T")

_COPIED = 8 << 20  # bytes that are copied at a time
_TOGETHER = 512  # files of which headers are fetched at a time: what is fetched is used before the cache lets it go


class Entry(NamedTuple):
    """What stands in a folder."""

    name: str
    path: str
    is_folder: bool
    is_file: bool


Range = tuple[str, int, int]  # path, first byte, end


def is_far(path: str) -> bool:
    """Whether a path is a URL."""
    return "://" in path


def absolute(path: str | os.PathLike[str], options: Mapping[str, Any] | None = None) -> str:
    """A path as it is used from here on: `~` and `.` resolved; file:// is near; of a chain of URLs the innermost folder
    last, so that names can be joined to it. options: of the file system behind a URL (fsspec's `storage_options`), kept
    for all that lies in the same bucket or on the same host.

    InputError for options of a near path.
    """
    path = os.fspath(path)
    if path.startswith(("file://", "local://")) and "::" not in path:
        path = path.split("://", 1)[1]
    if not is_far(path):
        if options:
            raise InputError(f"{path}: storage_options are for URLs, and this is a path")
        if "\0" in path:
            raise InputError(f"{path!r} is no path: it holds a null character")
        return os.path.abspath(os.path.expanduser(path))
    return far.opened(path, options)


def normal(path: str) -> str:
    """A path without `..` and doubled slashes."""
    return far.normal(path) if is_far(path) else os.path.normpath(path)


def join(folder: str, name: str) -> str:
    """A name in a folder. One that leads out of it, to a part of a checkpoint elsewhere, is resolved if it is far."""
    path = os.path.join(folder, name)
    return normal(path) if is_far(path) and ".." in name else path


def real(path: str) -> str:
    """A path without links; far away there are none."""
    return path if is_far(path) else os.path.realpath(path)


def parent(path: str) -> str:
    """The folder that a path lies in; a bucket, a host and an archive lie in themselves."""
    return far.parent(path) if is_far(path) else os.path.dirname(path)


def exists(path: str) -> bool:
    """Whether there is a file or folder."""
    return is_folder(path) or is_file(path) if is_far(path) else os.path.exists(path)


def is_file(path: str) -> bool:
    """Whether there is a file."""
    return far.is_file(path) if is_far(path) else os.path.isfile(path)


def is_folder(path: str) -> bool:
    """Whether there is a folder."""
    return far.is_folder(path) if is_far(path) else os.path.isdir(path)


def size(path: str) -> int:
    """The bytes of a file. FileNotFoundError if there is none."""
    return far.size(path) if is_far(path) else os.path.getsize(path)


def far_sizes(files: Iterable[str]) -> dict[str, int]:
    """The bytes of far files, as far as they can be told, asked for together where no listing says them."""
    return far.sizes(path for path in files if is_far(path))


def names(folder: str) -> list[str]:
    """The names in a folder, in no order. FileNotFoundError if there is none."""
    return list(far.listed(folder)) if is_far(folder) else os.listdir(folder)


def entries(folder: str) -> list[Entry]:
    """What stands in a folder, in no order. FileNotFoundError if there is none."""
    if not is_far(folder):
        with os.scandir(folder) as found:
            return [Entry(e.name, e.path, e.is_dir(), e.is_file()) for e in found]
    return [
        Entry(name, os.path.join(folder, name), one.is_folder, not one.is_folder)
        for name, one in far.listed(folder).items()
    ]


def walk(folder: str) -> Iterator[tuple[str, list[str], list[str]]]:
    """(folder, names of folders, names of files) from a folder downwards, as os.walk gives them; of a far one that
    lists all that lies below at once."""
    if not is_far(folder):
        yield from os.walk(folder)
        return
    far.list_below(folder)
    left = [folder]
    while left:
        at = left.pop()
        inside = entries(at) if is_folder(at) else []
        folders = [e.name for e in inside if e.is_folder]
        yield at, folders, [e.name for e in inside if e.is_file]
        left += [os.path.join(at, name) for name in reversed(folders)]


def open_binary(path: str) -> BinaryIO:
    """A file to be read. OSError for what is none: a pipe, of which the end may never come, a device."""
    return cast(BinaryIO, far.File(path)) if is_far(path) else open(path, "rb", opener=_files_alone)


def _files_alone(path: str, flags: int) -> int:
    handle = os.open(path, flags | os.O_NONBLOCK)  # a pipe waits for whoever writes into it
    mode = os.fstat(handle).st_mode
    if stat.S_ISREG(mode) or stat.S_ISDIR(mode):  # folders are refused by Python
        return handle
    os.close(handle)
    raise OSError(errno.EINVAL, "it is no file, but a pipe or a device", path)


def named(error: OSError, path: str) -> OSError:
    """An error of the operating system, which knows numbers of open files alone, with the file's name."""
    return OSError(error.errno, os.strerror(error.errno or 0), path)


@contextmanager
def naming(path: str) -> Iterator[None]:
    """Errors of the operating system name the file. (Not for what is done thousands of times: entering takes 2 µs.)"""
    try:
        yield
    except OSError as error:
        raise named(error, path) from None


def read_at(file: BinaryIO, nbytes: int, offset: int) -> bytes:
    """Bytes of an open file, as far as it has them, wherever it stands."""
    if not is_far(getattr(file, "name", "")):
        try:
            return os.pread(file.fileno(), nbytes, offset)
        except OSError as error:
            raise named(error, file.name) from None
    return far.read(str(file.name), offset, nbytes)


def read(path: str, offset: int = 0, nbytes: int | None = None) -> bytes:
    """Bytes of a file, as far as it has them; all from `offset` on where it is not said how many."""
    if is_far(path):
        return far.read(path, offset, nbytes)
    try:
        with open_binary(path) as file:
            if offset:
                file.seek(offset)
            return file.read() if nbytes is None else file.read(nbytes)
    except OSError as error:
        raise error if error.filename is not None else OSError(error.errno, error.strerror, path) from None


def copy(path: str, destination: str) -> None:
    """Copy a file. A far one appears whole."""
    import shutil
    import tempfile

    if not is_far(destination):
        with open_binary(path) as file, open(destination, "wb") as made:
            shutil.copyfileobj(file, made, _COPIED)
        return
    if not is_far(path):
        far.put(path, destination)
        return
    with tempfile.TemporaryDirectory(prefix="ckptlab-") as folder:
        copy(path, os.path.join(folder, "file"))
        far.put(os.path.join(folder, "file"), destination)


def text(path: str, errors: str = "strict", most: int | None = None) -> str:
    """The text of a file in UTF-8, its first `most` bytes where that is said."""
    return read(path, 0, most).decode("utf-8", errors)


def ahead(ranges: Iterable[Range]) -> None:
    """Fetch bytes of far files that will be read soon, many at a time and neighbours together; near ones are left. An
    optimisation: what does not fit, or cannot be read, is left to whoever reads it."""
    if wanted := [one for one in ranges if is_far(one[0])]:
        far.ahead(wanted)


def together(items: Iterable[tuple[str, T]]) -> Iterator[list[tuple[str, T]]]:
    """Items, each with the path of its file, in groups whose headers are worth being fetched at once: near ones one by
    one."""
    held: list[tuple[str, T]] = []
    for path, item in items:
        held.append((path, item))
        if len(held) == _TOGETHER or not is_far(path):
            yield held
            held = []
    if held:
        yield held


def stamps(paths: Iterable[str]) -> list[tuple[str, int, int, int]]:
    """What shows that a file was changed or replaced: path, size, and numbers that are others then, by time and
    identity. Far ones are listed anew."""
    wanted = list(paths)
    known = {stamp[0]: stamp for stamp in far.stamps([path for path in wanted if is_far(path)])}
    near = ((path, os.stat(path)) for path in wanted if path not in known)
    known |= {path: (path, s.st_size, s.st_mtime_ns, s.st_ino) for path, s in near}
    return [known[path] for path in wanted]


def options_known(path: str | None = None) -> dict[str, dict[str, Any]]:
    """The options that were given for far file systems, by bucket or host; of a path, its own alone: for whoever reads
    it in another process."""
    return {store: one for store, one in far.options.items() if path is None or store == far.store_of(path)}


def options_told(options: Mapping[str, Mapping[str, Any]]) -> None:
    """Take options that another process knows."""
    far.learn(options)
