"""Folders and files behind URLs, through fsspec: listings that are asked for once, and ranges of bytes, fetched many at
a time, neighbours together, and kept in a cache of bounded size.

Paths are URLs as `paths.absolute` spells them. Whatever a file system raises becomes an OSError that names the URL.
"""

from __future__ import annotations

import errno
import io
import json
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any, cast

from ckptlab.errors import CheckpointError

BLOCK = 8 << 10  # bytes that are fetched and kept as one
CACHE = 256 << 20  # bytes that are kept
GAP = 128 << 10  # bytes between two ranges that are fetched along rather than asked for apart
REQUEST = 8 << 20  # bytes of the largest request
AT_ONCE = 32  # requests under way
TRIES = 4
MANIFEST = "ckptlab-manifest.json"  # lists a folder of a server that does not list it
_MOST_MANIFEST = 1 << 28
_FIRST_WAIT = 0.2  # seconds before the second try, doubled before each further one
_HTTP = ("http://", "https://")
_LASTING = (FileNotFoundError, PermissionError, IsADirectoryError, NotImplementedError, ValueError)
_VERSION = ("ETag", "etag", "VersionId", "generation", "LastModified", "last_modified", "mtime", "created", "date_time")


Range = tuple[str, int, int]  # path, first byte, end


@dataclass(frozen=True)
class Listed:
    """What a listing says of a file or folder. size: None where it does not say. version: changes with the file."""

    is_folder: bool
    size: int | None = None
    version: str = ""


options: dict[str, dict[str, Any]] = {}  # of file systems, by bucket or host
_systems: dict[str, tuple[Any, str]] = {}  # bucket or host → its file system, and what it calls it
_folders: dict[str, dict[str, Listed] | None] = {}  # listings; None of what cannot be listed
_alone: dict[str, Listed | None] = {}  # files of folders that cannot be listed
_roots: set[str] = set()  # what was opened: what lies above need not be listable
_one_at_a_time = threading.Lock()  # for file systems that threads cannot share


def _after_fork() -> None:
    global _one_at_a_time, _blocks
    _systems.clear()
    _one_at_a_time, _blocks = threading.Lock(), _Blocks()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def opened(url: str, given: Mapping[str, Any] | None) -> str:
    """A URL as paths are spelled here. What was known of listings of its bucket or host is forgotten."""
    if given is not None:
        learn({store_of(_turned(url)): given})
    path = normal(_turned(url))
    store = store_of(path)
    _forget(store)
    _system(store)
    _roots.add(path)
    return path


def learn(known: Mapping[str, Mapping[str, Any]]) -> None:
    """Take options of file systems, by bucket or host."""
    for store, given in known.items():
        if options.get(store) != dict(given):
            options[store] = dict(given)
            _systems.pop(store, None)


def _turned(url: str) -> str:
    """A chain of URLs (`zip://inside::s3://bucket/a.zip`) with its links in the other order, and back."""
    links = url.split("::")
    front = [link for link in links[:-1] if "://" not in link]
    rest = [link if "://" in link else f"file://{link}" for link in links[len(front) :]]
    return "::".join([*front, *reversed(rest)])


def normal(path: str) -> str:
    """A URL without `..` and doubled slashes."""
    store, _, rest = path.rpartition("://")
    return f"{store}://{os.path.normpath(rest) if rest else ''}"


def parent(path: str) -> str:
    """The folder that a URL lies in: of a bucket, a host or an archive it itself."""
    return path if "/" not in path.rpartition("://")[2] else os.path.dirname(path)


def store_of(path: str) -> str:
    """The bucket, host or archive that a path lies in."""
    start = path.rindex("://") + 3
    end = path.find("/", start)
    return path if end < 0 else path[:end]


def _system(store: str) -> tuple[Any, str]:
    if store not in _systems:
        try:
            from fsspec.core import url_to_fs
        except ImportError:
            raise CheckpointError(f"{store}: URLs need fsspec: pip install fsspec") from None
        try:
            _systems[store] = url_to_fs(_turned(store), **options.get(store, {}))
        except Exception as error:  # no such protocol, its package is not there, an archive that is none, …
            raise CheckpointError(f"{store}: {error or type(error).__name__}") from error
    return _systems[store]


def inside(path: str) -> tuple[Any, str]:
    """The file system that a path lies in, and what it calls it."""
    store = store_of(path)
    system, root = _system(store)
    return system, root.rstrip("/") + path[len(store) :] if path != store else root


@contextmanager
def named(path: str) -> Iterator[None]:
    """Errors of file systems as OSErrors that name the URL."""
    try:
        yield
    except CheckpointError:
        raise
    except FileNotFoundError:
        raise FileNotFoundError(errno.ENOENT, "no such file or folder", path) from None
    except PermissionError as error:
        raise PermissionError(errno.EACCES, str(error) or "permission denied", path) from None
    except Exception as error:
        if isinstance(error, OSError) and error.filename == path:
            raise
        said = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        raise OSError(errno.EIO, said, path) from error


# Listings


def _forget(store: str) -> None:
    for known in (_folders, _alone):
        for path in [path for path in list(known) if path == store or path.startswith(f"{store}/")]:
            known.pop(path, None)
    if store in _systems:
        _systems[store][0].invalidate_cache()


def changed(path: str) -> None:
    """Forget what listings say of a file and the folders that it lies in."""
    system, name = inside(path)
    _alone.pop(path, None)
    while parent(path) != path:
        path, name = parent(path), name.rpartition("/")[0]
        _folders.pop(path, None)
        system.invalidate_cache(name)


def listed(folder: str) -> dict[str, Listed]:
    """What stands in a folder: name → what is known. FileNotFoundError where it is none, or cannot be listed."""
    found = _listing(folder)
    if found is None:
        raise FileNotFoundError(errno.ENOENT, "no such folder, or one that cannot be listed", folder)
    return found


def _listing(folder: str) -> dict[str, Listed] | None:
    if folder not in _folders:
        with named(folder):
            _folders[folder] = _ask(folder)
    return _folders[folder]


def _ask(folder: str) -> dict[str, Listed] | None:
    system, path = inside(folder)
    try:
        found = again(system, lambda: system.ls(path, detail=True))
    except Exception as error:
        refused = path.startswith(_HTTP) and _lasts(error, system)
        if not (isinstance(error, FileNotFoundError | NotADirectoryError) or refused):
            raise
        found = []
    inner = {}
    for one in found:
        name = one["name"].rstrip("/")
        if name.strip("/") != path.strip("/"):  # of a file, many file systems list it alone; or the folder lists itself
            inner[name.rpartition("/")[2]] = _said(one)
    if inner:
        return inner
    return _by_manifest(folder) if path.startswith(_HTTP) else None


def _said(one: Mapping[str, Any]) -> Listed:
    import hashlib  # OpenSSL's, which takes a while

    told = [(key, str(one[key])) for key in _VERSION if one.get(key) is not None]
    version = hashlib.sha256(repr((one.get("size"), told)).encode()).hexdigest()[:15]
    return Listed(one.get("type") == "directory", one.get("size"), version)


def _by_manifest(folder: str) -> dict[str, Listed] | None:
    """What the manifest in a folder lists, for a server that does not."""
    path = f"{folder}/{MANIFEST}"
    known = _info(path)
    if known is None or not known.size or known.size > _MOST_MANIFEST:
        return None
    _alone[path] = known
    try:
        told = json.loads(read(path))["files"]
        sizes = {str(name): int(entry["size"]) for name, entry in told.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError):
        return None
    _take(folder, {name: Listed(False, size) for name, size in sizes.items() if ".." not in name.split("/")})
    listing = _folders.pop(folder) or {}
    return {**listing, MANIFEST: known}


def list_below(folder: str) -> None:
    """List a folder and all below it, at once where the store can."""
    system, path = inside(folder)
    with named(folder):
        try:
            found = again(system, lambda: system.find(path, detail=True))
        except FileNotFoundError:
            found = {}
    start = len(path.strip("/"))
    files = {name.strip("/")[start:].lstrip("/"): _said(one) for name, one in found.items()}
    files = {name: one for name, one in files.items() if name and not one.is_folder}
    if files:
        _take(folder, files)


def _take(folder: str, files: Mapping[str, Listed]) -> None:
    """Keep listings of a folder and those below, by the relative names of all files."""
    made: dict[str, dict[str, Listed]] = {folder: {}}
    for name, one in files.items():
        at = folder
        *folders, last = name.split("/")
        for part in folders:
            made[at][part] = Listed(True)
            at = f"{at}/{part}" if not at.endswith("/") else at + part
            made.setdefault(at, {})
        made[at][last] = one
    _folders.update(made)


def _known(path: str) -> Listed | None:
    """What is known of a file or folder; None where there is none."""
    if path in _alone:
        return _alone[path]
    folder = parent(path)
    if path not in _roots and folder != path:
        above = None
        with suppress(OSError):
            above = _listing(folder)
        if above is not None:
            return above.get(path.rpartition("/")[2])
    one = _info(path) if path.startswith(_HTTP) else None  # a folder there is a page; to list a file is to fetch it
    if one is None and _listing(path) is not None:
        return Listed(True)
    _alone[path] = one or _info(path)
    return _alone[path]


def _info(path: str) -> Listed | None:
    system, name = inside(path)
    with named(path):
        try:
            told = again(system, lambda: system.info(name))
        except FileNotFoundError:
            return None
    return None if path.startswith(_HTTP) and told.get("mimetype") == "text/html" else _said(told)


def is_file(path: str) -> bool:
    known = _known(path)
    return known is not None and not known.is_folder


def is_folder(path: str) -> bool:
    known = _known(path)
    return known is not None and known.is_folder


def size(path: str) -> int:
    """The bytes of a file."""
    return _sized(path).size or 0


def _sized(path: str) -> Listed:
    """A file whose size is known, by asking where the listing does not say it."""
    known = _known(path)
    if known is None or known.is_folder:
        raise FileNotFoundError(errno.ENOENT, "no such file", path)
    if known.size is None:
        asked = _info(path)
        if asked is None or asked.size is None:
            raise OSError(errno.EIO, "the server does not say how large it is: copy it here", path)
        known = replace(asked, is_folder=False)
        above = _folders.get(parent(path))
        if above is not None:
            above[path.rpartition("/")[2]] = known
        else:
            _alone[path] = known
    return known


def stamps(paths: Sequence[str]) -> list[tuple[str, int, int, int]]:
    """Path, size and a number that changes with the file, listed anew."""
    for store in {store_of(path) for path in paths}:
        _forget(store)
    sizes(paths)
    found = [(path, _sized(path)) for path in paths]
    return [(path, one.size or 0, int(one.version or "0", 16), 0) for path, one in found]


def sizes(paths: Iterable[str]) -> dict[str, int]:
    """The bytes of files, as far as they can be told. What listings do not say is asked for, many at a time."""

    def ask(path: str) -> int:
        try:
            return size(path)
        except OSError:
            return -1

    found: dict[str, int] = {}
    unsaid = []
    for path in dict.fromkeys(paths):
        with suppress(OSError):
            known = _known(path)
            if known is not None and known.size is not None:
                found[path] = known.size
            elif known is not None and not known.is_folder:
                unsaid.append(path)
    if unsaid:
        with ThreadPoolExecutor(min(AT_ONCE, len(unsaid)), "ckptlab-sizes") as threads:
            found |= {path: size for path, size in zip(unsaid, threads.map(ask, unsaid), strict=True) if size >= 0}
    return found


# Bytes


class _Blocks:
    """The blocks that were fetched last, by (path, version, number)."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._held: OrderedDict[tuple[str, str, int], bytes] = OrderedDict()
        self._nbytes = 0
        self._ends: OrderedDict[tuple[str, str, int], int] = OrderedDict()

    def get(self, key: tuple[str, str, int]) -> bytes | None:
        with self._lock:
            found = self._held.get(key)
            if found is not None:
                self._held.move_to_end(key)
            return found

    def put(self, key: tuple[str, str, int], block: bytes) -> None:
        with self._lock:
            before = self._held.pop(key, b"")
            self._held[key] = block
            self._nbytes += len(block) - len(before)
            while self._nbytes > CACHE:
                self._nbytes -= len(self._held.popitem(last=False)[1])

    def further(self, path: str, version: str, first: int, count: int) -> int:
        """How many blocks behind those that are read to fetch along: some where they go on from where others ended,
        twice as many each time."""
        with self._lock:
            before = self._ends.pop((path, version, first), None)
            more = 0 if before is None else min(max(2 * before, count), REQUEST // BLOCK)
            self._ends[path, version, first + count + more] = max(more, count)
            if len(self._ends) > 4096:
                self._ends.popitem(last=False)
            return more


_blocks = _Blocks()


def fetch(ranges: Sequence[Range], *, further: bool = False) -> list[bytes]:
    """The bytes of ranges of far files, each whole. further: where one goes on from the last, read on a little.

    CheckpointError where a file is shorter than it was; OSError where it cannot be read.
    """
    files = dict.fromkeys(path for path, _, _ in ranges)
    if len(files) > 1:
        sizes(files)
    known = {path: _sized(path) for path in files}
    got: dict[tuple[str, int], bytes] = {}
    missing: dict[str, set[int]] = {}
    for path, lo, hi in ranges:
        one = known[path]
        if hi > (one.size or 0):
            raise CheckpointError(
                f"{path} has {one.size} bytes, but a tensor in it ends at byte {hi}: the file was cut or replaced "
                f"since the checkpoint was opened; open that, or copy the file, again"
            )
        if lo >= hi:
            continue
        first, end = lo // BLOCK, -(-hi // BLOCK)
        lacks = False
        for number in range(first, end):
            if (path, number) not in got:
                block = _blocks.get((path, one.version, number))
                if block is None:
                    missing.setdefault(path, set()).add(number)
                    lacks = True
                else:
                    got[path, number] = block
        if further and lacks:
            start = min(n for n in range(first, end) if (path, n) not in got)
            more = _blocks.further(path, one.version, start, end - start)
            last = min(end + more, -(-(one.size or 0) // BLOCK))
            missing[path] |= {n for n in range(end, last) if _blocks.get((path, one.version, n)) is None}
    requests = [(p, lo, hi) for p, numbers in missing.items() for lo, hi in _runs(sorted(numbers), known[p].size or 0)]
    for (path, lo, _), data in zip(requests, _get(requests), strict=True):
        for i in range(0, len(data), BLOCK):
            number, block = (lo + i) // BLOCK, data[i : i + BLOCK]
            got[path, number] = block
            _blocks.put((path, known[path].version, number), block)
    return [_cut(got, path, lo, hi) for path, lo, hi in ranges]


def _cut(got: Mapping[tuple[str, int], bytes], path: str, lo: int, hi: int) -> bytes:
    if lo >= hi:
        return b""
    first, last = lo // BLOCK, (hi - 1) // BLOCK
    if first == last:
        return got[path, first][lo - first * BLOCK : hi - first * BLOCK]
    parts = [got[path, number] for number in range(first, last + 1)]
    parts[0] = parts[0][lo - first * BLOCK :]
    parts[-1] = parts[-1][: hi - last * BLOCK]
    return b"".join(parts)


def _runs(numbers: Sequence[int], end: int) -> Iterator[tuple[int, int]]:
    """Blocks in ascending order as ranges of bytes, neighbours together."""
    start = last = -1
    for number in numbers:
        if start >= 0 and ((number - last - 1) * BLOCK > GAP or (number + 1 - start) * BLOCK > REQUEST):
            yield start * BLOCK, (last + 1) * BLOCK
            start = -1
        start = number if start < 0 else start
        last = number
    if start >= 0:
        yield start * BLOCK, min((last + 1) * BLOCK, end)


class _ShortError(OSError):
    """Less arrived than was asked for."""


def _get(requests: Sequence[Range]) -> list[bytes]:
    """Ranges of files as they are, asked for again where that fails."""
    found: list[bytes | None] = [None] * len(requests)
    left = list(range(len(requests)))
    for attempt in range(TRIES):
        failed: list[tuple[int, Exception]] = []
        for i, data in zip(left, _get_once([requests[i] for i in left]), strict=True):
            path, lo, hi = requests[i]
            if isinstance(data, Exception):
                failed.append((i, data))
            elif len(data) > hi - lo:
                raise OSError(errno.EIO, "the server sends whole files, and no ranges of them: copy it here", path)
            elif len(data) < hi - lo:
                failed.append((i, _ShortError(errno.EIO, f"{len(data)} of {hi - lo} bytes arrived", path)))
            else:
                found[i] = data
        for i, error in failed:
            path = requests[i][0]
            if attempt == TRIES - 1 or _lasts(error, None if isinstance(error, _ShortError) else inside(path)[0]):
                with named(path):
                    raise error
        left = [i for i, _ in failed]
        if not left:
            break
        time.sleep(_FIRST_WAIT * 2**attempt)
    return cast("list[bytes]", found)


def _get_once(requests: Sequence[Range]) -> list[bytes | Exception]:
    """Ranges, of each file system many at a time."""
    found: list[bytes | Exception] = [b""] * len(requests)
    by_store: dict[str, list[int]] = {}
    for i, (path, _, _) in enumerate(requests):
        by_store.setdefault(store_of(path), []).append(i)
    for store, numbers in by_store.items():
        system, _ = _system(store)
        places = [inside(requests[i][0])[1] for i in numbers]
        starts, ends = [requests[i][1] for i in numbers], [requests[i][2] for i in numbers]
        if system.async_impl:
            got = system.cat_ranges(places, starts, ends, batch_size=AT_ONCE)
        else:
            with _one_at_a_time:
                got = system.cat_ranges(places, starts, ends)
        for i, data in zip(numbers, got, strict=True):
            found[i] = data
    return found


def _lasts(error: Exception, system: Any) -> bool:
    """Whether to ask again is no use: without credentials, of what a server refuses and will refuse again, and of file
    systems that have asked again themselves."""
    status = getattr(error, "status", 0) or 0
    refused = "Credentials" in type(error).__name__ or (400 <= status < 500 and status not in (408, 429))
    return refused or isinstance(error, _LASTING) or getattr(system, "retries", 0) > 1


def again(system: Any, ask: Any) -> Any:
    """What a question to a file system is answered, asked again where it fails."""
    for attempt in range(TRIES):
        try:
            return ask()
        except Exception as error:
            if attempt == TRIES - 1 or _lasts(error, system):
                raise
            time.sleep(_FIRST_WAIT * 2**attempt)


def read(path: str, offset: int = 0, nbytes: int | None = None) -> bytes:
    """Bytes of a file, as far as it has them."""
    end = size(path)
    end = end if nbytes is None else min(offset + nbytes, end)
    return fetch([(path, offset, end)], further=True)[0] if offset < end else b""


def ahead(ranges: Sequence[Range]) -> None:
    """Fetch ranges into the cache, as many as half of it holds; what cannot be read is left to whoever reads it."""
    kept, nbytes = [], 0
    with suppress(OSError, CheckpointError):
        known = sizes(path for path, _, _ in ranges)
        for path, lo, hi in ranges:
            hi = min(hi, known.get(path, 0))
            if hi > lo and nbytes + hi - lo + 2 * BLOCK <= CACHE // 2:
                kept.append((path, lo, hi))
                nbytes += hi - lo + 2 * BLOCK
        fetch(kept)


def write(path: str, data: bytes) -> None:
    """Make a small file, which appears whole."""
    system, name = inside(path)
    with named(path):
        again(system, lambda: system.pipe_file(name, data))
    changed(path)


def put(near: str, path: str) -> None:
    """Copy a file of this machine, which appears whole."""
    system, name = inside(path)
    with named(path):
        again(system, lambda: system.put_file(near, name))
    changed(path)


def remove(gone: Iterable[str]) -> None:
    """Remove files, those that are there."""
    for path in gone:
        system, name = inside(path)
        with suppress(FileNotFoundError), named(path):
            again(system, lambda: system.rm_file(name))  # noqa: B023 (called at once)
        changed(path)


class File(io.RawIOBase):
    """A far file to be read, by ranges. `name` is its URL."""

    def __init__(self, path: str) -> None:
        self.name = path
        self._size, self._at = size(path), 0

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        if start + offset < 0:
            raise OSError(f"there is no byte {start + offset}")
        self._at = start + offset
        return self._at

    def tell(self) -> int:
        return self._at

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def read(self, nbytes: int | None = -1) -> bytes:
        data = read(self.name, self._at, None if nbytes is None or nbytes < 0 else nbytes)
        self._at += len(data)
        return data
