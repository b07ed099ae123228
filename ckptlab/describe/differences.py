"""What `diff` found, as plain data and as text."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from ckptlab.describe.facts import plain
from ckptlab.describe.text import aligned, blocks
from ckptlab.draw.words import number_of, some

if TYPE_CHECKING:
    from ckptlab.analysis import Diff, Difference, OnlyIn

ROWS = 20  # differences that are listed


def to_dict(diff: Diff) -> dict[str, Any]:
    """Plain values, as `ckptlab diff --json` prints them; what is infinite or NaN is text.

    Keys: equal, a, b (paths), tensors (compared), compared [{state, tensors, elements, differ}], differences [{name,
    state, dtypes, elements, count, max_abs, max_rel, at, a, b, reason}], only_a, only_b (names), shapes [{name, a, b}],
    states_only_a, states_only_b [{state, tensors, everywhere}], settings [{where, key, a, b}].
    """
    return {
        "equal": diff.equal,
        "a": diff.a,
        "b": diff.b,
        "tensors": diff.tensors,
        "compared": [vars(c) for c in diff.compared],
        "differences": [plain({**vars(d), "reason": _reason(d)}) for d in diff.differences],
        "only_a": list(diff.only_a),
        "only_b": list(diff.only_b),
        "shapes": [{"name": n, "a": list(a), "b": list(b)} for n, a, b in diff.shapes],
        "states_only_a": [plain(vars(s)) for s in diff.states_only_a],
        "states_only_b": [plain(vars(s)) for s in diff.states_only_b],
        "settings": [plain(vars(s)) for s in diff.settings],
    }


def _reason(difference: Difference) -> str:
    if difference.dtypes[0] == difference.dtypes[1]:
        return "values"
    return "values and dtype" if difference.count else "dtype"


def diff_text(diff: Diff) -> str:
    """The verdict, what was compared, and the largest differences."""
    found = [
        ("", [_verdict(diff)]),
        ("A", [diff.a]),
        ("B", [diff.b]),
        ("states", aligned(_states(diff), "lrrl")),
        ("tensors", [*_only("A", diff.only_a), *_only("B", diff.only_b), *_shapes(diff)]),
        ("settings", aligned([[s.where, s.key, f"{s.a} → {s.b}"] for s in diff.settings], "lll")),
    ]
    return "\n".join([*blocks(found), *_listed(diff)])


def _verdict(diff: Diff) -> str:
    if diff.equal:
        states = ", ".join(c.state for c in diff.compared)
        return f"equal: {number_of(diff.tensors, 'tensor')}, bit for bit, in every state that both have ({states})"
    names = len(dict.fromkeys(d.name for d in diff.differences))
    said = [f"{number_of(names, 'tensor')} with other values"] if names else []
    missing = len(diff.only_a) + len(diff.only_b)
    said += [f"{number_of(missing, 'tensor')} on one side only"] if missing else []
    said += [f"{number_of(len(diff.shapes), 'tensor')} of another shape"] if diff.shapes else []
    said += [f"{number_of(len(diff.settings), 'setting')} with another value"] if diff.settings else []
    return f"different: {', '.join(said)}"


def _states(diff: Diff) -> list[list[str]]:
    rows = [
        [
            c.state,
            number_of(c.tensors, "tensor"),
            number_of(c.elements, "element"),
            f"{c.differ:,} differ" if c.differ > 1 else "1 differs" if c.differ else "equal",
        ]
        for c in diff.compared
    ]
    for side, missing in (("A", diff.states_only_a), ("B", diff.states_only_b)):
        rows += [[m.state, number_of(len(m.tensors), "tensor"), "", f"only in {side}{_which(m)}"] for m in missing]
    return rows


def _which(missing: OnlyIn) -> str:
    return "" if missing.everywhere else f": {some(missing.tensors, 3)}"


def _only(side: str, names: tuple[str, ...]) -> list[str]:
    return [f"only in {side}: {some(names, 6)}"] if names else []


def _shapes(diff: Diff) -> list[str]:
    rows = [[name, f"{_shape(a)} in A", f"{_shape(b)} in B"] for name, a, b in diff.shapes[:ROWS]]
    left = len(diff.shapes) - ROWS
    return [*aligned(rows, "lll"), *([f"… and {left:,} more"] if left > 0 else [])]


def _shape(shape: tuple[int, ...]) -> str:
    return " × ".join(map(str, shape)) or "scalar"


def _listed(diff: Diff) -> list[str]:
    if not diff.differences:
        return []
    most = sorted(diff.differences, key=lambda d: -d.max_abs)
    rows = [["tensor", "state", "differing", "max |a−b|", "relative", "at", "a → b"], *map(_row, most[:ROWS])]
    left = len(most) - ROWS
    return ["", *aligned(rows, "llrrrll"), *([f"… and {left:,} more, smaller ones"] if left > 0 else [])]


def _row(d: Difference) -> list[str]:
    if not d.count:
        return [d.name, d.state, "0", "", "", "", f"same values, {d.dtypes[0]} → {d.dtypes[1]}"]
    dtypes = f" ({d.dtypes[0]} → {d.dtypes[1]})" if d.dtypes[0] != d.dtypes[1] else ""
    at = f"[{', '.join(map(str, d.at))}]"
    figures = [f"{d.count:,} of {d.elements:,}", _number(d.max_abs), _number(d.max_rel)]
    return [d.name, d.state, *figures, at, f"{_number(d.a, 7)} → {_number(d.b, 7)}{dtypes}"]


def _number(value: float, digits: int = 3) -> str:
    return f"{value:.{digits}g}" if math.isfinite(value) else str(value)
