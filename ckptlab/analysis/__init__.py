"""What a person asks of a checkpoint's numbers: how two of them differ."""

from ckptlab.analysis.compare import Compared, Diff, Difference, OnlyIn, Setting, diff

__all__ = ["Compared", "Diff", "Difference", "OnlyIn", "Setting", "diff"]
