"""What DeepSpeed's two checkpoint classes have in common here: a catalog, a target, `save` and `load`."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

from ckptlab.arrays import reader
from ckptlab.catalog import MASTER, PARAM, Catalog, Tensor
from ckptlab.checkpoint import Reshape
from ckptlab.convert import Report
from ckptlab.deepspeed.constants import UNIVERSAL_CHECKPOINT_INFO
from ckptlab.deepspeed.files import get_files, get_model_files
from ckptlab.deepspeed.reshape_3d import model_3d_desc
from ckptlab.deepspeed.tensors import tensor_of
from ckptlab.errors import CheckpointError
from ckptlab.formats import read
from ckptlab.formats.deepspeed.write import NativeWriter
from ckptlab.formats.torch import torchfile
from ckptlab.layout import Layout
from ckptlab.mesh import Mesh
from ckptlab.sharding.strategies import Strategy, replicated, resolve

if TYPE_CHECKING:
    import torch


class ReshapedCheckpoint(ABC):
    """A step folder and the degrees that it is wanted at. The folder is opened when what is asked for needs it."""

    dir: str
    strategy: Strategy | Mapping[str, str | Layout] | str | None = None

    @abstractmethod
    def target_degrees(self) -> model_3d_desc:
        """The degrees that the checkpoint is wanted at."""

    @cached_property
    def catalog(self) -> Catalog:
        """All that ckptlab knows of the folder. Errors are those of `ckptlab.open`."""
        return read(self.dir, resolve(self.strategy or self._by_names()))

    def _by_names(self) -> str | None:
        """DeepSpeed goes by Megatron's names where a checkpoint does not say how tensors are cut: so do we, aloud."""
        first = torchfile.read(get_model_files(get_files(self.dir))[0])
        dimensions = first.get("checkpoint_parallel_dimensions") or {}
        if dimensions.get("tp_degree", 2) == 1 or first.get(UNIVERSAL_CHECKPOINT_INFO) is not None:
            return None
        warnings.warn(
            f"{self.dir}: no {UNIVERSAL_CHECKPOINT_INFO} says how tensors are cut; taken to be cut as Megatron's names "
            "tell (without SwiGLU). Say strategy= if they are not",
            stacklevel=4,
        )
        return "megatron"

    @property
    def target_mesh(self) -> Mesh:
        """The mesh of the target's degrees."""
        wanted = self.target_degrees()
        return Mesh(pp=wanted.pp_degree, tp=wanted.tp_degree, dp=wanted.dp_degree)

    def reshaped(self, **options: Any) -> Reshape:
        """The checkpoint on the target's mesh (`ckptlab.Checkpoint.reshape`). ReshapeError if it cannot be."""
        return Reshape.of(self.catalog, self.target_mesh, **options)

    @cached_property
    def writer(self) -> NativeWriter:
        """Makes the contents of the target's files."""
        target = self.reshaped()
        return NativeWriter(target.source, target.target, None)

    def save(
        self,
        destination: str,
        format: str = "deepspeed",
        *,
        on: int | None = None,
        progress: bool = False,
        **options: Any,
    ) -> Report:
        """Write the checkpoint at the target's degrees; `destination` is the step folder to make.

        format, on, progress: as `ckptlab.Reshape.save`. options: as `ckptlab.Checkpoint.reshape` (zero_stage,
        dtype, padded_vocab, …). Vocabulary padding follows the new tp degree unless `padded_vocab` says otherwise.
        """
        return self.reshaped(**options).save(destination, format, on=on, progress=progress)

    def load(self, module: torch.nn.Module, strict: bool = True, state: str | None = None) -> Any:
        """Load whole tensors into a module whose parameters have the checkpoint's names.

        state: "master", "param", "exp_avg", …; None takes the master weight, and `param` where there is none
        (frozen tensors, buffers). Elements are rounded to the module's dtypes. A padded vocabulary has as many rows
        as the module. Returns (missing_keys, unexpected_keys) as `load_state_dict` does, whose RuntimeError lists
        them where strict.
        """
        wanted = {name: tuple(value.shape) for name, value in module.state_dict().items()}
        found = {
            name: tensor_of(_whole(self.catalog, tensor, held, wanted.get(name)))
            for tensor in self.catalog.tensors.values()
            if (held := _state_of(self.catalog, tensor, state)) is not None
            for name in (tensor.name, *tensor.aliases)
        }
        return module.load_state_dict(found, strict=strict)


def _state_of(catalog: Catalog, tensor: Tensor, state: str | None) -> str | None:
    """The state of the tensor to load; None if it has no such one. CheckpointError if no tensor has it."""
    if state is not None and state not in catalog.states:
        raise CheckpointError(f"{catalog.path}: no state {state!r}: there are {', '.join(catalog.states)}")
    choices = (MASTER, PARAM) if state is None else (state,)
    return next((s for s in choices if s in tensor.states), None)


def _whole(catalog: Catalog, tensor: Tensor, state: str, wanted: tuple[int, ...] | None) -> Any:
    """The whole of a tensor, with the padding rows that the module wants of a vocabulary."""
    rows = wanted[0] if wanted and tensor.layout.padded else tensor.shape[0] if tensor.shape else 0
    padded = {0: rows} if tensor.shape and rows > tensor.shape[0] else {}
    cut = replicated(len(tensor.shape), padded=padded).resolve(tensor.shape, Mesh())
    return reader(catalog, tensor.name, state).shard(cut, ())
