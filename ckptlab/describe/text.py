"""A checkpoint or a plan as text for a terminal, 80 to 100 columns wide."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ckptlab.catalog import Catalog
from ckptlab.describe import facts, phrases
from ckptlab.describe.fold import Line, fold, unfolded
from ckptlab.reshaping import Reshape
from ckptlab.words import figure, more, shorten, unit_of

WIDTH = 100
ROWS = 40  # lines of tensors in a summary
NAMES = 44  # characters that a tensor's name gets, however wide the other columns are
RECEIVERS = 8  # target ranks that a large plan lists
_KEY = 10  # the column of keys on the left


def summary_text(catalog: Catalog, *, findings: bool = True, everything: bool = False) -> str:
    """The summary. findings: what the user must hear, at the end. everything: a line for every tensor, no name cut."""
    about = facts.overview(catalog)
    found = [
        ("", [phrases.title(about)]),
        ("path", [about["path"]]),
        ("training", [phrases.training(about)]),
        ("size", _wrapped(phrases.extent(about))),
        ("states", aligned(phrases.states(about), "lllr")),
        ("groups", aligned(phrases.groups(about), "lllrr")),
        ("tied", _wrapped("; ".join(phrases.ties(about)))),
        ("client", _wrapped(phrases.client(about))),
        ("notes", _listed(about["findings"] if findings else ())),
    ]
    lines = (unfolded if everything else fold)(catalog.tensors.values())
    table = _tensors(lines, None if everything else ROWS)
    return "\n".join([*blocks(found[:-1]), "", *table, *_spaced(blocks(found[-1:]))])


def _tensors(lines: Sequence[Line], limit: int | None) -> list[str]:
    columns = phrases.columns(lines)
    shown = lines[:limit]
    rows = [[title for title, *_ in columns], *([cell(line) for *_, cell in columns] for line in shown)]
    if limit is not None:
        others = sum(max(map(len, column)) + 2 for column in list(zip(*rows, strict=True))[1:])
        rows = [[shorten(name, max(NAMES, WIDTH - others)), *rest] for name, *rest in rows]
    table = aligned(rows, "".join(side for _, side, _ in columns))
    left = sum(line.count for line in lines[len(shown) :])
    return [*table, *more(left, " tensors"), *phrases.legend(columns, lines)]


def plan_text(reshape: Reshape, *, findings: bool = True) -> str:
    """The plan. findings: what the user must hear, at the end."""
    about = facts.plan(reshape)
    found = [
        ("", [phrases.plan_title(about)]),
        ("source", [f"{about['source']['path']} ({about['source']['format']})"]),
        ("target", [phrases.target(about)]),
        ("changes", aligned(phrases.changes(about), "ll") or ["none: the same mesh, stage and dtype"]),
        ("cost", aligned(phrases.costs(about), "lrl")),
        ("moves", list(_moves(about))),
        ("notes", _listed(about["findings"] if findings else ())),
    ]
    return "\n".join(blocks(found))


def _moves(about: Mapping[str, Any]) -> Iterator[str]:
    matrix = about["moves"]["matrix"]
    if matrix is not None:
        unit, name = unit_of(max((n for row in matrix for n in row), default=0))
        yield f"{name} from source rank (down) to target rank (across); [ ] stay where they are"
        rows = [["", *map(str, range(len(matrix[0])))]]
        rows += [[str(i), *(_cell(n, unit, i == j) for j, n in enumerate(row))] for i, row in enumerate(matrix)]
        yield from aligned(rows, "r" * len(rows[0]))
        return
    yield f"the target ranks that receive most (of {about['target']['ranks']:,})"
    rows = [["rank", "", "from other ranks", "own", "sources"], *phrases.receivers(about, RECEIVERS)]
    yield from aligned(rows, "rlrrr")


def _cell(nbytes: int, unit: int, own: bool) -> str:
    if not nbytes:
        return "·" if not own else "· "
    text = figure(nbytes / unit)
    return f"[{text}]" if own else f"{text} "


def blocks(found: Sequence[tuple[str, Sequence[str]]]) -> list[str]:
    """Blocks of lines, each with its key on the left of the first; empty ones are left out."""
    return [
        f"{key if i == 0 else '':<{_KEY}}{line}".rstrip() if key else line
        for key, lines in found
        for i, line in enumerate(lines)
        if line or i
    ]


def _spaced(lines: list[str]) -> list[str]:
    return ["", *lines] if lines else []


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH - _KEY, break_long_words=False, break_on_hyphens=False)


def _listed(findings: Sequence[Mapping[str, str]]) -> list[str]:
    wrapper = textwrap.TextWrapper(WIDTH - _KEY, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)
    return [line for f in findings for line in wrapper.wrap(f"- {f['text']}")]


def aligned(rows: Sequence[Sequence[str]], sides: str) -> list[str]:
    """Rows of cells as lines, two spaces between columns; `sides` has "l" or "r" for each column."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(c.rjust(w) if s == "r" else c.ljust(w) for c, w, s in zip(row, widths, sides, strict=True)).rstrip()
        for row in rows
    ]
