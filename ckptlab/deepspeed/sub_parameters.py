"""Parameters that are several things in one: `deepspeed.checkpoint.SubparamShape`."""

from __future__ import annotations

from dataclasses import dataclass

from ckptlab.arguments import explained


@explained
@dataclass
class SubparamShape:
    """Parameters that hold several sub-parameters, each cut on its own.

    patterns: regular expressions of their names. shape: the whole's shape, with a tuple of the sub-parameters' sizes
    where they lie one after the other. partition_dim: the dim that tp cuts.
    """

    patterns: list[str]
    shape: tuple[tuple[int, ...] | int, ...]
    partition_dim: int
