"""The names of the files in a DeepSpeed step folder (DeepSpeed 0.19.8, `deepspeed.checkpoint.constants` and the
engine).

XX of `mp_rank_XX` is pp * TP + tp; the D of `zero_pp_rank_D` is the *data*-parallel rank, whatever its name says.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

TIED = "tied_modules."  # before the names of modules that a pipeline has at several places
_DIGITS = 6  # of a layer's number: more are none
VERSION = "0.19.8"  # of DeepSpeed: whose engine was seen to load such files
_NAMES = {
    kind: re.compile(pattern)
    for kind, pattern in {
        "model": r"mp_rank_(?P<mp>\d+)_model_states\.pt",
        "zero3_model": r"zero_pp_rank_(?P<dp>\d+)_mp_rank_(?P<mp>\d+)_model_states\.pt",
        # old: without "_"
        "optim": r"(?:(?P<prefix>bf16|fp16)_)?zero_pp_rank_(?P<dp>\d+)_mp_rank_(?P<mp>\d+)_?optim_states\.pt",
        "layer": r"layer_(?P<layer>\d+)(?:-(?P<prefix>model)_(?P<mp>\d+))?-model_states\.pt",
        "expert": r"(?:layer_(?P<layer>\d+)_)?expert_(?P<expert>\d+)_mp_rank_(?P<mp>\d+)_model_states\.pt",
        "expert_optim": r"expp_rank_(?P<expert>\d+)_mp_rank_(?P<mp>\d+)_optim_states\.pt",
    }.items()
}


@dataclass(frozen=True)
class FileName:
    """A file name taken apart; fields that its kind does not have are 0.

    `kind` is "model", "zero3_model", "optim" (whose `prefix` is "bf16" if and only if the engine that is to read it
    trains in bfloat16), "layer" (`prefix` is "model" where the engine's topology has a model axis, of which `mp` is the
    rank), "expert" (`expert` is its number in all of the layer, `layer` counts the layers that have experts; -1: an old
    DeepSpeed's, which put the experts of that number of all layers into one file) or "expert_optim", the optimizer of
    the ep rank `expert` where there is no ZeRO.
    """

    kind: str
    mp: int = 0
    dp: int = 0
    layer: int = 0
    prefix: str = ""
    expert: int = 0

    @classmethod
    def of_layer(cls, layer: int, tp: int, axis: bool) -> FileName:
        """A layer's file on a tp rank. axis: the engine's topology has a model axis."""
        return cls("layer", tp if axis else 0, layer=layer, prefix="model" if axis else "")

    @property
    def text(self) -> str:
        """The name as DeepSpeed writes it."""
        mp = f"mp_rank_{self.mp:02d}"
        match self.kind:
            case "model":
                return f"{mp}_model_states.pt"
            case "zero3_model":
                return f"zero_pp_rank_{self.dp}_{mp}_model_states.pt"
            case "optim":
                return f"{self.prefix and self.prefix + '_'}zero_pp_rank_{self.dp}_{mp}_optim_states.pt"
            case "expert":
                return f"{'' if self.layer < 0 else f'layer_{self.layer}_'}expert_{self.expert}_{mp}_model_states.pt"
            case "expert_optim":
                return f"expp_rank_{self.expert}_{mp}_optim_states.pt"
        return f"layer_{self.layer:02d}{self.prefix and f'-model_{self.mp:02d}'}-model_states.pt"


def parse(name: str) -> FileName | None:
    """What a file of a step folder is, by its name; None if it is none of DeepSpeed's."""
    for kind, pattern in _NAMES.items():
        if match := pattern.fullmatch(name):
            said = {field: text for field, text in match.groupdict().items() if text is not None}
            prefix = said.pop("prefix", "")
            numbers = {"layer": -1} if kind == "expert" else {}
            return FileName(kind, prefix=prefix, **numbers | {field: int(text) for field, text in said.items()})
    return None


def layer_number(tensor: str) -> int | None:
    """The layer of a pipeline that a tensor is in, whose number its name begins with; None where it does not."""
    head = tensor.partition(".")[0]
    return int(head) if head.isascii() and head.isdecimal() and len(head) < _DIGITS else None


def in_pipeline(tensor: str) -> bool:
    """Whether a tensor is called as those of a pipeline are."""
    return tensor.startswith(TIED) or layer_number(tensor) is not None


def tied(tensors: Iterable[str]) -> list[str]:
    """`tied_modules.KEY.` of every tied module that tensors are in, sorted."""
    return sorted({".".join(name.split(".")[:2]) + "." for name in tensors if name.startswith(TIED)})
