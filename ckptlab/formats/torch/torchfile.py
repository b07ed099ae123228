"""Torch's `.pt` files, read and written with neither torch nor the classes that they name.

A file is a zip (`torchzip`) of `data.pkl`, a pickle whose persistent ids name storages; the storages,
`data/N`; `byteorder` and `version`. The source of the format is `torch/serialization.py` (`_save`, `_load`),
and for tensors `torch/_utils.py` (`_rebuild_tensor_v2` and others).
"""

import math
import os
import re
import stat
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import islice
from types import MappingProxyType
from typing import Any, BinaryIO, ClassVar, NamedTuple, TypeVar

import ml_dtypes
import numpy as np

from ckptlab import paths
from ckptlab.arrays.dtypes import TORCHS
from ckptlab.errors import CheckpointError, UnsafeFileError, UnsupportedError
from ckptlab.formats import fileplan
from ckptlab.formats.fileplan import Elements, FilePlan, Literal, Part
from ckptlab.formats.torch import budget, legacy, pickles
from ckptlab.formats.torch.legacy import LegacyRecords
from ckptlab.formats.torch.pickles import Foreign, Global, named
from ckptlab.formats.torch.torchzip import RecordPlanner, RecordReader
from ckptlab.stored import Stored, row_major_strides, touch
from ckptlab.words import brief

T = TypeVar("T")

# The storage class that stands for a dtype.
_STORAGES: dict[str, np.dtype] = {
    "FloatStorage": np.dtype(np.float32),
    "DoubleStorage": np.dtype(np.float64),
    "HalfStorage": np.dtype(np.float16),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "LongStorage": np.dtype(np.int64),
    "IntStorage": np.dtype(np.int32),
    "ShortStorage": np.dtype(np.int16),
    "CharStorage": np.dtype(np.int8),
    "ByteStorage": np.dtype(np.uint8),
    "BoolStorage": np.dtype(np.bool_),
    "ComplexFloatStorage": np.dtype(np.complex64),
    "ComplexDoubleStorage": np.dtype(np.complex128),
}
_SIZES = {"UntypedStorage": 1, **{name: dtype.itemsize for name, dtype in _STORAGES.items()}}
_STORAGE_OF = {dtype: name for name, dtype in _STORAGES.items()}
# Dtypes without one: the storage is untyped and the dtype, of the same name in torch and numpy, an argument.
_UNTYPED = {name: dtype for name, dtype in TORCHS.items() if dtype not in _STORAGE_OF}

# Of far files:
_SMALL_FILE = 1 << 16  # bytes of one that is fetched whole
_HEAD = 1 << 12  # bytes at the start of a larger one, where it is told what it is
_TAIL = 1 << 14  # bytes at the end of a larger one, of which most directories have less
_SMALL_PICKLE = 1 << 22  # bytes of a record that is fetched along with others
_MOST_HEADERS = 4096  # records of a file of which headers are fetched together

_MOST_DIMS = 32  # numpy's limit before 2.0
_CHUNK = 1 << 18  # elements that are copied at a time
_EXPANDED_LIMIT = 1 << 26  # bytes to which a tensor may be expanded that has more elements than its storage


_OF_STORAGES = re.compile(r"torch|torch\.\w+|torch_npu\.npu")  # torch.cuda, torch.npu, torch.storage: modules


@lru_cache(maxsize=1024)
def is_of_storages(module: str) -> bool:
    """Whether torch, or a build of it for some device, keeps the names of storages there."""
    return _OF_STORAGES.fullmatch(module) is not None


class Storage(NamedTuple):
    """What tensors are views on: `numel` elements of `dtype` from byte `offset` of the file on."""

    path: str
    offset: int
    dtype: np.dtype
    numel: int


@dataclass(frozen=True, eq=False)
class Pending:
    """A tensor to be written that need not be in memory at once: `parts` hold its elements in row-major order."""

    dtype: np.dtype
    shape: tuple[int, ...]
    parts: tuple[Part, ...]

    def __post_init__(self) -> None:
        planned = sum(part.nbytes for part in self.parts)
        if planned != self.nbytes:
            raise ValueError(f"a tensor of shape {self.shape}, {self.dtype}, has {self.nbytes} bytes, not {planned}")

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def load(self) -> np.ndarray:
        """The tensor in memory."""
        held, done = np.empty(self.nbytes, np.uint8), 0
        for part in self.parts:
            for chunk in part.bytes():
                held[done : done + chunk.size] = chunk
                done += chunk.size
        return held.view(self.dtype).reshape(self.shape)


@dataclass(frozen=True, eq=False)
class Apart:
    """A stored tensor that is written with a storage of its own, whatever else is stored at the same place."""

    stored: Stored

    @property
    def dtype(self) -> np.dtype:
        return self.stored.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.stored.shape


Leaf = Stored | Apart | Pending | np.ndarray


@dataclass(frozen=True)
class Contents:
    """What a file holds: the object, and (module, name) of every class or function that its pickle names.

    saved_as: the file's name, without `.pt`, when torch saved it ("archive" where it was saved without one). sums: the
    CRC-32 of each storage, by its first byte.
    """

    value: Any
    globals_seen: frozenset[tuple[str, str]]
    saved_as: str = "archive"
    sums: Mapping[int, int] = field(default_factory=dict)


def read(path: str | os.PathLike[str]) -> Any:
    """The object in a `.pt` file, its tensors as `Stored`. Reads headers only and executes nothing.

    Raises UnsafeFileError for a file that could execute something or lies about its extents, UnsupportedError
    for one of a kind that torch itself must save again, CheckpointError for a damaged one.
    """
    return read_contents(path).value


def read_contents(path: str | os.PathLike[str], base: int = 0, length: int | None = None) -> Contents:
    """As `read`, and which classes and functions a normal loader would have imported, and may have called.

    base, length: the bytes of the file that are such a `.pt` file, where it is a part of another.
    """
    path = os.fspath(path)
    if not (paths.is_far(path) or stat.S_ISREG(os.stat(path).st_mode)):
        raise CheckpointError(f"{path} is no ordinary file (a folder, pipe or device): nothing is read of it")
    with paths.open_binary(path) as file:
        old = length is None and base == 0 and legacy.is_legacy(file)
        records = LegacyRecords(path, file, _SIZES) if old else RecordReader(path, file, base, length)
        if "byteorder" in records and records.bytes_of("byteorder") != b"little":
            raise UnsupportedError(f"{path}: its numbers are not little-endian; load it with torch and save it again")
        unpickler = _TensorUnpickler(records)
        return Contents(unpickler.load(), frozenset(unpickler.globals_seen), records.root, unpickler.sums)


def ready(items: Iterable[T], path_of: Callable[[T], str]) -> Iterator[T]:
    """The same items, one file each: of far files the headers of many are fetched at once, before they are used."""
    for group in paths.together((path_of(item), item) for item in items):
        if paths.is_far(group[0][0]):
            fetch_headers([(path, 0, None) for path, _ in group])
        yield from (item for _, item in group)


def fetch_headers(places: Sequence[tuple[str, int, int | None]]) -> None:
    """Fetch what `read_contents` will read of far files (path, base, length): first where their directories are, of
    small files all; then what those point to."""
    known: list[tuple[str, int, int | None]] = []
    ranges: list[paths.Range] = []
    sizes = paths.far_sizes(path for path, _, _ in places)
    for path, base, length in places:
        nbytes = sizes.get(path, 0) - base if length is None else length
        small = nbytes <= _SMALL_FILE
        ranges.append((path, base, base + (nbytes if small else _HEAD)))
        if not small:
            ranges.append((path, base + nbytes - _TAIL, base + nbytes))
            known.append((path, base, length))
    paths.ahead(ranges)
    wanted: list[paths.Range] = []
    for path, base, length in known:
        with suppress(OSError, CheckpointError), paths.open_binary(path) as file:
            records = RecordReader(path, file, base, length)
            wanted += [(path, lo, hi) for lo, hi in islice(records.places(_SMALL_PICKLE), _MOST_HEADERS)]
    paths.ahead(wanted)


class _TensorUnpickler(pickles.Unpickler):
    """Reads `data.pkl`: a persistent id becomes a `Storage`, what rebuilds a tensor of one a `Stored`."""

    def __init__(self, records: RecordReader | LegacyRecords) -> None:
        super().__init__(records.bytes_of("data.pkl", budget.PICKLE_BYTES), records.path)
        self._records = records
        self._storages: dict[tuple[str, str, int], Storage] = {}
        self.sums: dict[int, int] = {}

    def persistent_load(self, pid: Any) -> Storage:
        parts: tuple[Any, ...] = pid if type(pid) is tuple and len(pid) == 5 else (None,) * 5
        if type(pid) is tuple and len(pid) == 6 and pid[5] is None:  # of before 1.6: no view on another storage
            parts = pid[:5]
        tag, of, key, _, numel = parts
        fits = tag == "storage" and type(key) is str and type(numel) is int
        if not (fits and isinstance(of, Global) and is_of_storages(of.module)):
            raise UnsafeFileError(f"its pickle refers to {brief(pid)}, which is no storage; do not use it")
        found = self._storages.get((of.name, key, numel))
        if found is None:
            found = self._storages[of.name, key, numel] = self._storage(of.name, key, numel)
        return found

    def _storage(self, kind: str, key: str, numel: int) -> Storage:
        dtype = np.dtype(np.uint8) if kind == "UntypedStorage" else _STORAGES.get(kind)
        if dtype is None:
            raise UnsupportedError(f"a tensor is kept in a torch.{kind}; convert it to a plain dtype and save it again")
        offset, size = self._records.extent(f"data/{key}")
        if not 0 <= numel * dtype.itemsize <= size:
            raise UnsafeFileError(
                f"storage {key} is said to hold {numel} elements of {dtype}, but its record has {size} "
                f"bytes; the file is damaged or forged, get it again"
            )
        if isinstance(self._records, RecordReader):
            self.sums[offset] = self._records.crc(f"data/{key}")
        return Storage(self.source, offset, dtype, numel)


def _rebuild_tensor(storage: Any, start: Any, shape: Any, strides: Any, *rest: Any) -> Stored:
    """`torch._utils._rebuild_tensor_v2`; rest: requires_grad, hooks, and metadata where there is any."""
    _refuse_metadata(rest[2:])
    return _view(storage, start, shape, strides)


def _rebuild_untyped(storage: Any, start: Any, shape: Any, strides: Any, *rest: Any) -> Stored:
    """`torch._utils._rebuild_tensor_v3`; rest: requires_grad, hooks, dtype, metadata where there is any."""
    _refuse_metadata(rest[3:])
    dtype = rest[2] if len(rest) > 2 else None
    if not isinstance(dtype, Global) or dtype.module != "torch" or dtype.name not in _UNTYPED:
        raise UnsupportedError(
            f"a tensor is of {brief(dtype)}, a dtype without equal in numpy; convert it and save it again"
        )
    if type(storage) is not Storage:
        raise UnsafeFileError(f"a tensor is a view on {brief(storage)}, which is no storage; do not use it")
    kind = _UNTYPED[dtype.name]
    bytes_held = storage.numel * storage.dtype.itemsize
    return _view(storage._replace(dtype=kind, numel=bytes_held // kind.itemsize), start, shape, strides)


def _refuse_metadata(metadata: tuple[Any, ...]) -> None:
    if any(metadata):
        raise UnsupportedError(
            f"a tensor is a lazy view ({brief(metadata[0])}); call .resolve_conj().resolve_neg() and save it"
        )


def _view(storage: Any, start: Any, shape: Any, strides: Any) -> Stored:
    sizes_fit = type(shape) is type(strides) is tuple and len(shape) == len(strides) <= _MOST_DIMS
    if type(storage) is not Storage or not sizes_fit or not _naturals(start, *shape, *strides):
        raise UnsafeFileError(
            f"a tensor of shape {brief(shape)}, strides {brief(strides)} at element {brief(start)} is no view on a "
            f"storage; do not use the file"
        )
    numel = math.prod(shape)
    end = start + 1 + sum([(size - 1) * stride for size, stride in zip(shape, strides, strict=True)]) if numel else 0
    if end > storage.numel or (numel > storage.numel and numel * storage.dtype.itemsize > _EXPANDED_LIMIT):
        raise UnsafeFileError(
            f"a tensor of shape {brief(shape)}, strides {brief(strides)} at element {brief(start)} claims more "
            f"than its storage holds ({storage.numel} elements); the file is damaged or forged, get it again"
        )
    return Stored(storage.path, storage.offset + start * storage.dtype.itemsize, storage.dtype, shape, strides)


def _naturals(*numbers: Any) -> bool:
    return {*map(type, numbers)} == {int} and min(numbers) >= 0 and max(numbers) < 1 << 63


def _rebuild_parameter(data: Any, *_: Any) -> Any:
    return data if type(data) is Stored else NotImplemented


def _rebuild_on_npu(storage: Any, start: Any, shape: Any, strides: Any, *_: Any) -> Stored:
    """`torch_npu.utils.storage._rebuild_npu_tensor`: stored in row order, whatever the format on the device."""
    return _view(storage, start, shape, strides)


def _rebuild_on_device(data: Any, dtype: Any, *_: Any) -> Any:
    """`torch._utils._rebuild_device_tensor_from_cpu_tensor`: of torch_xla and others whose tensors have no storages."""
    if type(data) is not Stored or not isinstance(dtype, Global):
        return NotImplemented
    if dtype.name != data.dtype.name:
        raise UnsupportedError(f"a tensor of {data.dtype.name} is to become {brief(dtype)}; convert and save it again")
    return data


def _rebuild_from_array(*_: Any) -> Any:
    """`torch._utils._rebuild_device_tensor_from_numpy`, which older builds for other devices wrote."""
    raise UnsupportedError(
        "a tensor was saved on a device without storages (torch_xla, hpu, DirectML) as an array inside the pickle; "
        "load it with torch.load(map_location='cpu') and save it again"
    )


def _rebuild_from_type(rebuild: Any, _class: Any, args: Any, _state: Any) -> Any:
    value = rebuild(*args) if isinstance(rebuild, Global) and type(args) is tuple else NotImplemented
    return value if type(value) is Stored else NotImplemented


def is_unread(value: Any) -> bool:
    """Whether it stands for a tensor of a kind that is not read: sparse, quantised, or of a class of its own."""
    if not isinstance(value, Foreign) or not isinstance(value.callee, Global):
        return False
    return value.callee.module in ("torch._utils", "torch._tensor") and value.callee.name.startswith("_rebuild_")


_REBUILD = Global("torch._utils", "_rebuild_tensor_v2", _rebuild_tensor)
_REBUILD_UNTYPED = Global("torch._utils", "_rebuild_tensor_v3", _rebuild_untyped)
_TensorUnpickler.known = MappingProxyType(
    {
        **pickles.PLAIN_VALUES,
        **{
            (known.module, known.name): known
            for known in (
                _REBUILD,
                _REBUILD_UNTYPED,
                Global("torch._utils", "_rebuild_parameter", _rebuild_parameter),
                Global("torch._utils", "_rebuild_parameter_with_state", _rebuild_parameter),
                Global("torch._tensor", "_rebuild_from_type_v2", _rebuild_from_type),
                Global("torch_npu.utils.storage", "_rebuild_npu_tensor", _rebuild_on_npu),
                Global("torch._utils", "_rebuild_device_tensor_from_cpu_tensor", _rebuild_on_device),
                Global("torch._utils", "_rebuild_device_tensor_from_numpy", _rebuild_from_array),
                Global("torch._utils", "_rebuild_xla_tensor", _rebuild_from_array),
            )
        },
    }
)

KNOWN_GLOBALS = frozenset(_TensorUnpickler.known)
"""(module, name) of what becomes a plain value or a tensor; every other name becomes a placeholder."""


def plan(name: str, obj: Any) -> FilePlan:
    """The file `name` that holds an object as torch.save would write it.

    Tensors are `Stored`, `Apart`, `np.ndarray` or `Pending`; all else is what `pickles.Pickler` writes. The same
    object twice becomes one tensor, `Stored` that are equal share a storage. Of the model are those that are `Pending`.
    """
    leaves: dict[str, Leaf] = {}
    try:
        data = pickles.dumps(obj, lambda out: _TensorPickler(out, leaves))
    except CheckpointError as error:
        raise CheckpointError(f"{name}: {error}") from None
    records = RecordPlanner()
    records.add("data.pkl", [Literal(data)])
    records.add("byteorder", [Literal(b"little")])
    for key, leaf in leaves.items():
        records.add(f"data/{key}", _parts(leaf))
    records.add("version", [Literal(b"3\n")])
    return records.plan(name, sum(leaf.nbytes for leaf in leaves.values() if isinstance(leaf, Pending)))


def write(path: str | os.PathLike[str], obj: Any) -> None:
    """Write an object (see `plan`) as a file. Data is streamed. After an error the file is empty."""
    fileplan.write(plan(os.path.basename(path), obj), path)


class _Reference(NamedTuple):
    """What stands in the pickle for a storage that is written beside it."""

    kind: Global
    key: str
    numel: int


class _TensorPickler(pickles.Pickler):
    """Writes `data.pkl`, and collects what goes into the storages that it refers to."""

    dispatch: ClassVar[dict[type, Callable[..., None]]] = dict(pickles.Pickler.dispatch)

    def __init__(self, file: BinaryIO, leaves: dict[str, Leaf]) -> None:
        """leaves: filled with what each `data/N` is to hold, by N."""
        super().__init__(file)
        self._leaves = leaves
        self._keys: dict[Any, str] = {}

    def persistent_id(self, obj: Any) -> tuple[str, Global, str, str, int] | None:
        if type(obj) is Storage:
            whole = Stored(obj.path, obj.offset, obj.dtype, (obj.numel,), (1,))
            kind = named("torch", _STORAGE_OF.get(obj.dtype, "UntypedStorage"))
            return "storage", kind, self._key(whole), "cpu", obj.numel
        return ("storage", obj.kind, obj.key, "cpu", obj.numel) if type(obj) is _Reference else None

    def save_tensor(self, leaf: Leaf) -> None:
        dtype, shape = leaf.dtype, tuple(map(int, leaf.shape))
        key, numel = self._key(leaf), math.prod(shape)
        if dtype in _STORAGE_OF:
            storage = _Reference(named("torch", _STORAGE_OF[dtype]), key, numel)
        elif dtype.name in _UNTYPED and dtype == _UNTYPED[dtype.name]:
            storage = _Reference(named("torch.storage", "UntypedStorage"), key, numel * dtype.itemsize)
        else:
            raise TypeError(f"cannot write an array of dtype {dtype!r}: torch has no such dtype")
        args: tuple[Any, ...] = (storage, 0, shape, row_major_strides(shape), False, OrderedDict())
        if dtype in _STORAGE_OF:
            self.save_reduce(_REBUILD, args, obj=leaf)
        else:
            self.save_reduce(_REBUILD_UNTYPED, (*args, named("torch", dtype.name)), obj=leaf)

    for _leaf in (Stored, Apart, Pending, np.ndarray, np.memmap):
        dispatch[_leaf] = save_tensor
    del _leaf

    def _key(self, leaf: Leaf) -> str:
        identity = leaf if isinstance(leaf, Stored) else id(leaf)
        key = self._keys.setdefault(identity, str(len(self._keys)))
        self._leaves[key] = leaf
        return key


@dataclass(frozen=True)
class _Flat:
    """Draws a stored tensor's elements in row-major order."""

    stored: Stored

    def chunks(self, lo: int, hi: int) -> Iterator[np.ndarray]:
        size = self.stored.dtype.itemsize
        for start, view in self.stored.pieces(lo, hi, _CHUNK):
            touch(self.stored.path, self.stored.offset + start * size, view, self.stored.contiguous)
            yield view

    def label(self, index: int) -> str:
        return "a tensor of the client state"


def _parts(leaf: Leaf) -> Sequence[Part]:
    """The elements of a tensor in row-major order."""
    if isinstance(leaf, Apart):
        leaf = leaf.stored
    if isinstance(leaf, Stored):
        return [Elements(_Flat(leaf), leaf.dtype, 0, leaf.numel)]
    return [Literal(leaf.tobytes())] if isinstance(leaf, np.ndarray) else leaf.parts
