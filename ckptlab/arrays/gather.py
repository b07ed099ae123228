"""The one operation behind every view, reshape and writer: elements of a stored tensor, in the order of any other cut.

Merging is gathering into the whole, splitting is gathering into a shard, reshaping is gathering from one cut into
another. Boxes are copied from mapped files straight into a preallocated destination; nothing else is held in memory.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from ckptlab import paths
from ckptlab.arrays.composed import Adapted, Composed, Renamed
from ckptlab.arrays.readers import CHUNK, Mean, Reader, Zeros, in_dtype, is_sum
from ckptlab.catalog import MASTER, PARAM, Catalog, Fragment, Tensor
from ckptlab.errors import CheckpointError, LayoutError
from ckptlab.layout import Cut, overlap
from ckptlab.layout.boxes import flat_boxes, flat_start, plain_rows, restrict
from ckptlab.layout.cut import Coordinate
from ckptlab.plan import Holder
from ckptlab.stored import Stored, note_read, touch

FAR_CHUNK = 8 << 20  # bytes that `chunks` gives at a time of far files, each of which is a request or several
_RUN = 1 << 16  # bytes from which on a run is taken as it lies: shorter ones are copied into their order first
MAPPED = 1 << 20  # bytes from which on a box that lies in one piece is mapped: less is copied as fast


@dataclass(frozen=True)
class Tally:
    """What was really read: bytes by (rank that stored them, rank they are for)."""

    read: Counter[tuple[int, int]] = field(default_factory=Counter)
    target: int = 0

    def towards(self, rank: int) -> Tally:
        """The same tally, for what another rank of the target needs."""
        return Tally(self.read, rank)


def reader(
    catalog: Catalog,
    name: str,
    state: str,
    *,
    dtype: np.dtype | None = None,
    stage: int | None = None,
    holder: Holder | None = None,
    tally: Tally | None = None,
) -> Reader:
    """What reads one state of one tensor of a catalog in any cut.

    `dtype`: what the elements are converted to (round to nearest even). `stage`: the pp stage whose copy is read
    (default: the canonical one). `holder`: the one who is read, its copy of a tensor that is not cut, its shard of one
    that is (the rest is then 0). Where the layout says that replicas are averaged, and none is chosen, they are.
    Cheap to make. Pickled, it is the files' paths and offsets and the cut, without catalog and tally.
    """
    tensor = catalog[name]
    if catalog.filled is not None and tensor.name in catalog.filled.tensors:
        return _filled(catalog.filled, tensor, state, tensor.states[state] if dtype is None else np.dtype(dtype))
    if catalog.base is not None:
        seen = _seen(catalog, tensor.name, state, stage, holder, tally)
        return in_dtype(seen, tensor.states[state] if dtype is None else dtype)
    placement = catalog.placement(tensor.name, state)
    copies: list[dict[Coordinate, Holder]]
    if holder is not None:
        copies = [{placement.coordinate(holder): holder}]
    else:
        same: dict[Coordinate, list[Holder]] = {}
        for one in placement.on(placement.stages[0] if stage is None else stage):
            same.setdefault(placement.coordinate(one), []).append(one)
        if placement.cut.repeats and placement.replicas in ("mean", "sum"):
            raise LayoutError(
                f'{tensor.name}: replicas="{placement.replicas}" is for tensors that ranks have copies of as a whole, '
                f'and of {tensor.layout.text!r} they have copies of a part: say "equal" or "first"'
            )
        averaged = min(map(len, same.values())) if placement.replicas in ("mean", "sum") else 1
        copies = [{at: holders[i] for at, holders in same.items()} for i in range(averaged)]
    gathers = [Gather(catalog, tensor.name, state, held, holder is not None, tally) for held in copies]
    found: Reader = gathers[0] if len(gathers) == 1 else Mean(gathers, is_sum(placement.replicas, state))
    return in_dtype(found, dtype)


def _filled(weights: Catalog, tensor: Tensor, state: str, dtype: np.dtype) -> Reader:
    """What reads a tensor whose weights are those of another catalog, and all else of which is 0."""
    if state not in (MASTER, PARAM):
        return Zeros(tensor.name, state, tensor.cut, dtype)
    stored = weights.tensors[tensor.name].states
    return reader(weights, tensor.name, next(s for s in (state, MASTER, PARAM) if s in stored), dtype=dtype)


def _seen(
    catalog: Catalog, name: str, state: str, stage: int | None, holder: Holder | None, tally: Tally | None
) -> Reader:
    """What reads a tensor that is another, or made of others, of the catalog's base."""
    base, pieces = catalog.base, catalog.seen[name]
    assert base is not None
    if name in catalog.added and state not in base.tensors[pieces[0].name].states:
        state = PARAM  # what is added to a weight of 16 bits makes one of 32
    places = [base.placement(piece.name, state) for piece in pieces]
    if catalog.tensors[name].cut.is_whole and not all(place.cut.is_whole for place in places):
        holder = None  # one holder is said to have all of it
    parts = [reader(base, p.name, state, stage=stage, holder=holder, tally=tally) for p in pieces]
    shapes = [base.tensors[p.name].shape for p in pieces]
    shape = catalog.tensors[name].shape
    if len(pieces) == 1 and pieces[0].is_all(shape, shapes[0]):
        found: Reader = Renamed(parts[0], name)
    else:
        found = Composed(name, Cut.whole(shape), list(zip(pieces, parts, shapes, strict=True)), holder is not None)
    by = catalog.added.get(name)
    if by is None:
        return found
    narrow = [base.tensors[one] for one in (by.a, by.b)]
    a, b = (reader(base, one.name, one.weight, tally=tally) for one in narrow)
    return Adapted(found, a, b, tuple(one.shape for one in narrow), by)


@dataclass(frozen=True)
class _Piece:
    """A box of a source shard that lies in one fragment: where it begins in the shard, and its elements. Of a far file
    they are not an array yet, but where they are stored."""

    starts: tuple[int, ...]
    array: np.ndarray | Stored
    fragment: Fragment
    offset: int | None  # the byte of the file at which the array begins; None of a copy

    def view(self, held: tuple[slice, ...]) -> np.ndarray:
        """A part of it, which is about to be used."""
        stored = self.fragment.stored
        if isinstance(self.array, Stored):
            part = self.array.window(held)
            view = part.map()
            touch(stored.path, part.offset, view, part.contiguous)
            return view
        inside: Any = (*held, ...)  # with the ellipsis a 0-dim array stays an array
        view = self.array[inside]
        if self.offset is None:
            touch(stored.path, stored.offset, view, False)
        else:
            inside = view.__array_interface__["data"][0] - self.array.__array_interface__["data"][0]
            touch(stored.path, self.offset + inside, view)
        return view


class _Run(NamedTuple):
    """Elements start … stop-1 of a flattened shard, which are those from `inside` on of the source's at `at`."""

    start: int
    stop: int
    inside: int
    at: Coordinate


class Gather(Reader):
    """Reads what some holders have of one state of a tensor: `holders` names one for each coordinate of the cut.

    `alone`: only one of several is read, and what others hold too comes from it as well.
    """

    spares = True

    def __init__(
        self,
        catalog: Catalog,
        name: str,
        state: str,
        holders: Mapping[Coordinate, Holder],
        alone: bool = False,
        tally: Tally | None = None,
    ) -> None:
        self.name, self.state, self.holders, self.alone, self.tally = name, state, holders, alone, tally
        self.placement = catalog.placement(name, state)
        self.cut = self.placement.cut
        self.dtype = np.dtype(catalog.tensors[name].states[state])
        self._far = paths.is_far(catalog.path)
        self.piece = FAR_CHUNK if self._far else CHUNK
        self._catalog: Catalog | None = catalog
        self._known_fragments: dict[Holder, tuple[Fragment, ...]] = {}
        self._known_pieces: dict[Holder, list[_Piece]] = {}
        self._known_overlaps: dict[Coordinate, tuple[Cut, Coordinate, list[list[list[int]]]]] = {}

    def __getstate__(self) -> dict[str, Any]:
        for holder in self.holders.values():
            self._fragments(holder)
        return {
            **self.__dict__,
            "placement": None,
            "_catalog": None,
            "tally": None,
            "_known_pieces": {},
            "_known_overlaps": {},
        }

    def read_into(self, out: np.ndarray, cut: Cut, at: Coordinate, starts: Sequence[int]) -> None:
        for coordinate, holder in self.holders.items():
            self._copy(out, coordinate, holder, cut, at, starts)

    def leaves_gaps(self, cut: Cut) -> bool:
        return (self.alone and bool(self.cut.axes)) or super().leaves_gaps(cut)

    def box(self, cut: Cut, at: Coordinate, starts: Sequence[int], sizes: Sequence[int]) -> np.ndarray:
        """See Reader. A large box that lies in one piece in a file is not copied but mapped."""
        mapped = self._mapped(cut, at, starts, tuple(sizes))
        return super().box(cut, at, starts, sizes) if mapped is None else mapped

    def chunks(self, cut: Cut, at: Coordinate, lo: int, hi: int, limit: int | None = None) -> Iterator[np.ndarray]:
        """See Reader. Where source and target hold the same shard, or long runs of it lie in the same order in
        both, pieces are views of the mapped file."""
        limit = limit or self.piece // self.dtype.itemsize
        runs = [_Run(lo, hi, lo, at)] if self.is_straight(cut, at) else self._runs(cut, at)
        if runs is None:
            yield from super().chunks(cut, at, lo, hi, limit)
            return
        for run in runs:
            first, last = max(run.start, lo), min(run.stop, hi)
            if first < last:
                shift = run.inside - run.start
                yield from self._straight(run.at, first + shift, last + shift, limit)

    def _runs(self, cut: Cut, at: Coordinate) -> list[_Run] | None:
        """The flattened shard `at` of `cut`, as runs of the source's flattened shards; None where some elements are in
        none, or the runs are short."""
        shape, runs = cut.shard_shape(at), list[_Run]()
        if not shape or self._far:
            return None
        inner = math.prod(shape[1:])
        whole = [[[0, 0, n, 1]] for n in shape[1:]]
        for coordinate in self.holders:
            first, *others = self._overlap(coordinate, cut, at)
            if not first:
                continue
            same = self.cut.shard_shape(coordinate)[1:] == shape[1:]
            if not same or [[row[:4] for row in rows] for rows in others] != whole:
                return None
            for a, b, length, count, _, _ in first:
                if count > 1:
                    return None
                runs.append(_Run(b * inner, (b + length) * inner, a * inner, coordinate))
        runs.sort()
        if [run.start for run in runs] + [math.prod(shape)] != [0] + [run.stop for run in runs]:
            return None
        long = math.prod(shape) * self.dtype.itemsize >= len(runs) * _RUN
        return runs if long else None

    def unordered(self, cut: Cut, at: Coordinate) -> list[tuple[Cut, Coordinate]]:
        """See Reader. Shards of the source's own cut where they make up a whole: `chunks` gives those uncopied."""
        if not cut.is_whole or self.alone or self.cut.shape != cut.shape:
            return [(cut, at)]
        places = list(self.cut.coordinates())
        held = sum(math.prod(self.cut.shard_shape(place)) for place in places)
        if held != math.prod(cut.shape):  # some elements are held more than once
            return [(cut, at)]
        return [(self.cut, place) for place in places]

    def is_straight(self, cut: Cut, at: Coordinate) -> bool:
        return cut.axes == self.cut.axes and at in self.holders and cut.dims == self.cut.dims

    def _straight(self, at: Coordinate, lo: int, hi: int, limit: int) -> Iterator[np.ndarray]:
        holder = self.holders[at]
        for fragment in self._fragments(holder):
            first, last = max(lo, fragment.start), min(hi, fragment.start + fragment.count)
            stored = fragment.stored
            if first >= last:
                continue
            for start, view in stored.pieces(first - fragment.start, last - fragment.start, limit):
                touch(stored.path, stored.offset + start * self.dtype.itemsize, view, stored.contiguous)
                yield view
                self._count(holder, fragment.dp, view.nbytes)

    def _mapped(self, cut: Cut, at: Coordinate, starts: Sequence[int], sizes: tuple[int, ...]) -> np.ndarray | None:
        """The box as it lies in a file; None where it is small or in several pieces."""
        count = math.prod(sizes)
        if count * self.dtype.itemsize < MAPPED:
            return None
        for coordinate, holder in self.holders.items():
            rows = overlap(self.cut, coordinate, cut, at, owned=not self.alone)
            place = [_in_one_row(*dim) for dim in zip(rows, starts, sizes, strict=True)]
            first = flat_start(self.cut.shard_shape(coordinate), place, sizes) if None not in place else None
            if first is None:
                continue
            for fragment in self._fragments(holder):
                at_byte = fragment.stored.offset + (first - fragment.start) * self.dtype.itemsize
                inside = fragment.start <= first and first + count <= fragment.start + fragment.count
                if inside and fragment.stored.contiguous and at_byte % self.dtype.itemsize == 0:
                    self._count(holder, fragment.dp, count * self.dtype.itemsize)
                    return fragment.stored.elements(first - fragment.start, count).private().reshape(sizes)
        return None

    def _copy(
        self, out: np.ndarray, coordinate: Coordinate, holder: Holder, cut: Cut, at: Coordinate, starts: Sequence[int]
    ) -> None:
        """Copy what one holder has of the box."""
        rows = self._overlap(coordinate, cut, at)
        if not all(rows):
            return
        for piece in self._pieces(holder, coordinate):
            per_dim = []
            for dim, dim_rows in enumerate(rows):
                windows = (
                    restrict(row, piece.starts[dim], piece.array.shape[dim], starts[dim], out.shape[dim])
                    for row in dim_rows
                )
                per_dim.append([w for w in windows if w is not None])
            if isinstance(piece.array, Stored):
                each = itertools.product(*([a for a, _ in windows] for windows in per_dim))
                paths.ahead(piece.array.window(held).span for held in each)
            for combination in itertools.product(*per_dim):
                wanted: Any = (*(b for _, b in combination), ...)
                source = piece.view(tuple(a for a, _ in combination))
                np.copyto(out[wanted], source, casting="unsafe")
                self._count(holder, piece.fragment.dp, source.nbytes)

    def _overlap(self, coordinate: Coordinate, cut: Cut, at: Coordinate) -> list[list[list[int]]]:
        """What a source shard and a shard of `cut` have in common, by dim; known as long as the same is asked for."""
        known = self._known_overlaps.get(coordinate)
        if known is None or known[0] is not cut or known[1] != at:
            rows = overlap(self.cut, coordinate, cut, at, owned=not self.alone)
            known = cut, at, [plain_rows(r).tolist() for r in rows]
            self._known_overlaps[coordinate] = known
        return known[2]

    def _pieces(self, holder: Holder, coordinate: Coordinate) -> list[_Piece]:
        """The source shard of a holder as boxes, each within one fragment."""
        if holder not in self._known_pieces:
            self._known_pieces[holder] = self._find_pieces(holder, coordinate)
        return self._known_pieces[holder]

    def _find_pieces(self, holder: Holder, coordinate: Coordinate) -> list[_Piece]:
        shape = self.cut.shard_shape(coordinate)
        fragments = self._fragments(holder)
        if len(fragments) == 1 and fragments[0].count == math.prod(shape):
            stored = fragments[0].stored
            same = stored.shape == shape
            if paths.is_far(stored.path) and (same or stored.contiguous):
                return [_Piece((0,) * len(shape), stored if same else stored.reshape(shape), fragments[0], None)]
            array = stored.map() if same else stored.flat.reshape(shape)
            offset = stored.offset if same or stored.contiguous else None
            return [_Piece((0,) * len(shape), array, fragments[0], offset)]
        pieces = []
        for fragment in fragments:
            done, stored = 0, fragment.stored
            distant = paths.is_far(stored.path) and stored.contiguous
            flat = None if distant else stored.flat
            for starts, sizes in flat_boxes(shape, fragment.start, fragment.start + fragment.count):
                count = math.prod(sizes)
                offset = stored.offset + done * self.dtype.itemsize if stored.contiguous else None
                held = stored.elements(done, count) if flat is None else flat[done : done + count]
                pieces.append(_Piece(starts, held.reshape(sizes), fragment, offset))
                done += count
        return pieces

    def _fragments(self, holder: Holder) -> tuple[Fragment, ...]:
        if holder not in self._known_fragments:
            if self._catalog is None:
                raise CheckpointError(f"{self.name}: {holder} was not among what this reader took along")
            found = self._catalog.fragments(self.name, self.state, holder)
            shape = self.placement.shape(holder)
            if (stored := sum(f.count for f in found)) != math.prod(shape):  # the rest would be whatever memory held
                raise CheckpointError(
                    f"{self._catalog.path}: {self.name}: {self.state}: of the shard of {holder}, shape {shape}, only "
                    f"{stored} elements are stored: the checkpoint is incomplete, see what `ckptlab check` says of it"
                )
            self._known_fragments[holder] = found
        return self._known_fragments[holder]

    def _count(self, holder: Holder, dp: int, nbytes: int) -> None:
        note_read(nbytes)
        if self.tally is not None:
            self.tally.read[int(self.placement.ranks(holder)[dp]), self.tally.target] += nbytes


def _in_one_row(rows: np.ndarray, start: int, size: int) -> int | None:
    """Where a window of the target's dim begins in the source's, if one row of their overlap holds all of it."""
    for a, b, length, count, _, _ in rows.tolist():
        if count == 1 and b <= start and start + size <= b + length:
            return int(a + start - b)
    return None
