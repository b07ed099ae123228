"""The widget: `Explorer` for a checkpoint, `Playground` for a model on paper. What is wanted is in its traits."""

from __future__ import annotations

import os
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import anywidget
import traitlets

from ckptlab.errors import CheckpointError, CkptlabError
from ckptlab.mesh import Mesh
from ckptlab.sharding.activations import Activations
from ckptlab.sharding.families.described import described
from ckptlab.sharding.transformer import PaperModel
from ckptlab.widgets import export, numbers, page, parts
from ckptlab.widgets.presets import PRESETS
from ckptlab.widgets.steps import TITLES
from ckptlab.widgets.subject import Choice, Refusal, Subject, one_line, pairs

STATIC = Path(__file__).parent / "static"
WIDTH = 560  # of a column, in pixels, until the page says how wide it is
KEPT = 400  # parts
SMALL = 64  # tokens of a sequence, of a model that is small
REST = 0.3  # seconds that a state must stand before it is found out which degrees work beside it
AT_ONCE = 2_000_000  # tensors * ranks, of source and target together, or values: beyond, a state is worked out beside


class MeshTrait(traitlets.TraitType):
    """A mesh; degrees by axis make one."""

    info_text = "a ckptlab.Mesh, or degrees by axis"

    def validate(self, obj: Any, value: Any) -> Mesh:
        if isinstance(value, Mesh):
            return value.joined()
        if isinstance(value, Mapping):
            return Mesh(**value)
        self.error(obj, value)


def _mesh_trait() -> Any:
    return MeshTrait(Mesh()).tag(
        sync=True,
        to_json=lambda mesh, _: [list(pair) for pair in pairs(mesh)],
        from_json=lambda said, _: Mesh(**dict(said)),
    )


class Explorer(anywidget.AnyWidget):
    """A checkpoint to look into.

    What is chosen is in traits, to be read, set and observed: `tab` ("Look", "Values", "Reshape", "Steps"; of a
    playground also "Model"), `tensor`, `state`, `rank`; `window`, of the values, [first, one behind the last] for each
    dim; the target's `mesh`, `zero_stage` and `target_rank`; `step` of the reshape; `activations`, the fields of
    `viz.Activations` that memory is told with (none: without). `choose(tensor=…, rank=…)` sets several at once.
    CheckpointError for a tensor that is not there, MeshError for a rank that is not on the mesh, LayoutError for
    activations of a model of which too little is known. `to_html(path)` writes a page that answers without a kernel.
    """

    _esm = STATIC / "explorer.js"
    _css = STATIC / "explorer.css"

    tab = traitlets.Unicode("Look").tag(sync=True)
    tensor = traitlets.Unicode().tag(sync=True)
    state = traitlets.Unicode().tag(sync=True)
    rank = traitlets.Int(0).tag(sync=True)
    mesh = _mesh_trait()
    zero_stage = traitlets.Int(0).tag(sync=True)
    target_rank = traitlets.Int(0).tag(sync=True)
    step = traitlets.Int(0).tag(sync=True)
    window: Any = traitlets.List().tag(sync=True)
    width = traitlets.Int(WIDTH).tag(sync=True)
    activations = traitlets.Dict().tag(sync=True)
    model = traitlets.Dict(None, allow_none=True).tag(sync=True)
    source_mesh = _mesh_trait()
    source_stage = traitlets.Int(0).tag(sync=True)

    asked = traitlets.Int(0).tag(sync=True)
    view = traitlets.Dict().tag(sync=True)
    plan = traitlets.Dict().tag(sync=True)
    titles = traitlets.List(list(TITLES)).tag(sync=True)
    stages: Any = traitlets.List().tag(sync=True)
    most = traitlets.Int(parts.MOST).tag(sync=True)
    presets = traitlets.Dict().tag(sync=True)

    tabs: tuple[str, ...] = ("Look", "Values", "Reshape", "Steps")

    def __init__(self, subject: Subject, **others: Any) -> None:
        self.subject: Subject | Refusal = subject
        self._good = subject  # the last that could be
        self._parts: OrderedDict[str, Any] = OrderedDict()
        self._worker = ThreadPoolExecutor(1, "ckptlab-explorer")
        self._beside: Future[None] | None = None
        self._shown: tuple[dict[str, Any], int] | None = None
        self._settling = True
        start = subject.start()
        if subject.catalog.extents is None:
            self.tabs = tuple(tab for tab in self.tabs if tab != "Values")
        super().__init__(
            tensor=start.tensor,
            state=start.state,
            mesh=start.mesh,
            zero_stage=start.zero_stage,
            source_mesh=subject.catalog.mesh,
            source_stage=subject.catalog.zero_stage or 0,
            stages=list(subject.stages),
            plan={
                "fields": list(parts.FIELDS),
                "slots": {slot: list(fields) for slot, fields in parts.SLOTS.items()},
                "tabs": {tab: list(parts.TABS[tab]) for tab in self.tabs},
                "optional": list(parts.OPTIONAL),
            },
            **others,
        )
        self._settling = False
        self.observe(self._changed, [*parts.FIELDS, "asked"])
        self._show()

    # ---------------------------------------------------------------- what is wanted

    @property
    def choice(self) -> Choice:
        """What is chosen, as a plain value."""
        return Choice(
            *(self.tensor, self.state, self.rank, self.mesh, self.zero_stage, self.target_rank, self.step, self.width),
            tuple((int(a), int(b)) for a, b in self.window),
            Activations(**self.activations) if self.activations else None,
        )

    def choose(self, **changes: Any) -> None:
        """Set several traits at once."""
        for name in changes:
            if name not in parts.FIELDS:
                raise CheckpointError(f"there is no {name!r} to choose: {', '.join(parts.FIELDS)}")
        with self.hold_trait_notifications(), self.hold_sync():
            for name, value in changes.items():
                setattr(self, name, value)

    @traitlets.validate("tensor")
    def _known_tensor(self, proposal: Any) -> str:
        return proposal["value"] if self._settling else self._good.catalog[proposal["value"]].name

    @traitlets.validate("rank")
    def _known_rank(self, proposal: Any) -> int:
        if not self._settling:
            self._good.catalog.mesh.coordinate(proposal["value"])
        return proposal["value"]

    @traitlets.validate("tab")
    def _known_tab(self, proposal: Any) -> str:
        if proposal["value"] not in self.tabs:
            raise CheckpointError(f"there is no tab {proposal['value']!r}: {', '.join(self.tabs)}")
        return proposal["value"]

    @traitlets.validate("activations")
    def _known_activations(self, proposal: Any) -> dict[str, Any]:
        if not proposal["value"]:
            return {}
        wanted = Activations(**proposal["value"])
        described(self._good.catalog, wanted.facts)  # an error says what is not known of the model
        return asdict(wanted)

    @traitlets.validate("step")
    def _known_step(self, proposal: Any) -> int:
        return min(max(proposal["value"], 0), len(TITLES) - 1)

    def _changed(self, _: Any) -> None:
        if self._settling:
            return
        self._settling = True
        try:
            self._settle()
        finally:
            self._settling = False
        self._show()

    def _settle(self) -> None:
        """Let what was chosen follow: a state that the tensor has, a window that is in it."""
        tensor = self._good.catalog[self.tensor]
        if not numbers.fits(self.window, tensor.shape):
            self.window = []
        states = tensor.states
        if self.state not in states:
            self.state = next(iter(states))

    # ---------------------------------------------------------------- what is shown

    def wanted(self) -> dict[str, Any]:
        """The state as the page has it: see `parts.FIELDS`."""
        said = {name: getattr(self, name) for name in parts.FIELDS}
        return {name: [list(p) for p in pairs(v)] if isinstance(v, Mesh) else v for name, v in said.items()}

    def shown(self, slot: str) -> Any:
        """The content of a part (see `parts.SLOTS`) of the state that is wanted, worked out if it is not there yet."""
        return self._part(slot, self.wanted(), self.subject, self.choice)

    def settled(self) -> None:
        """Wait until what is worked out beside the kernel is there."""
        if self._beside is not None:
            self._beside.result()

    def _show(self) -> None:
        """Answer the state that is wanted: at once, or beside the kernel where it takes long; what is then wanted no
        more is not finished."""
        state, asked = self.wanted(), self.asked
        if self._shown == (state, asked):
            return
        self._shown = (state, asked)
        if self._beside is not None:
            self._beside.cancel()
            self._beside = None
        subject, choice = self.subject, self.choice
        slots = [slot for slot in parts.TABS[self.tab] if slot not in parts.OPTIONAL]
        if self._heavy(subject, choice):
            self._beside = self._worker.submit(self._answer, slots, state, asked, subject, choice)
        else:
            self._answer(slots, state, asked, subject, choice)
        later = [slot for slot in parts.TABS[self.tab] if slot in parts.OPTIONAL]
        if later:
            self._beside = self._worker.submit(self._afterwards, later, state, asked, subject, choice)

    def _heavy(self, subject: Subject | Refusal, choice: Choice) -> bool:
        if isinstance(subject, Refusal):
            return False
        if self.tab == "Values":
            return numbers.read(subject, choice) > AT_ONCE
        ranks = subject.catalog.mesh.size + (choice.mesh.size if self.tab in ("Reshape", "Steps") else 0)
        return len(subject.catalog.tensors) * ranks > AT_ONCE

    def _afterwards(self, slots: list[str], state: dict[str, Any], asked: int, *of: Any) -> None:
        """What need not be there at once, of a state that stands for a while."""
        time.sleep(REST)
        self._answer(slots, state, asked, *of)

    def _answer(
        self, slots: list[str], state: dict[str, Any], asked: int, subject: Subject | Refusal, choice: Choice
    ) -> None:
        found = {}
        for slot in slots:
            if self._shown != (state, asked):
                return  # something else is wanted by now
            found[parts.key(slot, state)] = self._part(slot, state, subject, choice)
        self.view = {"asked": asked, "parts": found}

    def _part(self, slot: str, state: dict[str, Any], subject: Subject | Refusal, choice: Choice) -> Any:
        name = parts.key(slot, state)
        if name not in self._parts:
            content = self._refused_works() if slot == "source.works" else parts.part(slot, subject, choice, self.most)
            self._parts[name] = content
            while len(self._parts) > KEPT:
                self._parts.popitem(last=False)
        return self._parts[name]

    def _refused_works(self) -> dict[str, list[int]]:
        """The degrees that a source may have; of a source that cannot be too."""
        return self._good.works(self.source_mesh, self.source_stage, self.most)

    # ---------------------------------------------------------------- without a kernel

    def to_html(
        self,
        path: str | os.PathLike[str],
        *,
        meshes: Sequence[Mesh] | None = None,
        tensors: Sequence[str] | None = None,
        values: Sequence[str] | None = None,
        width: int = 520,
    ) -> None:
        """Write what is shown as one file that opens from disk, without a kernel or a network, and answers to hover,
        click and keyboard.

        meshes: the targets to slide to, in the ZeRO stage that is chosen (None: the chosen one, the source's, and those
        next to it that work). tensors: which can be chosen (None: all, of many those of the first layers); of each all
        states on the chosen rank, and what each rank holds of the chosen state, as far as `export.STATES` go. values:
        tensors whose values are read and go into the page (None: the chosen one's, unless it is large). width: of a
        column of pictures, in pixels. CkptlabError for a mesh that cannot be.
        """
        script, style = ((STATIC / name).read_text(encoding="utf-8") for name in ("explorer.js", "explorer.css"))
        traits = {name: value for name, value in self.get_state().items() if not name.startswith("_")}
        of: dict[str, Any] = {"meshes": meshes, "tensors": tensors, "values": values, "width": width}
        html = export.page(self._good, self.choice, traits, (script, style), **of)
        Path(path).write_text(html, encoding="utf-8")

    def _repr_mimebundle_(self, **kwargs: Any) -> Any:
        """The widget, and beside it a static page for where there is no kernel."""
        bundle = super()._repr_mimebundle_(**kwargs)
        page_ = {"text/html": page.static(self._good, self.choice)}
        if isinstance(bundle, tuple):
            return {**bundle[0], **page_}, bundle[1]
        return {**(bundle or {}), **page_}


class Playground(Explorer):
    """A model on paper to play with: its numbers (`model`), its mesh and ZeRO stage (`source_mesh`, `source_stage`) are
    traits too, and a tab of their own before the explorer's. What does not fit together is said, and what could be
    stays."""

    tabs = ("Model", "Look", "Reshape", "Steps")

    def __init__(self, model: PaperModel, mesh: Mesh, zero_stage: int) -> None:
        presets = {
            name: {"model": asdict(p.model), "source": p.source, "activations": asdict(Activations(active=p.active))}
            for name, p in PRESETS.items()
        }
        subject = Subject.on_paper(model, mesh, zero_stage)
        small = asdict(Activations(sequence=SMALL))
        super().__init__(subject, tab="Model", model=asdict(model), activations=small, most=512, presets=presets)
        self._made_of = self._of()

    def _settle(self) -> None:
        if (of := self._of()) != self._made_of:  # whatever it was that changed: several traits may be set at once
            self._made_of = of
            self._follow()
        super()._settle()

    def _of(self) -> tuple[Any, ...]:
        """What the source is made of."""
        return self.model, self.source_mesh, self.source_stage

    def _follow(self) -> None:
        """Another source; the target follows it until it is moved, and what was chosen stays where there is such a
        thing."""
        before = self._good.start()
        try:
            self.subject = Subject.on_paper(PaperModel(**self.model), self.source_mesh, self.source_stage)
        except (CkptlabError, TypeError) as error:
            self.subject = Refusal(one_line(error))
            return
        self._good = self.subject
        start = self.subject.start()
        if self.mesh == before.mesh:
            self.mesh = start.mesh
        if self.zero_stage == before.zero_stage:
            self.zero_stage = start.zero_stage
        if self.tensor not in self.subject.catalog.tensors:
            self.tensor = start.tensor
        self.rank = min(self.rank, self.subject.catalog.mesh.size - 1)
