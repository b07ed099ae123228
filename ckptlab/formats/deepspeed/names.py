"""The names of the files in a DeepSpeed step folder (DeepSpeed 0.19.8, `deepspeed.checkpoint.constants` and the
engine).

XX of `mp_rank_XX` is pp * TP + tp; the D of `zero_pp_rank_D` is the *data*-parallel rank, whatever its name says.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

TIED = "tied_modules."  # before the names of modules that a pipeline has at several places
VERSION = "0.19.8"  # of DeepSpeed: whose engine was seen to load such files
_MODEL = re.compile(r"mp_rank_(\d+)_model_states\.pt")
_ZERO3_MODEL = re.compile(r"zero_pp_rank_(\d+)_mp_rank_(\d+)_model_states\.pt")
_OPTIM = re.compile(r"(?:(bf16|fp16)_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_?optim_states\.pt")  # old: without "_"
_LAYER = re.compile(r"layer_(\d+)(?:-model_(\d+))?-model_states\.pt")
_EXPERT = re.compile(r"(?:layer_(\d+)_)?expert_(\d+)_mp_rank_(\d+)_model_states\.pt")
_EXPERT_OPTIM = re.compile(r"expp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")


@dataclass(frozen=True)
class FileName:
    """A file name taken apart. `kind` is "model", "zero3_model", "optim", "layer", "expert" (`layer` counts the layers
    that have experts; -1: its file is of all of them) or "expert_optim" (`expert` is the ep rank); fields that the kind
    does not have are 0."""

    kind: str
    mp: int = 0
    dp: int = 0
    layer: int = 0
    prefix: str = ""
    expert: int = 0

    @property
    def text(self) -> str:
        """The name as DeepSpeed writes it."""
        match self.kind:
            case "model":
                return model(self.mp)
            case "zero3_model":
                return zero3_model(self.dp, self.mp)
            case "optim":
                return optim(self.dp, self.mp, self.prefix)
            case "expert":
                return expert(self.layer, self.expert, self.mp)
            case "expert_optim":
                return expert_optim(self.expert, self.mp)
        return layer(self.layer, self.mp if self.prefix else None)

    def rank(self, tp: int) -> dict[str, int]:
        """The coordinate that the name stands for, as far as it says one, in a mesh of that tp degree."""
        if self.kind == "layer":
            return {"tp": self.mp}
        place = {"pp": self.mp // tp, "tp": self.mp % tp}
        return {**place, "dp": self.dp} if self.kind in ("zero3_model", "optim") else place


def parse(name: str) -> FileName | None:
    """What a file of a step folder is, by its name; None if it is none of DeepSpeed's."""
    if m := _MODEL.fullmatch(name):
        return FileName("model", mp=int(m[1]))
    if m := _ZERO3_MODEL.fullmatch(name):
        return FileName("zero3_model", dp=int(m[1]), mp=int(m[2]))
    if m := _OPTIM.fullmatch(name):
        return FileName("optim", dp=int(m[2]), mp=int(m[3]), prefix=m[1] or "")
    if m := _LAYER.fullmatch(name):
        return FileName("layer", layer=int(m[1]), mp=int(m[2] or 0), prefix="model" if m[2] else "")
    if m := _EXPERT.fullmatch(name):
        return FileName("expert", mp=int(m[3]), layer=-1 if m[1] is None else int(m[1]), expert=int(m[2]))
    if m := _EXPERT_OPTIM.fullmatch(name):
        return FileName("expert_optim", mp=int(m[2]), expert=int(m[1]))
    return None


def model(mp: int) -> str:
    return f"mp_rank_{mp:02d}_model_states.pt"


def zero3_model(dp: int, mp: int) -> str:
    return f"zero_pp_rank_{dp}_mp_rank_{mp:02d}_model_states.pt"


def optim(dp: int, mp: int, prefix: str = "") -> str:
    """`prefix` is "bf16" if and only if the engine that is to read the file trains in bfloat16."""
    return f"{prefix and prefix + '_'}zero_pp_rank_{dp}_mp_rank_{mp:02d}_optim_states.pt"


def layer(index: int, tp: int | None) -> str:
    """`tp` is None where the engine's topology has no model axis."""
    return f"layer_{index:02d}{'' if tp is None else f'-model_{tp:02d}'}-model_states.pt"


def expert(layer: int, number: int, mp: int) -> str:
    """`layer` counts the layers that have experts, `number` is the expert's in all of the layer; -1: an
    old DeepSpeed's, which put the experts of that number of all layers into one file."""
    return f"{'' if layer < 0 else f'layer_{layer}_'}expert_{number}_mp_rank_{mp:02d}_model_states.pt"


def expert_optim(ep: int, mp: int) -> str:
    """The optimizer of an expert parallel rank where there is no ZeRO."""
    return f"expp_rank_{ep}_mp_rank_{mp:02d}_optim_states.pt"
