"""Who shows what: a type does not know who draws it; whoever does says so, by type.

Our own renderers are modules that are imported when something of theirs is first shown, so that nothing imports what
draws it. Somebody else's type is shown by `Shown` among its bases and one call of `shows`.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any, NamedTuple, TypeVar

T = TypeVar("T")

_RENDERERS = {
    "ckptlab.mesh": "ckptlab.viz.meshes",
    "ckptlab.layout.layout": "ckptlab.viz.cuts",
    "ckptlab.layout.cut": "ckptlab.viz.cuts",
    "ckptlab.plan.compose": "ckptlab.viz.moves",
    "ckptlab.checkpoint": "ckptlab.describe",
    "ckptlab.reshaping": "ckptlab.describe",
    "ckptlab.analysis.found": "ckptlab.describe.differences",
    "ckptlab.analysis.run": "ckptlab.describe.runs",
    "ckptlab.analysis.checkup.health": "ckptlab.describe.health",
    "ckptlab.findings": "ckptlab.describe.health",
    "ckptlab.views.accessor": "ckptlab.describe.statistics",
}
"""The module of a type → the module that calls `shows` for it."""


class Ways(NamedTuple):
    """How a type is shown: as text, as HTML, as a plot of matplotlib's (on its Axes, or new ones)."""

    text: Callable[[Any], str] | None = None
    html: Callable[[Any], str] | None = None
    plot: Callable[..., Any] | None = None


_SHOWN: dict[type, Ways] = {}


def shows(
    kind: type[T],
    *,
    text: Callable[[T], str] | None = None,
    html: Callable[[T], str] | None = None,
    plot: Callable[..., Any] | None = None,
) -> None:
    """Say how a type (and what is derived from it) is shown. Without `text` it writes its own `__repr__`."""
    _SHOWN[kind] = Ways(text, html, plot)


def ways(kind: type) -> Ways:
    """How a type, or the nearest of its bases of which that is known, is shown."""
    for base in kind.__mro__:
        if base not in _SHOWN and base.__module__ in _RENDERERS:
            import_module(_RENDERERS[base.__module__])
        if base in _SHOWN:
            return _SHOWN[base]
    return Ways()


def plot(thing: Any, *arguments: Any) -> Any:
    """Plot a thing as its type is registered to be; TypeError where nobody said how."""
    found = ways(type(thing)).plot
    if found is None:
        raise TypeError(f"nothing says how a {type(thing).__name__} is plotted: see ckptlab.shown.shows")
    return found(thing, *arguments)


class Shown:
    """What has a picture or a page: a notebook asks it for them, and it asks whoever registered."""

    def __repr__(self) -> str:
        text = ways(type(self)).text
        return object.__repr__(self) if text is None else text(self)

    def _repr_html_(self) -> str | None:
        html = ways(type(self)).html
        return None if html is None else html(self)
