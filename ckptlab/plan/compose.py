"""Composition: from how tensors lie on one mesh and on another to which rank sends how much to which.

Reads no data. For each pair of shards that share elements, both sides' dp edges are mapped into the order
of the shared elements (`boxes.py`) and merged: every piece between neighbouring edges has one source rank
and one target rank. Tensors that lie alike, the layers of a model, are merged together (`spread.py`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ckptlab.aliases import Int64
from ckptlab.arguments import explained
from ckptlab.errors import LayoutError, ReshapeError
from ckptlab.layout.cut import Coordinate, Cut
from ckptlab.plan.boxes import Box, shared_boxes
from ckptlab.plan.made import Made
from ckptlab.plan.moves import Later, Move
from ckptlab.plan.placement import InBuffers, Placement
from ckptlab.plan.ranks import Ranks, best_ranks
from ckptlab.plan.spread import Edges, Spread
from ckptlab.plan.time import Cluster, Times, time
from ckptlab.registry import Registry
from ckptlab.shown import Shown

RUNNERS: Registry[Callable[..., Any]] = Registry(
    "library that moves between live ranks",
    "ckptlab.runners",
    ReshapeError,
    {"torch": "ckptlab.arrays.live:run_torch", "jax": "ckptlab.arrays.live:run_jax"},
    ": run takes a process group of torch.distributed or a jax.sharding.Mesh",
)
"""The library whose group of ranks is given → (moves, shards, group, limit, ranks) → what the target's ranks hold."""

Columns = tuple[Int64, Int64, Int64]
Rows = tuple[Int64, Int64, Int64, Int64]
"""Columns: tensor, source and target (ranks, or fragments of shards), count."""


@explained
def plan_tensor(a: Placement, b: Placement) -> Columns:
    """(source rank, target rank, count) of one tensor, int64: each pair of ranks once, counts in elements.

    Sources are ranks of the first stage of `a`: of holders that have the same shard the first, of parts
    that several coordinates hold the lowest; where replicas are averaged, all. Targets are all stages and
    holders of `b`. Elements that only one whole has (padding) are left out. Raises LayoutError.
    """
    _, source, target, count = _concatenate(list(_alike([0], [a], [b])))
    return source, target, count


def _alike(index: Sequence[int], a: Sequence[Placement], b: Sequence[Placement]) -> Iterator[Rows]:
    """The rows of tensors that lie alike, all layers of a kind at once: what boxes their shards share is the same, and
    only where dp cuts them differs. LayoutError where a tensor's two placements do not fit."""
    mean = a[0].replicas in ("mean", "sum")
    at = np.asarray(index, np.int64)
    source, target = Spread.of(a, first=True), Spread.of(b)
    done: dict[tuple[tuple[Any, ...], int, int], Rows] = {}
    for at_a, at_b, boxes in shared_boxes(a[0].cut, b[0].cut, not mean):
        for here in source.holders[at_a][: None if mean else 1]:
            for there in target.holders[at_b]:
                key = (tuple(box.content for box in boxes), here.slot, there.slot)
                if key not in done:
                    done[key] = _merge(boxes, source.edges[here.slot], target.edges[there.slot])
                tensor, i, j, count = done[key]
                yield at[tensor], source.ranks(here, tensor, i), target.ranks(there, tensor, j), count


def _merge(boxes: tuple[Box, ...], a: Edges, b: Edges) -> Rows:
    """(tensor, source fragment, target fragment, count) of what the shards of each tensor share."""
    found = [_merge_box(box, a, b) for box in boxes]
    if len(found) == 1:
        return found[0]
    tensor, i, j, count = _concatenate(found)
    wide, high = int(i.max(initial=0)) + 1, int(j.max(initial=0)) + 1
    pairs, place = np.unique((tensor * wide + i) * high + j, return_inverse=True)
    summed = np.zeros(len(pairs), np.int64)
    np.add.at(summed, place, count)
    return pairs // (wide * high), pairs // high % wide, pairs % high, summed


def _merge_box(box: Box, a: Edges, b: Edges) -> Rows:
    """A sorted merge of both sides' edges, in the order of the box's elements: tensor after tensor on one line."""
    ordinals_a = box.a.ordinals(a.places) + a.tensor * box.size
    ordinals_b = box.b.ordinals(b.places) + b.tensor * box.size
    merged = np.union1d(ordinals_a, ordinals_b)
    low = merged[:-1]
    tensor = low // max(box.size, 1)
    i = np.searchsorted(ordinals_a, low, "right") - 1 - a.first[tensor]
    j = np.searchsorted(ordinals_b, low, "right") - 1 - b.first[tensor]
    return tensor, i, j, np.diff(merged)


def _concatenate(columns: Sequence[Rows]) -> Rows:
    if not columns:
        none = np.zeros(0, np.int64)
        return none, none, none, none
    tensor, source, target, count = (np.concatenate(column) for column in zip(*columns, strict=True))
    return tensor, source, target, count


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
    moves: Sequence[Move] = ()

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
        """Move what live ranks hold, without files: what the target's ranks hold, moved from what the source's hold.

        shards: key → array, what this rank has of each tensor: `ckpt.of_rank` gives it, and `held_by` says which part
        of which shard, flattened or in the shard's own shape. Keys are tensors' names, of a reshape (name, state). For
        jax a sequence of these, one a rank. group: a torch.distributed process group (None: the default one), or a
        `jax.sharding.Mesh` whose devices are the ranks in order. limit: bytes that a rank may have under way, in each
        direction.

        Returns key → array in the library's memory, of the shard's shape where the rank has all of it, else flat; for
        jax a list of these. Copies that dp ranks have of what no flat buffer cuts are not in the plan: rank 0 of dp has
        it. ReshapeError where arrays are missing or of another size.
        """
        if limit < 1 or not isinstance(limit, int):
            raise ReshapeError(f"limit is a number of bytes, not {limit!r}")
        if not self.moves:
            raise ReshapeError("this plan does not know what it moves: run the plan itself, not a renumbered one")
        library = "torch" if group is None else type(group).__module__.partition(".")[0]
        return RUNNERS.get(library)(self.moves, shards, group, limit, max(self.sources, self.targets))

    def __repr__(self) -> str:
        figures = f"reads {self.read:,}, writes {self.written:,}, moves {self.moved:,} bytes"
        scale = f"{len(self.names):,} tensors, {self.sources:,} → {self.targets:,} ranks, {self.rows:,} rows"
        return f"<Plan of {scale}: {figures}>"


@explained
def compose(
    tensors: Iterable[tuple[str, int, int, Placement | Made, Placement]],
    moves: Callable[[], Iterable[Move]] | None = None,
) -> Plan:
    """The plan for many tensors: (name, bytes an element read, bytes an element written, from, to) each.

    The bytes are summed over the states that lie alike. moves: gives what is moved state by state, when that is wanted
    (None: what is named).
    All placements on one side have meshes of one size.
    Raises ReshapeError, with the tensor's name, where a tensor's two placements do not fit.
    """
    names: list[str] = []
    figures: list[tuple[int, int]] = []
    pairs: list[tuple[Placement, Placement]] = []
    made: dict[int, tuple[Made, Placement]] = {}
    alike: dict[Any, list[int]] = {}
    kinds: dict[Any, int] = {}
    for i, (name, read_size, written_size, a, b) in enumerate(tensors):
        names.append(name)
        figures.append((read_size, written_size))
        if isinstance(a, Made):
            made[i] = a, b
            a = Placement(Cut.whole(a.shape, a.mesh))
        pairs.append((a, b))
        if i not in made:
            alike.setdefault((_kind(kinds, a, True), _kind(kinds, b, False)), []).append(i)
    for number, side in enumerate(("source", "target")):
        found = {pairs[i][number].mesh.size for i in (*(index[0] for index in alike.values()), *made)}
        if len(found) > 1:
            raise ReshapeError(f"the tensors' {side} meshes differ in size: {', '.join(map(str, sorted(found)))} ranks")
    rows: list[Rows] = []
    elements = np.zeros((len(names), 2), np.int64)
    for index in alike.values():
        sources, targets = ([pairs[i][side] for i in index] for side in (0, 1))
        try:
            rows += _alike(index, sources, targets)
        except LayoutError:
            for i in index:  # which of them it is
                try:
                    plan_tensor(*pairs[i])
                except LayoutError as error:
                    raise ReshapeError(f"tensor {names[i]!r}: {error}") from error
            raise
        a, b = sources[0], targets[0]
        elements[index] = _elements_read(a, b.cut.shape), _elements_written(b, a.cut.shape)
    for i, (a, b) in made.items():
        from_rank, to_rank, count, read = a.to(b)
        rows.append((np.full(len(count), i, np.int64), from_rank, to_rank, count))
        elements[i] = read, _elements_written(b, a.shape)
    tensor, source, target, count = _concatenate(rows)
    order = np.argsort(tensor, kind="stable")
    sizes = np.array(figures, np.int64).reshape(-1, 2)
    told = moves or (lambda: (Move(name, *pair) for name, pair in zip(names, pairs, strict=True)))
    return Plan(
        tuple(names),
        max((a.mesh.size for a, _ in pairs[:1]), default=0),
        max((b.mesh.size for _, b in pairs[:1]), default=0),
        tensor[order].astype(np.int32),
        source[order].astype(np.int32),
        target[order].astype(np.int32),
        count[order],
        sizes[:, 0],
        sizes[:, 1],
        elements[:, 0],
        elements[:, 1],
        Later(told),
    )


def _kind(known: dict[Any, int], placement: Placement, first: bool) -> int:
    """A number for each kind of placement of a cut (see `Placement.kind`), looked up by what those of a kind share:
    contents are looked at once for each that there is."""
    flats, at = placement.flats, placement.at
    buffers = flats.group if isinstance(flats, InBuffers) else flats
    shared = (id(placement.cut), id(buffers), id(at) if at else 0, placement.stages, placement.replicas, first)
    found = known.get(shared)
    if found is None:
        found = known[shared] = known.setdefault((placement.cut, *placement.kind(first)), len(known))
    return found


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
