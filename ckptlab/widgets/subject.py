"""What is explored, and what was chosen to look at: plain values, without a widget.

A `Subject` is a checkpoint or a model on paper; a `Choice` is where the user's hands are. Every picture, table and text
of the widgets is a function of the two.
"""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

from ckptlab.catalog import ZERO_STAGES, Catalog, Tensor
from ckptlab.checkpoint import Checkpoint, Reshape, paper_model
from ckptlab.errors import CkptlabError
from ckptlab.mesh import Mesh
from ckptlab.sharding.transformer import PaperModel


@dataclass(frozen=True)
class Choice:
    """The chosen tensor, one of its states, a rank of the source; the target's mesh and ZeRO stage, a rank of it; the
    step of the reshape that is shown (from 0)."""

    tensor: str
    state: str
    rank: int
    mesh: Mesh
    zero_stage: int
    target_rank: int = 0
    step: int = 0


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

    @staticmethod
    def of_checkpoint(ckpt: Checkpoint) -> Subject:
        if numbers := ckpt.catalog.training.numbers:
            return Subject.on_paper(PaperModel(**numbers), ckpt.mesh, ckpt.zero_stage or 0)
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
    def stages(self) -> tuple[int, ...]:
        """The ZeRO stages that a target may have."""
        return ZERO_STAGES if self.is_paper else (1, 2, 3)

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
        name = self.catalog.path if self.is_paper else "/".join(self.catalog.path.rstrip("/").split("/")[-2:])
        stage = "" if self.catalog.zero_stage is None else f" · ZeRO-{self.catalog.zero_stage}"
        return f"{name} · {self.catalog.mesh.title()}{stage}"

    def start(self) -> Choice:
        """What is shown first: the first matrix that tp cuts, on rank 0; the target is the run's own mesh."""
        tensors = list(self.catalog.tensors.values())
        cut = (t for t in tensors if t.cut.axes and len(t.shape) > 1 and len(t.stages) == 1)
        first = next(cut, next((t for t in tensors if len(t.shape) > 1), tensors[0]))
        stage = self.catalog.zero_stage
        return Choice(first.name, next(iter(first.states)), 0, self.trained_on, 1 if stage is None else stage)

    def tensor(self, choice: Choice) -> Tensor:
        return self.catalog[choice.tensor]

    def target(self, choice: Choice) -> Reshape | Refusal:
        """The reshape to the chosen mesh, or why there is none. Remembered."""
        return self.reshape(choice.mesh, choice.zero_stage)

    def _reshape(self, mesh: Mesh, zero_stage: int) -> Reshape | Refusal:
        try:
            return Reshape.of(self.catalog, mesh, zero_stage=zero_stage)
        except CkptlabError as error:
            return Refusal(one_line(error, self.catalog.path))

    def line(self, choice: Choice) -> str:
        """The Python line that does what was chosen: opens the tensor, or reshapes and, a checkpoint, saves."""
        if (choice.mesh, choice.zero_stage) == (self.catalog.mesh, self.catalog.zero_stage):
            return self.code if self.is_paper else f'{self.code}.full("{choice.state}", stack=False)["{choice.tensor}"]'
        line = f"{self.code}.{self.reshaping(choice)}"
        return line if self.is_paper else f'{line}.save("reshaped/step")'

    def reshaping(self, choice: Choice) -> str:
        """`reshape(ckptlab.Mesh(tp=4, dp=2), zero_stage=1)`; without a stage if it is the source's."""
        stage = "" if choice.zero_stage == self.catalog.zero_stage else f", zero_stage={choice.zero_stage}"
        return f"reshape({mesh_code(choice.mesh)}{stage})"


def mesh_code(mesh: Mesh) -> str:
    """`ckptlab.Mesh(tp=4, dp=2)`."""
    degrees = ", ".join(f"{axis}={mesh[axis]}" for axis in ("tp", "pp", "dp") if mesh[axis] > 1)
    return f"ckptlab.Mesh({degrees})"


def one_line(error: Exception, path: Any = "") -> str:
    """An error's message without the path before it, its list of reasons run together."""
    first, *others = str(error).removeprefix(f"{path}: ").split("\n")
    reasons = "; ".join(line.removeprefix("  - ") for line in others if line.startswith("  - "))
    rest = ". ".join(line.strip() for line in others if not line.startswith("  - "))
    told = f"{first} {reasons}".strip()
    told = f"{told}. {rest}" if rest else told
    return told[:1].upper() + told[1:] if told.split(" ")[0].isalpha() else told
