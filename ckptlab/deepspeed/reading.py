"""What DeepSpeed's two checkpoint classes have in common here: a catalog, a target, `save` and `load`."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

from ckptlab.catalog import Catalog
from ckptlab.checkpoint import Checkpoint
from ckptlab.convert import Report
from ckptlab.deepspeed.constants import UNIVERSAL_CHECKPOINT_INFO
from ckptlab.deepspeed.files import get_files, get_model_files
from ckptlab.deepspeed.reshape_3d import model_3d_desc
from ckptlab.errors import CheckpointError
from ckptlab.formats import read
from ckptlab.formats.deepspeed.write import NativeWriter
from ckptlab.formats.torch import torchfile
from ckptlab.layout import Layout
from ckptlab.mesh import Mesh
from ckptlab.reshaping import Reshape
from ckptlab.sharding.strategies import Strategy, resolve

if TYPE_CHECKING:
    import torch

    from ckptlab.state_dict import Loaded


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

    def load(self, module: torch.nn.Module, strict: bool = True, state: str | None = None) -> Loaded:
        """Load whole tensors into a module whose parameters have the checkpoint's names: see
        `ckptlab.Checkpoint.load_into`. CheckpointError for a state that no tensor has."""
        if state is not None and state not in self.catalog.states:
            states = ", ".join(self.catalog.states)
            raise CheckpointError(f"{self.catalog.path}: no state {state!r}: there are {states}")
        return Checkpoint(self.catalog).load_into(module, strict, state)
