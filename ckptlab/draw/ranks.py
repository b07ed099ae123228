"""Ranks as cells of a page: which ranks a cell stands for, and what it says of them."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from ckptlab.aliases import Int64
from ckptlab.draw.axes import Axes
from ckptlab.draw.blocks import each, listed, tip


@dataclass(frozen=True)
class Cell:
    """What stands for the ranks `held`: the `groups` that they are in, its classes and `data-*`, what it says, and how
    strong its colour is."""

    held: list[int]
    groups: tuple[int, ...]
    marked: bool
    kind: str
    data: dict[str, object]
    said: str
    strength: str


@dataclass(frozen=True, eq=False)
class Ranks:
    """Ranks 0, 1, … (or `numbers`) over axes with `degrees`, the last running fastest. directions: which axes go from
    sheet to sheet, which down, which across.

    marks: ranks that stand out. groups: lists of ranks, framed together; `along` says what they are. spoken: axes in
    the order in which they are named.
    """

    degrees: Mapping[str, int]
    directions: Sequence[Sequence[str]]
    marks: Collection[int] = ()
    groups: Sequence[Sequence[int]] = ()
    along: str = ""
    spoken: Sequence[str] = ()
    numbers: Sequence[int] | None = None

    @cached_property
    def sides(self) -> list[Axes]:
        """The axes of each direction, run together."""
        return [Axes(tuple(axes), tuple(self.degrees[a] for a in axes)) for axes in self.directions]

    @cached_property
    def table(self) -> Int64:
        """The ranks, with a dim for each direction."""
        order = [list(self.degrees).index(axis) for side in self.sides for axis in side.names]
        every = np.arange(math.prod(self.degrees.values())) if self.numbers is None else np.asarray(self.numbers)
        return every.reshape(tuple(self.degrees.values())).transpose(order).reshape([side.size for side in self.sides])

    @cached_property
    def marked(self) -> frozenset[int]:
        return frozenset(self.marks)

    @cached_property
    def _group_of(self) -> dict[int, int]:
        return {rank: i for i, group in enumerate(self.groups) for rank in group}

    def cell(self, at: Sequence[range]) -> Cell:
        """The cell that stands for these coordinates along each direction."""
        held = [int(rank) for rank in self.table[np.ix_(*at)].ravel()]
        groups = tuple(sorted({self._group_of[rank] for rank in held if rank in self._group_of}))
        place = {axis: k for side, own in zip(self.sides, at, strict=True) for axis, k in side.data(own).items()}
        mark = not self.marked.isdisjoint(held)
        kind = "rank marked" if mark else "rank dimmed" if self.marked else "rank"
        data: dict[str, object] = {"rank": each(held), **place, **({"group": listed(groups)} if groups else {})}
        said = tip(held, {axis: place[axis] for axis in self.spoken or place})
        return Cell(held, groups, mark, kind, data, said, "1" if mark else ".1" if self.marked else ".32")

    def notes(self, cut: Sequence[Sequence[range]]) -> list[str]:
        """What is to be said below its cells: for how many ranks one stands, and which are marked."""
        found = []
        if (step := math.prod(len(side[0]) for side in cut)) > 1:
            cells = math.prod(map(len, cut))
            found.append(
                f"{self.table.size:,} ranks in {cells:,} cells: each cell stands for up to {step:,} ranks, of which it "
                "names the first"
            )
        if self.marked:
            some = ", ".join(map(str, sorted(self.marked)[:8])) + (" …" if len(self.marked) > 8 else "")
            found.append(f"marked: {'rank' if len(self.marked) == 1 else f'{len(self.marked):,} ranks,'} {some}")
        return found
