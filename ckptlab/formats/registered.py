"""The formats there are: ours, and those of installed packages."""

from __future__ import annotations

from typing import Any

from ckptlab.errors import CheckpointError
from ckptlab.formats.format import Format
from ckptlab.registry import Registry


def _wrong(name: str, value: Any) -> str:
    """Why what a package registers under a name is no format; "" where it is one."""
    if not (isinstance(value, type) and issubclass(value, Format)):
        return f"expected a subclass of ckptlab.formats.Format, found {value!r}"
    if getattr(value, "name", None) != name:
        return f"its `name` is {getattr(value, 'name', None)!r}, and it is registered as {name!r}"
    try:
        value()
    except Exception as broken:  # another package's code may raise anything
        return f"{type(broken).__name__}: {broken}"
    return ""


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
    wrong=_wrong,
)


def get(name: str) -> Format:
    """The format of that name. CheckpointError, with the names there are, if there is none."""
    return FORMATS.get(name)()


def every() -> list[Format]:
    """All of them; one of another package that cannot be loaded is left out, with a warning."""
    return [form() for form in FORMATS.every()]
