"""The one operation behind every view, reshape and writer: elements of a stored tensor, in the order of any other cut.

Merging is gathering into the whole, splitting is gathering into a shard, reshaping is gathering from one cut into
another. Boxes are copied from mapped files straight into a preallocated destination; nothing else is held in memory.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from ckptlab.arrays.backends.base import Empty
from ckptlab.arrays.boxes import flat_boxes, flat_start, plain_rows, restrict
from ckptlab.catalog import Catalog, Fragment
from ckptlab.errors import CheckpointError
from ckptlab.layout import Cut, overlap
from ckptlab.stored import note_read

CHUNK = 1 << 23  # elements that `chunks` holds at a time
MAPPED = 1 << 20  # bytes from which on a box that lies in one piece is mapped: less is copied as fast


@dataclass(frozen=True)
class Tally:
    """What was really read: bytes by ((pp, dp, tp) that stored them, rank they are for)."""

    read: Counter[tuple[tuple[int, int, int], int]] = field(default_factory=Counter)
    target: int = 0

    def towards(self, rank: int) -> Tally:
        """The same tally, for what another rank of the target needs."""
        return Tally(self.read, rank)


@dataclass(frozen=True)
class _Piece:
    """A box of a source shard that lies in one fragment: where it begins in the shard, and its elements."""

    starts: tuple[int, ...]
    array: np.ndarray
    dp: int


class Gather:
    """Reads one state of one tensor of a catalog in any cut.

    `stage` chooses the pp stage whose copy is read (default: the canonical one), `dtype` what the elements are
    converted to (round to nearest even), `replica` the one tp rank that is read: its copy of a tensor that is not cut,
    its shard of one that is (the rest is then 0). Where the layout says that replicas are averaged, and none is chosen,
    they are. Cheap to make. Pickled, it is the files' paths and offsets and the cut, without catalog and tally.
    """

    def __init__(
        self,
        catalog: Catalog,
        name: str,
        state: str,
        *,
        stage: int | None = None,
        dtype: np.dtype | None = None,
        replica: int | None = None,
        tally: Tally | None = None,
    ) -> None:
        tensor = catalog[name]
        self.name, self.state, self.tally = tensor.name, state, tally
        self.cut = tensor.cut
        self._catalog: Catalog | None = catalog
        self._tp = catalog.mesh.tp
        self.stage = catalog.holders(tensor.name, state)[0] if stage is None else stage
        self.stored_dtype = np.dtype(tensor.states[state])
        self.dtype = self.stored_dtype if dtype is None else np.dtype(dtype)
        averaged = tensor.layout.replicas == "mean" and not self.cut.axes and replica is None
        self.replica = replica
        self.replicas = tuple(range(self._tp)) if averaged else (replica or 0,)
        self._known_fragments: dict[int, tuple[Fragment, ...]] = {}
        self._known_pieces: dict[int, list[_Piece]] = {}

    def __getstate__(self) -> dict[str, Any]:
        for tp in {*self.replicas, *self._coordinates.values()}:
            self._fragments(tp)
        return {**self.__dict__, "_catalog": None, "tally": None, "_known_pieces": {}}

    def box(
        self, cut: Cut, at: tuple[int, ...], starts: Sequence[int], sizes: Sequence[int], empty: Empty = np.empty
    ) -> np.ndarray:
        """The box of shard `at` of `cut`: an array of shape `sizes`. What the source does not hold (padding) is 0.

        A large box that lies in one piece in a file is not copied but mapped: to write to it changes no file.
        """
        mapped = self._mapped(cut, at, tuple(starts), tuple(sizes)) if empty is np.empty else None
        if mapped is not None:
            return mapped
        out = empty(tuple(sizes), self.dtype)
        if self._leaves_gaps(cut):
            out[...] = 0
        self._fill(out, cut, at, tuple(starts))
        return out

    def shard(self, cut: Cut, at: tuple[int, ...]) -> np.ndarray:
        """The whole shard `at` of `cut`, of shape `cut.shard_shape(at)`."""
        shape = cut.shard_shape(at)
        return self.box(cut, at, (0,) * len(shape), shape)

    def chunks(self, cut: Cut, at: tuple[int, ...], lo: int, hi: int, limit: int = CHUNK) -> Iterator[np.ndarray]:
        """Elements lo … hi-1 of the flattened shard, in pieces of at most `limit` elements (one-dimensional).

        A piece is only valid until the next one is asked for: the buffer is used again. Where source and target hold
        the same shard, pieces are views of the mapped file.
        """
        if self._same_shard(cut, at):
            yield from self._straight(at, lo, hi, limit)
            return
        shape = cut.shard_shape(at)
        buffer: np.ndarray | None = None
        for start in range(lo, hi, limit):
            stop = min(start + limit, hi)
            if buffer is None:
                buffer = np.empty(stop - start, self.dtype)
            flat = buffer[: stop - start]
            if self._leaves_gaps(cut):
                flat[...] = 0
            done = 0
            for starts, sizes in flat_boxes(shape, start, stop):
                count = math.prod(sizes)
                self._fill(flat[done : done + count].reshape(sizes), cut, at, starts)
                done += count
            yield flat

    def unordered(self, cut: Cut, at: tuple[int, ...]) -> list[tuple[Cut, tuple[int, ...]]]:
        """Shards that together hold every element of shard `at` of `cut` once, for whoever needs them in no order.

        Those of the source's own cut where they make up a whole, which `chunks` then gives without a copy; else the
        shard itself.
        """
        if not cut.is_whole or self.replica is not None or self.cut.shape != cut.shape:
            return [(cut, at)]
        places = list(self.cut.coordinates())
        held = sum(math.prod(self.cut.shard_shape(place)) for place in places)
        if held != math.prod(cut.shape):  # some elements are held more than once
            return [(cut, at)]
        return [(self.cut, place) for place in places]

    def _straight(self, at: tuple[int, ...], lo: int, hi: int, limit: int) -> Iterator[np.ndarray]:
        rank = self._tp_of(at)
        for fragment in self._fragments(rank):
            first, last = max(lo, fragment.start), min(hi, fragment.start + fragment.count)
            for start in range(first, last, limit):
                stop = min(start + limit, last)
                view = fragment.stored.flat[start - fragment.start : stop - fragment.start]
                yield view.astype(self.dtype, copy=False)
                self._count(rank, fragment.dp, view.nbytes)

    def _same_shard(self, cut: Cut, at: tuple[int, ...]) -> bool:
        if len(self.replicas) > 1 or cut.axes != self.cut.axes or at not in self._coordinates:
            return False
        return cut.dims == self.cut.dims

    @cached_property
    def _coordinates(self) -> dict[tuple[int, ...], int]:
        """The tp rank that is read at each coordinate of the source's cut."""
        if not self.cut.axes:
            return {(): self.replicas[0]}
        ranks = reversed(range(self._tp)) if self.replica is None else (self.replica,)
        return {self.cut.coordinate({"tp": t}): t for t in ranks}

    def _tp_of(self, coordinate: tuple[int, ...]) -> int:
        return self._coordinates[coordinate]

    def _leaves_gaps(self, cut: Cut) -> bool:
        if self.replica is not None and self.cut.axes:
            return True
        return any(b > a for a, b in zip(self.cut.shape, cut.shape, strict=True))

    def _mapped(
        self, cut: Cut, at: tuple[int, ...], starts: tuple[int, ...], sizes: tuple[int, ...]
    ) -> np.ndarray | None:
        """The box as it lies in a file; None where it is small, in several pieces, or to be converted."""
        count = math.prod(sizes)
        if count * self.dtype.itemsize < MAPPED or self.dtype != self.stored_dtype or len(self.replicas) > 1:
            return None
        for coordinate, tp in self._coordinates.items():
            rows = overlap(self.cut, coordinate, cut, at, owned=self.replica is None)
            place = [_in_one_row(*dim) for dim in zip(rows, starts, sizes, strict=True)]
            first = flat_start(self.cut.shard_shape(coordinate), place, sizes) if None not in place else None
            if first is None:
                continue
            for fragment in self._fragments(tp):
                at_byte = fragment.stored.offset + (first - fragment.start) * self.dtype.itemsize
                inside = fragment.start <= first and first + count <= fragment.start + fragment.count
                if inside and fragment.stored.contiguous and at_byte % self.dtype.itemsize == 0:
                    self._count(tp, fragment.dp, count * self.dtype.itemsize)
                    return fragment.stored.elements(first - fragment.start, count).private().reshape(sizes)
        return None

    def _fill(self, out: np.ndarray, cut: Cut, at: tuple[int, ...], starts: tuple[int, ...]) -> None:
        """Copy into `out` the box of shard `at` that begins at `starts`."""
        if len(self.replicas) == 1:
            for coordinate, tp in self._coordinates.items():
                self._copy(out, coordinate, tp, cut, at, starts)
            return
        total = np.zeros(out.shape, np.float32)
        for tp in self.replicas:
            one = np.zeros(out.shape, self.stored_dtype)
            self._copy(one, (), tp, cut, at, starts)
            total += one
        np.divide(total, np.float32(len(self.replicas)), out=total)
        np.copyto(out, total, casting="unsafe")

    def _copy(
        self,
        out: np.ndarray,
        coordinate: tuple[int, ...],
        tp: int,
        cut: Cut,
        at: tuple[int, ...],
        starts: tuple[int, ...],
    ) -> None:
        owned = self.replica is None  # one rank alone is read: what lower ranks hold too comes from it as well
        rows = [plain_rows(r) for r in overlap(self.cut, coordinate, cut, at, owned=owned)]
        if any(len(r) == 0 for r in rows):
            return
        for piece in self._pieces(tp):
            per_dim = []
            for dim, dim_rows in enumerate(rows):
                windows = (
                    restrict(row, piece.starts[dim], piece.array.shape[dim], starts[dim], out.shape[dim])
                    for row in dim_rows
                )
                per_dim.append([w for w in windows if w is not None])
            for combination in itertools.product(*per_dim):
                held: Any = (*(a for a, _ in combination), ...)  # with the ellipsis a 0-dim array stays an array
                wanted: Any = (*(b for _, b in combination), ...)
                source = piece.array[held]
                np.copyto(out[wanted], source, casting="unsafe")
                self._count(tp, piece.dp, source.nbytes)

    def _pieces(self, tp: int) -> list[_Piece]:
        """The source shard of a tp rank as boxes, each within one fragment."""
        if tp not in self._known_pieces:
            self._known_pieces[tp] = self._find_pieces(tp)
        return self._known_pieces[tp]

    def _find_pieces(self, tp: int) -> list[_Piece]:
        shape = self.cut.shard_shape(self.cut.coordinate({"tp": tp}))
        fragments = self._fragments(tp)
        if len(fragments) == 1 and fragments[0].count == math.prod(shape):
            stored = fragments[0].stored
            array = stored.map() if stored.shape == shape else stored.flat.reshape(shape)
            return [_Piece((0,) * len(shape), array, fragments[0].dp)]
        pieces = []
        for fragment in fragments:
            flat, done = fragment.stored.flat, 0
            for starts, sizes in flat_boxes(shape, fragment.start, fragment.start + fragment.count):
                count = math.prod(sizes)
                pieces.append(_Piece(starts, flat[done : done + count].reshape(sizes), fragment.dp))
                done += count
        return pieces

    def _fragments(self, tp: int) -> tuple[Fragment, ...]:
        if tp not in self._known_fragments:
            if self._catalog is None:
                raise CheckpointError(f"{self.name}: tp rank {tp} was not among what this reader took along")
            found = self._catalog.fragments(self.name, self.state, self.stage, tp)
            shape = self.cut.shard_shape(self.cut.coordinate({"tp": tp}))
            if (stored := sum(f.count for f in found)) != math.prod(shape):  # the rest would be whatever memory held
                raise CheckpointError(
                    f"{self._catalog.path}: {self.name}: {self.state}: of tp rank {tp}'s shard of shape {shape} only "
                    f"{stored} elements are stored: the checkpoint is incomplete, see what `ckptlab check` says of it"
                )
            self._known_fragments[tp] = found
        return self._known_fragments[tp]

    def _count(self, tp: int, dp: int, nbytes: int) -> None:
        note_read(nbytes)
        if self.tally is not None:
            self.tally.read[(self.stage, dp, tp), self.tally.target] += nbytes


def _in_one_row(rows: np.ndarray, start: int, size: int) -> int | None:
    """Where a window of the target's dim begins in the source's, if one row of their overlap holds all of it."""
    for a, b, length, count, _, _ in rows.tolist():
        if count == 1 and b <= start and start + size <= b + length:
            return int(a + start - b)
    return None
