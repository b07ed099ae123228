"""What the widget shows, part by part: each part is a function of a subject and of a few fields of a choice.

The page (static/explorer.js) shows a state when it has all parts of its tab, and asks for them by a key that is made of
those fields alone: so parts of two states are never shown together, and what was shown once needs no kernel. A new part
is a line of `_OF_SOURCE` or `_OF_TARGET`, and its name in `TABS`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from ckptlab import viz
from ckptlab.catalog import ZERO_STAGES, Catalog
from ckptlab.draw import Stack, bars
from ckptlab.errors import CkptlabError
from ckptlab.reshaping import Reshape
from ckptlab.widgets import numbers, page, steps
from ckptlab.widgets.held import by_rank
from ckptlab.widgets.page import buffer, layout
from ckptlab.widgets.subject import Choice, Refusal, Subject, one_line
from ckptlab.words import shape_text

State = Mapping[str, Any]
"""The fields of what is wanted, as the page has them: see FIELDS."""

SOURCE = ("model", "source_mesh", "source_stage")
TARGET = (*SOURCE, "mesh", "zero_stage")
_TENSOR = (*SOURCE, "tensor", "state")
FIELDS = (
    *("tab", "tensor", "state", "rank", "window", "mesh", "zero_stage", "target_rank", "step", "width", "activations"),
    *SOURCE,
)
"""What a state is made of: what the hands are on in the source, in the target, and what the source is."""

TABS: dict[str, tuple[str, ...]] = {
    "Model": ("about", "tensors", "line.Model", "model.told", "model.zero", "model.mesh", "source.works"),
    "Look": (
        *("about", "tensors", "line.Look", "states"),
        *("look.mesh", "look.tensor", "look.flat", "look.held", "look.holdings"),
    ),
    "Values": ("about", "tensors", "line.Values", "states", "look.mesh", "values.map"),
    "Reshape": (
        *("about", "tensors", "line.Reshape", "to.figures", "to.mesh", "to.tensor", "to.memory", "to.plan", "to.flow"),
        *("to.held", "to.holdings", "to.works"),
    ),
    "Steps": ("about", "tensors", "line.Steps", "to.figures", "step.text", "step.pictures", "to.works"),
}
"""Tab → its parts."""

OPTIONAL = ("source.works", "to.works")
"""What comes when there is time for it: which degrees work."""

MOST = 16  # degree to which sliders go at least
DEVICE = 80 * 10**9  # bytes of a device, as many of them have
NODE = 8  # ranks of a machine, as it is mostly built
RANKS = 4096  # of more, nobody is told what each holds


def key(slot: str, state: State) -> str:
    """What a part is asked for by; the page makes the same text."""
    return slot + json.dumps([state[name] for name in SLOTS[slot]], separators=(",", ":"), ensure_ascii=False)


def part(slot: str, subject: Subject | Refusal, choice: Choice, most: int = MOST) -> Any:
    """The content of a part: text, HTML, SVG or a small table; None where there is nothing to show."""
    if isinstance(subject, Refusal):
        if slot.startswith("line."):
            return f"# {subject}"
        return {"refused": str(subject), "axes": []} if slot == "about" else None
    if slot in _OF_SOURCE:
        return _OF_SOURCE[slot][1](subject, choice, most)
    target = subject.target(choice)
    if isinstance(target, Refusal):
        return {"refused": str(target)} if slot == "to.figures" else None
    return _OF_TARGET[slot][1](subject, choice, target)


def _about(subject: Subject) -> dict[str, Any]:
    return {"title": subject.title, "axes": list(subject.catalog.mesh.degrees.items())}


def _tensors(subject: Subject) -> dict[str, list[str]]:
    tensors = subject.catalog.tensors.values()
    return {"names": [t.name for t in tensors], "notes": [shape_text(t.shape) for t in tensors]}


def _zero(subject: Subject, choice: Choice) -> str:
    told = choice.activations
    kept = [Stack(f"ZeRO-{s}", viz.fullest(subject.at_stage(s), told), {}) for s in ZERO_STAGES]
    fits = [stack.label for stack in kept if sum(stack.amounts.values()) <= DEVICE]
    notes = [f"fits into 80 GB: {', '.join(fits) or 'none'}", f"activations: {told}" if told else "without activations"]
    title = "memory of the fullest rank by ZeRO stage"
    return bars(
        kept, title=title, notes=notes, limit=DEVICE, families={"activations": viz.ACTIVATIONS}, width=choice.width
    ).svg


def _held(catalog: Catalog, choice: Choice) -> dict[str, Any] | None:
    if catalog.mesh.size > RANKS or choice.state not in catalog[choice.tensor].states:
        return None
    lines, of = by_rank(catalog, choice.tensor, choice.state)
    return {"lines": lines, "of": of}


def _figures(target: Reshape, activations: viz.Activations | None) -> dict[str, Any]:
    try:
        html = page.figures(target, target.cost(), activations)
    except CkptlabError as error:
        return {"refused": one_line(error)}
    return {"html": html, "title": page.towards(target), "axes": list(target.mesh.degrees.items())}


def _plan(draw: Callable[..., viz.Drawing], target: Reshape, width: int | None) -> str | None:
    try:
        return draw(target.plan, target.source.mesh, target.mesh, width=width).svg
    except CkptlabError:
        return None  # the figures say why


def _target_rank(choice: Choice, target: Reshape) -> int:
    return min(choice.target_rank, target.mesh.size - 1)


_OF_SOURCE: dict[str, tuple[tuple[str, ...], Callable[[Subject, Choice, int], Any]]] = {
    "about": (SOURCE, lambda s, c, _: _about(s)),
    "tensors": (("model",), lambda s, c, _: _tensors(s)),
    "source.works": (SOURCE, lambda s, c, most: s.works(s.catalog.mesh.joined(), s.catalog.zero_stage or 0, most)),
    "line.Model": (SOURCE, lambda s, c, _: s.code),
    "line.Look": (_TENSOR, lambda s, c, _: s.opening(c)),
    "line.Values": ((*_TENSOR, "window"), lambda s, c, _: numbers.line(s, c)),
    "line.Reshape": (TARGET, lambda s, c, _: s.reshaping(c)),
    "line.Steps": (TARGET, lambda s, c, _: s.reshaping(c)),
    "model.told": ((*SOURCE, "activations"), lambda s, c, _: page.model(s, c.activations)),
    "model.zero": ((*SOURCE, "activations", "width"), lambda s, c, _: _zero(s, c)),
    "model.mesh": (
        (*SOURCE, "width"),
        lambda s, c, _: viz.mesh(s.catalog.mesh, oblique=True, node=NODE, width=c.width).svg,
    ),
    "states": ((*SOURCE, "tensor"), lambda s, c, _: list(s.tensor(c).states)),
    "look.mesh": ((*SOURCE, "width"), lambda s, c, _: viz.mesh(s.catalog.mesh, width=c.width).svg),
    "look.tensor": (
        (*_TENSOR, "rank", "width"),
        lambda s, c, _: layout(s.catalog, c.tensor, c.state, c.rank, c.width),
    ),
    "look.flat": (
        (*_TENSOR, "rank", "width"),
        lambda s, c, _: buffer(s.catalog, c.tensor, c.state, c.rank, _across(c.width)),
    ),
    "look.held": (_TENSOR, lambda s, c, _: _held(s.catalog, c)),
    "look.holdings": ((*SOURCE, "rank"), lambda s, c, _: page.holdings(s.catalog, c.rank)),
    "values.map": ((*_TENSOR, "window", "width"), lambda s, c, _: numbers.heat_map(s, c)),
    "to.works": (TARGET, lambda s, c, most: s.works(c.mesh, c.zero_stage, most)),
}
_OF_TARGET: dict[str, tuple[tuple[str, ...], Callable[[Subject, Choice, Reshape], Any]]] = {
    "to.figures": ((*TARGET, "activations"), lambda s, c, t: _figures(t, c.activations)),
    "to.mesh": ((*TARGET, "width"), lambda s, c, t: viz.mesh(t.mesh, width=c.width).svg),
    "to.tensor": (
        (*TARGET, "tensor", "state", "target_rank", "width"),
        lambda s, c, t: layout(t.target, c.tensor, c.state, _target_rank(c, t), c.width),
    ),
    "to.memory": (
        (*TARGET, "activations", "width"),
        lambda s, c, t: viz.memory(t.target, activations=c.activations, width=c.width).svg,
    ),
    "to.plan": ((*TARGET, "width"), lambda s, c, t: _plan(viz.plan, t, c.width)),
    "to.flow": ((*TARGET, "width"), lambda s, c, t: _plan(viz.flow, t, c.width)),
    "to.held": ((*TARGET, "tensor", "state"), lambda s, c, t: _held(t.target, c)),
    "to.holdings": ((*TARGET, "target_rank"), lambda s, c, t: page.holdings(t.target, _target_rank(c, t))),
    "step.text": (
        (*TARGET, "tensor", "step"),
        lambda s, c, t: page.step(steps.step(t, c.tensor, c.step, c.width), with_code=not s.is_paper),
    ),
    "step.pictures": (
        (*TARGET, "tensor", "step", "width"),
        lambda s, c, t: page.row(*steps.step(t, c.tensor, c.step, c.width).pictures),
    ),
}
SLOTS = {slot: fields for slot, (fields, _) in (*_OF_SOURCE.items(), *_OF_TARGET.items())}
"""Part → the fields that it follows from."""


def _across(width: int | None) -> int | None:
    """A flat buffer has the whole panel: two columns of a wide one are drawn for as many pixels as fit both."""
    return None if width is None else min(max(width, 420), 900)


def wanted(state: State) -> Iterator[tuple[str, str]]:
    """(slot, key) of all parts of a state's tab."""
    for slot in TABS[state["tab"]]:
        yield slot, key(slot, state)
