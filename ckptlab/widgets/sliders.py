"""Sliders for a mesh and a ZeRO stage."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import ipywidgets as w

from ckptlab.mesh import Mesh

AXES = ("tp", "pp", "dp")
DEGREES = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 16, 20, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)
LARGE = 128  # ranks from which a slider answers when it is let go, not while it moves


class MeshSliders:
    """A slider for each of tp, pp and dp, and one for the ZeRO stage: `mesh` and `stage` are what they say.

    Degrees go to `most`, or to four times what the mesh has, at least 16.
    """

    def __init__(self, mesh: Mesh, stages: Sequence[int], stage: int, most: int = 16) -> None:
        self._heard: list[Callable[[Mesh, int], None]] = []
        self._setting = False
        look: dict[str, Any] = {"continuous_update": mesh.size < LARGE, "layout": w.Layout(width="auto")}
        look["style"] = {"description_width": "44px"}
        self.degrees = {
            axis: w.SelectionSlider(
                options=_options(mesh[axis], max(most, 4 * mesh[axis])), value=mesh[axis], description=axis, **look
            )
            for axis in AXES
        }
        self.zero = w.SelectionSlider(options=sorted({*stages, stage}), value=stage, description="ZeRO", **look)
        for slider in (*self.degrees.values(), self.zero):
            slider.observe(self._moved, "value")
        columns = "repeat(auto-fit, minmax(250px, 1fr))"
        layout = w.Layout(grid_template_columns=columns, grid_gap="0 24px", width="100%", max_width="720px")
        self.box = w.GridBox([*self.degrees.values(), self.zero], layout=layout)

    @property
    def mesh(self) -> Mesh:
        return Mesh(**{axis: slider.value for axis, slider in self.degrees.items()})

    @property
    def stage(self) -> int:
        return int(self.zero.value)

    def on_move(self, heard: Callable[[Mesh, int], None]) -> None:
        """Call this with the mesh and the stage whenever a slider is moved."""
        self._heard.append(heard)

    def show(self, mesh: Mesh, stage: int) -> None:
        """Put the sliders where these are, without a word; a degree between the notches gets one."""
        self._setting = True
        try:
            for slider, value in (*((self.degrees[axis], mesh[axis]) for axis in AXES), (self.zero, stage)):
                if value not in slider.options:
                    slider.options = sorted({*slider.options, value})
                slider.value = value
        finally:
            self._setting = False

    def _moved(self, _: Any) -> None:
        if not self._setting:
            for heard in self._heard:
                heard(self.mesh, self.stage)


def _options(degree: int, most: int) -> list[int]:
    return sorted({degree, *(n for n in DEGREES if n <= most)})
