"""What every page consists of, without the pictures: a box with a heading, terms, tables, what can be folded away."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

# currentColor is the page's own text colour, so that light and dark pages both work; a doubled class wins over what
# notebooks say of tables.
STYLE = """
.ckptlab{font:13px/1.5 system-ui,sans-serif;max-width:72em;--line:color-mix(in srgb,currentColor 18%,transparent)}
.ckptlab .head{font-weight:600;font-size:14px;padding-bottom:.3em;border-bottom:1px solid var(--line)}
.ckptlab dl{display:grid;grid-template-columns:max-content 1fr;gap:.15em 1em;margin:.5em 0}
.ckptlab dt{opacity:.6}
.ckptlab dd{margin:0;overflow-wrap:anywhere}
.ckptlab table{border-collapse:collapse;margin:0;font:12px/1.5 ui-monospace,monospace}
.ckptlab.ckptlab table :is(td,th){padding:.05em .9em .05em 0;text-align:left;white-space:nowrap;background:none}
.ckptlab.ckptlab table :is(td,th){color:inherit}
.ckptlab.ckptlab table .r{text-align:right}
.ckptlab.ckptlab table th{font-weight:400;opacity:.6}
.ckptlab.ckptlab table tbody tr{background:none}
.ckptlab.ckptlab table tbody tr:hover{background:color-mix(in srgb,currentColor 7%,transparent)}
.ckptlab .scroll{overflow:auto;max-height:32em;margin:.3em 0}
.ckptlab summary{cursor:pointer}
.ckptlab b{font-weight:600;color:#ea580c}
.ckptlab .note{border-left:3px solid #d97706;padding-left:.6em;margin:.2em 0}
.ckptlab .pictures{display:flex;flex-wrap:wrap;gap:1.5em;margin:.5em 0;align-items:flex-start}
.ckptlab details>div{margin-top:.4em}
"""


def page(title: str, parts: Iterable[str]) -> str:
    """A box with a heading, if there is one; parts are HTML already."""
    head = f"<div class=head>{escape(title)}</div>" if title else ""
    return f"<div class=ckptlab><style>{STYLE}</style>{head}{''.join(parts)}</div>"


def terms(pairs: Iterable[tuple[str, str]]) -> str:
    """A list of terms; values are HTML already, empty ones are left out."""
    return f"<dl>{''.join(f'<dt>{key}</dt><dd>{value}</dd>' for key, value in pairs if value)}</dl>"


def folded(title: str, content: str, *, shown: bool = True) -> str:
    """Content, which is HTML already, that can be folded away under a title; nothing where there is none."""
    opened = " open" if shown else ""
    return f"<details{opened}><summary>{escape(title)}</summary>{content}</details>" if content else ""


def scrolled(content: str) -> str:
    """Content that scrolls where it is long."""
    return f"<div class=scroll>{content}</div>" if content else ""


def table_html(header: Sequence[str], rows: Sequence[Sequence[str]], sides: str, *, escaped: bool = False) -> str:
    """Rows of cells; `sides` has "l" or "r" for each column. escaped: the cells are HTML already."""
    if not rows:
        return ""
    open_ = ["<td class=r>" if side == "r" else "<td>" for side in sides]
    titles = zip(header, sides, strict=True) if header else ()
    head = "".join(f"<th{' class=r' if side == 'r' else ''}>{escape(title)}</th>" for title, side in titles)
    body = "".join(
        f"<tr>{''.join(tag + (c if escaped else escape(c)) + '</td>' for tag, c in zip(open_, row, strict=True))}</tr>"
        for row in rows
    )
    return f"<table>{f'<thead><tr>{head}</tr></thead>' if head else ''}<tbody>{body}</tbody></table>"
