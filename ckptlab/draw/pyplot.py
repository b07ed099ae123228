"""matplotlib, which is an extra: loaded when a plot is asked for."""

from __future__ import annotations

from typing import Any


def pyplot() -> Any:
    """matplotlib's pyplot. ImportError, with what to install, where there is none."""
    try:
        from matplotlib import pyplot as found
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install matplotlib") from error
    return found
