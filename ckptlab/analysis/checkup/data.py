"""The pass over the data: what is not finite, below zero, all zero, not rounded, not equal, or not empty."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from ckptlab import pool
from ckptlab.analysis import elements
from ckptlab.analysis.checkup.jobs import WINDOW, Gap, Job, Row
from ckptlab.analysis.checkup.reading import Reader
from ckptlab.catalog import MASTER, PARAM
from ckptlab.plan import Holder
from ckptlab.pool import Workers

_TOGETHER, _MANY = 64, 8  # jobs that one reader does at most, and windows from which on they are enough


class Key(NamedTuple):
    """What an observation is about. `what`: "finite", "negative", "rounded", "equal" or "padding"; `other` is the rank
    that `rank` was compared with (it holds the `b` of Seen)."""

    what: str
    tensor: str
    state: str
    rank: Holder
    other: Holder | None = None


@dataclass
class Seen:
    """How many elements something was seen in, and the worst of it: the largest distance (where nothing was compared,
    the first), at element `at` of the flattened shard or partition, where `a` and `b` stand."""

    count: int = 0
    worst: float = -1.0
    at: int = 0
    a: float = math.nan
    b: float = math.nan

    def add(self, where: np.ndarray, start: int, a: np.ndarray, b: np.ndarray | None = None) -> None:
        """Note the elements `where` of a window that begins at element `start`."""
        distances = np.zeros(1) if b is None else elements.apart(a[where], b[where])
        i = int(distances.argmax())
        self.count += len(where)
        if distances[i] > self.worst:
            self.worst, self.at = float(distances[i]), start + int(where[i])
            self.a = float(a[where[i]].real)
            self.b = math.nan if b is None else float(b[where[i]].real)

    def join(self, other: Seen) -> None:
        """Add what was seen in another range of the same."""
        self.count += other.count
        if other.worst > self.worst:
            self.worst, self.at, self.a, self.b = other.worst, other.at, other.a, other.b


@dataclass
class Told:
    """What the data of a checkpoint says: faults by key, and which rows (tensor, state, rank) are zero throughout."""

    seen: dict[Key, Seen] = field(default_factory=dict)
    zero: dict[tuple[str, str, Holder], bool] = field(default_factory=dict)

    def note(self, key: Key, seen: Seen) -> None:
        if key in self.seen:
            self.seen[key].join(seen)
        else:
            self.seen[key] = seen

    def join(self, other: Told) -> None:
        for key, seen in other.seen.items():
            self.note(key, seen)
        for row, zero in other.zero.items():
            self.zero[row] = self.zero.get(row, True) and zero


def survey(
    jobs: Sequence[Job], gaps: Sequence[Gap], *, window: int = WINDOW, on: Workers = None, progress: bool = False
) -> Told:
    """Read everything once, in windows of so many bytes, and say what was seen."""
    told = Told()
    todo: list[Job | Gap] = [*jobs, *gaps]
    with pool.progress(sum(job.nbytes for job in todo), "checking", "B", progress) as bar:
        for part in pool.run(_work, _tasks(todo, window), on=on, size=lambda task: task.nbytes, bar=bar):
            told.join(part)
    return told


@dataclass(frozen=True)
class _Task:
    """Jobs that one reader does: many of them may be small."""

    jobs: tuple[Job | Gap, ...]
    window: int

    @property
    def nbytes(self) -> int:
        return sum(job.nbytes for job in self.jobs)


def _tasks(todo: Sequence[Job | Gap], window: int) -> Iterator[_Task]:
    jobs: list[Job | Gap] = []
    for job in todo:
        jobs.append(job)
        if sum(job.nbytes for job in jobs) >= _MANY * window or len(jobs) == _TOGETHER:
            yield _Task(tuple(jobs), window)
            jobs = []
    if jobs:
        yield _Task(tuple(jobs), window)


def _work(task: _Task) -> Told:
    told = Told()
    with Reader() as reader, np.errstate(all="ignore"):
        for job in task.jobs:
            told.join(_padding(reader, job) if isinstance(job, Gap) else _rows(reader, job, task.window))
    return told


def is_second_moment(state: str) -> bool:
    """A mean of squares, which cannot be below zero."""
    return state.endswith(("_sq", "square_avg"))


def _rows(reader: Reader, job: Job, window_bytes: int) -> Told:
    told, size = Told(), job.elements(window_bytes)
    rounds = {MASTER, PARAM} <= {row.state for row in job.rows}
    scratch = np.empty(min(size, job.hi - job.lo) if rounds else 0, np.uint32)
    for start in range(job.lo, job.hi, size):
        stop = min(start + size, job.hi)
        held = reader.buffers(job.rows, stop - start)
        by_place = {}
        for row, window in zip(job.rows, held, strict=True):
            reader.row(row, start, stop, window)
            by_place[row.state, row.rank] = window
            _values(told, job, row, window, start)
            partner = job.compared_with(row)
            if partner is not None:
                _equal(told, job, row, partner, window, by_place[partner.state, partner.rank], start)
        _rounding(told, job, by_place, start, scratch)
    return told


def _values(told: Told, job: Job, row: Row, window: np.ndarray, start: int) -> None:
    squares = is_second_moment(row.state)
    seen = elements.extremes(window, signed=squares)
    place = (job.tensor, row.state, row.rank)
    told.zero[place] = told.zero.get(place, True) and seen.zero
    if not seen.finite:
        told.note(Key("finite", *place), _noted(elements.unfinite(window), window, start))
    if squares and (seen.negative or not seen.finite):
        below = np.flatnonzero(window.astype(np.float32) < 0)
        if len(below):
            told.note(Key("negative", *place), _noted(below, window, start))


def _noted(where: np.ndarray, a: np.ndarray, start: int, b: np.ndarray | None = None) -> Seen:
    seen = Seen()
    seen.add(where, start, a, b)
    return seen


def _equal(told: Told, job: Job, row: Row, partner: Row, a: np.ndarray, b: np.ndarray, start: int) -> None:
    if a.dtype != b.dtype:
        return
    where = elements.unequal(a, b)
    if len(where):
        told.note(Key("equal", job.tensor, row.state, row.rank, partner.rank), _noted(where, a, start, b))


def _rounding(
    told: Told, job: Job, by_place: dict[tuple[str, Holder], np.ndarray], start: int, scratch: np.ndarray
) -> None:
    for (state, rank), weight in by_place.items():
        master = by_place.get((MASTER, rank)) if state == PARAM else None
        if master is None:
            continue
        where = elements.unrounded(master, weight, scratch)
        if len(where):
            told.note(Key("rounded", job.tensor, MASTER, rank), _noted(where, master, start, weight))


def _padding(reader: Reader, gap: Gap) -> Told:
    told = Told()
    for start, count in gap.spans:
        for at in range(start, start + count, 1 << 18):
            window = np.empty(min(start + count - at, 1 << 18), gap.stored.dtype)
            reader.elements(gap.stored, at, window)
            if not elements.extremes(window).zero:
                name = gap.group.names[0] if gap.group.names else ""
                key = Key("padding", f"group {gap.group.group}: {name}", gap.state, gap.rank)
                told.note(key, _noted(np.flatnonzero(window.astype(np.float32) != 0), window, at))
    return told
