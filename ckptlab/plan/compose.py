"""Composition: from how tensors lie on one mesh and on another to which rank sends how much to which.

Reads no data. For each pair of shards that share elements, both sides' dp edges are mapped into the order
of the shared elements (`boxes.py`) and merged: every piece between neighbouring edges has one source rank
and one target rank.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from importlib import import_module
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ckptlab.arguments import explained
from ckptlab.errors import LayoutError, ReshapeError
from ckptlab.layout.cut import Coordinate, Cut
from ckptlab.plan.boxes import Box, shared_boxes
from ckptlab.plan.moves import Move
from ckptlab.plan.placement import Placement, Shard
from ckptlab.plan.ranks import Ranks, best_ranks
from ckptlab.plan.time import Cluster, Times, time
from ckptlab.shown import Shown

Int64 = NDArray[np.int64]
Columns = tuple[Int64, Int64, Int64]


_Memo = dict[tuple[tuple[Box, ...], tuple[int, int], tuple[int, int]], Columns]


def plan_tensor(a: Placement, b: Placement) -> Columns:
    """(source rank, target rank, count) of one tensor, int64: each pair of ranks once, counts in elements.

    Sources are ranks of the first stage of `a`: of holders that have the same shard the first, of parts
    that several coordinates hold the lowest; where replicas are averaged, all. Targets are all stages and
    holders of `b`. Elements that only one whole has (padding) are left out. Raises LayoutError.
    """
    return _concatenate(list(_pairs(a, b, {})))


def _pairs(a: Placement, b: Placement, memo: _Memo) -> Iterator[Columns]:
    """The columns of each pair of shards that have something in common."""
    mean = a.replicas in ("mean", "sum")
    sources, targets = a.shards(a.stages[:1]), b.shards(b.stages)
    for at_a, at_b, boxes in shared_boxes(a.cut, b.cut, not mean):
        for source in sources[at_a][: None if mean else 1]:
            for target in targets[at_b]:
                i, j, count = _merged(boxes, source, target, memo)
                yield source.ranks[source.first + i], target.ranks[target.first + j], count


def _merged(boxes: tuple[Box, ...], source: Shard, target: Shard, memo: _Memo) -> Columns:
    """(source fragment, target fragment, count) of what two shards share."""
    if source.pattern is None or target.pattern is None:
        return _merge(boxes, source.edges, target.edges)
    key = (boxes, source.pattern, target.pattern)
    if key not in memo:
        memo[key] = _merge(boxes, source.edges, target.edges)
    return memo[key]


def _merge(boxes: tuple[Box, ...], edges_a: Int64, edges_b: Int64) -> Columns:
    if len(boxes) == 1:
        return _merge_box(boxes[0], edges_a, edges_b)
    i, j, count = _concatenate([_merge_box(box, edges_a, edges_b) for box in boxes])
    pairs, place = np.unique(i * len(edges_b) + j, return_inverse=True)
    summed = np.zeros(len(pairs), np.int64)
    np.add.at(summed, place, count)
    return pairs // len(edges_b), pairs % len(edges_b), summed


def _merge_box(box: Box, edges_a: Int64, edges_b: Int64) -> Columns:
    """A sorted merge of both sides' edges, in the order of the box's elements."""
    if len(edges_a) == len(edges_b) == 2:  # neither side is cut
        return np.zeros(1, np.int64), np.zeros(1, np.int64), np.array([box.size], np.int64)
    ordinals_a, ordinals_b = box.a.ordinals(edges_a), box.b.ordinals(edges_b)
    merged = np.union1d(ordinals_a, ordinals_b)
    low = merged[:-1]
    i = np.searchsorted(ordinals_a, low, "right") - 1
    j = np.searchsorted(ordinals_b, low, "right") - 1
    return i, j, np.diff(merged)


def _concatenate(columns: list[Columns]) -> Columns:
    if not columns:
        return np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.int64)
    first, second, third = zip(*columns, strict=True)
    return np.concatenate(first), np.concatenate(second), np.concatenate(third)


@explained
@dataclass(frozen=True, eq=False)
class Plan(Shown):
    """Which rank sends how many elements of which tensor to which: one row each, columnar.

    `tensor` (index into `names`), `source` and `target` (ranks), `count` (elements) have one entry a row.
    One name may stand for several states, and may come several times. An element of tensor i takes
    `read_size[i]` bytes in the source, `written_size[i]` in the target. `elements_read[i]` and
    `elements_written[i]` are different elements: what is stored at several places counts once for each that
    is read or written, however many rows it is in.

    All byte figures are payload: elements of tensors that both wholes have. Padding, whether of dims or of
    flat buffers, headers and client state are not in them.
    """

    names: tuple[str, ...]
    sources: int
    targets: int
    tensor: NDArray[np.int32]
    source: NDArray[np.int32]
    target: NDArray[np.int32]
    count: Int64
    read_size: Int64
    written_size: Int64
    elements_read: Int64
    elements_written: Int64
    moves: tuple[Move, ...] = ()

    @property
    def rows(self) -> int:
        """Number of rows: (tensor, source rank, target rank) that share elements."""
        return len(self.count)

    @cached_property
    def read(self) -> int:
        """Bytes read: each element once, from where it is taken (from all, where replicas are averaged)."""
        return int(self.elements_read @ self.read_size)

    @cached_property
    def written(self) -> int:
        """Bytes written: each element at every stage and holder of the target that has it."""
        return int(self.elements_written @ self.written_size)

    @cached_property
    def sent(self) -> int:
        """Bytes of all rows, in the source's dtypes: as `read`, but once for every rank that needs them."""
        return int(self.count @ self.read_size[self.tensor])

    @cached_property
    def moved(self) -> int:
        """Bytes that change rank: of `sent`, the rows whose source rank is not their target rank."""
        away = self.source != self.target
        return int(self.count[away] @ self.read_size[self.tensor[away]])

    def matrix(self) -> Int64:
        """(source ranks, target ranks): bytes from each to each, as in `sent`, their sum."""
        table = np.zeros((self.sources, self.targets), np.int64)
        np.add.at(table, (self.source, self.target), self.count * self.read_size[self.tensor])
        return table

    def best_ranks(self, together: int | Sequence[Sequence[int]] = 1) -> Ranks:
        """Which process is best made which rank of the target, so that the fewest bytes change process.

        together: how many consecutive ranks of the target must be those of one node, whose processes are consecutive
        too; or the groups themselves, `mesh.groups("tp")`, all of one size. Within a node any order will do. Needs
        scipy. ReshapeError where the ranks do not divide into such groups.
        """
        return best_ranks(self.matrix(), together)

    def renumbered(self, order: Ranks | Sequence[int]) -> Plan:
        """The plan where process `order[k]` is rank k of the target: `plan.renumbered(plan.best_ranks())`."""
        numbers = np.asarray(order.order if isinstance(order, Ranks) else list(order))
        if len(numbers) != self.targets or len(set(numbers.tolist())) != self.targets:
            raise ReshapeError(f"an order names a process of its own for each of {self.targets} ranks, not {order!r}")
        return replace(
            self, target=numbers.astype(np.int32)[self.target], targets=int(numbers.max(initial=-1)) + 1, moves=()
        )

    def time(self, cluster: Cluster) -> Times:
        """How long the bytes that change rank take on a cluster, every link at once, and which link is the slowest.

        An estimate: docs/plans.md says what it leaves out. Source rank k and target rank k are one process.
        """
        return time(self.matrix(), cluster)

    def run(self, shards: Any, group: Any = None, *, limit: int = 1 << 28) -> Any:
        """Move what live ranks hold, without files: what the target's then hold. See `ckptlab.arrays.live.run`."""
        live = import_module("ckptlab.arrays.live")  # by name: it stands above
        return live.run(self.moves, shards, group, limit=limit, ranks=max(self.sources, self.targets))

    def __repr__(self) -> str:
        figures = f"reads {self.read:,}, writes {self.written:,}, moves {self.moved:,} bytes"
        scale = f"{len(self.names):,} tensors, {self.sources:,} → {self.targets:,} ranks, {self.rows:,} rows"
        return f"<Plan of {scale}: {figures}>"


@explained
def compose(tensors: Iterable[tuple[str, int, int, Placement, Placement]], moves: Iterable[Move] | None = None) -> Plan:
    """The plan for many tensors: (name, bytes an element read, bytes an element written, from, to) each.

    The bytes are summed over the states that lie alike. moves: what is moved state by state (None: what is named).
    All placements on one side have meshes of one size.
    Raises ReshapeError, with the tensor's name, where a tensor's two placements do not fit.
    """
    names: list[str] = []
    named: list[Move] = []
    figures: list[tuple[int, int, int, int]] = []
    parts: list[tuple[NDArray[np.int32], NDArray[np.int32], Int64]] = []
    memo: _Memo = {}
    sizes: dict[str, set[int]] = {"source": set(), "target": set()}
    for name, read_size, written_size, a, b in tensors:
        try:
            source, target, count = _concatenate(list(_pairs(a, b, memo)))
        except LayoutError as error:
            raise ReshapeError(f"tensor {name!r}: {error}") from error
        names.append(name)
        named.append(Move(name, a, b))
        figures.append((read_size, written_size, _elements_read(a, b.cut.shape), _elements_written(b, a.cut.shape)))
        parts.append((source.astype(np.int32), target.astype(np.int32), count))
        sizes["source"].add(a.mesh.size)
        sizes["target"].add(b.mesh.size)
    for side, found in sizes.items():
        if len(found) > 1:
            raise ReshapeError(f"the tensors' {side} meshes differ in size: {', '.join(map(str, sorted(found)))} ranks")
    rows = [len(count) for _, _, count in parts]
    table = np.array(figures, np.int64).reshape(-1, 4)
    empty = (np.zeros(0, np.int32), np.zeros(0, np.int32), np.zeros(0, np.int64))
    first, second, third = zip(*(parts or [empty]), strict=True)
    return Plan(
        tuple(names),
        max(sizes["source"], default=0),
        max(sizes["target"], default=0),
        np.repeat(np.arange(len(names), dtype=np.int32), rows),
        np.concatenate(first),
        np.concatenate(second),
        np.concatenate(third),
        table[:, 0],
        table[:, 1],
        table[:, 2],
        table[:, 3],
        tuple(named if moves is None else moves),
    )


@explained
def between(source: Cut | Placement, target: Cut | Placement, itemsize: int = 4, name: str = "tensor") -> Plan:
    """The plan for one tensor from one layout to another: `between(a.resolve(shape, mesh), b.resolve(shape, other))`.

    A cut by itself lies on pp stage 0 and in no flat buffer: see Placement for what says more. itemsize: bytes an
    element, on both sides. ReshapeError where the two are of different tensors.
    """
    a, b = (side if isinstance(side, Placement) else Placement(side) for side in (source, target))
    return compose([(name, itemsize, itemsize, a, b)])


def _elements_read(a: Placement, other: tuple[int, ...]) -> int:
    """A cut covers its whole, so without averaging each element that both wholes have is read once."""
    if a.replicas not in ("mean", "sum"):
        return math.prod(min(n, m) for n, m in zip(a.cut.shape, other, strict=True))
    return sum(_held(a.cut, a.coordinate(holder), other) for holder in a.on(a.stages[0]))


def _elements_written(b: Placement, other: tuple[int, ...]) -> int:
    return sum(_held(b.cut, b.coordinate(holder), other) for holder in b.holders)


@lru_cache(maxsize=1 << 16)
def _held(cut: Cut, at: Coordinate, other: tuple[int, ...]) -> int:
    """Elements of a shard that a whole of shape `other` has too."""
    return math.prod(
        dim.widths[part] if n >= dim.size else int((dim.positions(part) < n).sum())
        for dim, part, n in zip(cut.dims, cut.per_dim(at), other, strict=True)
    )
