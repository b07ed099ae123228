"""Gradients of whoever trains on plain torch, clipped as the runs clip theirs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

CLIP = 1.0  # of the norm of all gradients together


def clipped(grads: Sequence[Tensor], most: float) -> None:
    """Scale gradients so that their norm together is at most that."""
    norm = torch.stack([whole(grad).norm() for grad in grads]).norm()
    for grad in grads:
        grad.mul_(min(1.0, most / (float(norm) + 1e-6)))


def whole(value: Any) -> Tensor:
    """What ranks hold together of a tensor."""
    return value.full_tensor() if hasattr(value, "full_tensor") else value
