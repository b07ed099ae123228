"""What a user may say of a DCP folder to be written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class DCPOptions:
    """What a user may say of a target; None keeps the source's.

    `keys`: how they are nested: "torch" ({"model": …, "optimizer": …} of get_state_dict; what is written where the
    source says nothing), "torch-flat" (flatten_optimizer_state_dict=True), "torchtitan", "accelerate" (two folders),
    "weights" (model.state_dict() alone). `model_key`, `optimizer_key`: other prefixes, dotted ("app.model"; "" is
    none). `rename`: "regex=replacement", one after the other, on the names of tensors. `chunks`: "fsdp" (as FSDP2 cuts:
    what a layout says, and dim 0 over dp within; the default), "layouts" (what layouts say alone), "whole" (one file).
    `dtype`: "bf16", "fp16" or "fp32" of the weights; master weights of another are then kept beside the moments, as
    `master_param`. None: master weights are the model's, but a DCP source keeps what it has (not Megatron-core's, whose
    masters torch's own optimizers have no place for). `param_groups`:
    hyperparameters of each group, added to the source's or in their place. `padded_vocab`: rows of a vocabulary that is
    padded in the source, which keep what they held there.
    """

    keys: str | None = None
    model_key: str | None = None
    optimizer_key: str | None = None
    rename: tuple[str, ...] | None = None
    chunks: str | None = None
    dtype: str | None = None
    param_groups: tuple[Mapping[str, Any], ...] | None = None
    padded_vocab: int | None = None
