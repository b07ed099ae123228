"""What a run says of itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np

from ckptlab.catalog.tensor import ParameterGroup
from ckptlab.mesh import Mesh

DTYPES: Mapping[str, np.dtype] = {
    "bf16": np.dtype(ml_dtypes.bfloat16),
    "fp16": np.dtype(np.float16),
    "fp32": np.dtype(np.float32),
}
"""What models compute in, as their programs call it."""


ZERO_STAGES = (0, 1, 2, 3)


@dataclass(frozen=True)
class Gradients:
    """How a run keeps its gradients: in a dtype, `flat` in buffers as the optimizer's states or tensor by tensor, and
    cut over dp or whole on each of its ranks."""

    dtype: np.dtype
    cut: bool
    flat: bool

    def __str__(self) -> str:
        return f"{self.dtype.name} gradients {'cut over dp' if self.cut else 'whole on each dp rank'}"


@dataclass(frozen=True)
class Training:
    """What a checkpoint says of the run that wrote it; None and empty: it does not say.

    `mesh`: the mesh that the run trained on (a catalog's own is 1 · 1 · 1 where tensors are stored whole). `dtype`:
    what the model computes in, a key of DTYPES. `wrapper`: the optimizer's, by its program's name. `groups`: parameter
    groups, in the program's order. `layer_stages`: the pp stage of each layer of a pipeline. `heads`, `kv_heads`:
    attention heads. `gradients`: how they are kept. `layouts_told`: the checkpoint itself says how its tensors are cut,
    and no strategy overruled it. `numbers`: those that a model on paper is described by.
    """

    mesh: Mesh | None = None
    step: int | None = None
    zero_stage: int | None = None
    dtype: str | None = None
    wrapper: str | None = None
    groups: tuple[ParameterGroup, ...] = ()
    layer_stages: Mapping[int, int] = field(default_factory=dict)
    heads: int | None = None
    kv_heads: int | None = None
    gradients: Gradients | None = None
    layouts_told: bool = False
    numbers: Mapping[str, Any] = field(default_factory=dict)
