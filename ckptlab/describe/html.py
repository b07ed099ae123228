"""A checkpoint or a plan as HTML for a notebook: self-contained, no script, colours that follow the page's own."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from ckptlab import viz
from ckptlab.catalog import Catalog
from ckptlab.describe import facts, phrases
from ckptlab.describe.fold import Line, fold
from ckptlab.describe.page import folded, page, scrolled, table_html, terms
from ckptlab.draw import Drawing
from ckptlab.reshaping import Reshape
from ckptlab.words import more

ROWS = 200  # lines of tensors in a summary
PICTURED = 2000  # tensors whose way over the stages is drawn: naming the layers of more takes too long
RECEIVERS = 16  # target ranks that a large plan lists


def summary_html(catalog: Catalog) -> str:
    """The summary, its table of tensors folded away if it is long."""
    about = facts.overview(catalog)
    about_it = [
        ("path", escape(about["path"])),
        ("training", escape(phrases.training(about))),
        ("size", escape(phrases.extent(about))),
        ("states", table_html([], phrases.states(about), "lllr")),
        ("groups", _groups(about)),
        ("tied", "<br>".join(map(escape, phrases.ties(about)))),
        ("client", escape(phrases.client(about))),
    ]
    lines, mesh = fold(catalog.tensors.values()), catalog.mesh
    few = len(catalog.tensors) <= PICTURED
    pictures = _pictures(viz.mesh(mesh), viz.stages(catalog) if mesh.pp > 1 and few else None, viz.memory(catalog))
    shown = pictures if mesh.size > 1 else ""
    return page(phrases.title(about), [terms(about_it), _notes(about), shown, _tensors(lines, len(catalog.tensors))])


def _groups(about: Mapping[str, Any]) -> str:
    """Parameter groups; what else their optimizer was told unfolds."""
    rows = table_html([], phrases.groups(about), "lllrr")
    told = (
        f"<div>{escape(group['name'] or f'group {i}')}: "
        f"{escape(', '.join(f'{k}={v}' for k, v in group['options'].items()))}</div>"
        for i, group in enumerate(about["groups"])
    )
    return rows + folded("hyperparameters", "".join(told), shown=False)


def _tensors(lines: Sequence[Line], tensors: int) -> str:
    columns = phrases.columns(lines)
    header = [title for title, *_ in columns]
    rows = []
    meshes = {line.tensor.cut.mesh for line in lines[:ROWS]}
    names = {name for mesh in meshes for axis in mesh for name in (axis, *mesh.leaves(axis))}
    axes = re.compile(rf"\b({'|'.join(names)})\b")
    for line in lines[:ROWS]:
        cells = [escape(cell(line)) for *_, cell in columns]
        rows.append([axes.sub(r"<b>\1</b>", c) if t == "layout" else c for t, c in zip(header, cells, strict=True)])
    table = table_html(header, rows, "".join(side for _, side, _ in columns), escaped=True)
    left = more(sum(line.count for line in lines[ROWS:]), " tensors")
    said = "<br>".join([*left, *map(escape, phrases.legend(columns, lines))])
    return folded(f"{tensors:,} tensors", scrolled(table) + said, shown=len(lines) <= 30)


def plan_html(reshape: Reshape) -> str:
    """The plan."""
    about = facts.plan(reshape)
    changes = phrases.changes(about)
    about_it = [
        ("source", escape(f"{about['source']['path']} ({about['source']['format']})")),
        ("target", escape(phrases.target(about))),
        ("changes", table_html([], changes, "ll") if changes else "none: the same mesh, stage and dtype"),
        ("cost", table_html([], phrases.costs(about), "lrl")),
    ]
    memory = _pictures(viz.mesh(reshape.source.mesh), viz.mesh(reshape.mesh), viz.memory(reshape.target))
    return page(phrases.plan_title(about), [terms(about_it), _notes(about), _moves(about, reshape), memory])


def _moves(about: Mapping[str, Any], reshape: Reshape) -> str:
    moves = viz.plan(reshape.plan, reshape.source.mesh, reshape.target.mesh)
    picture = folded("moves", moves._repr_html_())
    if about["moves"]["matrix"] is not None:
        return picture
    header = ["rank", "", "from other ranks", "own", "sources"]
    table = table_html(header, phrases.receivers(about, RECEIVERS), "rlrrr")
    return picture + folded("ranks that receive most", scrolled(table), shown=False)


def _pictures(*drawings: Drawing | None) -> str:
    """Drawings beside one another."""
    shown = "".join(d._repr_html_() for d in drawings if d is not None)
    return folded("pictures", shown and f"<div class=pictures>{shown}</div>")


def _notes(about: Mapping[str, Any]) -> str:
    return "".join(f"<div class=note>{escape(n['text'])}</div>" for n in about["findings"])
