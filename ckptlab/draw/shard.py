"""What one coordinate holds of a tensor, to the scale of the whole, drawn beside it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

from ckptlab.draw.colours import PALETTE, colour
from ckptlab.draw.edge import STRIPS, Edge
from ckptlab.draw.svg import cell, text, width_of


def shard_beside(
    edges: Sequence[Edge],
    shard: Sequence[Sequence[tuple[int, int]]],
    rows: Sequence[int],
    columns: Sequence[int],
    corner: tuple[float, float],
    whole: tuple[float, float],
    marked: Mapping[str, int],
) -> tuple[list[str], tuple[float, float]]:
    """The shard to the scale of the whole, its pieces behind one another; and where it ends (right, bottom)."""
    across = _runs([edges[i] for i in columns], [shard[i] for i in columns], whole[0])
    down = _runs([edges[i] for i in rows], [shard[i] for i in rows], whole[1])
    number = 0
    for edge in edges:
        block = next(i for i, b in enumerate(edge.blocks) if edge.axes.where(dict(marked)).intersection(b))
        number = number * len(edge.blocks) + block
    fill = colour(number) if any(edge.axes.size > 1 for edge in edges) else PALETTE[-1]  # as the whole has it
    who = " ".join(f"{axis} {k}" for axis, k in marked.items()) or "each rank"
    size = " × ".join(f"{sum(n for _, n in pieces):,}" for pieces in shard)
    x, y = corner
    found = [text(x, y - 11, f"{who} holds {size}", "strong shard-label")]
    for (names_a, at_a, a), (names_b, at_b, b) in itertools.product(down, across):
        tip = f"{who} · {', '.join(filter(None, [names_a, names_b]))}"
        found.append(cell((x + at_b, y + at_a, b, a), fill, tip, kind="shard", data=dict(marked)))
    end = x + (across[-1][1] + across[-1][2] if across else 0)
    labels = [(end + 8, y + at + a / 2, names) for names, at, a in down if len(down) > 1 and a >= 9]
    found += [text(*label, "small quiet") for label in labels]
    widest = max([width_of(names, 10) for _, _, names in labels] + [0])
    bottom = y + (down[-1][1] + down[-1][2] if down else 0)
    return found, (max(end + widest + 16, x + width_of(f"{who} holds {size}", 13)), bottom)


def _runs(
    edges: Sequence[Edge], pieces: Sequence[Sequence[tuple[int, int]]], extent: float
) -> list[tuple[str, float, float]]:
    """(names, place, length) along one direction of the shard; more than can be seen are one."""
    whole = math.prod(edge.size for edge in edges)
    if math.prod(map(len, pieces)) > STRIPS:
        return [("", 0.0, extent * math.prod(sum(n for _, n in some) for some in pieces) / max(whole, 1))]
    found, at = [], 0.0
    for choice in itertools.product(*pieces):
        length = extent * math.prod(n for _, n in choice) / max(whole, 1)
        names = " × ".join(_spanned(e, s, n) for e, (s, n) in zip(edges, choice, strict=True))
        found.append((names, at, length))
        at += length
    return found


def _spanned(edge: Edge, start: int, length: int) -> str:
    """`out 8–15`; of a part `k: out 36–39`, of several `k, v: out 64–79`."""
    at, parts = 0, []
    for name, size in edge.parts:
        if at < start + length and start < at + size:
            parts.append(name)
        at += size
    return f"{', '.join(parts)}{': ' if parts else ''}{edge.name} {start:,}–{start + length - 1:,}"
