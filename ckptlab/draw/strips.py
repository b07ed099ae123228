"""Buffers as bars: named pieces behind one another, gaps the places where a piece goes on in the next bar."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ckptlab.draw.colours import PALETTE, colour
from ckptlab.draw.svg import Drawing, cell, drawing, element, noted, rect, swatch, text, width_of

_WIDTH, _HEIGHT, _STEP = 760.0, 30.0, 46.0
CUTS = 16  # cuts of a whole that are drawn through it
LEGEND = 24  # names that are listed below
_THIN = 3.0  # pixels: pieces thinner than this are drawn together with their neighbours


@dataclass(frozen=True)
class Piece:
    """`length` elements at `start` of a bar; `hue` numbers and colours it, unless it has a `tint`.

    torn: whether it began in a bar before, and whether it goes on in a bar behind.
    """

    name: str
    start: int
    length: int
    hue: int
    torn: tuple[bool, bool] = (False, False)
    data: Mapping[str, object] = field(default_factory=dict)
    tint: str = ""

    @property
    def fill(self) -> str:
        return self.tint or colour(self.hue % 7)


@dataclass(frozen=True)
class Bar:
    """`length` elements, of which pieces, ascending, take some; the rest is padding. `kind` is its pieces' class."""

    label: str
    length: int
    pieces: Sequence[Piece]
    data: Mapping[str, object] = field(default_factory=dict)
    kind: str = "fragment"


def strips(
    bars: Sequence[Bar | str],
    *,
    whole: Bar | None = None,
    cuts: Sequence[tuple[int, str]] = (),
    title: str = "",
    notes: Sequence[str] = (),
    width: float | None = None,
) -> Drawing:
    """Bars to one scale, for a page of a width (pixels; None: as wide as they like), one below the other; a text among
    them stands for bars that are left out.

    whole: what the bars are cut from, drawn above to its own scale, with `cuts`: where each bar begins in it, and what
    that bar is called.
    """
    labels = [b.label for b in [*bars, whole] if isinstance(b, Bar)]
    left = max([width_of(label) for label in labels] + [0]) + 12
    longest = max([b.length for b in bars if isinstance(b, Bar)] + [1])
    parts = [text(0, 8, title, "title")] if title else []
    y = 30.0 if title else 8.0
    merged = 0
    across = _WIDTH if width is None else max(width - left - 12, 120.0)
    scaled = [(bar, across / longest) for bar in bars if isinstance(bar, Bar)]
    if whole is not None:
        scaled.append((whole, across / max(whole.length, 1)))
        y += 14
        parts.append(text(left - 8, y + _HEIGHT / 2, whole.label, "end whole-label"))
        cells, merged = _bar(whole, left, y, scaled[-1][1])
        parts += [*cells, *_cuts(cuts, whole, left, y, across)]
        y += _STEP + 8
    for bar in bars:
        if isinstance(bar, str):
            parts.append(text(left, y + 8, bar, "quiet omitted"))
            y += 26
            continue
        parts.append(text(left - 8, y + _HEIGHT / 2, bar.label, "end bar-label"))
        cells, thin = _bar(bar, left, y, across / longest)
        parts += cells
        merged += thin
        length = across * bar.length / longest
        parts.append(text(left, y + _HEIGHT + 8, "0", "small quiet"))
        parts.append(text(left + length, y + _HEIGHT + 8, f"{bar.length:,}", "small quiet end"))
        y += _STEP
    legend, y = _legend(scaled, left, y, across)
    parts += legend
    said = [*notes]
    if merged:
        said.append(f"{merged:,} pieces are too thin to be seen; they are drawn together with their neighbours")
    below, y, broad = noted(said, y, width)
    total = max(left + across + 12, broad)
    return drawing(title or "buffers", [*parts, *below], total if width is None else min(total, width), y + 2)


def _bar(bar: Bar, left: float, y: float, scale: float) -> tuple[list[str], int]:
    """The cells of a bar, and how many pieces were too thin for one of their own."""
    found, thin, at = [], 0, 0
    run: list[Piece] = []
    for piece in bar.pieces:
        if piece.start > at:
            found += _flush(run, left, y, scale, bar)
            found.append(_padding(bar, at, piece.start - at, left, y, scale))
        at = piece.start + piece.length
        if piece.length * scale < _THIN:
            run.append(piece)
            thin += 1
            continue
        found += _flush(run, left, y, scale, bar)
        found.append(_piece(piece, left, y, scale, bar))
    found += _flush(run, left, y, scale, bar)
    if at < bar.length:
        found.append(_padding(bar, at, bar.length - at, left, y, scale))
    name = "bar overlay" if bar.kind == "fragment" else "whole overlay"
    found.append(rect(left, y, bar.length * scale, _HEIGHT, class_=name, fill="none", stroke="currentColor"))
    return found, thin


def _cuts(cuts: Sequence[tuple[int, str]], whole: Bar, left: float, y: float, across: float) -> list[str]:
    """A dashed line where each bar begins, of many a mark outside; and what the bar is called, if there is room."""
    found = []
    ends = [*(at for at, _ in cuts[1:]), whole.length]
    for (at, label), end in zip(cuts, ends, strict=True):
        x, width = left + across * at / max(whole.length, 1), across * (end - at) / max(whole.length, 1)
        if at:
            high, low = y - 10, y + _HEIGHT + 6
            path = f"M{x:.2f} {high:.1f}V{y + 6:.1f}M{x:.2f} {y + _HEIGHT - 6:.1f}V{low:.1f}"  # not through a name
            if len(cuts) > CUTS:
                path = f"M{x:.2f} {high:.1f}v9M{x:.2f} {low:.1f}v-5"
            style = {"fill": "none", "stroke": "currentColor", "stroke_width": "2", "stroke_dasharray": "4 2"}
            found.append(element("path", d=path, class_="cut overlay", **style))
        if width >= width_of(label, 10) + 4:
            found.append(text(x + width / 2, y - 8, label, "small quiet middle"))
    return found


def _piece(piece: Piece, left: float, y: float, scale: float, bar: Bar) -> str:
    x, width = left + piece.start * scale, piece.length * scale
    data = {"tensor": piece.name, "start": piece.start, "count": piece.length, **bar.data, **piece.data}
    before, after = piece.torn
    goes = " · goes on in the next" if after else ""
    tip = f"{piece.name} · {piece.length:,} elements from {piece.start:,}{goes}{' · begun before' if before else ''}"
    label = piece.name if _fits(piece, scale) else str(piece.hue + 1)
    shape = cell((x, y, width, _HEIGHT), piece.fill, tip, kind=bar.kind, label=label, data=data)
    return shape + "".join(_tear(at, y) for at, torn in ((x, before), (x + width, after)) if torn)


def _fits(piece: Piece, scale: float) -> bool:
    return piece.length * scale >= width_of(piece.name, 10) + 6


def _legend(bars: Sequence[tuple[Bar, float]], left: float, y: float, across: float) -> tuple[list[str], float]:
    """Names of the pieces that have only a number, in columns; and where the legend ends."""
    found: dict[int, Piece] = {}
    for bar, scale in bars:
        for piece in bar.pieces:
            if not _fits(piece, scale) and piece.length * scale >= _THIN:
                found.setdefault(piece.hue, piece)
    shown = [found[hue] for hue in sorted(found)][:LEGEND]
    columns = max(1, int(across // max([width_of(p.name, 10) + 46 for p in shown] + [1])))
    wide = across / columns
    parts = []
    for i, piece in enumerate(shown):
        x, at = left + i % columns * wide, y + 8 + 16 * (i // columns)
        parts += [
            swatch(x, at, piece.fill),
            text(x + 15, at, f"{piece.hue + 1} · {piece.name}", "small legend"),
        ]
    y += 16 * -(-len(shown) // columns) + (6 if shown else 0)
    if len(found) > LEGEND:
        parts.append(text(left, y + 6, f"… and {len(found) - LEGEND:,} more tensors", "small quiet"))
        y += 14
    return parts, y


def _tear(x: float, y: float) -> str:
    """A zigzag where a piece is torn."""
    step = _HEIGHT / 6
    path = f"M{x:.1f} {y:.1f}" + "".join(f"l{3 if k % 2 else -3} {step:.1f}" for k in range(6))
    return element("path", d=path, fill="none", stroke="currentColor", stroke_width="2", class_="tear overlay")


def _flush(run: list[Piece], left: float, y: float, scale: float, bar: Bar) -> list[str]:
    """One cell for all pieces that were too thin."""
    if not run:
        return []
    start, end = run[0].start, run[-1].start + run[-1].length
    names = f"{run[0].name} … {run[-1].name}" if len(run) > 1 else run[0].name
    data = {"tensors": len(run), "start": start, "count": sum(p.length for p in run), **bar.data}
    tip = f"{len(run):,} pieces: {names} · {end - start:,} elements from {start:,}"
    label = f"{len(run):,} pieces"
    box = (left + start * scale, y, (end - start) * scale, _HEIGHT)
    run.clear()
    return [cell(box, PALETTE[-1], tip, kind=f"{bar.kind} merged", label=label, data=data)]


def _padding(bar: Bar, start: int, length: int, left: float, y: float, scale: float) -> str:
    box = (left + start * scale, y, length * scale, _HEIGHT)
    data = {"start": start, "count": length, **bar.data}
    kind = "padding" if bar.kind == "fragment" else f"{bar.kind} padding"
    tip = f"padding · {length:,} elements from {start:,}"
    return cell(box, "none", tip, kind=kind, data=data, hatch=True, pointer_events="all")
