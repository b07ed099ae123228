"""`.metadata` of a folder that is written: what lies where, pickled as torch's own pickler does."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import numpy as np

from ckptlab.formats.dcp.keys import Path
from ckptlab.formats.dcp.metadata import CHECKPOINT, LABELS
from ckptlab.formats.torch import pickles
from ckptlab.formats.torch.pickles import Foreign, foreign, named

VERSION = "1.0.0"  # of the format, as torch 2.9 to 2.13 say it


class Place(NamedTuple):
    """Where an item lies: its file within the folder, first byte, bytes."""

    file: str
    offset: int
    length: int


class Chunk(NamedTuple):
    """A box of a tensor: where it begins, its lengths, and where it lies."""

    start: tuple[int, ...]
    size: tuple[int, ...]
    place: Place


@dataclass
class Index:
    """What one `.metadata` says of the files beside it, in the folder `under` the destination's."""

    under: str
    tensors: list[tuple[str, tuple[int, ...], np.dtype, list[Chunk]]] = field(default_factory=list)
    objects: list[tuple[str, Place]] = field(default_factory=list)
    paths: dict[str, Path] = field(default_factory=dict)

    def tensor(self, path: Path, shape: Sequence[int], dtype: np.dtype, chunks: list[Chunk]) -> None:
        self.tensors.append((self._key(path), tuple(shape), dtype, chunks))

    def object(self, path: Path, place: Place) -> None:
        self.objects.append((self._key(path), place))

    def _key(self, path: Path) -> str:
        key = ".".join(map(str, path))
        self.paths[key] = path
        return key

    def pickled(self, save_id: str, told: Mapping[str, Any] | None) -> bytes:
        """The pickle of torch's `Metadata`, built as torch's own pickler builds it. told: labels, if there are any."""
        layout = foreign("torch.serialization", "_get_layout", "torch.strided")
        memory = foreign(CHECKPOINT, "_MEM_FORMAT_ENCODING", 0)
        properties: dict[np.dtype, Foreign] = {}
        entries: dict[str, Any] = {}
        places: list[tuple[Any, Any]] = []
        for key, place in self.objects:
            entries[key] = Foreign(_BYTES, new=True)
            places.append((_Once(_INDEX, {"fqn": key, "index": None}), _info(place)))
        for key, shape, dtype, chunks in self.tensors:
            if dtype not in properties:
                its = (named("torch", dtype.name), layout, False, memory, False)
                properties[dtype] = foreign(CHECKPOINT, "TensorProperties", state=its, new=True)
            held = []
            for i, (start, lengths, place) in enumerate(chunks):
                held.append(_Once(_CHUNK, {"offsets": _Lengths(start), "sizes": _Lengths(lengths)}))
                places.append((_Once(_INDEX, {"fqn": key, "offset": _Lengths(start), "index": i}), _info(place)))
            state = {"properties": properties[dtype], "size": pickles.Size(shape), "chunks": held}
            entries[key] = foreign(CHECKPOINT, "TensorStorageMetadata", state=state, new=True)
        about: dict[str, Any] = {"checkpoint_id": None, "save_id": save_id, "load_id": None, "modules": []}
        root = {
            "state_dict_metadata": entries,
            "planner_data": self.paths,
            "storage_data": _Pairs(places),
            "storage_meta": foreign(CHECKPOINT, "StorageMeta", state=about, new=True),
            "version": VERSION,
            **({} if told is None else {LABELS: told}),
        }
        return pickles.dumps(foreign(CHECKPOINT, "Metadata", state=root, new=True), _MetadataPickler)


def _info(place: Place) -> _Once:
    return _Once(_INFO, {"relative_path": place.file, "offset": place.offset, "length": place.length})


class _Pairs(tuple[tuple[Any, Any], ...]):
    """A dict to be written whose keys are placeholders: told apart by what they hold, not by what they are."""

    __slots__ = ()


class _Once(NamedTuple):
    """An object of a class of torch's that nothing else refers to: made by `__new__`, then given its state."""

    kind: pickles.Global
    state: Mapping[str, Any]


class _Lengths(tuple[int, ...]):
    """A `torch.Size` that nothing else refers to."""

    __slots__ = ()


class _MetadataPickler(pickles.Pickler):
    """Writes what comes by the hundred thousand without a number in the memo, which a reader would fill as well."""

    dispatch: ClassVar[dict[type, Callable[..., None]]] = dict(pickles.Pickler.dispatch)

    def save_once(self, obj: _Once) -> None:
        self.save(obj.kind)
        self.write(pickle.EMPTY_TUPLE + pickle.NEWOBJ + pickle.EMPTY_DICT + pickle.MARK)
        for key, value in obj.state.items():
            self.save(key)
            self.save(value)
        self.write(pickle.SETITEMS + pickle.BUILD)

    def save_lengths(self, obj: _Lengths) -> None:
        self.save(pickles.TORCH_SIZE)
        self.write(pickle.MARK)
        for length in obj:
            self.save(length)
        self.write(pickle.TUPLE + pickle.TUPLE1 + pickle.REDUCE)

    def save_pairs(self, obj: _Pairs) -> None:
        self.write(pickle.EMPTY_DICT)
        self.memoize(obj)
        for key, value in obj:
            self.save(key)
            self.save(value)
            self.write(pickle.SETITEM)

    dispatch[_Pairs] = save_pairs
    dispatch[_Once] = save_once
    dispatch[_Lengths] = save_lengths


_CHUNK, _INDEX, _BYTES = (
    named(CHECKPOINT, name) for name in ("ChunkStorageMetadata", "MetadataIndex", "BytesStorageMetadata")
)
_INFO = named("torch.distributed.checkpoint.filesystem", "_StorageInfo")
