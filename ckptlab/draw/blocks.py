"""Many as few: which neighbours one cell stands for when there are more than a page can show."""

from __future__ import annotations

import math
from collections.abc import Sequence


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
