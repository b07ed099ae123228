"""A tensor as a rectangle that is cut: who holds what, parts framed, padding hatched, copies as sheets behind."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ckptlab.draw.colours import PALETTE, colour, tinted
from ckptlab.draw.edge import Edge, Strip
from ckptlab.draw.fragments import Fragment, areas_drawn, fragment_beside
from ckptlab.draw.shard import shard_beside
from ckptlab.draw.svg import Drawing, cell, drawing, element, noted, rect, striped, tail, text, text_of, width_of

_SIDES, _THIN = (340.0, 280.0, 230.0, 180.0), 46.0
_SEEN = 4.0  # pixels between two lines
_STRIPES = 4  # holders whose colours are striped; more are grey

Area = tuple[float, float, float, float]  # left, top, width, height


@dataclass(frozen=True)
class _Band:
    """Strips of all dims that run along one direction of the page, one choice of each."""

    strips: tuple[Strip, ...]
    at: float
    length: float


def sheet(
    edges: Sequence[Edge],
    *,
    title: str = "",
    notation: str = "",
    copies: Sequence[tuple[str, int]] = (),
    marked: Mapping[str, int] | None = None,
    shard: Sequence[Sequence[tuple[int, int]]] | None = None,
    notes: Sequence[str] = (),
    fragments: Sequence[Fragment] = (),
    nothing: str = "",
    everyone: str = "every rank",
    hue: int | None = None,
    room: float | None = None,
) -> Drawing:
    """One tensor. copies: (axis, number) of those that hold the same; marked: the coordinate that stands out; shard:
    what it holds, drawn beside: for each dim its intervals (start in the whole, length), in the shard's order.

    fragments: what each shard is cut into further, drawn in its place (see Fragment). nothing: what is said of a rank
    that holds nothing of it; everyone: who has what is not cut. hue: one colour, in tints, instead of one for each
    coordinate. room: the width of the page; the largest scale that
    fits it is taken, and what stands beside the tensor goes below it where that does not.
    """
    told = title if room is None else tail(title, room, 14)
    one = _Sheet(edges, told, notation, copies, marked, shard, notes, fragments, nothing, everyone, hue, room)
    for below in (False, True):
        width, draw = one.laid(_SIDES[0], below)
        if room is None or width <= room:
            return draw()
        width, draw = one.laid(_SIDES[-1], below)
        if width <= room:
            between = (one.laid(side, below) for side in _SIDES[1:-1])
            return next((larger for width, larger in between if width <= room), draw)()
    return draw()


@dataclass(frozen=True)
class _Sheet:
    """What is drawn of a tensor: see `sheet`."""

    edges: Sequence[Edge]
    title: str
    notation: str
    copies: Sequence[tuple[str, int]]
    marked: Mapping[str, int] | None
    shard: Sequence[Sequence[tuple[int, int]]] | None
    notes: Sequence[str]
    fragments: Sequence[Fragment]
    nothing: str
    everyone: str
    hue: int | None
    room: float | None

    def laid(self, side: float, below: bool) -> tuple[int, Callable[[], Drawing]]:
        """How wide it is with the tensor's longer side so long, and what draws it; below: what a rank holds is drawn
        below it, not beside."""
        edges, title, notation, fragments = self.edges, self.title, self.notation, self.fragments
        rows, columns = self._directions()
        width, height = _extent([edges[i].size for i in rows], [edges[i].size for i in columns], side)
        down = _Direction([edges[i] for i in rows], height, vertical=True)
        over = _Direction([edges[i] for i in columns], width, vertical=False)
        left, top = self._margins(down, over)
        sheets = min(2, math.prod(n for _, n in self.copies) - 1)
        headed = not fragments and _headed(down, over)
        wide = [width_of(f"{down.head(b)} · {math.prod(s.length for s in b.strips):,}", 10) for b in down.bands]
        right = left + width + 5 * sheets + (max(wide) + 20 if headed else 46)
        bottom = top + height + 5 * sheets + (28 if len(over.bands) > 1 else 6)
        corner = (left, bottom + 34) if below else (right + 30, top)
        beside: list[str] = []
        end = corner
        if self.nothing:
            beside, end = _empty(self.nothing, corner, (width, height))
        elif fragments and self.marked is not None:
            beside, end = fragment_beside(fragments, corner, (width, height), edges, rows, columns, self.marked)
        elif self.shard is not None:
            beside, end = shard_beside(edges, self.shard, rows, columns, corner, (width, height), self.marked or {})
        if beside:
            right, bottom = max(right, end[0]), max(bottom, end[1] + 6)
        said, bottom, broad = noted([*self._said({*rows, *columns}), *self.notes], bottom, self.room)
        total = max(right, width_of(title, 14), width_of(notation, 13), broad)

        def draw() -> Drawing:
            area = (left, top, width, height)
            parts = [text(0, 8, title, "title")] if title else []
            if notation:
                parts.append(text(0, 26 if title else 8, _spelled(notation, edges), "mono notation", svg=True))
            for k in range(sheets, 0, -1):
                parts.append(_behind(left + 5 * k, top + 5 * k, width, height))
            defs: list[str] = []
            if fragments:
                across, deep = (math.prod(edges[i].size for i in side) for side in (columns, rows))
                parts += areas_drawn(fragments, area, across, deep, self.marked, bool(self.nothing))
            for a, b in itertools.product(down.bands, over.bands):
                strips: dict[int, Strip] = dict(zip([*rows, *columns], [*a.strips, *b.strips], strict=True))
                parts.append(self._cell(strips, (left + b.at, top + a.at, b.length, a.length), defs))
            parts.append(_frame(area, "whole overlay", "1.5"))
            parts += [*down.inner(area), *over.inner(area), *down.labels(area, headed), *over.labels(area, headed)]
            return drawing(title or notation, [*parts, *beside, *said], total, bottom + 2, defs)

        return round(total), draw

    def _directions(self) -> tuple[list[int], list[int]]:
        """Dims that run down and across. All that are cut are shown, and at least two; the rest are said below."""
        edges = self.edges
        cut = [i for i, edge in enumerate(edges) if len(edge.strips) > 1]
        others = sorted((i for i in range(len(edges)) if i not in cut), key=lambda i: -edges[i].size)
        shown = sorted([*cut, *others][: max(2, len(cut))])
        return shown[:-1], shown[-1:]

    def _margins(self, down: _Direction, over: _Direction) -> tuple[float, float]:
        names = [_named(edge) for edge in down.edges] + [name for edge in down.edges for name, _ in edge.parts]
        left = max([width_of(name) for name in names] + [0]) + (34 if any(e.parts for e in down.edges) else 14)
        left = max(left, sum(down.room(depth) for depth in {d for d, *_ in down.blocks}) + 12)
        top = (22 if self.title else 0) + (20 if self.notation else 0) + (22 if over.edges else 4)
        return left, top + (20 if any(edge.parts for edge in over.edges) else 0)

    @cached_property
    def _marked(self) -> list[set[int] | None]:
        """Of each dim the coordinates on its axes that stand out; None where none do."""
        return [None if self.marked is None else edge.axes.where(dict(self.marked)) for edge in self.edges]

    def _cell(self, strips: Mapping[int, Strip], box: Area, defs: list[str]) -> str:
        edges, allowed = self.edges, self._marked
        holders = [strips[i].holders if i in strips else tuple(range(len(e.blocks))) for i, e in enumerate(edges)]
        fill = self._fill(holders, defs)
        held = [[k for h in mine for k in e.blocks[h]] for e, mine in zip(edges, holders, strict=True)]
        label = " ".join(filter(None, (e.axes.label(k) for e, k in zip(edges, held, strict=True))))
        uncut = all(e.axes.size == 1 for e in edges)
        place = {name: v for e, k in zip(edges, held, strict=True) for name, v in e.axes.data(k).items()}
        padding = any(s.padding for s in strips.values())
        shared = math.prod(map(len, holders)) > 1
        hit = all(ok is None or ok.intersection(k) for ok, k in zip(allowed, held, strict=True))
        kinds = ["piece", *(["padding"] if padding else []), *(["replicated"] if shared else [])]
        if any(ok is not None for ok in allowed):
            kinds.append("marked" if hit and not self.nothing else "dimmed")
        sizes = [strips[i].length if i in strips else e.size for i, e in enumerate(edges)]
        starts = [strips[i].start if i in strips else 0 for i in range(len(edges))]
        names = [e.parts[s.part][0] for i, e in enumerate(edges) if (s := strips.get(i)) and s.part is not None]
        data: dict[str, object] = {
            **place,
            "start": ",".join(map(str, starts)),
            "shape": ",".join(map(str, sizes)),
            "count": math.prod(sizes),
        }
        if names:
            data["part"] = " ".join(names)
        along = ", ".join(f"{e.name} {s}–{s + n - 1}" for e, s, n in zip(edges, starts, sizes, strict=True))
        everyone = self.everyone if self.copies else "whole"
        who = f"{label or everyone}{' (each holds it)' if shared else ''}"
        tip = f"{who} · {' '.join([*names, along])} · {math.prod(sizes):,} elements{' · padding' if padding else ''}"
        told: dict[str, Any] = {"kind": " ".join(kinds), "label": everyone if uncut else label, "data": data}
        faint: dict[str, Any] = {"fill_opacity": ".15"} if "dimmed" in kinds else {}
        if self.fragments:  # they lie below, and are what the mouse is to find
            fill, faint = "none", {"pointer_events": "none"}
            told |= {"kind": "shard-of-fragments", "label": ""}
        return cell(box, fill, tip, hatch=padding, **told, **faint)

    def _fill(self, holders: Sequence[tuple[int, ...]], defs: list[str]) -> str:
        """A colour for each coordinate of the cut; stripes for what several hold, grey if it is not cut at all."""
        edges, hue = self.edges, self.hue
        if hue is not None and all(len(mine) == 1 for mine in holders):
            return tinted(hue, sum(k for (k,) in holders))
        if all(len(e.blocks) == 1 for e in edges):
            return PALETTE[-1] if all(e.axes.size == 1 for e in edges) else PALETTE[0]
        numbers = []
        for combination in itertools.product(*holders):
            number = 0
            for edge, k in zip(edges, combination, strict=True):
                number = number * len(edge.blocks) + k
            numbers.append(number)
        if len(numbers) == 1:
            return colour(numbers[0])
        colours = tuple(colour(n) for n in numbers) if len(numbers) <= _STRIPES else ("#666666", "#bbbbbb")
        fill, pattern = striped(colours)
        defs.append(pattern)
        return fill

    def _said(self, shown: Collection[int]) -> list[str]:
        """What must be heard of the dims, of which some are shown."""
        found = []
        edges, copies = self.edges, self.copies
        left_out = [i for i in range(len(edges)) if i not in shown]
        if left_out:
            found.append(f"not drawn, held whole: {', '.join(_named(edges[i]) for i in left_out)}")
        for edge in edges:
            if edge.true < edge.size:
                found.append(f"hatched: {edge.size - edge.true:,} of {edge.size:,} {edge.name} are padding")
            if edge.folded:
                found.append(
                    f"{edge.name}: {edge.folded:,} strips, drawn in {edge.windows} windows; "
                    "in each, what one rank holds is drawn together"
                )
            if len(edge.blocks) < len(edge.held):
                each = f"{len(edge.blocks)} blocks of {len(edge.blocks[0]):,}"
                found.append(f"{edge.name}: {len(edge.held):,} coordinates in {each}")
        if copies:
            each = " · ".join(f"{axis} {n:,}" for axis, n in copies)
            found.append(f"each piece is held alike by {math.prod(n for _, n in copies):,} ranks ({each})")
        return found


@dataclass(frozen=True)
class _Direction:
    """The dims that run along one direction of the page, over so many pixels."""

    edges: Sequence[Edge]
    extent: float
    vertical: bool

    @cached_property
    def bands(self) -> list[_Band]:
        """The choices of strips, behind one another; together they fill it."""
        found, at = [], 0.0
        whole = math.prod(edge.size for edge in self.edges)
        for strips in itertools.product(*(edge.strips for edge in self.edges)):
            length = self.extent * math.prod(s.length for s in strips) / whole
            found.append(_Band(strips, at, length))
            at += length
        return found

    @cached_property
    def blocks(self) -> list[tuple[int, str, float, float]]:
        """(depth, name, place, length) of the blocks that can be seen; nothing if it has several dims."""
        if len(self.edges) != 1 or self.edges[0].parts or not self.edges[0].inner:
            return []
        scale = self.extent / self.edges[0].size
        return [(d, name, a * scale, n * scale) for d, name, a, n in self.edges[0].inner if n * scale >= _SEEN]

    def room(self, depth: int) -> float:
        """How wide the names of the blocks of a depth are written."""
        return max([width_of(name, 10) + 8 for d, name, _, length in self.blocks if d == depth and length >= 9] + [0])

    def head(self, band: _Band) -> str:
        """Who holds a band, on its own axes: `tp 0`."""
        held = ([k for h in s.holders for k in e.blocks[h]] for e, s in zip(self.edges, band.strips, strict=True))
        return " ".join(filter(None, (e.axes.label(k) for e, k in zip(self.edges, held, strict=True) if k)))

    def labels(self, area: Area, headed: bool) -> list[str]:
        """Names and sizes of dims and parts before an edge of the rectangle, lengths of strips behind it; headed: with
        who holds them."""
        if not self.edges:
            return []
        (left, top, width, height), vertical = area, self.vertical
        name = " × ".join(map(_named, self.edges))
        parted = len(self.edges) == 1 and bool(self.edges[0].parts)
        found = []
        if vertical:
            above = parted or bool(self.blocks)
            found.append(text(left - (30 if parted else 8), top - 10 if above else top + height / 2, name, "end dim"))
        else:
            found.append(text(left + width / 2, top - (30 if parted else 11), name, "middle dim"))
        if parted:
            found += self._parts(area)
        for band in self.bands:
            said = f"{math.prod(s.length for s in band.strips):,}"
            middle = band.at + band.length / 2
            head = self.head(band) if headed else ""
            if head and vertical and band.length >= 9:
                found.append(text(left + width + 16, top + middle, f"{head} · {said}", "small head"))
                continue
            if head and not vertical and band.length >= width_of(head, 10):
                found.append(text(left + middle, top + height + 18, head, "small middle head"))
                continue
            if len(self.bands) > 1 and vertical and band.length >= 9:
                found.append(text(left + width + 16, top + middle, said, "small quiet length"))
            elif len(self.bands) > 1 and not vertical and band.length >= width_of(said, 10):
                found.append(text(left + middle, top + height + 18, said, "small quiet middle length"))
        return found

    def inner(self, area: Area) -> list[str]:
        """Thin lines between blocks that lie in what one holds, and their names at the edge."""
        (left, top, width, height), vertical = area, self.vertical
        found = []
        depths = sorted({depth for depth, *_ in self.blocks}, reverse=True)
        for depth, name, at, length in self.blocks:
            style = {"fill": "none", "stroke": "#000", "stroke_opacity": ".75" if depth == depths[-1] else ".45"}
            style |= {"stroke_width": "1.1" if depth == depths[-1] else ".7"}
            a, b = (width, f"M{left:.1f} {top + at:.1f}h") if vertical else (height, f"M{left + at:.1f} {top:.1f}v")
            side = max(a / 2 - 36, 8.0)  # what is written in the middle of a cell is not struck through
            line = f"{b}{side:.1f}m{f'{a - 2 * side:.1f} 0' if vertical else f'0 {a - 2 * side:.1f}'}{b[-1]}{side:.1f}"
            if at:
                found.append(element("path", d=line, class_="inner overlay", **style))
            if vertical and length >= 9:
                place = left - 8 - sum(self.room(deeper) for deeper in depths if deeper > depth)
                found.append(text(place, top + at + length / 2, name, "small quiet end inner-label"))
        return found

    def _parts(self, area: Area) -> list[str]:
        """Of the one dim each part's name and length beside it, and a frame around it."""
        (left, top, width, height), vertical, edge = area, self.vertical, self.edges[0]
        found, at = [], 0.0
        for name, length in edge.parts:
            size = self.extent * length / edge.size
            box = (left, top + at, width, size) if vertical else (left + at, top, size, height)
            found.append(_frame(box, "part overlay", "2.5", data_part=name))
            said = f"{name} {length:,}"
            if vertical and size >= 9:
                small = "small " if size < 14 else ""
                found.append(text(left - 12, box[1] + size / 2, said, f"end strong {small}part-label"))
                found.append(_bracket(left - 8, box[1] + 2, size - 4))
            elif not vertical and size >= width_of(said, 10):
                found.append(text(box[0] + size / 2, top - 11, said, "middle strong part-label"))
            at += size
        return found


def _headed(down: _Direction, over: _Direction) -> bool:
    """Whether who holds a cell is said at the edges, since a label for both directions does not fit into every cell."""
    if len(down.bands) < 2 or len(over.bands) < 2:
        return False
    heads = [[side.head(band) for band in side.bands] for side in (down, over)]
    widest = max(width_of(f"{a} {b}", 10) for a in heads[0] for b in heads[1])
    narrow, low = (min(band.length for band in side.bands) for side in (over, down))
    return all(map(any, heads)) and (widest + 4 > narrow or low < 11)


def _spelled(notation: str, edges: Sequence[Edge]) -> str:
    """The notation with the mesh axes that cut in it underlined."""
    axes = {name for edge in edges for name in edge.axes.names}
    words = re.split(r"(\w+)", notation)
    return "".join(
        element("tspan", text_of(w), class_="strong", text_decoration="underline") if w in axes else text_of(w)
        for w in words
    )


def _extent(rows: Sequence[int], columns: Sequence[int], side: float) -> tuple[float, float]:
    """Width and height: the true ratio, unless one side would be too thin."""
    if not columns:
        return _THIN, _THIN
    if not rows:
        return side * 1.4, _THIN
    ratio = math.prod(rows) / max(math.prod(columns), 1)
    ratio = min(max(ratio, 0.45), 1.6)
    return (side, side * ratio) if ratio <= 1 else (side / ratio, side)


def _named(edge: Edge) -> str:
    return f"{edge.name} {edge.size:,}"


def _empty(said: str, corner: tuple[float, float], whole: tuple[float, float]) -> tuple[list[str], tuple[float, float]]:
    """An empty place where a shard would stand, and what is said of it; and where it ends."""
    x, y = corner
    w, h = min(whole[0], 120.0), min(whole[1], 60.0)
    place = rect(x, y, w, h, fill="none", stroke="currentColor", stroke_opacity=".5", stroke_dasharray="4 4", rx="4")
    found = [text(x, y - 11, said, "strong shard-label"), place, text(x + w / 2, y + h / 2, "∅", "middle quiet")]
    return found, (max(x + w, x + width_of(said, 13)), y + h)


def _behind(x: float, y: float, width: float, height: float) -> str:
    """The edges of a sheet that stand out below and beside the one before it."""
    path = f"M{x:.1f} {y + height - 5:.1f}v5h{width:.1f}v{-height:.1f}h-5"
    return element("path", d=path, fill="none", stroke="currentColor", stroke_opacity=".35", class_="copy overlay")


def _frame(box: tuple[float, float, float, float], kind: str, width: str, **attributes: object) -> str:
    x, y, w, h = box
    return rect(x, y, w, h, fill="none", stroke="currentColor", stroke_width=width, class_=kind, **attributes)


def _bracket(x: float, y: float, length: float) -> str:
    path = f"M{x + 4:.1f} {y:.1f}h-4v{max(length, 1):.1f}h4"
    return element("path", d=path, class_="line")
