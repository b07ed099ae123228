"""What a run says of itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ckptlab.catalog.tensor import ParameterGroup
from ckptlab.mesh import Mesh


@dataclass(frozen=True)
class Training:
    """What a checkpoint says of the run that wrote it; None and empty: it does not say.

    `mesh`: the mesh that the run trained on (a catalog's own is 1 · 1 · 1 where tensors are stored whole). `dtype`:
    what the model computes in, "bf16", "fp16" or "fp32". `wrapper`: the optimizer's, by its program's name. `groups`:
    parameter groups, in the program's order. `layer_stages`: the pp stage of each layer of a pipeline. `heads`,
    `kv_heads`: attention heads. `layouts_told`: the checkpoint itself says how its tensors are cut, and no strategy
    overruled it. `numbers`: those that a model on paper is described by.
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
    layouts_told: bool = False
    numbers: Mapping[str, Any] = field(default_factory=dict)
