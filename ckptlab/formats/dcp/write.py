"""A catalog → the files of a DCP folder: one `.distcp` a rank, its items one after the other, and `.metadata`.

An item is a whole `.pt` file (torch/distributed/checkpoint/filesystem.py); what `dcp.load` asks of it and of
`.metadata` was found by leaving out one thing at a time (torch 2.13). What is equal lies once, and several keys name
it: steps, options, tied tensors.
"""

from __future__ import annotations

import itertools
import math
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np

from ckptlab.arrays import Drawn, Tally, shard_reader
from ckptlab.catalog import MASTER, PARAM, Catalog, Tensor
from ckptlab.formats.dcp import labels
from ckptlab.formats.dcp.index import Chunk, Index, Place
from ckptlab.formats.dcp.keys import Path
from ckptlab.formats.dcp.marks import METADATA
from ckptlab.formats.dcp.styles import KeyStyle
from ckptlab.formats.dcp.target import DCPTarget
from ckptlab.formats.fileplan import Checksum, Elements, FilePlan, Literal, Part, merged
from ckptlab.formats.torch import torchfile
from ckptlab.formats.torch.torchfile import Pending
from ckptlab.layout import Cut, DimCut
from ckptlab.mesh import Mesh
from ckptlab.plan import Holder
from ckptlab.stored import Stored

MASTER_KEY = "master_param"  # what an optimizer that keeps a weight of its own calls it

Start = tuple[int, ...]


@dataclass(frozen=True)
class Box:
    """What a rank stores of one state of one tensor, in one chunk: shard `at` of the target's cut, or a part of it."""

    name: str
    state: str
    holder: Holder
    cut: Cut
    at: tuple[int, ...]
    start: Start
    size: tuple[int, ...]


def files(source: Catalog, target: Catalog, tally: Tally | None = None) -> Iterator[FilePlan]:
    """Every file of the folder for `target` (see `target.reshape`), drawn from `source`: those of the ranks, in their
    order, and `.metadata` last."""
    return _Writer(source, target, tally).files()


class _Writer:
    def __init__(self, source: Catalog, target: Catalog, tally: Tally | None) -> None:
        self.source, self.target, self.tally = source, target, tally
        self.private: DCPTarget = target.private
        model, optimizer = self.style.folders
        self.model = Index(model)
        self.optimizer = self.model if optimizer == model else Index(optimizer)
        self._readers: dict[tuple[str, str, Holder], Any] = {}
        self._alike: dict[tuple[np.dtype, tuple[int, ...]], FilePlan] = {}  # items that differ in their elements alone

    @property
    def style(self) -> KeyStyle:
        return self.private.style

    def files(self) -> Iterator[FilePlan]:
        by_rank = self._boxes()
        chunks: dict[tuple[str, str], list[Chunk]] = {}
        folders = list({id(f): f for f in (self.model, self.optimizer)}.values())
        for rank, folder in itertools.product(range(self.target.mesh.size), folders):
            items = _Items(folder, f"__{rank}_0.distcp")
            if rank == 0 and folder is self.optimizer and self.style.optimizer is not None:
                self._optimizer(items)
            if rank == 0 and folder is self.model and not self.style.apart:
                self._client(items)
            for box in by_rank.get(rank, ()):
                if self._folder(box.name, box.state) is folder:
                    place = items.add(self._item(box, rank))
                    chunks.setdefault((box.name, box.state), []).append(Chunk(box.start, box.size, place))
            yield items.plan()
        for (name, state), its in chunks.items():
            self._entry(name, state, its)
        for folder in folders:
            told = labels.of(self.target, self.private.names) if folder is self.model else None
            yield FilePlan(folder.under + METADATA, (Literal(folder.pickled(self._save_id(folder), told)),))

    # ---------------------------------------------------------------- tensors

    def _is_weight(self, name: str, state: str) -> bool:
        """Whether a state is what the model's program has as the weight."""
        return state == PARAM or (state == MASTER and PARAM not in self.target.tensors[name].states)

    def _folder(self, name: str, state: str) -> Index:
        return self.model if self._is_weight(name, state) else self.optimizer

    def _boxes(self) -> dict[int, list[Box]]:
        """Rank → what it stores: of each shard who comes first among those that have it, and of shards without
        elements one."""
        found: dict[int, list[Box]] = {}
        for (name, state), (placement,) in self.target.placements.items():
            cut, empty = placement.cut, set()
            for holder in placement.holders:
                at = cut.coordinate(holder)
                rank = int(placement.ranks(holder)[0])
                for start, size, whole in _parts(cut, at):
                    if not math.prod(size):
                        if start in empty:
                            continue
                        empty.add(start)
                    box = Box(
                        name, state, holder, *((cut, at) if whole else (_window(cut, start, size), ())), start, size
                    )
                    found.setdefault(rank, []).append(box)
        return found

    def _item(self, box: Box, rank: int) -> FilePlan:
        dtype, key = self.target.tensors[box.name].states[box.state], (box.name, box.state, box.holder)
        if key not in self._readers:
            self._readers.clear()
            tally = self.tally and self.tally.towards(rank)
            self._readers[key] = shard_reader(self.source, self.target, box.name, box.state, box.holder, tally)
        drawn = Elements(Drawn(self._readers[key], box.cut, box.at), dtype, 0, math.prod(box.size))
        alike = self._alike.get((dtype, box.size))
        if alike is None:
            alike = torchfile.plan(box.name, Pending(dtype, box.size, (drawn,)))
            self._alike[dtype, box.size] = alike
        return replace(alike, parts=tuple(drawn if isinstance(part, Elements) else part for part in alike.parts))

    def _entry(self, name: str, state: str, chunks: list[Chunk]) -> None:
        tensor, style = self.target.tensors[name], self.style
        shape, dtype = tensor.cut.shape, tensor.states[state]
        if self._is_weight(name, state):
            for alias in (name, *tensor.aliases):
                self.model.tensor(style.weight(self.private.names[alias]), shape, dtype, chunks)
        else:
            path = style.state(self.private.names[name], MASTER_KEY if state == MASTER else state)
            self.optimizer.tensor(path, shape, dtype, chunks)

    # ---------------------------------------------------------------- what is no tensor of the model

    def _optimizer(self, items: _Items) -> None:
        style, names = self.style, self.private.names
        for i, group in enumerate(self.target.groups):
            members = [name for name in group.tensors if name in names]
            for name in members:
                for scalar, value in group.scalars_of(name).items():
                    items.leaf(style.state(names[name], scalar), _scalar(scalar, value))
            options = dict(group.options)
            if not style.flat:
                options["params"] = [names[name] for name in members]
            for name in members if style.flat else [""]:
                for option, value in options.items():
                    items.leaf(style.option(i, names[name] if name else "", str(option)), value)

    def _client(self, items: _Items) -> None:
        """What the program put in, where it was DCP's; of others the step, as torchtitan has it."""
        step = self.target.training.step
        client = self.source.client if isinstance(self.source.private, KeyStyle) else {}
        for root in client:
            items.tree((root,), client[root])
        if step is not None and "train_state" not in client:
            items.leaf(("train_state", "step"), step)

    # ---------------------------------------------------------------- what else `.metadata` says

    def _save_id(self, folder: Index) -> str:
        """The same for the same conversion, so that one which was interrupted goes on with the same bytes."""
        about = (self.source.path, self.source.files, str(self.target.mesh), self.private, folder.under)
        return str(uuid.uuid5(uuid.NAMESPACE_URL, repr(about)))


def differences(target: Catalog, found: Catalog | None) -> Iterator[str]:
    """What a folder that was written does not say as its target does."""
    names = target.private.names
    for name, tensor in target.tensors.items():
        again = found.tensors.get(names[name]) if found else None
        expected, got = _told(tensor), again and _told(again)
        if got != expected:
            yield f"{names[name]} was written as {got}, expected {expected}"


def _told(tensor: Tensor) -> tuple[tuple[int, ...], dict[str, str]]:
    """Shape and dtypes, the weight's by its own name whether or not it is the master."""
    states = {state: dtype.name for state, dtype in tensor.states.items()}
    if PARAM not in states and MASTER in states:
        states[PARAM] = states.pop(MASTER)
    return tensor.shape, states


def _scalar(name: str, value: Any) -> Any:
    """What an optimizer keeps once for a tensor: `step` as torch has it, others as they are."""
    if name == "step":
        number = value.map() if isinstance(value, Stored) else value
        return np.array(number, np.float32).reshape(())
    return value


def _parts(cut: Cut, at: tuple[int, ...]) -> Iterator[tuple[Start, tuple[int, ...], bool]]:
    """The boxes of a shard: where each begins, its lengths, and whether it is all of the shard. A shard without
    elements is one box of none, which begins where the tensor ends."""
    spans = [_spans(dim, part) for dim, part in zip(cut.dims, cut.per_dim(at), strict=True)]
    whole = all(len(dim) == 1 for dim in spans)
    for box in itertools.product(*spans):
        yield tuple(start for start, _ in box), tuple(size for _, size in box), whole


@lru_cache(maxsize=4096)
def _spans(dim: DimCut, at: tuple[int, ...]) -> list[tuple[int, int]]:
    """The intervals of a dim that a coordinate has: several where parts are cut each on its own."""
    found = [(start, length) for start, _, length, _, _ in dim.rows[at].tolist() if length]
    return found or [(dim.size, 0)]


def _window(cut: Cut, start: Start, size: tuple[int, ...]) -> Cut:
    """One box as a cut of its own, of which nobody has the rest."""
    dims = (
        DimCut(dim.size, (), {(): np.array([[a, 0, n, 1, 0]], np.int64)}, {(): n})
        for dim, a, n in zip(cut.dims, start, size, strict=True)
    )
    return Cut(cut.logical, Mesh(), tuple(dims))


class _Items:
    """One `.distcp` file: items, one after the other, which `index` tells of."""

    def __init__(self, index: Index, name: str) -> None:
        self.index, self.name = index, name
        self._parts: list[Part] = []
        self._checksums: list[Checksum] = []
        self._nbytes = self._size = 0
        self._known: dict[Any, Place] = {}

    def add(self, item: FilePlan) -> Place:
        place = Place(self.name, self._size, item.size)
        for start, stop, places in item.checksums:
            at = (start + self._size, stop + self._size, tuple(p + self._size for p in places))
            self._checksums.append(Checksum(*at))
        self._parts += item.parts
        self._nbytes += item.nbytes
        self._size += item.size
        return place

    def tree(self, path: Path, value: Any) -> None:
        """What a program put in: an item for each thing in it."""
        if isinstance(value, Mapping) and value:
            for key, inner in value.items():
                self.tree((*path, key if isinstance(key, int) else str(key)), inner)
        else:
            self.leaf(path, value)

    def leaf(self, path: Path, value: Any) -> None:
        place = self._shared(path, value)
        if isinstance(value, Stored | np.ndarray):
            self.index.tensor(path, value.shape, value.dtype, [Chunk((0,) * len(value.shape), value.shape, place)])
        else:
            self.index.object(path, place)

    def _shared(self, path: Path, value: Any) -> Place:
        """An item of its own, or that of an equal value."""
        plain = type(value) in (bool, int, float, str, type(None))
        if plain and (place := self._known.get((type(value), repr(value)))) is not None:
            return place
        item = torchfile.plan(".".join(map(str, path)), value)
        content = b"".join(part.data for part in item.parts if isinstance(part, Literal))
        known = all(isinstance(part, Literal) for part in item.parts)
        key = (type(value), repr(value)) if plain else content if known else object()
        if key not in self._known:
            self._known[key] = self.add(item)
        return self._known[key]

    def plan(self) -> FilePlan:
        return FilePlan(self.index.under + self.name, (*merged(self._parts),), tuple(self._checksums), self._nbytes)
