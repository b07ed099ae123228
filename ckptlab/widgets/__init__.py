"""Interaction: `explore` a checkpoint, `playground` for a model on paper. Needs the extra `widgets`.

From the ground up: subject.py (what is explored and chosen), held.py, steps.py, page.py (pictures, tables and texts),
parts.py (which of them a state of the page is made of), presets.py; explorer.py (the widget, whose page is
static/explorer.js), export.py (the same without a kernel).
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from ckptlab.arguments import check_fields, explained
from ckptlab.checkpoint import Checkpoint, Source, opened
from ckptlab.errors import UnsupportedError
from ckptlab.mesh import Mesh
from ckptlab.reshaping import Reshape

if TYPE_CHECKING:
    from ckptlab.widgets.explorer import Explorer, Playground

NEEDED = ("anywidget",)


@explained
def explore(ckpt: Source | Reshape) -> Explorer:
    """Look into a checkpoint and its reshapes in a notebook: tensors, ranks, files; target meshes, memory, cost.

    Shows itself as the last line of a cell, in Jupyter and in marimo. ckpt: what `ckptlab.open` or
    `ckptlab.paper_model` gave, or a path; a reshape, to begin with its mesh as the target's. Headers only: no data is
    read. What is chosen is in traits, `.tensor`, `.rank`, `.mesh`, …, to read, set and observe; `.to_html(path)` writes
    a page that answers without a kernel. UnsupportedError where anywidget is not installed.
    """
    _require()
    from ckptlab.widgets.explorer import Explorer
    from ckptlab.widgets.subject import Subject

    if not isinstance(ckpt, Reshape):
        return Explorer(Subject.of_checkpoint(opened(ckpt)))
    if ckpt.strategy is not None:
        raise UnsupportedError(
            f"{ckpt.source.path}: a target with layouts of your own is no state of this page: explore the checkpoint, "
            "and draw the target with ckptlab.viz"
        )
    found = Explorer(Subject.of_checkpoint(Checkpoint(ckpt.source)))
    found.choose(tab="Reshape", mesh=ckpt.mesh, zero_stage=ckpt.zero_stage or 0)
    return found


@explained
def playground(mesh: Mesh | None = None, zero_stage: int = 1, **numbers: Any) -> Playground:
    """What `explore` shows, with no checkpoint at all: a model described by a few numbers that can be changed.

    Arguments as for `ckptlab.paper_model`; without any, a small model on tp 2 · pp 2 · dp 2. UnsupportedError where
    anywidget is not installed.
    """
    _require()
    from ckptlab.sharding.transformer import PaperModel
    from ckptlab.widgets.explorer import Playground

    check_fields("playground", PaperModel, numbers)
    return Playground(PaperModel(**numbers), mesh or Mesh(tp=2, pp=2, dp=2), zero_stage)


def _require() -> None:
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        raise UnsupportedError(
            f"{' and '.join(missing)} not found: the widgets need it: pip install anywidget, "
            "then restart the notebook's kernel"
        )
