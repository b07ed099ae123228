"""What a person asks of a checkpoint's numbers: what they are like, whether it is healthy, what changed.

Each is loaded when it is first used: `check` and `diff` need numpy alone, `stats`, `updates` and `open_run` xarray,
`plots` matplotlib.

A new statistic of elements is added up by partial.py and accumulate.py, and gets its name in statistics.py; a new test
of health goes to checkup.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ckptlab.analysis import plots
    from ckptlab.analysis.adam import updates
    from ckptlab.analysis.checkup import Checked, Health, check
    from ckptlab.analysis.compare import diff
    from ckptlab.analysis.found import Compared, Diff, Difference, OnlyIn, Setting
    from ckptlab.analysis.measure import Measure, Summary
    from ckptlab.analysis.renames import Renamed
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

_HOME_OF = {
    **dict.fromkeys(("Checked", "Health", "check"), "checkup"),
    **dict.fromkeys(("Compared", "Diff", "Difference", "OnlyIn", "Setting"), "found"),
    **dict.fromkeys(("Measure", "Summary"), "measure"),
    **dict.fromkeys(("Run", "Skipped", "open_run"), "run"),
    "Renamed": "renames",
    "diff": "compare",
    "stats": "statistics",
    "updates": "adam",
}


def __getattr__(name: str) -> Any:
    """Load a part when it is first asked for (PEP 562)."""
    if name == "plots":
        return import_module("ckptlab.analysis.plots")
    if name not in _HOME_OF:
        raise AttributeError(f"module 'ckptlab.analysis' has no attribute {name!r}")
    value = getattr(import_module(f"ckptlab.analysis.{_HOME_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
