"""What statistics are of: one state of one tensor, of one layer, rank and training step.

What remains to be reduced are the tensor's own dims.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from ckptlab.analysis.windows import Array


@dataclass(frozen=True)
class Row:
    """One state of one tensor: `array` with the tensor's own dims alone.

    name: the model's own. stack: the name that it shares with the other layers; layer: its number among them, -1 where
    it stands alone. pp: the stage that holds it, -1 where nothing says so. ranks: mesh axis → rank, for the axes that
    are dims of the view. step: None where the view has no such dim. layout: the line of notation that says how it is
    cut, "" where nothing says so.
    """

    name: str
    state: str
    array: Array
    stack: str
    layer: int = -1
    kind: str = ""
    group: str = ""
    pp: int = -1
    ranks: Mapping[str, int] = field(default_factory=dict)
    step: int | None = None
    layout: str = ""

    @property
    def numel(self) -> int:
        return math.prod(self.array.shape)
