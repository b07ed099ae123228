"""What a person asks of a checkpoint's numbers: what they are like, whether it is healthy, what changed.

`check` and `diff` need numpy alone. What needs xarray (`stats`, `updates`, `open_run`) or draws (`plots`) is loaded
when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ckptlab.analysis.checkup import Checked, Health, check
from ckptlab.analysis.compare import diff
from ckptlab.analysis.found import Compared, Diff, Difference, OnlyIn, Setting
from ckptlab.analysis.measure import Measure, Summary
from ckptlab.analysis.renames import Renamed

if TYPE_CHECKING:
    from ckptlab.analysis import plots
    from ckptlab.analysis.adam import updates
    from ckptlab.analysis.run import Run, Skipped, open_run
    from ckptlab.analysis.statistics import stats

__all__ = [
    "Checked",
    "Compared",
    "Diff",
    "Difference",
    "Health",
    "Measure",
    "OnlyIn",
    "Renamed",
    "Run",
    "Setting",
    "Skipped",
    "Summary",
    "check",
    "diff",
    "open_run",
    "plots",
    "stats",
    "updates",
]

_HOME_OF = {"Run": "run", "Skipped": "run", "updates": "adam", "open_run": "run", "stats": "statistics"}


def __getattr__(name: str) -> Any:
    """Load what is heavy when it is first asked for (PEP 562)."""
    if name == "plots":
        return import_module("ckptlab.analysis.plots")
    if name not in _HOME_OF:
        raise AttributeError(f"module 'ckptlab.analysis' has no attribute {name!r}")
    value = getattr(import_module(f"ckptlab.analysis.{_HOME_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
