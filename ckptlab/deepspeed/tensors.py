"""What a `.pt` file holds, as torch would load it, read by our own reader: nothing that the file names is imported.

Tensors are torch's, on memory that is mapped copy-on-write: nothing is read before it is used, and what is written to
one never reaches the file. Objects of a few harmless classes are themselves again; all others stay placeholders that
show their attributes.
"""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from ckptlab.deepspeed.sub_parameters import SubparamShape
from ckptlab.errors import CheckpointError
from ckptlab.formats.torch import torchfile
from ckptlab.formats.torch.pickles import Foreign, Global, Size
from ckptlab.formats.torch.torchfile import Apart, Pending
from ckptlab.stored import Stored

if TYPE_CHECKING:
    import torch


def load(path: str) -> Any:
    """The object in a `.pt` file. Errors are those of `torchfile.read`."""
    return as_torch(torchfile.read(path))


def as_torch(content: Any) -> Any:
    """The same object with torch's tensors and sizes for ours; containers are made anew, kinds and order kept."""
    return _Loader().convert(content)


def tensor_of(array: np.ndarray) -> torch.Tensor:
    """The array as a tensor on the same memory, which must be writable (torch does not know of any other)."""
    import torch

    dtype = torch_dtype(array.dtype)
    raw = array.view(f"u{array.dtype.itemsize}") if array.dtype.kind == "V" or array.dtype.isbuiltin != 1 else array
    return torch.from_numpy(raw).view(dtype)


def torch_dtype(dtype: np.dtype) -> torch.dtype:
    """The dtype of the same name in torch."""
    import torch

    return getattr(torch, dtype.name)


class _Loader:
    """Converts one object; every file that its tensors lie in is mapped once."""

    def __init__(self) -> None:
        self._mapped: dict[str, np.ndarray] = {}

    def convert(self, value: Any) -> Any:
        """Torch is imported where there is something of it; a dtype stays a placeholder where torch is not there."""
        if isinstance(value, Stored):
            return self._stored(value)
        if isinstance(value, Apart):
            return self._stored(value.stored).clone()
        if isinstance(value, Pending):
            return tensor_of(value.load())
        if isinstance(value, np.ndarray):
            return tensor_of(value)
        if isinstance(value, Size):
            import torch

            return torch.Size(value)
        if isinstance(value, Mapping):
            return type(value)((key, self.convert(one)) for key, one in value.items())  # type: ignore[call-arg]
        if isinstance(value, (list, tuple)):
            return type(value)(self.convert(one) for one in value)
        if isinstance(value, Global):
            return _dtype(value) if value.module == "torch" and _DTYPE.fullmatch(value.name) else value
        if isinstance(value, Foreign) and isinstance(value.callee, Global):
            build = _HARMLESS.get((value.module, value.name))
            return self._placeholder(value) if build is None else build(self, value)
        return value

    def _placeholder(self, value: Foreign) -> Foreign:
        """An object that stays one, its attributes converted."""
        named = isinstance(value.state, dict) and all(isinstance(key, str) for key in value.state)
        return value.with_attributes(**self.convert(value.state)) if named else value

    def _stored(self, stored: Stored) -> torch.Tensor:
        import torch

        dtype = torch_dtype(stored.dtype)
        if stored.numel == 0:
            return torch.empty(stored.shape, dtype=dtype)
        last = sum((n - 1) * stride for n, stride in zip(stored.shape, stored.strides, strict=True))
        held = self._map(stored.path, stored.offset + (last + 1) * stored.dtype.itemsize)
        flat = torch.frombuffer(held, dtype=dtype, count=last + 1, offset=stored.offset)
        return flat.as_strided(stored.shape, stored.strides)

    def _map(self, path: str, needed: int) -> np.ndarray:
        if path not in self._mapped:
            self._mapped[path] = np.memmap(path, np.uint8, mode="c")
        if len(self._mapped[path]) < needed:
            raise CheckpointError(
                f"{path} has {os.path.getsize(path)} bytes, but a tensor in it ends at byte {needed}: the file was "
                "cut or replaced since it was opened; copy it again"
            )
        return self._mapped[path]


def _dtype(name: Global) -> Any:
    try:
        import torch
    except ImportError:
        return name
    return getattr(torch, name.name, name)


def _namespace(loader: _Loader, value: Foreign) -> argparse.Namespace:
    return argparse.Namespace(**{key: loader.convert(one) for key, one in value.attributes.items()})


def _array(loader: _Loader, value: Foreign) -> Any:
    """A numpy array of numbers (random states are kept as such); of objects, it stays a placeholder."""
    try:
        _, shape, dtype, fortran, data = value.state
        kind, order = np.dtype(dtype.args[0]), dtype.state[1]
        array = np.frombuffer(data, kind.newbyteorder(order if order in "<>" else "="))
        return array.reshape(shape, order="F" if fortran else "C").astype(kind)
    except (TypeError, ValueError, AttributeError, IndexError):
        return value


def _enum_number(loader: _Loader, value: Foreign) -> Any:
    return value.args[0] if len(value.args) == 1 and type(value.args[0]) is int else value


def _sub_parameters(loader: _Loader, value: Foreign) -> Any:
    fields = value.attributes
    return SubparamShape(**fields) if set(fields) == {"patterns", "shape", "partition_dim"} else value


_HARMLESS: Mapping[tuple[str, str], Callable[[_Loader, Foreign], Any]] = {
    ("argparse", "Namespace"): _namespace,
    ("numpy.core.multiarray", "_reconstruct"): _array,
    ("numpy._core.multiarray", "_reconstruct"): _array,
    ("deepspeed.runtime.zero.config", "ZeroStageEnum"): _enum_number,
    ("deepspeed.checkpoint.universal_checkpoint", "SubparamShape"): _sub_parameters,
}
_DTYPE = re.compile(r"bool|(bfloat|float|int|uint|complex)\d+")
