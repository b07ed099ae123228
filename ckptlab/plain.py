"""Facts as plain values, as JSON holds them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ckptlab.stored import Stored


def plain(value: Any) -> Any:
    """A value as JSON can hold it; what it cannot hold becomes text (a number that was not read, a placeholder)."""
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, Stored):
        return f"tensor {value.shape} {value.dtype}, not read"
    return repr(value)
