"""The tensors of a checkpoint and the parameter groups of its optimizer, as headers tell of them."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ckptlab.arguments import explained
from ckptlab.errors import CheckpointError
from ckptlab.layout import Cut, Layout

MASTER = "master"  # the state that holds the weight that the optimizer steps
PARAM = "param"  # the state that holds the weight as the model computes with it (16-bit, as a rule)


@explained
@dataclass(frozen=True)
class Tensor:
    """One logical tensor.

    `shape` is the true whole (vocabulary padding cut off); `kind` is "parameter", "frozen" or "buffer"; `group` indexes
    the run's parameter groups (None where the optimizer does not know it); `stages` are the pp stages that hold it, the
    first being canonical; `aliases` are further names of the same tensor in the model; `states` maps each state to its
    dtype; `layout_known` is False where a checkpoint of tp 1 does not tell how the tensor would be cut.
    """

    name: str
    shape: tuple[int, ...]
    layout: Layout
    cut: Cut
    kind: str
    states: Mapping[str, np.dtype]
    group: int | None = None
    stages: tuple[int, ...] = (0,)
    aliases: tuple[str, ...] = ()
    layout_known: bool = True

    @property
    def numel(self) -> int:
        """Elements of the whole."""
        return math.prod(self.shape)

    @property
    def weight(self) -> str:
        """The state that is its weight: the master where it has one."""
        return MASTER if MASTER in self.states else PARAM

    @property
    def dims(self) -> tuple[str, ...]:
        """Names of the whole's dims."""
        return self.layout.names


def drawn_from(source: Tensor, target: Tensor, state: str) -> str:
    """The state that one of a target is drawn from: the same; its param from the stored one if the dtype stays, else
    from the master, rounded."""
    if state != PARAM:
        return state
    keeps = source.states.get(PARAM) == target.states[PARAM]
    return PARAM if keeps or MASTER not in source.states else MASTER


def asked(states: str | Sequence[str] | None, known: Collection[str], where: str = "") -> tuple[str, ...] | None:
    """The states that somebody names (None: nobody did). CheckpointError, with `where` before it, for one that is not
    known."""
    if states is None:
        return None
    wanted = (states,) if isinstance(states, str) else tuple(states)
    if unknown := [state for state in wanted if state not in known]:
        raise CheckpointError(f"{where}no state {unknown[0]!r}: there are {', '.join(known)}")
    return wanted


@dataclass(frozen=True)
class ParameterGroup:
    """An optimizer's parameter group: its hyperparameters and its tensors, both in the order of the user's program;
    `scalars` is what the optimizer keeps once for all of them (`step`), `apart` those of tensors that have others: that
    were not trained in every step."""

    options: Mapping[str, Any]
    tensors: tuple[str, ...]
    scalars: Mapping[str, Any] = field(default_factory=dict)
    apart: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def scalars_of(self, tensor: str) -> Mapping[str, Any]:
        """What the optimizer keeps once for a tensor of the group."""
        return self.apart.get(tensor, self.scalars)

    @property
    def name(self) -> str | None:
        said = self.options.get("name")
        return said if isinstance(said, str) else None
