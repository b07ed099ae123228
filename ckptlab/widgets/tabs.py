"""The tabs: each shows one side of a subject and a choice, and tells what the user chose in it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import ipywidgets as w

from ckptlab import viz
from ckptlab.catalog import Catalog
from ckptlab.checkpoint import Reshape
from ckptlab.errors import CkptlabError
from ckptlab.widgets import page, steps
from ckptlab.widgets.cells import rank_of, tensor_of, told
from ckptlab.widgets.later import Later
from ckptlab.widgets.picture import Picture, text
from ckptlab.widgets.pictures import buffer, layout
from ckptlab.widgets.sliders import MeshSliders
from ckptlab.widgets.subject import Choice, Refusal, Subject, one_line

BESIDE = "1 1 320px"  # a tensor shrinks to stand beside its mesh
HINT = "Hover over a cell to learn what it stands for; click one to see all that its rank holds."

Choose = Callable[..., None]
"""Called with the fields of `Choice` that the user changed."""


class Tab(Protocol):
    """A side of the subject: `box` is the widget, `draw` brings it up to date."""

    box: w.Widget

    def draw(self, subject: Subject, choice: Choice) -> None: ...


def row(*children: w.Widget) -> w.Box:
    """Side by side, one below the other where there is no room."""
    return w.Box(children, layout=w.Layout(flex_flow="row wrap", align_items="flex-start", grid_gap="4px 24px"))


class Hearing:
    """Pictures of one catalog, and the line below them that says what the mouse is on.

    A click chooses the cell's rank as `field` of the choice, and its tensor where it says one.
    """

    def __init__(self, choose: Choose, field: str) -> None:
        self.line = text(page.told([], HINT))
        self._choose, self._field = choose, field
        self._catalog: Catalog | None = None
        self._choice: Choice | None = None

    def of(self, catalog: Catalog | None, choice: Choice) -> None:
        """What the pictures are of from now on; None: nothing."""
        self._catalog, self._choice = catalog, choice
        self.line.value = page.told([], HINT)

    def picture(self, flex: str = "0 1 auto") -> Picture:
        """A picture that is heard; `flex` says how it shares a row."""
        made = Picture(layout=w.Layout(flex=flex, min_width="0"))
        made.on_cell(self.hear)
        return made

    def hear(self, event: str, cell: Mapping[str, str]) -> None:
        if self._catalog is None or self._choice is None:
            return
        name = self._choice.tensor
        if event == "hover":
            self.line.value = page.told(told(cell, self._catalog, name, self._choice.state), HINT)
            return
        rank, tensor = rank_of(cell, self._catalog, name), tensor_of(cell, self._catalog)
        changes: dict[str, Any] = {self._field: rank} if rank is not None else {}
        if changes or tensor:
            self._choose(**changes, **({"tensor": tensor} if tensor else {}))


class Look:
    """The checkpoint as it is: its mesh, the tensor's layout, what the chosen rank holds."""

    def __init__(self, choose: Choose) -> None:
        self.state = w.Dropdown(description="state", layout=w.Layout(width="200px"))
        self.state.style.description_width = "40px"
        self._choose, self._drawing = choose, False
        self.state.observe(self._picked, "value")
        self.hearing = Hearing(choose, "rank")
        self.mesh, self.flat = self.hearing.picture(), self.hearing.picture()
        self.tensor = self.hearing.picture(BESIDE)
        self.holdings = text()
        left = w.VBox([self.state, self.mesh])
        self.box = w.VBox([row(left, self.tensor), self.flat, self.hearing.line, self.holdings])

    def _picked(self, change: Any) -> None:
        if not self._drawing:
            self._choose(state=change["new"])

    def draw(self, subject: Subject, choice: Choice) -> None:
        catalog, tensor = subject.catalog, subject.tensor(choice)
        self._drawing = True  # a menu with other options falls back to the first of them
        if self.state.options != tuple(tensor.states):
            self.state.options = tuple(tensor.states)
        self.state.value = choice.state
        self._drawing = False
        self.mesh.svg = viz.mesh(catalog.mesh, highlight=choice.rank).svg
        self.tensor.svg = layout(catalog, tensor.name, choice.state, choice.rank)
        self.flat.svg = buffer(catalog, tensor.name, choice.state, choice.rank)
        self.hearing.of(catalog, choice)
        self.holdings.value = page.holdings(catalog, choice.rank)


class Change:
    """The checkpoint on another mesh: the target's layout, memory per rank, cost."""

    def __init__(self, choose: Choose, sliders: MeshSliders) -> None:
        self.sliders = sliders
        sliders.on_move(lambda mesh, stage: choose(mesh=mesh, zero_stage=stage))
        self.figures = text()
        self.hearing = Hearing(choose, "target_rank")
        self.mesh, self.memory, self.plan = (self.hearing.picture() for _ in range(3))
        self.tensor = self.hearing.picture(BESIDE)
        self.holdings = text()
        self.pictures = w.VBox(
            [row(self.mesh, self.tensor), self.hearing.line, row(self.memory, self.plan), self.holdings]
        )
        self.box = w.VBox([self.sliders.box, self.figures, self.pictures])
        self.later = Later()
        self._shown: Reshape | None = None

    def draw(self, subject: Subject, choice: Choice) -> None:
        self.sliders.show(choice.mesh, choice.zero_stage)
        target = subject.target(choice)
        self._shown = None if isinstance(target, Refusal) else target
        if isinstance(target, Refusal):
            self.figures.value = page.refusal(target)
            self.pictures.layout.display = "none"
            self.hearing.of(None, choice)
            return
        self.pictures.layout.display = ""
        self._draw(target, choice)
        if len(target.target.tensors) < page.MANY or "plan" in vars(target):
            self._count(target)
        else:
            self.figures.value, self.plan.svg = page.figures(target, None), ""
            self.later.do(lambda: self._count(target))

    def _count(self, target: Reshape) -> None:
        """The plan and its cost; nobody hears of it if another target is shown by then."""
        try:
            told, svg = page.figures(target, target.cost()), page.moves(target)
        except CkptlabError as error:
            told, svg = page.refusal(Refusal(one_line(error))), ""
        if self._shown is target:
            self.figures.value, self.plan.svg = told, svg

    def _draw(self, target: Reshape, choice: Choice) -> None:
        mesh = target.mesh
        rank = min(choice.target_rank, mesh.size - 1)
        self.mesh.svg = viz.mesh(mesh, highlight=rank).svg
        self.tensor.svg = layout(target.target, choice.tensor, choice.state, rank)
        self.memory.svg = viz.memory(target.target).svg
        self.hearing.of(target.target, choice)
        self.holdings.value = page.holdings(target.target, rank)


class Steps:
    """The reshape merge by merge."""

    def __init__(self, choose: Choose) -> None:
        last = len(steps.TITLES) - 1
        self.slider = w.IntSlider(min=0, max=last, readout=False, layout=w.Layout(width="300px"))
        self.back = w.Button(icon="arrow-left", tooltip="the step before", layout=w.Layout(width="44px"))
        self.next = w.Button(icon="arrow-right", tooltip="the next step", layout=w.Layout(width="44px"))
        self.slider.observe(lambda change: choose(step=change["new"]), "value")
        self.back.on_click(lambda _: self._go(-1))
        self.next.on_click(lambda _: self._go(1))
        self.text = text()
        self.pictures = [Picture(), Picture()]
        controls = w.HBox([self.back, self.slider, self.next])
        self.box = w.VBox([controls, self.text, row(*self.pictures)])

    def _go(self, way: int) -> None:
        self.slider.value = min(max(self.slider.value + way, self.slider.min), self.slider.max)

    def draw(self, subject: Subject, choice: Choice) -> None:
        self.slider.value = choice.step
        self.back.disabled, self.next.disabled = choice.step == 0, choice.step == self.slider.max
        target = subject.target(choice)
        shown: tuple[str, ...] = ()
        if isinstance(target, Refusal):
            self.text.value = page.refusal(target)
        else:
            step = steps.step(target, choice.tensor, choice.step)
            self.text.value = page.step(choice.step, step, with_code=not subject.is_paper)
            shown = step.pictures
        for i, picture in enumerate(self.pictures):
            picture.svg = shown[i] if i < len(shown) else ""
