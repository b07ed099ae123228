"""The first tab of the playground: a model's numbers, and the mesh that it is trained on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ipywidgets as w

from ckptlab.catalog import ZERO_STAGES
from ckptlab.draw import Stack, bars
from ckptlab.errors import CkptlabError
from ckptlab.mesh import Mesh
from ckptlab.sharding.transformer import PaperModel
from ckptlab.viz import fullest
from ckptlab.widgets import page
from ckptlab.widgets.picture import Picture, text
from ckptlab.widgets.sliders import MeshSliders
from ckptlab.widgets.subject import Choice, Refusal, Subject, one_line

MOST = 512  # of a degree

PRESETS: dict[str, PaperModel] = {
    "tiny": PaperModel(),
    "GPT-2": PaperModel(12, 768, 12, vocab=50257),
    "Llama 2 7B": PaperModel(32, 4096, 32, ffn=11008, vocab=32000, tied=False, gated=True),
    "Llama 3 70B": PaperModel(80, 8192, 64, 8, 28672, 128256, tied=False, gated=True),
    "GPT-3 175B": PaperModel(96, 12288, 96, vocab=50257),
}
"""Shapes as published; biases and position embeddings are left out."""


class Numbers:
    """Fields for the numbers of a `PaperModel`, sliders for its mesh; `changed` is given each subject that comes of it.

    What does not fit together becomes a line below the fields, and the subject stays.
    """

    def __init__(self, model: PaperModel, mesh: Mesh, stage: int, changed: Callable[[Subject], None]) -> None:
        self._changed, self._setting = changed, False
        self.preset = w.Dropdown(options=["", *PRESETS], description="like")
        self.fields: dict[str, Any] = {
            "layers": w.BoundedIntText(min=1, max=1000),
            "hidden": w.BoundedIntText(min=1, max=1 << 20),
            "heads": w.BoundedIntText(min=1, max=1 << 12),
            "kv_heads": w.BoundedIntText(min=1, max=1 << 12, description="kv heads"),
            "ffn": w.BoundedIntText(min=1, max=1 << 22),
            "vocab": w.BoundedIntText(min=1, max=1 << 24),
            "dtype": w.Dropdown(options=["bf16", "fp16", "fp32"]),
            "tied": w.Checkbox(description="tied embeddings", indent=False),
            "gated": w.Checkbox(description="gated (SwiGLU)", indent=False),
        }
        self._show(model)
        for name, field in (("", self.preset), *self.fields.items()):
            field.description = field.description or name
            field.layout, field.style.description_width = w.Layout(width="210px"), "70px"
            field.observe(self._pick if field is self.preset else self._edited, "value")
        self.sliders = MeshSliders(mesh, ZERO_STAGES, stage, MOST)
        self.sliders.on_move(lambda mesh, stage: self._edited())
        self.told, self.stages = text(), Picture()
        grid = w.Layout(grid_template_columns="repeat(auto-fill, 220px)", grid_gap="2px 12px")
        numbers = [self.preset, *(field for name, field in self.fields.items() if name not in ("tied", "gated"))]
        fields, choices = w.GridBox(numbers, layout=grid), w.HBox([self.fields["tied"], self.fields["gated"]])
        self.box = w.VBox([fields, choices, self.sliders.box, self.told, self.stages])

    @property
    def model(self) -> PaperModel:
        """What the fields say. LayoutError where they do not fit each other."""
        said = {name: field.value for name, field in self.fields.items()}
        same_heads, plain = said["kv_heads"] == said["heads"], said["ffn"] == 4 * said["hidden"]
        return PaperModel(**{**said, **({"kv_heads": None} if same_heads else {}), **({"ffn": None} if plain else {})})

    def subject(self) -> Subject | Refusal:
        """The model on its mesh, or why it cannot be."""
        try:
            return Subject.on_paper(self.model, self.sliders.mesh, self.sliders.stage)
        except CkptlabError as error:
            return Refusal(one_line(error))

    def draw(self, subject: Subject, choice: Choice) -> None:
        """The model's size, and what each ZeRO stage would keep on the fullest rank."""
        self.told.value = page.model(subject)
        kept = [Stack(f"ZeRO-{s}", fullest(subject.at_stage(s)), {}) for s in ZERO_STAGES]
        self.stages.svg = bars(kept, title="memory of the fullest rank by ZeRO stage, gradients included", notes=[]).svg

    def _show(self, model: PaperModel) -> None:
        self._setting = True
        try:
            for name, field in self.fields.items():
                field.value = {"kv_heads": model.keys, "ffn": model.width}.get(name, getattr(model, name))
        finally:
            self._setting = False

    def _pick(self, change: Any) -> None:
        if change["new"]:
            self._show(PRESETS[change["new"]])
            self._edited()

    def _edited(self, _: Any = None) -> None:
        if self._setting:
            return
        subject = self.subject()
        if isinstance(subject, Refusal):
            self.told.value = page.refusal(subject)
        else:
            self._changed(subject)
