"""What statistics are of: one state of one tensor, of one layer, tp rank and training step.

What remains to be reduced are the tensor's own dims.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ckptlab.analysis.windows import Array


@dataclass(frozen=True)
class Row:
    """One state of one tensor: `array` with the tensor's own dims alone.

    name: the model's own. stack: the name that it shares with the other layers; layer: its number among them, -1 where
    it stands alone. pp: the stage that holds it, -1 where nothing says so. tp, step: None where the view has no such
    dim. layout: the line of notation that says how it is cut, "" where nothing says so.
    """

    name: str
    state: str
    array: Array
    stack: str
    layer: int = -1
    kind: str = ""
    group: str = ""
    pp: int = -1
    tp: int | None = None
    step: int | None = None
    layout: str = ""

    @property
    def numel(self) -> int:
        return math.prod(self.array.shape)
