"""Many as few: which neighbours one cell stands for when there are more than a page can show, and how that is said."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence

from ckptlab.words import ranges

_LISTED = 64  # ranks of a cell that are named one by one


def blocks(n: int, most: int) -> list[range]:
    """0 … n - 1 in at most `most` runs of one length (the last may be shorter)."""
    step = max(-(-n // max(most, 1)), 1)
    return [range(i, min(i + step, n)) for i in range(0, n, step)]


def thinned(shape: Sequence[int], limits: Sequence[int], most: int) -> list[list[range]]:
    """Blocks along each axis: no axis has more than its limit, and all together are at most `most` cells.

    The longest axis is halved first, of equals the first.
    """
    limits = [min(n, limit) for n, limit in zip(shape, limits, strict=True)]
    found = [blocks(n, limit) for n, limit in zip(shape, limits, strict=True)]
    while math.prod(map(len, found)) > most:
        axis = max(range(len(found)), key=lambda i: len(found[i]))
        found[axis] = blocks(shape[axis], -(-len(found[axis]) // 2))
    return found


def span(numbers: Sequence[int] | range) -> str:
    """`3`, `0–7`."""
    return str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]}–{numbers[-1]}"


def told(numbers: Sequence[int] | range) -> str:
    """The same for a `data-*` attribute: `3`, `0-7`."""
    return str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]}-{numbers[-1]}"


def listed(numbers: Iterable[int]) -> str:
    """The same where there are gaps: `0-1,8-9`."""
    return ranges(numbers, to="-").replace(" ", "")


def each(held: Sequence[int]) -> str:
    """A cell's ranks for a `data-*` attribute: one by one where they are few."""
    return ",".join(map(str, held)) if len(held) <= _LISTED else listed(held)


def tip(held: Sequence[int], place: Mapping[str, str]) -> str:
    """What a cell says of its ranks, and of where they are: `rank 3 · dp 1 tp 0`."""
    who = f"rank {held[0]}" if len(held) == 1 else f"{len(held):,} ranks, {held[0]} … {held[-1]}"
    at = " ".join(f"{axis} {k.replace('-', '–')}" for axis, k in place.items())
    return f"{who} · {at}"


def fill(cells: Collection[tuple[int, int]]) -> bool:
    """Whether cells (row, column) fill a rectangle."""
    rows, columns = {i for i, _ in cells}, {j for _, j in cells}
    whole = len(rows) * len(columns) == len(cells)
    return whole and all(max(side) - min(side) < len(side) for side in (rows, columns))
