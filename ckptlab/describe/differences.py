"""What `diff` found, as text and as HTML."""

from __future__ import annotations

import math
from html import escape
from typing import Any

from ckptlab.analysis.found import Diff, Difference, OnlyIn, Setting
from ckptlab.analysis.measure import Summary
from ckptlab.describe.page import folded, page, scrolled, table_html, terms
from ckptlab.describe.text import aligned, blocks
from ckptlab.shown import shows
from ckptlab.viz.depth import plot_depth
from ckptlab.words import more, number_of, shape_text, some

ROWS = 20  # differences that are listed


def diff_text(diff: Diff) -> str:
    """The verdict, what was compared, and the largest differences."""
    found = [
        ("", [diff.verdict]),
        ("A", [diff.a]),
        ("B", [diff.b]),
        ("states", aligned(_states(diff), "lrrl")),
        ("same", _unchanged(diff)),
        ("tensors", [*_only("A", diff.only_a), *_only("B", diff.only_b), *_renamed(diff), *_shapes(diff)]),
        ("settings", aligned([[s.where, s.key, _values(s)] for s in diff.settings], "lll")),
    ]
    return "\n".join([*blocks(found), *_listed(diff), *_summaries(diff)])


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


def _unchanged(diff: Diff) -> list[str]:
    """The tensors of which nothing differs, where others do."""
    return [some(diff.unchanged, 4)] if diff.differences and diff.unchanged else []


def _values(setting: Setting) -> str:
    """Both values; a step that one optimizer keeps as 3.0 and another as 3 looks alike."""
    a, b = (int(v) if isinstance(v, float) and v.is_integer() else v for v in (setting.a, setting.b))
    return f"{setting.a} → {setting.b}" if a == b else f"{a} → {b}"


def _only(side: str, names: tuple[str, ...]) -> list[str]:
    return [f"only in {side}: {some(names, 6)}"] if names else []


def _renamed(diff: Diff) -> list[str]:
    rows = [[r.a, "→", r.b, "same sample" if r.same else f"{r.distance:.1%} apart"] for r in diff.renamed[:ROWS]]
    return [*aligned(rows, "llll"), *more(len(diff.renamed) - ROWS, " under another name")]


def _shapes(diff: Diff) -> list[str]:
    rows = [[name, f"{shape_text(a)} in A", f"{shape_text(b)} in B"] for name, a, b in diff.shapes[:ROWS]]
    return [*aligned(rows, "lll"), *more(len(diff.shapes) - ROWS)]


def _listed(diff: Diff) -> list[str]:
    if not diff.differences:
        return []
    most = sorted(diff.differences, key=lambda d: -d.max_abs)
    rows = [_HEADER, *map(_row, most[:ROWS])]
    return ["", *aligned(rows, _SIDES), *more(len(most) - ROWS, ", smaller ones")]


_HEADER = ["tensor", "state", "differing", "max |a−b|", "|a−b|/|a|", "cosine", "at", "a → b"]
_SIDES = "llrrrrll"
_SUMMARY = ["tensors", "differ", "max |a−b|", "|a−b|/|a|", "cosine"]


def _summaries(diff: Diff) -> list[str]:
    """The first state in which something differs, by kind of tensor and by layer."""
    lines: list[str] = []
    for title, found in _tables(diff):
        shown = found if len(found) <= 2 * ROWS else [*found[:ROWS], ["…"] + [""] * len(_SUMMARY), *found[-ROWS:]]
        lines += ["", *aligned([[title, *_SUMMARY], *shown], "lrrrrr")]
    return lines


def _tables(diff: Diff) -> list[tuple[str, list[list[str]]]]:
    """(title, rows) by kind and by layer; nothing where one tensor alone was compared."""
    states = diff.differing
    if not states or diff.tensors < 2:
        return []
    kinds = sorted(diff.by_kind(states[0]), key=lambda s: -s.relative)
    layers = diff.by_layer(states[0])
    found = [(f"kind ({states[0]})", kinds), (f"layer ({states[0]})", layers if len(layers) > 1 else ())]
    return [(title, [_summary(s) for s in of]) for title, of in found if of]


def _summary(s: Summary) -> list[str]:
    return [s.label, f"{s.tensors:,}", f"{s.differ:,}", _number(s.max_abs), _number(s.relative), _cosine(s.cosine)]


def diff_html(diff: Diff) -> str:
    """The same for a notebook; the summaries and the list unfold."""
    facts = [
        ("A", diff.a),
        ("B", diff.b),
        *[("same", text) for text in _unchanged(diff)],
        *[("tensors", text) for text in (*_only("A", diff.only_a), *_only("B", diff.only_b))],
        *[("renamed", f"{r.a} → {r.b}") for r in diff.renamed[:ROWS]],
        *[("shape", f"{name}: {shape_text(a)} in A, {shape_text(b)} in B") for name, a, b in diff.shapes[:ROWS]],
        *[("setting", f"{s.where}: {s.key} {_values(s)}") for s in diff.settings],
    ]
    states = ("states", table_html([], _states(diff), "lrrl"))
    most = sorted(diff.differences, key=lambda d: -d.max_abs)
    parts = [terms([*((key, escape(str(text))) for key, text in facts), states])]
    parts += [_folded(title, [title, *_SUMMARY], rows, "lrrrrr") for title, rows in _tables(diff)]
    if most:
        title = f"largest of {number_of(len(most), 'difference')}"
        parts.append(_folded(title, _HEADER, [_row(d) for d in most[: 5 * ROWS]], _SIDES))
    return page(diff.verdict, parts)


def _folded(title: str, header: list[str], rows: list[list[str]], sides: str) -> str:
    return folded(title, scrolled(table_html(header, rows, sides)), shown=len(rows) <= ROWS)


def _row(d: Difference) -> list[str]:
    if not d.count:
        return [d.name, d.state, "0", "", "", "", "", f"same values, {d.dtypes[0]} → {d.dtypes[1]}"]
    dtypes = f" ({d.dtypes[0]} → {d.dtypes[1]})" if d.dtypes[0] != d.dtypes[1] else ""
    at = f"[{', '.join(map(str, d.at))}]"
    figures = [f"{d.count:,} of {d.elements:,}", _number(d.max_abs), _number(d.relative), _cosine(d.cosine)]
    values = f"{_number(d.a, 7)} → {_number(d.b, 7)}{dtypes}"
    return [d.name, d.state, *figures, at, f"{values}, the same in another order" if d.permuted else values]


def _cosine(value: float) -> str:
    """Near 1 what is missing to it tells more: `1 − 2e-07`."""
    return f"1 − {1 - value:.1g}" if 0.9995 < value < 1 else f"{value:.4g}" if math.isfinite(value) else ""


def _number(value: float, digits: int = 3) -> str:
    return f"{value:.{digits}g}" if math.isfinite(value) else str(value)


def _plot(diff: Diff, state: str, ax: Any = None) -> Any:
    return plot_depth([m for m in diff.measures if m.state == state], state, ax)


shows(Diff, text=diff_text, html=diff_html, plot=_plot)
