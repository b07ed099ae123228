"""What a person asks of a checkpoint's numbers: how two of them differ, and whether one is healthy."""

from ckptlab.analysis.checkup import Checked, Finding, Health, Where, health
from ckptlab.analysis.compare import diff
from ckptlab.analysis.found import Compared, Diff, Difference, OnlyIn, Setting
from ckptlab.analysis.measure import Measure, Summary
from ckptlab.analysis.renames import Renamed

__all__ = [
    "Checked",
    "Compared",
    "Diff",
    "Difference",
    "Finding",
    "Health",
    "Measure",
    "OnlyIn",
    "Renamed",
    "Setting",
    "Summary",
    "Where",
    "diff",
    "health",
]
