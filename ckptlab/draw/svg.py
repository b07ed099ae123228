"""SVG as text: elements, and the drawing that they make."""

from __future__ import annotations

import hashlib
import os
import re
import textwrap
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from html import escape
from pathlib import Path

from ckptlab.arguments import explained
from ckptlab.draw.colours import ink
from ckptlab.errors import DestinationError


class Own(str):
    """An attribute's value that was made here and holds no one else's text: it goes in as it is."""


UID = "\ue000"
"""Stands for the drawing's own id in `id` and `url(#…)` until `drawing` knows it: drawings on one page never clash."""

_FORBIDDEN = f"{UID}\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff\ufffe\uffff"
_CONTROL = re.compile(f"[{_FORBIDDEN}]")
_TOLD_OTHERWISE = re.compile(f"[&<>\"'{_FORBIDDEN}]")

# Every rule is scoped, and the same in every drawing. currentColor is the page's own text colour.
_STYLE = (
    ".ckptlab-drawing{font:12px system-ui,sans-serif;max-width:100%;height:auto}"
    ".ckptlab-drawing text{fill:currentColor;dominant-baseline:central;pointer-events:none}"
    ".ckptlab-drawing .title{font-weight:600;font-size:13px}"
    ".ckptlab-drawing .small{font-size:10px}"
    ".ckptlab-drawing .tiny{font-size:10px;opacity:.8}"
    ".ckptlab-drawing .quiet{opacity:.68}"
    ".ckptlab-drawing .strong{font-weight:600}"
    ".ckptlab-drawing .mono{font-family:ui-monospace,monospace}"
    ".ckptlab-drawing .middle{text-anchor:middle}"
    ".ckptlab-drawing .end{text-anchor:end}"
    ".ckptlab-drawing .white{fill:#fff}"
    ".ckptlab-drawing .black{fill:#000}"
    ".ckptlab-drawing .line{fill:none;stroke:currentColor;stroke-opacity:.55}"
    ".ckptlab-drawing .overlay{pointer-events:none}"
    ".ckptlab-drawing .cell{stroke:currentColor;stroke-opacity:.4;stroke-width:.75}"
    ".ckptlab-drawing .marked{stroke-opacity:1;stroke-width:2.5}"
    ".ckptlab-drawing .tied{stroke-opacity:.9;stroke-width:1.25}"
    ".ckptlab-drawing .cell:hover{stroke-opacity:1;stroke-width:2}"
)
_NAMESPACE = ' xmlns="http://www.w3.org/2000/svg"'
_ALONE = "svg{color:#1f2328}@media(prefers-color-scheme:dark){svg{color:#e6edf3}}"  # a file has no page to follow


@explained
@dataclass(frozen=True)
class Drawing:
    """A picture: one self-contained SVG without script, its text in the colour of the page that it stands on.

    `width` and `height` are its natural size in CSS pixels; it shrinks with a narrower page.
    """

    svg: str
    width: int
    height: int

    def _repr_svg_(self) -> str:
        return self.svg

    def _repr_html_(self) -> str:
        return f'<div style="overflow-x:auto">{self.inline}</div>'

    @property
    def inline(self) -> str:
        """The SVG as an element of an HTML page, which needs no namespace."""
        return self.svg.replace(_NAMESPACE, "", 1)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write an .svg file that follows the reader's preference for light or dark. DestinationError where none can be
        written."""
        try:
            Path(path).write_text(self.svg.replace("<style>", f"<style>{_ALONE}", 1), encoding="utf-8")
        except (OSError, ValueError) as error:
            raise DestinationError(f"{path}: no picture can be written there: {error}") from None

    def __repr__(self) -> str:
        return f"<Drawing, {self.width} × {self.height}>"


def drawing(title: str, parts: Iterable[str], width: float, height: float, defs: Iterable[str] = ()) -> Drawing:
    """The drawing of these elements; its id follows from what is in it. title: for those who hear the page."""
    shared = "".join(dict.fromkeys(defs))
    body = f"<defs>{_HATCH}{shared}</defs>{''.join(parts)}"
    uid = "k" + hashlib.blake2b(body.encode("utf-8"), digest_size=6).hexdigest()
    w, h = round(width), round(height)
    svg = (
        f'<svg{_NAMESPACE} class="ckptlab-drawing" role="img" aria-label="{text_of(title)}" '
        f'width="{w}" height="{h}" viewBox="0 0 {w} {h}"><style>{_STYLE}</style>{body.replace(UID, uid)}</svg>'
    )
    return Drawing(svg, w, h)


_HATCH = (
    f'<pattern id="{UID}hatch" width="6" height="6" patternUnits="userSpaceOnUse" patternTransform="rotate(45)">'
    '<line x1="0" y1="0" x2="0" y2="6" stroke="currentColor" stroke-opacity=".6" stroke-width="1.6"/></pattern>'
)


def text_of(value: object) -> str:
    """A value as SVG can hold it, in an attribute too: escaped, without characters that XML forbids."""
    said = str(value)
    return escape(_CONTROL.sub("�", said)) if _TOLD_OTHERWISE.search(said) else said


def number(value: float) -> str:
    """Three decimals at most."""
    return f"{value:.3f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)


def element(tag: str, content: str = "", /, **attributes: object) -> str:
    """`stroke_width` becomes `stroke-width`, `class_` `class`; None is left out. `content` is SVG already."""
    told = "".join(
        f' {_attribute(name)}="{number(v) if isinstance(v, float) else v if isinstance(v, Own) else text_of(v)}"'
        for name, v in attributes.items()
        if v is not None
    )
    return f"<{tag}{told}>{content}</{tag}>" if content else f"<{tag}{told}/>"


@cache
def _attribute(name: str) -> str:
    return name.strip("_").replace("_", "-")


def telling(tag: str, tip: str, data: Mapping[str, object], **attributes: object) -> str:
    """An element that stands for something: with a tooltip, and `data` as `data-*` attributes behind the others."""
    told = {f"data_{name}": value for name, value in data.items()}
    return element(tag, element("title", text_of(tip)), **attributes, **told)


def rect(x: float, y: float, w: float, h: float, **attributes: object) -> str:
    return element("rect", x=float(x), y=float(y), width=float(w), height=float(h), **attributes)


def text(x: float, y: float, content: object, classes: str = "", *, svg: bool = False, **attributes: object) -> str:
    """Text centred vertically on y. svg: the content is SVG already."""
    said = str(content) if svg else text_of(content)
    return element("text", said, x=float(x), y=float(y), class_=classes or None, **attributes)


def cell(
    box: tuple[float, float, float, float],
    fill: str,
    tip: str,
    *,
    kind: str = "",
    label: str = "",
    data: Mapping[str, object] | None = None,
    hatch: bool = False,
    small: bool = False,
    **attributes: object,
) -> str:
    """A rectangle (x, y, width, height) that stands for something: it has a tooltip and, if it fits, a label.

    Its classes are "cell" and `kind`; `data` become `data-*` attributes; hatch: what it stands for is padding; small:
    in small letters even where larger ones would fit, as those of cells beside it.
    """
    x, y, w, h = box
    place = {"x": float(x), "y": float(y), "width": float(w), "height": float(h)}
    shape = telling("rect", tip, data or {}, **place, class_=f"cell {kind}".rstrip(), fill=fill, **attributes)
    shape += hatched(box) if hatch else ""
    if not label or h < 11 or w < width_of(label, 10) + 4:
        return shape
    letters = "" if not small and h >= 14 and w >= width_of(label) + 8 else "small"
    if hatch or fill.startswith("url("):  # on a pattern, letters need a ground of their own
        wide, high = width_of(label, 10 if letters else 12) + 6, 11 if letters else 15
        plate = rect(x + (w - wide) / 2, y + (h - high) / 2, wide, high, rx="3", fill="#fff", class_="plate overlay")
        return shape + plate + text(x + w / 2, y + h / 2, label, f"middle black {letters}".rstrip())
    on = ink(fill) if fill.startswith("#") and "fill_opacity" not in attributes else ""
    return shape + text(x + w / 2, y + h / 2, label, " ".join(filter(None, ["middle", letters, on])))


def hatched(box: tuple[float, float, float, float]) -> str:
    """Hatching over a cell: padding."""
    return rect(*box, fill=Own(f"url(#{UID}hatch)"), class_="overlay")


def striped(colours: tuple[str, ...]) -> tuple[str, str]:
    """(fill, definition) of diagonal stripes in these colours: what several hold."""
    name, step = "s" + "".join(c.strip("#") for c in colours), 7
    bands = "".join(rect(i * step, 0, step, 8, fill=c) for i, c in enumerate(colours))
    total = step * len(colours)
    pattern = element(
        "pattern",
        bands,
        id=Own(f"{UID}{name}"),
        width=total,
        height=8,
        patternUnits="userSpaceOnUse",
        patternTransform="rotate(45)",
    )
    return Own(f"url(#{UID}{name})"), pattern


def swatch(x: float, y: float, fill: str, hatch: bool = False) -> str:
    """A square of a legend, centred on y."""
    box = (x, y - 5, 10, 10)
    mark = rect(*box, fill=fill, stroke="currentColor", stroke_opacity=".4", stroke_width=".75", class_="swatch")
    return mark + (hatched(box) if hatch else "")


def width_of(content: str, size: float = 12) -> float:
    """About how wide text is, in pixels: system-ui's mean character."""
    return 0.6 * size * len(content)


def wrapped(lines: Iterable[str], width: float | None, size: float = 12) -> list[str]:
    """Lines broken between words so that each fits the width; None: as they are."""
    if width is None:
        return list(lines)
    most = max(int(width / width_of("x", size)), 12)
    return [part for line in lines for part in (textwrap.wrap(line, most, break_long_words=False) or [""])]


def noted(lines: Iterable[str], bottom: float, room: float | None) -> tuple[list[str], float, float]:
    """Notes below a picture that ends at `bottom`, each on a line of its own, or on several that fit the room; where
    they end, and how wide they are."""
    said = wrapped(lines, room)
    found = [text(0, bottom + 18 * k + 9, line, "quiet note") for k, line in enumerate(said)]
    return found, bottom + 18 * len(said), max(map(width_of, said), default=0.0)


def tail(name: str, width: float, size: float = 12) -> str:
    """A dotted name that fits the width: leading parts go first, `…word_embeddings.weight`, else its beginning."""
    most = int(width / width_of("x", size))
    if len(name) <= most:
        return name
    kept = name[len(name) - most + 1 :]
    _, dot, after = kept.partition(".")
    return f"…{after}" if dot and len(after) > most // 2 else f"…{kept}"


def fitted(content: str, width: float, size: float = 10) -> str:
    """The text, with its middle cut out to fit the width; nothing if hardly anything fits."""
    if width_of(content, size) <= width + 1e-9:
        return content
    most = int(width / (0.6 * size))
    if most < 5:
        return ""
    head = (most - 1) // 3
    return f"{content[:head]}…{content[head - most + 1 :]}"
