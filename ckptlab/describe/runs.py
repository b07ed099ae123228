"""A training run as text and as HTML: its steps, what wrote them, and what was skipped."""

from __future__ import annotations

from html import escape

from ckptlab.analysis.run import Run
from ckptlab.describe.page import page, table_html
from ckptlab.shown import shows
from ckptlab.words import more

SKIPPED = 8  # folders that are listed


def run_text(run: Run) -> str:
    """`Run of 3 checkpoints: …`, a line for each format and mesh, a line for each folder that was skipped."""
    lines = [_title(run)]
    lines += [f"  steps {steps}: {form}, {mesh}" for steps, form, mesh in _rows(run)]
    return "\n".join([*lines, *(f"  {line}" for line in _skipped(run))])


def run_html(run: Run) -> str:
    """The same for a notebook."""
    table = table_html(["steps", "format", "mesh"], _rows(run), "lll")
    return page(_title(run), [table, *(f"<div class=note>{escape(line)}</div>" for line in _skipped(run))])


def _title(run: Run) -> str:
    return f"Run of {len(run.steps)} checkpoints: {run.path}"


def _rows(run: Run) -> list[list[str]]:
    """(steps, format, mesh) of the steps that were written alike."""
    alike: dict[tuple[str, str], list[int]] = {}
    for step, ckpt in run.checkpoints.items():
        alike.setdefault((ckpt.format, str(ckpt.mesh)), []).append(step)
    return [[", ".join(map(str, steps)), *written] for written, steps in alike.items()]


def _skipped(run: Run) -> list[str]:
    return [f"skipped {one}" for one in run.skipped[:SKIPPED]] + more(len(run.skipped) - SKIPPED, " skipped")


shows(Run, text=run_text, html=run_html)
