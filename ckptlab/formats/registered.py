"""The formats there are: ours, and those of installed packages."""

from __future__ import annotations

import warnings

from ckptlab.errors import CheckpointError
from ckptlab.formats.format import Format
from ckptlab.registry import Registry

FORMATS: Registry[type[Format]] = Registry(
    "format",
    "ckptlab.formats",
    CheckpointError,
    {
        "deepspeed": "ckptlab.formats.deepspeed.format:DeepSpeed",
        "universal": "ckptlab.formats.deepspeed.format:Universal",
        "safetensors": "ckptlab.formats.safetensors.format:Safetensors",
        "huggingface": "ckptlab.formats.safetensors.huggingface:HuggingFace",
        "torch": "ckptlab.formats.torch.format:Torch",
        "paper": "ckptlab.formats.paper.format:Paper",
        "dcp": "ckptlab.formats.dcp.format:DCP",
        "megatron": "ckptlab.formats.known:Megatron",
        "torchscript": "ckptlab.formats.known:TorchScript",
        "unread": "ckptlab.formats.known:Unread",
    },
)


def get(name: str) -> Format:
    """The format of that name. CheckpointError, with the names there are, if there is none."""
    return FORMATS.get(name)()


def every() -> list[Format]:
    """All of them; one of another package that cannot be loaded is left out, with a warning."""
    found = []
    for name in FORMATS.names():
        try:
            found.append(get(name))
        except CheckpointError as broken:
            warnings.warn(str(broken), stacklevel=2)
    return found
