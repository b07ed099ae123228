"""What a person asks of a checkpoint's numbers: what they are like, whether it is healthy, what changed.

Each is loaded when it is first used: `check` and `diff` need numpy alone, `stats`, `updates` and `open_run` xarray,
`plots` matplotlib.

A new statistic of elements is added up by partial.py and accumulate.py, and gets its name in statistics.py; a new test
of health goes to checkup.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ckptlab.lazily import loader

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

_HOMES = {
    "analysis.adam": "updates",
    "analysis.checkup": "Checked Health check",
    "analysis.compare": "diff",
    "analysis.found": "Compared Diff Difference OnlyIn Setting",
    "analysis.measure": "Measure Summary",
    "analysis.renames": "Renamed",
    "analysis.run": "Run Skipped open_run",
    "analysis.statistics": "stats",
}
__all__, __getattr__ = loader(__name__, _HOMES, ["plots"])


def __dir__() -> list[str]:
    return sorted(__all__)
