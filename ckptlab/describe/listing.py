"""The tensors of a checkpoint one a line, those whose names a pattern takes: what `ckptlab ls` prints."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ckptlab.describe.facts import summary
from ckptlab.describe.text import aligned
from ckptlab.errors import UnknownNameError
from ckptlab.words import shape_text

if TYPE_CHECKING:
    from ckptlab.checkpoint import Checkpoint


def listed(ckpt: Checkpoint, pattern: str | None = None, regex: bool = False) -> list[dict[str, Any]]:
    """The facts of each tensor whose name, or one of whose aliases, the pattern takes (see `summary`), in their order.

    pattern: of a glob (`*`, `?`, `[…]`) the whole name, any other text somewhere in it; with `regex` a regular
    expression that is found in it. UnknownNameError where it takes none, or is no regular expression.
    """
    tensors: list[dict[str, Any]] = summary(ckpt.catalog)["tensors"]
    if pattern is None:
        return tensors
    glob = pattern if re.search(r"[*?[]", pattern) else f"*{pattern}*"
    try:
        takes = re.compile(pattern if regex else fnmatch.translate(glob))
    except re.error as e:
        raise UnknownNameError(f"{pattern!r} is no regular expression: {e}") from None
    search = takes.search if regex else takes.match
    found = [t for t in tensors if any(search(name) for name in (t["name"], *t["aliases"]))]
    if not found:
        raise UnknownNameError(f"{ckpt.path}: none of {len(tensors):,} tensors is called like {pattern!r}")
    return found


def listing(tensors: Sequence[Mapping[str, Any]]) -> str:
    """A line for each: name, shape, layout, states by dtype."""
    rows = [[t["name"], shape_text(t["shape"]), _layout(t["layout"]), _states(t["states"])] for t in tensors]
    return "\n".join(aligned(rows, "llll"))


def _layout(text: str | None) -> str:
    return "?" if text is None else f'"{text}"'


def _states(states: Mapping[str, str]) -> str:
    """`fp32 exp_avg exp_avg_sq: float32, module: bfloat16`."""
    by_dtype: dict[str, list[str]] = {}
    for state, dtype in states.items():
        by_dtype.setdefault(dtype, []).append(state)
    return ", ".join(f"{' '.join(names)}: {dtype}" for dtype, names in by_dtype.items())
