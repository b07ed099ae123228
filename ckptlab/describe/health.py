"""What `check` found, as plain data, as text and as HTML."""

from __future__ import annotations

import textwrap
from html import escape

from ckptlab.analysis.checkup.health import Health
from ckptlab.describe.page import page, terms
from ckptlab.describe.text import WIDTH, aligned
from ckptlab.findings import Finding, Where
from ckptlab.shown import shows
from ckptlab.words import number_of, place_text, size, some

NAMES = 4  # files and tensors that a finding lists
_COLOURS = {"error": "#dc2626", "warning": "#d97706", "info": "#2563eb", "healthy": "#16a34a"}


def finding_line(finding: Finding) -> str:
    """A finding as one line."""
    at = f" ({_about(finding.where)})" if _about(finding.where) else ""
    return f"{finding.severity}: {finding.code}{at}: {finding.found}. Expected {finding.expected}. {_do(finding)}"


def health_text(health: Health) -> str:
    """The verdict, how far the check went, and a block for each finding."""
    lines = [health.verdict, *aligned([["path", health.path], ["checked", _checked(health)]], "ll")]
    for finding in health.findings:
        lines += ["", f"{finding.severity.upper()}  {finding.code}"]
        lines += [line for key, text in _parts(finding) for line in _block(key, text)]
    return "\n".join(lines)


def _block(key: str, text: str) -> list[str]:
    head = f"  {key:<10}"
    return textwrap.wrap(
        text,
        WIDTH,
        initial_indent=head,
        subsequent_indent=" " * len(head),
        break_long_words=False,
        break_on_hyphens=False,
    )


def health_html(health: Health) -> str:
    """The same for a notebook: a card for each finding, its colour that of its severity."""
    facts = [("path", health.path), ("checked", _checked(health))]
    cards = "".join(_card(f) for f in health.findings)
    colour = _COLOURS["healthy" if health.healthy else health.findings[0].severity]
    said = f'<div style="color:{colour};font-weight:600;margin:.4em 0">{escape(health.verdict)}</div>'
    return page("health", [said, terms((key, escape(text)) for key, text in facts), cards])


def finding_html(finding: Finding) -> str:
    """One finding by itself."""
    return page("", [_card(finding)])


def _card(finding: Finding) -> str:
    colour = _COLOURS[finding.severity]
    parts = terms((key, escape(text)) for key, text in _parts(finding))
    title = f'<span style="color:{colour};font-weight:600">{finding.severity}</span> {escape(finding.code)}'
    return f'<div class=note style="border-color:{colour}"><div>{title}</div>{parts}</div>'


def _parts(finding: Finding) -> list[tuple[str, str]]:
    parts = [
        ("where", _about(finding.where)),
        ("found", finding.found),
        ("expected", finding.expected),
        ("do", finding.todo),
    ]
    return [(key, text) for key, text in parts if text]


def _do(finding: Finding) -> str:
    return f"{finding.todo[:1].upper()}{finding.todo[1:]}"


def _about(where: Where) -> str:
    """Files, tensors, states and ranks, as far as there are any."""
    ranks = [place_text(rank) for rank in where.ranks if rank]
    said = [some(where.files, NAMES), some(where.tensors, NAMES), ", ".join(where.states), some(ranks, NAMES)]
    return "; ".join(text for text in said if text)


def _checked(health: Health) -> str:
    done = health.checked
    what = ", ".join(t for t in (health.format, health.mesh) if t)
    files = number_of(done.files, "file")
    if not done.data:
        return f"{what}: the headers of {files}; no data was read"
    read = f"{what}: {files}, {number_of(done.tensors, 'tensor')}, {size(done.bytes)} of data"
    return read if done.opened else f"{read}, each file by itself: the checkpoint does not open"


shows(Finding, text=finding_line, html=finding_html)
shows(Health, text=health_text, html=health_html)
