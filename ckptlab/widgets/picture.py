"""Text, and two widgets that answer to the mouse by themselves: an SVG that reports its cells, a tree of names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import anywidget
import ipywidgets as w
import traitlets

STATIC = Path(__file__).parent / "static"

Told = Callable[[str, Mapping[str, str]], None]
"""What is called with "hover" or "click" and the cell's `data-*` attributes (none where the mouse left)."""


def text(content: str = "") -> w.HTML:
    """HTML that is never wider than what it stands in."""
    return w.HTML(content, layout=w.Layout(min_width="0", width="auto"))


class Picture(anywidget.AnyWidget):
    """Shows an SVG; `on_cell` hears which of its cells the mouse is on, and which is clicked."""

    _esm = STATIC / "picture.js"
    _css = STATIC / "picture.css"
    svg = traitlets.Unicode("").tag(sync=True)

    def on_cell(self, heard: Told) -> None:
        def message(_: Any, content: Any, __: Any) -> None:
            if isinstance(content, Mapping) and content.get("event") in ("hover", "click"):
                cell = content.get("cell") or {}
                heard(content["event"], {str(k): str(v) for k, v in cell.items()})

        self.on_msg(message)


class Tree(anywidget.AnyWidget):
    """Dotted names as a tree with a box to search them; `notes` stand beside the names; `chosen` is one of them."""

    _esm = STATIC / "tree.js"
    _css = STATIC / "tree.css"
    names = traitlets.List(traitlets.Unicode()).tag(sync=True)
    notes = traitlets.List(traitlets.Unicode()).tag(sync=True)
    chosen = traitlets.Unicode("").tag(sync=True)
