"""What is explored, and what was chosen to look at: plain values, without a widget.

A `Subject` is a checkpoint or a model on paper; a `Choice` is where the user's hands are. Every picture, table and text
of the widgets is a function of the two.
"""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from typing import Any

from ckptlab import formats
from ckptlab.catalog import ZERO_STAGES, Catalog, Tensor
from ckptlab.checkpoint import Checkpoint, paper_model
from ckptlab.errors import CkptlabError
from ckptlab.mesh import Mesh
from ckptlab.reshaping import Reshape
from ckptlab.sharding.activations import Activations
from ckptlab.sharding.transformer import PaperModel
from ckptlab.widgets.held import pieces

DEGREES = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 16, 20, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)
"""What sliders offer, and static/explorer.js with them."""

FIRST = 64  # tensors among which the first to be shown is looked for


@dataclass(frozen=True)
class Choice:
    """The chosen tensor, one of its states, a rank of the source; the target's mesh and ZeRO stage, a rank of it; the
    step of the reshape that is shown (from 0); for how wide a page pictures are drawn, in pixels; of the values the
    window that is shown, (first, one behind the last) for each dim (of all of it, nothing); of a model on paper the
    activations that memory is told with."""

    tensor: str
    state: str
    rank: int
    mesh: Mesh
    zero_stage: int
    target_rank: int = 0
    step: int = 0
    width: int | None = None
    window: tuple[tuple[int, int], ...] = ()
    activations: Activations | None = None


@dataclass(frozen=True)
class Refusal:
    """Why there is no target, in one line."""

    text: str

    def __str__(self) -> str:
        return self.text


class Subject:
    """A catalog to look at, and the line of Python that opens it."""

    def __init__(self, catalog: Catalog, code: str) -> None:
        self.catalog, self.code = catalog, code
        self.reshape = lru_cache(maxsize=8)(self._reshape)
        self.fits = lru_cache(maxsize=4096)(self._fits)

    @staticmethod
    def of_checkpoint(ckpt: Checkpoint) -> Subject:
        if numbers := ckpt.catalog.training.numbers:
            return Subject.on_paper(PaperModel(**numbers), ckpt.mesh, ckpt.zero_stage or 0)
        if not ckpt.plainly:  # with layouts or a mesh that a user said, or under other names: as the user calls it
            return Subject(ckpt.catalog, "ckpt")
        path = min(ckpt.path, os.path.relpath(ckpt.path), key=len)
        return Subject(ckpt.catalog, f"ckptlab.open({path!r})")

    @staticmethod
    def on_paper(numbers: PaperModel, mesh: Mesh, zero_stage: int) -> Subject:
        """CkptlabError where the numbers, mesh and stage do not fit each other."""
        code = f"ckptlab.paper_model({mesh_code(mesh)}, zero_stage={zero_stage}, {numbers})"
        return Subject(paper_model(mesh, zero_stage, **asdict(numbers)).catalog, code)

    @property
    def is_paper(self) -> bool:
        return bool(self.catalog.training.numbers)

    @property
    def home(self) -> str | None:
        """The format that a target is laid out in: None, as such checkpoints are; on paper where they have no home."""
        return None if formats.get(self.catalog.format).home else "paper"

    @property
    def stages(self) -> tuple[int, ...]:
        """The ZeRO stages that a target may have; none where its format knows of none."""
        form = formats.get(self.home or formats.get(self.catalog.format).home or "paper")
        if "zero_stage" not in {field.name for field in fields(form.options)}:
            return ()
        return ZERO_STAGES if form.name == "paper" else (1, 2, 3)

    def _options(self, zero_stage: int) -> dict[str, Any]:
        return {"zero_stage": zero_stage} if self.stages else {}

    def at_stage(self, zero_stage: int) -> Catalog:
        """Of a model on paper: the same on the same mesh under another ZeRO stage."""
        return paper_model(self.catalog.mesh, zero_stage, **self.catalog.training.numbers).catalog

    @property
    def trained_on(self) -> Mesh:
        """The mesh of the run; where a format holds whole tensors, not that of its files."""
        return self.catalog.training.mesh or self.catalog.mesh

    @property
    def title(self) -> str:
        """`gpt/global_step3 · tp 2 · pp 2 · dp 2 (8 ranks) · ZeRO-1`."""
        numbers = self.catalog.training.numbers
        name = "/".join(self.catalog.path.rstrip("/").split("/")[-2:])
        if numbers:
            name = f"model on paper, {numbers['layers']} layers of {numbers['hidden']:,}"
        stage = "" if self.catalog.zero_stage is None else f" · ZeRO-{self.catalog.zero_stage}"
        return f"{name} · {self.catalog.mesh.title()}{stage}"

    def start(self) -> Choice:
        """What is shown first: the first matrix that tp cuts and of which rank 0 has something (among the first ones);
        the target is the run's own mesh."""
        tensors = list(self.catalog.tensors.values())
        cut = [t for t in tensors if t.cut.axes and len(t.shape) > 1 and len(t.stages) == 1]
        held = (t for t in cut[:FIRST] if pieces(self.catalog, t.name, next(iter(t.states)), 0))
        first = next(held, next(iter(cut), next((t for t in tensors if len(t.shape) > 1), tensors[0])))
        stage = self.catalog.zero_stage
        if stage is None:
            stage = 0 if self.home or not self.stages else 1
        return Choice(first.name, next(iter(first.states)), 0, self.trained_on.joined(), stage)

    def tensor(self, choice: Choice) -> Tensor:
        return self.catalog[choice.tensor]

    def target(self, choice: Choice) -> Reshape | Refusal:
        """The reshape to the chosen mesh, or why there is none. Remembered."""
        return self.reshape(choice.mesh, choice.zero_stage)

    def _reshape(self, mesh: Mesh, zero_stage: int) -> Reshape | Refusal:
        try:
            return Reshape.of(self.catalog, mesh, self.home, **self._options(zero_stage))
        except CkptlabError as error:
            return Refusal(one_line(error, self.catalog.path))

    def works(self, mesh: Mesh, zero_stage: int, most: int) -> dict[str, list[int]]:
        """For each axis of a mesh the degrees that it can have while the others stay, and the ZeRO stages ("ZeRO")."""
        found = {}
        for axis, degree in mesh.degrees.items():
            tried = sorted({degree, *(n for n in DEGREES if n <= max(most, 4 * degree))})
            found[axis] = [n for n in tried if self.fits(mesh.replace(**{axis: n}), zero_stage)]
        if self.stages:
            found["ZeRO"] = [stage for stage in self.stages if self.fits(mesh, stage)]
        return found

    def _fits(self, mesh: Mesh, zero_stage: int) -> bool:
        """Whether there is a target on a mesh."""
        try:
            if numbers := self.catalog.training.numbers:  # a model of few layers has the same reasons
                few = min(numbers["layers"], max(mesh.pp, numbers["dense_layers"] + 1))
                paper_model(mesh, zero_stage, **{**numbers, "layers": few})
            else:
                Reshape.of(self.catalog, mesh, self.home, **self._options(zero_stage))
        except CkptlabError:
            return False
        return True

    def opening(self, choice: Choice) -> str:
        """The Python line that opens the chosen tensor; of a model on paper, that makes the model."""
        return self.code if self.is_paper else f'{self.code}.full("{choice.state}", stack=False)["{choice.tensor}"]'

    def reshaping(self, choice: Choice) -> str:
        """The Python line that reshapes and, of what has files, saves: `….reshape(ckptlab.Mesh(tp=4, dp=2),
        zero_stage=1)`, without a stage if it is the source's; where there is no such target, a comment that says
        why."""
        target = self.target(choice)
        if isinstance(target, Refusal):
            return f"# {choice.mesh}: {target}"
        same = not self.stages or choice.zero_stage == self.catalog.zero_stage
        stage = "" if same else f", zero_stage={choice.zero_stage}"
        there = f', "{self.home}"' if self.home else ""
        line = f"{self.code}.reshape({mesh_code(choice.mesh)}{there}{stage})"
        return line if self.is_paper or self.home else f'{line}.save("reshaped/step")'


def mesh_code(mesh: Mesh) -> str:
    """`ckptlab.Mesh(tp=4, dp=2)`; with its parts where an axis was split."""
    if mesh.joined() != mesh:
        return f"ckptlab.{mesh!r}"
    return f"ckptlab.Mesh({', '.join(f'{axis}={n}' for axis, n in pairs(mesh) if n > 1)})"


def pairs(mesh: Mesh) -> list[tuple[str, int]]:
    """Axes and degrees in the order in which people name them."""
    degrees = mesh.joined().degrees
    return [(axis, degrees[axis]) for axis in dict.fromkeys(("tp", "pp", "dp", *degrees))]


def one_line(error: Exception, path: Any = "") -> str:
    """An error's message without the path before it, its list of reasons run together."""
    first, *others = str(error).removeprefix(f"{path}: ").split("\n")
    reasons = "; ".join(line.removeprefix("  - ") for line in others if line.startswith("  - "))
    rest = ". ".join(line.strip() for line in others if not line.startswith("  - "))
    told = f"{first} {reasons}".strip()
    told = f"{told}. {rest}" if rest else told
    return told[:1].upper() + told[1:] if told.split(" ")[0].isalpha() else told
