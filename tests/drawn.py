"""Reading a drawing back: its cells by class, their areas, the coordinates that they say they stand for."""

from __future__ import annotations

import re
from xml.etree.ElementTree import Element, fromstring

from ckptlab.draw import Drawing

SVG = "{http://www.w3.org/2000/svg}"


def elements(drawing: Drawing) -> list[Element]:
    """Everything in a drawing that is seen; the text must be well-formed XML."""
    return [e for e in fromstring(drawing.svg).iter() if e.tag != f"{SVG}pattern"]


def cells(drawing: Drawing, *classes: str) -> list[Element]:
    """The rectangles that have all of these classes."""
    return [e for e in elements(drawing) if e.tag == f"{SVG}rect" and {*classes} <= {*e.get("class", "").split()}]


def paths(drawing: Drawing, kind: str) -> list[Element]:
    """The paths of a class."""
    return [e for e in elements(drawing) if e.tag.endswith("}path") and kind in e.get("class", "").split()]


def texts(drawing: Drawing, kind: str | None = None) -> list[str]:
    """What is written, of one class or at all; not the tooltips."""
    found = [e for e in elements(drawing) if e.tag == f"{SVG}text"]
    return ["".join(e.itertext()) for e in found if kind is None or kind in e.get("class", "").split()]


def tip(cell: Element) -> str:
    """A cell's tooltip."""
    title = cell.find(f"{SVG}title")
    assert title is not None
    assert title.text
    return title.text


def area(cell: Element) -> float:
    return float(cell.get("width", "")) * float(cell.get("height", ""))


def box(cell: Element) -> tuple[float, float, float, float]:
    """Left, top, right, bottom."""
    x, y, w, h = (float(cell.get(name, "")) for name in ("x", "y", "width", "height"))
    return x, y, x + w, y + h


def numbers(told: str | None) -> set[int]:
    """`0-3,7` as numbers."""
    found: set[int] = set()
    for run in re.findall(r"(\d+)(?:-(\d+))?", told or ""):
        found.update(range(int(run[0]), int(run[1] or run[0]) + 1))
    return found


def overlap(found: list[Element]) -> bool:
    """Whether any two cells lie over one another."""
    boxes = [box(c) for c in found]
    return any(
        min(a[2], b[2]) - max(a[0], b[0]) > 0.01 and min(a[3], b[3]) - max(a[1], b[1]) > 0.01
        for i, a in enumerate(boxes)
        for b in boxes[:i]
    )
