"""A tensor that lies in a file: where, of which dtype and shape. No data until it is mapped.

`Stored` is what every reader hands out and every writer takes, so that what travels between
processes is a path and an offset. Data comes as read-only numpy views on files mapped whole.
"""

import errno
import math
import mmap
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np

from ckptlab import paths
from ckptlab.arguments import explained
from ckptlab.errors import CheckpointError, LayoutError, UnsafeFileError

_POPULATE_READ = 22  # Linux 5.14 on
_FAR_PIECE = 32 << 20  # bytes of a far file that are fetched at a time
_SPARSE = 8  # a view's bytes are brought in with what lies between them where that is less than so many times as much
RESIDENT = 64 << 20  # bytes of mapped files that are read before their pages are let go


def row_major_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides, in elements, of a contiguous tensor of this shape."""
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor in a file.

    path: the file. offset: bytes from its start to the tensor's first element. dtype: numpy's, with
    ml_dtypes for bfloat16 and fp8. shape: sizes by tensor dim. strides: in elements, none negative.
    """

    path: str
    offset: int
    dtype: np.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def __reduce__(self) -> tuple[Callable[..., "Stored"], tuple[Any, ...]]:
        where = self.path, self.offset, self.dtype, self.shape, self.strides
        options = paths.options_known(self.path) if paths.is_far(self.path) else {}
        return (_with_options, (options, *where)) if options else (Stored, where)

    def __setstate__(self, state: object) -> NoReturn:
        # The one that dataclasses make sets fields: a hostile pickle could move a tensor that was checked.
        raise UnsafeFileError("its pickle tries to change a tensor after it was made; do not use it")

    @property
    def numel(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """The bytes of its elements, each counted once for every place it stands at."""
        return self.numel * self.dtype.itemsize

    @property
    def contiguous(self) -> bool:
        """Whether its elements lie one after the other in row-major order."""
        expected = 1
        for size, stride in zip(reversed(self.shape), reversed(self.strides), strict=True):
            if size != 1 and stride != expected:
                return self.numel == 0
            expected *= size
        return True

    def map(self) -> np.ndarray:
        """The tensor as a read-only view on the mapped file, `shape` as declared, nothing copied.

        Raises CheckpointError where the file has become too short for it since it was opened.
        """
        if self.numel == 0:
            return _read_only(np.empty(self.shape, self.dtype))
        if paths.is_far(self.path):
            return _read_only(_far_array(self))
        last = sum((size - 1) * stride for size, stride in zip(self.shape, self.strides, strict=True))
        whole = _mapped_files.get(self.path, self.offset + (last + 1) * self.dtype.itemsize)
        strides = tuple(stride * self.dtype.itemsize for stride in self.strides)
        return np.ndarray(self.shape, self.dtype, buffer=whole, offset=self.offset, strides=strides)

    def read_one(self) -> np.generic:
        """The element of a tensor that has but one, without mapping its file.

        Raises CheckpointError where the file has become too short for it since it was opened.
        """
        if paths.is_far(self.path):
            return self.map().reshape(-1)[0]
        data = paths.read(self.path, self.offset, self.dtype.itemsize)
        if len(data) < self.dtype.itemsize:
            raise CheckpointError(_cut(self.path, self.offset + len(data), self.offset + self.dtype.itemsize))
        return np.frombuffer(data, self.dtype)[0]

    def private(self) -> np.ndarray:
        """A contiguous tensor mapped for the caller alone: may be written to, which changes no file.

        Raises CheckpointError where the file has become too short, or was replaced, since it was opened.
        """
        if paths.is_far(self.path):
            found = _far_array(self)
            return found if found.flags.writeable else found.copy()
        _mapped_files.get(self.path, self.offset + self.nbytes)  # is the file as long as it must be?
        skipped = self.offset % mmap.ALLOCATIONGRANULARITY
        with open(self.path, "rb") as file:
            pages = mmap.mmap(
                file.fileno(), skipped + self.nbytes, access=mmap.ACCESS_COPY, offset=self.offset - skipped
            )
        return np.ndarray(self.shape, self.dtype, buffer=pages, offset=skipped)

    @property
    def flat(self) -> np.ndarray:
        """Its elements in row-major order, 1-D and read-only: a view where it is contiguous, else a copy."""
        if not self.contiguous:
            return _read_only(self.map().reshape(-1))
        numel = self.numel
        if numel == 0 or paths.is_far(self.path):
            return self.reshape((numel,)).map()
        whole = _mapped_files.get(self.path, self.offset + numel * self.dtype.itemsize)
        return np.ndarray((numel,), self.dtype, buffer=whole, offset=self.offset)

    def reshape(self, shape: tuple[int, ...]) -> "Stored":
        """The same elements under another shape. Raises LayoutError where that needs a copy."""
        if not self.contiguous:
            raise LayoutError(
                f"{self.path}: a tensor of shape {self.shape}, strides {self.strides}, is not contiguous and "
                f"cannot be reshaped to {shape} without a copy; reshape what .map() gives"
            )
        if math.prod(shape) != self.numel:
            raise LayoutError(f"{self.path}: shape {self.shape} has {self.numel} elements, {shape} has not")
        return Stored(self.path, self.offset, self.dtype, shape, row_major_strides(shape))

    def pieces(self, lo: int, hi: int, most: int) -> Iterator[tuple[int, np.ndarray]]:
        """Elements lo … hi-1 in row-major order, in views of at most `most`: each with the first one's number."""
        flat = None if self.contiguous and paths.is_far(self.path) else self.flat
        for start in range(lo, hi, most):
            stop = min(start + most, hi)
            yield start, self.elements(start, stop - start).map() if flat is None else flat[start:stop]

    def window(self, held: Sequence[slice]) -> "Stored":
        """A part of it, by slices with a start and a stop in every dim; no data is read."""
        steps = [s.step or 1 for s in held]
        first = sum(s.start * stride for s, stride in zip(held, self.strides, strict=True))
        shape = tuple(-(-(s.stop - s.start) // step) for s, step in zip(held, steps, strict=True))
        strides = tuple(stride * step for stride, step in zip(self.strides, steps, strict=True))
        return Stored(self.path, self.offset + first * self.dtype.itemsize, self.dtype, shape, strides)

    @property
    def span(self) -> tuple[str, int, int]:
        """Its file, and where its first element begins and its last one ends there."""
        last = sum((size - 1) * stride for size, stride in zip(self.shape, self.strides, strict=True))
        return self.path, self.offset, self.offset + (last + 1) * self.dtype.itemsize * (self.numel > 0)

    def elements(self, start: int, count: int) -> "Stored":
        """`count` elements from `start` on in row-major order, of a contiguous tensor; no data is read."""
        if not self.contiguous or not 0 <= start <= start + count <= self.numel:
            raise LayoutError(
                f"{self.path}: elements {start} to {start + count} are not one piece of a tensor of shape "
                f"{self.shape}, strides {self.strides}; slice what .flat gives"
            )
        return Stored(self.path, self.offset + start * self.dtype.itemsize, self.dtype, (count,), (1,))


def _with_options(options: dict[str, dict[str, Any]], *where: Any) -> Stored:
    paths.options_told(options)
    return Stored(*where)


def _far_array(stored: Stored) -> np.ndarray:
    """A tensor in a far file as an array of its own: what lies between its rows is left where it is. Large ones come in
    pieces, so that they are in memory once."""
    from ckptlab.far import GAP, fetch

    if stored.numel == 0:
        return _read_only(np.empty(stored.shape, stored.dtype))
    path, lo, hi = stored.span
    if stored.contiguous and hi - lo > _FAR_PIECE:
        whole = np.empty(hi - lo, np.uint8)
        for at in range(lo, hi, _FAR_PIECE):
            end = min(at + _FAR_PIECE, hi)
            whole[at - lo : end - lo] = np.frombuffer(fetch([(path, at, end)], further=True)[0], np.uint8)
        return whole.view(stored.dtype).reshape(stored.shape)
    if len(stored.shape) > 1 and stored.strides[0] * stored.dtype.itemsize > GAP and hi - lo > 2 * stored.nbytes:
        parts = [slice(0, n) for n in stored.shape[1:]]
        rows = [stored.window([slice(i, i + 1), *parts]) for i in range(stored.shape[0])]
        fetched = fetch([row.span for row in rows])
    else:
        rows, fetched = [stored], fetch([(path, lo, hi)], further=True)
    made = [_viewed(row, data) for row, data in zip(rows, fetched, strict=True)]
    return made[0] if len(made) == 1 else np.concatenate(made)


def _viewed(stored: Stored, data: bytes) -> np.ndarray:
    strides = tuple(stride * stored.dtype.itemsize for stride in stored.strides)
    return np.ndarray(stored.shape, stored.dtype, buffer=data, strides=strides)


def _read_only(array: np.ndarray) -> np.ndarray:
    array.flags.writeable = False
    return array


def _cut(path: str, size: int, needed: int) -> str:
    return (
        f"{path} has {size} bytes, but a tensor in it ends at byte {needed}: the file was cut or replaced since the "
        "checkpoint was opened; open that, or copy the file, again"
    )


def _mapped(path: str, size: int) -> mmap.mmap:
    with paths.naming(path), open(path, "rb") as file:
        return mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ)


class _MappedFiles:
    """The files mapped last, each mapped whole and once however many tensors are taken from it.

    A file that has changed since (another size, time or inode) is mapped anew. Views keep their mapping
    alive, so one that is dropped from here is unmapped only when the last of them is gone.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._used = 0
        self._lock = threading.Lock()
        self._files: OrderedDict[str, tuple[tuple[int, ...], mmap.mmap]] = OrderedDict()

    def get(self, path: str, needed: int) -> mmap.mmap:
        """The whole of a file of at least `needed` bytes."""
        with self._lock:
            found = os.stat(path)
            # Touching a mapped page past the end of its file kills the process: hence a look at the size.
            if found.st_size < needed:
                raise CheckpointError(_cut(path, found.st_size, needed))
            version = (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)
            known = self._files.get(path)
            if known is not None and known[0] == version:
                self._files.move_to_end(path)
                return known[1]
            try:
                whole = _mapped(path, found.st_size)
            except OSError as error:
                if error.errno not in (errno.EMFILE, errno.ENOMEM):
                    raise
                self._files.clear()  # what nobody looks at gives its open file and its addresses back
                whole = _mapped(path, found.st_size)
            self._files[path] = version, whole
            self._files.move_to_end(path)
            if len(self._files) > self._capacity:
                self._files.popitem(last=False)
            return whole

    def populate(self, path: str, offset: int, nbytes: int) -> None:
        """Bring bytes of a mapped file in at once: faster than page by page, and what cannot be read (a disk that
        fails, a file cut meanwhile) is an error and not the end of the process."""
        known = self._files.get(path)
        start = offset - offset % mmap.PAGESIZE
        if known is None or start + 1 > len(known[1]):
            return
        try:
            known[1].madvise(_POPULATE_READ, start, min(offset + nbytes, len(known[1])) - start)
        except OSError as error:
            if error.errno != errno.EINVAL:  # a kernel that does not know it
                raise OSError(error.errno, f"cannot be read ({error.strerror}), or was cut meanwhile", path) from None

    def used(self, nbytes: int) -> None:
        """Count bytes that were read; now and then let go of the pages, which a process otherwise keeps resident."""
        with self._lock:
            self._used += nbytes
            if self._used < RESIDENT:
                return
            self._used = 0
            files = [whole for _, whole in self._files.values()]
        for whole in files:  # a page that is needed again comes back from the page cache
            whole.madvise(mmap.MADV_DONTNEED)


_mapped_files = _MappedFiles(capacity=64)


@dataclass
class Reading:
    """What was read since `reading` began: `bytes` of tensors, each as often as it was read."""

    bytes: int = 0


_reading: ContextVar[Reading | None] = ContextVar("reading", default=None)


@explained
@contextmanager
def reading() -> Iterator[Reading]:
    """Count what is read from tensors' files:

        with ckptlab.reading() as read:
            ckpt.full()["wte.weight"].load()
        read.bytes

    Counts what this thread reads, and the tasks that it has run (`stats`, `diff`, `check`, `updates`, wherever those
    run); not what other threads of the program read meanwhile.
    """
    try:
        with reading_apart() as mine:
            yield mine
    finally:
        add_read(mine.bytes)


@contextmanager
def reading_apart() -> Iterator[Reading]:
    """The same for a task, which may be run anywhere: what it reads is not counted for whoever counts around it."""
    mine = Reading()
    outer = _reading.set(mine)
    try:
        yield mine
    finally:
        _reading.reset(outer)


def add_read(nbytes: int) -> None:
    """Count bytes that were read, here or in a task."""
    counted = _reading.get()
    if counted is not None:
        counted.bytes += nbytes


Observer = Callable[[str, int, np.ndarray | None], None]

_observer: ContextVar[Observer | None] = ContextVar("observer", default=None)


@contextmanager
def observed(observer: Observer) -> Iterator[None]:
    """Show an observer what is read of files from here on, before it is used: the file, the byte at which it begins,
    and the elements as they lie there; None of what does not lie in one piece."""
    outer = _observer.set(observer)
    try:
        yield
    finally:
        _observer.reset(outer)


def touch(path: str, offset: int, view: np.ndarray, straight: bool = True) -> None:
    """Say that a view on a mapped file, whose first element lies at byte `offset`, is about to be used: it is brought
    in, and shown to whoever observes. straight: False of a copy, whose elements lie otherwise in the file."""
    whole = view.flags.c_contiguous
    if straight and view.size:
        last = sum((size - 1) * stride for size, stride in zip(view.shape, view.strides, strict=True))
        span = view.nbytes if whole else last + view.itemsize
        if span <= min(RESIDENT, _SPARSE * view.nbytes):
            _mapped_files.populate(path, offset, span)
    straight = straight and whole
    observer = _observer.get()
    if observer is not None:
        observer(path, offset, view if straight else None)


def note_read(nbytes: int) -> None:
    """Say that so many bytes of mapped files were read and are done with: they are counted, and a long conversion's
    memory stays small."""
    add_read(nbytes)
    _mapped_files.used(nbytes)


def scalar(value: Any) -> float | None:
    """A number, which may be stored as a tensor of one element, as optimizers' `step` is; None if it is none."""
    if isinstance(value, Stored):
        if value.numel != 1 or value.dtype.kind == "c":
            return None
        return float(np.asarray(value.read_one(), dtype=np.float64))
    return float(value) if isinstance(value, (int, float)) and abs(value) < 1 << 62 else None
