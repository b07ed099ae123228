"""`.metadata`: what torch.distributed.checkpoint says of a folder, read without torch and kept in columns.

One pickle of `Metadata` (torch/distributed/checkpoint/metadata.py). The classes in it that come by the hundred thousand
become small records here, known by their exact names in torch 2.1 to 2.13; everything else is a placeholder.
"""

from __future__ import annotations

import gc
import itertools
import os
import pickle
import threading
from collections.abc import Iterable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

import numpy as np

from ckptlab import paths
from ckptlab.aliases import Int64
from ckptlab.arrays.dtypes import TORCHS
from ckptlab.errors import CheckpointError, UnsafeFileError
from ckptlab.formats.dcp.marks import DATA, METADATA
from ckptlab.formats.torch import budget, pickles
from ckptlab.formats.torch.pickles import Foreign, Global, tuple_opcodes_at_most
from ckptlab.formats.torch.placeholders import comparisons_at_most
from ckptlab.words import brief, shorten

CHECKPOINT = "torch.distributed.checkpoint.metadata"  # the module of its classes
LABELS = "ckptlab"  # the attribute in which ckptlab's own writer says what torch has no word for
MOST_NAME = 2048  # characters of a key or the name of a file: no writer comes near
MOST = 1 << 62  # elements or bytes: beyond any file
MOST_RANKS = 1 << 17  # of a run: what is said of more is damage
_MOST_DIMS = 32
_STACK_OF_TUPLE = 256  # bytes of the stack that hashing one tuple in another takes, about threefold
_MOST_STACK = 1 << 33  # of address space: what is not touched takes no memory
_BUDGET = budget.Budget(containers=24_000_000, calls=24_000_000)  # some ten of each a chunk


class _Record:
    """What an object of a class of torch's is kept as: those of its attributes that are ours to know."""

    __slots__: tuple[str, ...] = ()

    def __init__(self, *given: Any) -> None:
        if given:
            raise CheckpointError(f"its pickle makes a {type(self).__name__} of {len(given)} arguments, expected none")

    def __setstate__(self, state: Any) -> None:
        for name in self.__slots__:
            setattr(self, name, state.get(name))
        state.clear()  # the unpickler keeps it to its end: three of them a chunk


class _Chunk(_Record):
    __slots__ = ("offsets", "sizes")
    offsets: Any
    sizes: Any


class _Index(_Record):
    __slots__ = ("fqn", "offset")
    fqn: Any
    offset: Any


class _Info(_Record):
    __slots__ = ("length", "offset", "relative_path", "transform_descriptors")
    length: Any
    offset: Any
    relative_path: Any
    transform_descriptors: Any


class _Tensor(_Record):
    __slots__ = ("chunks", "properties", "size")
    chunks: Any
    properties: Any
    size: Any


class _Bytes(_Record):
    __slots__ = ()


class _Properties(_Record):
    """`TensorProperties`, whose state is (dtype, layout, requires_grad, memory format, pinned)."""

    __slots__ = ("dtype",)

    def __setstate__(self, state: Any) -> None:
        self.dtype = state[0] if isinstance(state, tuple) else state.get("dtype")


def _size(*args: Any) -> Any:
    """`torch.Size`, as the tuple of numbers that it is made of: nothing is copied."""
    fits = len(args) == 1 and type(args[0]) is tuple and len(args[0]) <= _MOST_DIMS
    try:
        return args[0] if fits and sum(args[0]) >= 0 else NotImplemented  # of what is no number there is no sum
    except TypeError:
        return NotImplemented


def _path(*parts: Any) -> Any:
    return os.path.join(*parts) if parts and all(type(part) is str for part in parts) else NotImplemented


_OLD = "torch.distributed._shard.sharded_tensor.metadata"
_KNOWN: dict[tuple[str, str], Any] = {
    (CHECKPOINT, "ChunkStorageMetadata"): _Chunk,
    (CHECKPOINT, "MetadataIndex"): _Index,
    (CHECKPOINT, "TensorStorageMetadata"): _Tensor,
    (CHECKPOINT, "BytesStorageMetadata"): _Bytes,
    (CHECKPOINT, "TensorProperties"): _Properties,
    (_OLD, "TensorProperties"): _Properties,  # torch 2.1
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"): _Info,
    ("torch", "Size"): Global("torch", "Size", _size),
    ("collections", "OrderedDict"): pickles.PLAIN_VALUES["collections", "OrderedDict"],
    **{
        (module, name): Global(module, name, _path)
        for module in ("pathlib", "pathlib._local")  # the second from Python 3.13 on
        for name in ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath")
    },
}


class _Unpickler(pickles.Unpickler):
    """Reads a `.metadata` of millions of tuples, which Python's slow unpickler would take minutes to rehearse."""

    known: ClassVar[Mapping[tuple[str, str], Any]] = _KNOWN

    def _load(self) -> Any:
        """In a thread whose stack is deep enough to hash a tuple of all the tuples there are, nested in one another."""
        if budget.examine(self._data, _BUDGET):
            self.rehearse()
        stack = 1 << 23 | (tuple_opcodes_at_most(self._data) * _STACK_OF_TUPLE + 4095 & ~4095)
        if stack > _MOST_STACK:
            raise UnsafeFileError(
                f"it makes more tuples than a stack of {_MOST_STACK:,} bytes could hold; do not use it"
            )
        found: Future[Any] = Future()

        def run() -> None:
            try:
                with comparisons_at_most(pickles.COMPARISONS):
                    found.set_result(pickle.Unpickler.load(self))
            except BaseException as error:  # to be raised where it is waited for
                found.set_exception(error)

        before = threading.stack_size(stack)
        try:
            thread = threading.Thread(target=run)
            thread.start()
        except RuntimeError:  # no room for its stack
            raise MemoryError from None
        finally:
            threading.stack_size(before)
        thread.join()
        return found.result()


@dataclass(frozen=True)
class Entry:
    """One tensor of `.metadata`: its chunks, one a row, sorted by where they begin.

    `path`: the key in parts, as the program nested it; None where that is not said. `starts`, `sizes`: (chunks, dims).
    `file`: index into `Metadata.files`; `offset`, `length`: bytes of the item in that file.
    """

    key: str
    path: tuple[str | int, ...] | None
    shape: tuple[int, ...]
    dtype: np.dtype
    starts: Int64
    sizes: Int64
    file: Int64
    offset: Int64
    length: Int64


@dataclass(frozen=True)
class Blob:
    """One entry of `.metadata` that is a pickled object, not a tensor."""

    key: str
    path: tuple[str | int, ...] | None
    file: int
    offset: int
    length: int


@dataclass(frozen=True)
class Metadata:
    """What one or several `.metadata` files say together.

    `folder`: relative paths of `files` begin there. `transforms`: file index → what its streams went through.
    `extra`: what Megatron-core adds (`mcore_data`; `ranks`, how many planned), and `LABELS`.
    """

    folder: str
    tensors: Mapping[str, Entry]
    blobs: Mapping[str, Blob]
    files: tuple[str, ...]
    transforms: Mapping[int, str] = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict)
    lost: tuple[str, ...] = ()

    @cached_property
    def ranks(self) -> Int64:
        """The rank that wrote each file, by its name; -1 where that does not say."""
        found = (DATA.fullmatch(os.path.basename(name)) for name in self.files)
        return np.array([int(match[1]) if match else -1 for match in found], np.int64)

    def path(self, file: int) -> str:
        """The file of that index."""
        return os.path.join(self.folder, self.files[file])


def read_metadata(folder: str, names: Iterable[str]) -> Metadata:
    """What the named files of a folder (`.metadata`, or one `__{rank}.metadata` of each rank) say together.

    CheckpointError, naming file and key, where one is damaged or says what no writer does.
    """
    made = _Columns(folder)
    for name in names:
        path = os.path.join(folder, name)
        if (size := paths.size(path)) > budget.PICKLE_BYTES:
            raise UnsafeFileError(
                f"{path}: has {size:,} bytes, more than the {budget.PICKLE_BYTES:,} that any checkpoint's has; do not "
                "use it"
            )
        root = _load(paths.read(path), path)
        try:
            made.add(root)
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {error}") from None
        except (TypeError, ValueError, AttributeError, KeyError, OverflowError, RecursionError) as error:
            raise CheckpointError(
                f"{path}: does not say what torch.distributed.checkpoint writes ({type(error).__name__}: {error}): "
                "damaged or forged; copy it again"
            ) from None
    try:
        return made.metadata()
    except CheckpointError as error:
        raise CheckpointError(f"{os.path.join(folder, METADATA)}: {error}") from None


def _load(data: bytes, source: str) -> Any:
    """The object in a pickle. The garbage collector, which would go through a million objects again and again as they
    are made, waits."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        return _Unpickler(data, source).load()
    finally:
        if collecting:
            gc.enable()


class _Columns:
    """Chunks gathered by key, each (starts, sizes, file, offset, length)."""

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self.files: dict[str, int] = {}
        self.transforms: dict[int, str] = {}
        self.tensors: dict[str, tuple[Any, tuple[int, ...], np.dtype, dict[Any, tuple[Any, int, int, int]]]] = {}
        self.blobs: dict[str, Blob] = {}
        self.extra: dict[str, Any] = {}
        self.lost: list[str] = []

    def add(self, root: Any) -> None:
        if not isinstance(root, Foreign) or root.name != "Metadata" or not isinstance(root.state, dict):
            raise CheckpointError(f"holds {_said(root)}, expected a Metadata of {CHECKPOINT}: no `.metadata` of torch")
        entries, storage = root.state.get("state_dict_metadata"), root.state.get("storage_data")
        if not isinstance(entries, dict) or not isinstance(storage, dict):
            raise CheckpointError(
                "names no entries or no places of them (state_dict_metadata, storage_data): it is cut or forged"
            )
        paths = root.state.get("planner_data")
        paths = paths if isinstance(paths, dict) else {}
        self.extra.setdefault("order", list(paths))
        places: dict[str, dict[Any, tuple[int, int, int]]] = {}
        for index, info in storage.items():
            if type(index) is not _Index or type(info) is not _Info:
                raise CheckpointError(f"storage_data holds {_said(index)} with {_said(info)}, expected places of items")
            places.setdefault(index.fqn, {})[index.offset] = self._place(index.fqn, info)
        for key, entry in entries.items():
            if type(key) is not str or len(key) > MOST_NAME or type(entry) not in (_Tensor, _Bytes):
                raise CheckpointError(f"the entry {brief(key)} is {_said(entry)}, expected a tensor or bytes by name")
            self._entry(key, entry, _parts(paths.get(key)), places.get(key, {}))
        told = {key: root.state.get(key) for key in ("mcore_data", LABELS)}
        self.extra |= {key: value for key, value in told.items() if isinstance(value, dict)}
        if isinstance(root.state.get("all_local_plans"), list):
            self.extra["ranks"] = len(root.state["all_local_plans"])

    def _place(self, key: str, info: _Info) -> tuple[int, int, int]:
        name, offset, length = info.relative_path, info.offset, info.length
        file = self.files.get(name) if type(name) is str else None
        file = self._file(key, info) if file is None else file
        if not natural(offset) or not natural(length):
            raise _no_place(key, info)
        if info.transform_descriptors:
            told = info.transform_descriptors
            self.transforms[file] = shorten(", ".join(map(str, told)), 200) if isinstance(told, list) else brief(told)
        return file, offset, length

    def _file(self, key: str, info: _Info) -> int:
        """The number of a file that is named for the first time."""
        name = info.relative_path
        if type(name) is not str or not 0 < len(name) <= MOST_NAME or "\0" in name:
            raise _no_place(key, info)
        if os.path.isabs(name) or ".." in name.replace("\\", "/").split("/"):
            raise CheckpointError(f"{brief(key)}: lies in {brief(name)}, outside of the folder: do not use it")
        return self.files.setdefault(name, len(self.files))

    def _entry(self, key: str, entry: Any, path: Any, places: Mapping[Any, tuple[int, int, int]]) -> None:
        if type(entry) is _Bytes:
            found = next(iter(places.values()), None)
            if found is None:
                self.lost.append(key)
            else:
                self.blobs.setdefault(key, Blob(key, path, *found))
            return
        shape, dtype = entry.size, getattr(entry.properties, "dtype", None)
        if type(shape) is not tuple or len(shape) > _MOST_DIMS or not all(map(natural, shape)):
            raise CheckpointError(f"{key}: its size is {brief(shape)}, expected lengths of dims")
        if not isinstance(dtype, Global) or dtype.module != "torch" or dtype.name not in TORCHS:
            raise CheckpointError(
                f"{key}: its dtype is {brief(dtype)}, which has no equal in numpy: convert it and save again"
            )
        known = self.tensors.setdefault(key, (path, shape, TORCHS[dtype.name], {}))
        if known[1] != shape or known[2] != TORCHS[dtype.name]:
            raise CheckpointError(
                f"{key}: has shape {shape} of {dtype.name} here, {known[1]} of {known[2]} in another rank's file: they "
                "are of different saves"
            )
        for chunk in entry.chunks:
            start, size = chunk.offsets, chunk.sizes
            if type(start) is not tuple or type(size) is not tuple or not len(start) == len(size) == len(shape):
                raise CheckpointError(f"{key}: a chunk at {brief(start)} of {brief(size)}, the tensor is {shape}")
            if start not in places:
                self.lost.append(f"{key} at {brief(start)}")
            elif start not in known[3]:
                known[3][start] = (size, *places[start])

    def metadata(self) -> Metadata:
        tensors = {key: _entry_of(key, *known) for key, known in self.tensors.items()}
        packed = np.array(list(self.transforms), np.int64)
        for entry in tensors.values():
            _fits(entry, packed)
        return Metadata(
            self.folder,
            tensors,
            self.blobs,
            tuple(self.files),
            self.transforms,
            self.extra,
            tuple(self.lost),
        )


def _entry_of(
    key: str, path: Any, shape: tuple[int, ...], dtype: np.dtype, chunks: Mapping[Any, tuple[Any, int, int, int]]
) -> Entry:
    n = len(chunks)
    table = [(*start, *size, file, offset, length) for start, (size, file, offset, length) in chunks.items()]
    d, plain = len(shape), {int}.issuperset(map(type, itertools.chain.from_iterable(table)))
    values = sorted(table) if plain else []
    if not plain or (values and not 0 <= min(map(min, values)) <= max(map(max, values)) < MOST):
        raise CheckpointError(f"{key}: a chunk begins or is sized by what is no number of elements")
    columns = np.array(values, np.int64).reshape(n, 2 * d + 3)
    starts, sizes = np.ascontiguousarray(columns[:, :d]), np.ascontiguousarray(columns[:, d : 2 * d])
    outside = (starts < 0) | (sizes < 0) | (starts + sizes > np.array(shape, np.int64)) if n else np.zeros(0, bool)
    if outside.any():
        row = int(np.argwhere(outside)[0][0])
        raise CheckpointError(
            f"{key}: a chunk at {tuple(starts[row].tolist())} of {tuple(sizes[row].tolist())} reaches out of the "
            f"tensor, whose shape is {shape}"
        )
    file, offset, length = (np.ascontiguousarray(columns[:, i]) for i in (-3, -2, -1))
    return Entry(key, path, shape, dtype, starts, sizes, file, offset, length)


def _fits(entry: Entry, packed: Int64) -> None:
    """CheckpointError where a chunk is said to lie in fewer bytes than it has, or two in the same."""
    if not len(entry.file):
        return
    nbytes = entry.sizes.prod(axis=1, dtype=np.float64) * entry.dtype.itemsize  # of what is forged, more than 2^63
    small = (nbytes > entry.length) & ~np.isin(entry.file, packed)
    if small.any():
        row = int(np.argmax(small))
        raise CheckpointError(
            f"{entry.key}: a chunk of {tuple(entry.sizes[row].tolist())} of {entry.dtype} is said to lie in "
            f"{entry.length[row]:,} bytes, which cannot hold it: damaged or forged; copy it again"
        )
    held = np.stack([entry.file, entry.offset], 1)[nbytes > 0]
    if len(held) > 1 and len(np.unique(held, axis=0)) < len(held):
        raise CheckpointError(f"{entry.key}: two chunks are said to lie in the same bytes: damaged or forged")


def _parts(path: Any) -> tuple[str | int, ...] | None:
    fits = type(path) is tuple and path and all(type(part) in (str, int) for part in path)
    return path if fits else None


def natural(value: Any) -> bool:
    """Whether it is a number of elements or bytes that there could be."""
    return type(value) is int and 0 <= value < MOST


def _no_place(key: str, info: _Info) -> CheckpointError:
    name, offset, length = map(brief, (info.relative_path, info.offset, info.length))
    return CheckpointError(f"{brief(key)}: lies in {name}, bytes {offset} + {length}: no place in a file")


def _said(value: Any) -> str:
    """A value in an error: what it is, without what it holds."""
    if isinstance(value, Foreign):
        return f"a {value.module}.{value.name}"
    return f"a {type(value).__name__}"
