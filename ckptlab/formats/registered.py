"""The formats there are: ours, and those of installed packages."""

from __future__ import annotations

from ckptlab.errors import CheckpointError
from ckptlab.formats.format import Format
from ckptlab.registry import Registry

FORMATS: Registry[Format] = Registry(
    "format",
    "ckptlab.formats",
    CheckpointError,
    {
        "deepspeed": "ckptlab.formats.deepspeed:DeepSpeed",
        "universal": "ckptlab.formats.deepspeed:Universal",
        "safetensors": "ckptlab.formats.safetensors:Safetensors",
        "paper": "ckptlab.formats.paper:Paper",
        "dcp": "ckptlab.formats.known:TorchDCP",
        "megatron": "ckptlab.formats.known:Megatron",
        "fsdp": "ckptlab.formats.known:FSDP",
        "nanotron": "ckptlab.formats.known:Nanotron",
        "orbax": "ckptlab.formats.known:Orbax",
        "torchscript": "ckptlab.formats.known:TorchScript",
    },
    make=True,
)
