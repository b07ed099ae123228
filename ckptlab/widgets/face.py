"""The two widgets: `Explorer` for a checkpoint, `Playground` for a model on paper."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import ipywidgets as w

from ckptlab.mesh import Mesh
from ckptlab.sharding.transformer import PaperModel
from ckptlab.widgets import page
from ckptlab.widgets.numbers import MOST, Numbers
from ckptlab.widgets.picture import Tree, text
from ckptlab.widgets.sliders import MeshSliders
from ckptlab.widgets.subject import Subject
from ckptlab.widgets.tabs import Change, Look, Steps, Tab
from ckptlab.words import shape_text


class Explorer(w.VBox):
    """A checkpoint to look into. `choice` is what is shown; `choose(tensor=…, rank=…, …)` does what a hand does."""

    most = 16  # degree to which the sliders go at least

    def __init__(self, subject: Subject) -> None:
        self.subject, self.choice = subject, subject.start()
        self.look = Look(self.choose)
        sliders = MeshSliders(self.choice.mesh, subject.stages, self.choice.zero_stage, self.most)
        self.change = Change(self.choose, sliders)
        self.steps = Steps(self.choose)
        self.tabs: dict[str, Tab] = {"Look": self.look, "Reshape": self.change, "Step by step": self.steps}
        self.heading, self.code = text(), text()
        self.tree = Tree(layout=w.Layout(width="270px", min_width="270px"))
        self.tree.observe(lambda change: self.choose(tensor=change["new"]), "chosen")
        self.pages = w.Tab(layout=w.Layout(flex="1 1 auto", min_width="0"))
        self.pages.observe(lambda _: self._draw(), "selected_index")
        self.python = w.ToggleButton(description="Python", icon="code", tooltip="the Python line that does the same")
        self.python.layout = w.Layout(width="100px", flex="0 0 auto")
        self.python.observe(lambda _: self._draw_code(), "value")
        body = w.HBox([self.tree, self.pages], layout=w.Layout(width="100%", grid_gap="12px"))
        head = w.HBox([self.heading, self.python], layout=w.Layout(justify_content="space-between", width="100%"))
        super().__init__([head, self.code, body])
        self._fill()

    def _fill(self) -> None:
        """Put the tabs in their places, and show the subject for the first time."""
        self.pages.children = [tab.box for tab in self.tabs.values()]
        self.pages.titles = tuple(self.tabs)
        self.pages.selected_index = 0
        self.show(self.subject)

    def show(self, subject: Subject) -> None:
        """Another subject from now on; what was chosen stays chosen where there is such a thing."""
        start = subject.start()
        self.subject, old = subject, self.choice
        tensor = old.tensor if old.tensor in subject.catalog.tensors else start.tensor
        state = old.state if old.state in subject.catalog[tensor].states else next(iter(subject.catalog[tensor].states))
        self.choice = replace(old, tensor=tensor, state=state, rank=min(old.rank, subject.catalog.mesh.size - 1))
        self.heading.value = page.heading(subject)
        tensors = subject.catalog.tensors.values()
        with self.tree.hold_sync():
            self.tree.names = [t.name for t in tensors]
            self.tree.notes = [shape_text(t.shape) for t in tensors]
            self.tree.chosen = tensor
        self._draw()

    def choose(self, **changes: Any) -> None:
        """Look at something else: fields of `Choice`. CheckpointError for a tensor that is not there."""
        choice = replace(self.choice, **changes)
        states = self.subject.catalog[choice.tensor].states
        if choice.state not in states:
            choice = replace(choice, state=next(iter(states)))
        if choice != self.choice:
            self.choice = choice
            self.tree.chosen = choice.tensor
            self._draw()

    def _draw(self) -> None:
        """The tab that is open; the others when they are opened."""
        if self.pages.selected_index is not None:
            list(self.tabs.values())[self.pages.selected_index].draw(self.subject, self.choice)
        self._draw_code()

    def _draw_code(self) -> None:
        self.code.value = page.code(self.subject.line(self.choice)) if self.python.value else ""

    def _repr_mimebundle_(self, **kwargs: Any) -> Any:
        """The widget, and beside it a static page for where there is no kernel."""
        bundle = super()._repr_mimebundle_(**kwargs)
        page_ = {"text/html": page.static(self.subject, self.choice)}
        if isinstance(bundle, tuple):
            return {**bundle[0], **page_}, bundle[1]
        return {**(bundle or {}), **page_}


class Playground(Explorer):
    """A model on paper to play with: its numbers and its mesh are a tab of their own, before the explorer's."""

    most = MOST

    def __init__(self, model: PaperModel, mesh: Mesh, zero_stage: int) -> None:
        self.numbers = Numbers(model, mesh, zero_stage, self.show)
        super().__init__(Subject.on_paper(model, mesh, zero_stage))

    def _fill(self) -> None:
        self.tabs = {"Model": self.numbers, **self.tabs}
        super()._fill()
