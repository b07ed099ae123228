"""What is to be read: for each tensor the copies of its states, side by side, so that each stored byte is read once.

A `Row` is one state of one shard as one rank stores it, in whatever fragments; a `Job` is a range of the flattened
shard in all the rows that have to do with each other there: every state, and every rank that holds a copy.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ckptlab.catalog import ALONE, MASTER, Catalog, FlatGroup, Fragment, Tensor
from ckptlab.errors import CkptlabError
from ckptlab.layout.cut import Coordinate
from ckptlab.plan import Holder
from ckptlab.stored import Stored

WINDOW = 1 << 21  # bytes of all rows of a job that a worker holds at a time, if not said
_JOB = 2  # elements of a shard that one job goes through, for each byte of a window


@dataclass(frozen=True)
class Row:
    """A state of a shard as `rank` stores it: a holder, with its dp coordinate where each dp rank has a copy."""

    state: str
    rank: Holder
    dtype: np.dtype
    fragments: tuple[Fragment, ...]


@dataclass(frozen=True)
class Job:
    """Elements lo … hi-1 of a flattened shard, in rows of the same shape. `compared`: see `compared_with`."""

    tensor: str
    kind: str
    lo: int
    hi: int
    rows: tuple[Row, ...]
    compared: bool = True

    @property
    def nbytes(self) -> int:
        return sum((self.hi - self.lo) * row.dtype.itemsize for row in self.rows)

    def elements(self, window: int) -> int:
        """Elements of a row in a window of so many bytes; not too few, however many rows there are."""
        return max(window // max(sum(row.dtype.itemsize for row in self.rows), 1), window >> 9, 1)

    def compared_with(self, row: Row) -> Row | None:
        """The row that must hold the same as `row`: that of the first dp rank; of the same holder on the canonical
        stage; of the first holder there. None for the first of all, and where copies may differ."""
        alike = {r.rank: r for r in self.rows if r.state == row.state}
        first = next(iter(alike))
        if row.rank.get("dp"):
            return alike.get(row.rank.with_(dp=0))
        if row.rank["pp"] != first["pp"]:
            return alike.get(row.rank.with_(pp=first["pp"]))
        return alike[first] if row.rank != first and self.compared else None


@dataclass(frozen=True)
class Gap:
    """Elements of a flat partition that belong to no tensor: `spans` are (start, count) in what is stored of it."""

    group: FlatGroup
    state: str
    rank: Holder
    stored: Stored
    spans: tuple[tuple[int, int], ...]

    @property
    def nbytes(self) -> int:
        return sum(n for _, n in self.spans) * self.stored.dtype.itemsize


Unreadable = dict[tuple[str, str], CkptlabError]  # tensor and state → why


def jobs(catalog: Catalog, unreadable: Unreadable, window: int = WINDOW) -> Iterator[Job]:
    """Everything that a catalog has of tensors, once; in jobs of many windows of so many bytes. What cannot be read,
    of formats whose tensors have headers of their own, goes into `unreadable`."""
    for tensor in catalog.tensors.values():
        held = _rows(catalog, tensor, unreadable)
        compared = tensor.layout.replicas not in ("mean", "sum")
        for at in tensor.cut.coordinates():
            count = math.prod(tensor.cut.shard_shape(at))
            if at in held and count:
                yield from _split(tensor.name, tensor.kind, count, window, tuple(held[at]), compared)


def _split(name: str, kind: str, count: int, window: int, rows: tuple[Row, ...], compared: bool) -> Iterator[Job]:
    for lo in range(0, count, _JOB * window):
        yield Job(name, kind, lo, min(lo + _JOB * window, count), rows, compared)


def _rows(catalog: Catalog, tensor: Tensor, unreadable: Unreadable) -> dict[Coordinate, list[Row]]:
    """The states of a tensor at each coordinate of its cut, with all their copies, the canonical stage's first."""
    found: dict[Coordinate, list[Row]] = {}
    for state, dtype in tensor.states.items():
        for placement in catalog.placements.get((tensor.name, state), ()):
            for holder in placement.holders:
                try:
                    fragments = catalog.fragments(tensor.name, state, holder)
                except CkptlabError as error:
                    unreadable.setdefault((tensor.name, state), error)
                    continue
                row = Row(state, holder, np.dtype(dtype), fragments)
                found.setdefault(placement.coordinate(holder), []).append(row)
    return found


def gaps(catalog: Catalog) -> Iterator[Gap]:
    """The padding of flat buffers that must be zero: that of stages 1 and 2, of states that nothing but gradients
    moves. (ZeRO-3's is memory nobody wrote.)"""
    for group in catalog.flat_groups:
        for state, (holder, flat) in itertools.product(filter(_is_zero_untrained, group.dtypes), group.flats.items()):
            partitions = catalog.stored.partitions[group.key, state][holder]
            for d, stored in enumerate(partitions) if flat.partition is not None else ():
                spans = tuple(_between([(int(at), int(n)) for _, _, at, n in flat.within(d)], stored.numel))
                if spans:
                    yield Gap(group, state, holder.with_(**{group.over: d}), stored, spans)


def _is_zero_untrained(state: str) -> bool:
    """Whether it stays zero where no gradient comes: unlike a state that has another beginning (Adagrad's sum, Rprop's
    step sizes) or a floor (Adamax's norm)."""
    return state in (MASTER, "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer")


def _between(held: Sequence[tuple[int, int]], end: int) -> Iterator[tuple[int, int]]:
    done = 0
    for start, count in [*held, (end, 0)]:
        if start > done:
            yield done, min(start, end) - done
        done = max(done, start + count)


def loose(contents: Mapping[str, Any], window: int = WINDOW) -> Iterator[Job]:
    """The tensors of files that could be read, each by itself: for a checkpoint that does not open. Views on the same
    bytes are taken once."""
    seen: dict[tuple[str, int], int] = {}
    for file, content in contents.items():
        for key, stored in stored_in(content):
            place = (stored.path, stored.offset)
            if stored.numel and stored.contiguous and seen.get(place, 0) < stored.nbytes:
                seen[place] = stored.nbytes
                row = Row("", ALONE, stored.dtype, (Fragment(0, stored),))
                yield from _split(f"{file}: {key}", "loose", stored.numel, window, (row,), False)


def stored_in(content: Any) -> Iterator[tuple[str, Stored]]:
    """Every tensor in the content of a file, with the keys that lead to it: `module.wte.weight`. However deep it is
    nested, and whatever holds itself."""
    seen: set[int] = set()
    left: list[tuple[str, Any]] = [("", content)]
    while left:
        key, value = left.pop()
        if isinstance(value, Stored):
            yield key, value
        elif isinstance(value, (Mapping, list, tuple)) and id(value) not in seen:
            seen.add(id(value))
            inside = value.items() if isinstance(value, Mapping) else enumerate(value)
            held = ((i, k, v) for i, (k, v) in enumerate(inside) if isinstance(v, (Stored, Mapping, list, tuple)))
            named = ((str(k) if isinstance(k, (str, int)) else f"[{i}]", v) for i, k, v in held)
            left += reversed([(f"{key}.{k}" if key else k, v) for k, v in named])
