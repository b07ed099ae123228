"""The widgets' pictures, tables and texts as HTML, and the static page that a saved notebook keeps."""

from __future__ import annotations

from html import escape

from ckptlab import viz
from ckptlab.catalog import Catalog
from ckptlab.reshaping import Cost, Reshape
from ckptlab.widgets.held import in_words, inventory, sizes
from ckptlab.widgets.steps import Step
from ckptlab.widgets.subject import Choice, Refusal, Subject
from ckptlab.words import count, number_of, shorten, size

ROWS = 100  # of a rank's inventory
MANY = 2_000  # tensors from which a plan takes seconds

STYLE = """
.ckptlab-text{font:13px/1.5 system-ui,sans-serif;color:var(--jp-ui-font-color1,inherit)}
.ckptlab-text p{margin:.4em 0;max-width:56em}
.widget-html-content:has(>.ckptlab-text){min-width:0;width:100%}
.ckptlab-text .quiet{overflow-wrap:anywhere}
.ckptlab-text .subhead{font-weight:600;font-size:14px}
.ckptlab-text .quiet{opacity:.68}
.ckptlab-text .told{font:12px/1.5 ui-monospace,monospace;min-height:6em}
.ckptlab-text .refused{border-left:3px solid #d97706;padding-left:.6em;margin-bottom:.5em}
.ckptlab-text .figures{display:flex;flex-wrap:wrap;gap:.2em 1.6em;margin-bottom:.5em}
.ckptlab-text .figures b{font-weight:600;font-variant-numeric:tabular-nums}
.ckptlab-text .scroll{overflow:auto;max-height:20em}
.ckptlab-text table{border-collapse:collapse;font:12px/1.5 ui-monospace,monospace;margin:0}
.ckptlab-text :is(td,th){padding:.05em .8em .05em 0;text-align:left;white-space:nowrap;font-weight:400;background:none}
.ckptlab-text .r{text-align:right}
.ckptlab-text th{opacity:.68}
.ckptlab-text pre{margin:.3em 0;padding:.5em .7em;white-space:pre-wrap;user-select:all;color:inherit;
border:1px solid color-mix(in srgb,currentColor 18%,transparent);border-radius:3px;background:none;
font:12px/1.5 ui-monospace,monospace}
.ckptlab-text .row{display:flex;flex-wrap:wrap;gap:1.2em;align-items:flex-start;margin:.4em 0}
"""


def block(content: str) -> str:
    """HTML in the widgets' style."""
    return f'<div class="ckptlab-text"><style>{STYLE}</style>{content}</div>'


def model(subject: Subject, activations: viz.Activations | None = None) -> str:
    """A model on paper in numbers, and what DeepSpeed would say to it."""
    catalog = subject.catalog
    parameters = sum(t.numel for t in catalog.tensors.values())
    full = viz.fullest(catalog, activations)
    full["activations"] = sum(full.pop(kind) for kind in viz.ACTIVATIONS)
    full = {kind: nbytes for kind, nbytes in full.items() if nbytes}
    kept = f"{size(sum(full.values()))} on the fullest rank: {sizes(full)}"
    notes = "".join(f'<div class="refused">{escape(n.text)}</div>' for n in catalog.findings)
    said = f"{count(parameters)} parameters in {number_of(len(catalog.tensors), 'tensor')} · {kept}"
    return f"<p>{escape(said)}</p>{notes}"


def code(line: str) -> str:
    return f"<pre>{escape(line)}</pre>"


def refusal(reason: Refusal) -> str:
    return f'<div class="refused">{escape(str(reason))}</div>'


def holdings(catalog: Catalog, rank: int) -> str:
    """All that a rank holds: its files, its states, and a table of tensors."""
    found = inventory(catalog, rank)
    head = f"{in_words(catalog, rank)} holds {size(found.nbytes)}"
    facts = [f"{number_of(len(found.rows), 'piece')}: {sizes(found.kinds)}"]
    if found.files:
        facts.append("in " + sizes(dict(list(found.files.items())[:6])) + " …" * (len(found.files) > 6))
    rows = "".join(
        f'<tr><td title="{escape(name)}">{escape(shorten(name, 44))}</td><td class=r>{start:,}</td>'
        f"<td class=r>{count:,}</td><td class=r>{share:.3g} %</td><td class=r>{size(nbytes)}</td>"
        f'<td title="{escape(where)}">{escape(where)}</td></tr>'
        for name, start, count, share, nbytes, where in found.rows[:ROWS]
    )
    titles = ("tensor", ""), ("from", "r"), ("elements", "r"), ("of shard", "r"), ("size", "r"), ("where", "")
    header = "".join(f"<th class={side or 'l'}>{title}</th>" for title, side in titles)
    more = f'<div class="quiet">and {len(found.rows) - ROWS:,} more</div>' if len(found.rows) > ROWS else ""
    quiet = "".join(f'<div class="quiet">{escape(fact)}</div>' for fact in facts)
    table = f'<div class="scroll"><table><thead><tr>{header}</tr></thead><tbody>{rows}</tbody></table></div>'
    return f'<div class="subhead">{escape(head)}</div>{quiet}{table}{more}'


def figures(reshape: Reshape, cost: Cost | None, activations: viz.Activations | None = None) -> str:
    """The plan's cost (None: it was not worked out), the memory of the fullest rank before and after, and what the
    user must hear."""
    runs = [catalog for catalog in (reshape.source, reshape.target) if catalog.zero_stage is not None]
    kept = [size(sum(viz.fullest(catalog, activations).values())) for catalog in runs]
    shown = [
        ("read", size(cost.read) if cost else "…"),
        ("written", size(cost.written) if cost else "…"),
        ("changes rank", size(cost.moved) if cost else "…"),
        *([("memory of the fullest rank", " → ".join(kept))] if kept else []),
    ]
    notes = "".join(f'<div class="refused">{escape(n.text)}</div>' for n in reshape.target.findings)
    cells = "".join(f'<span><span class="quiet">{name}</span> <b>{value}</b></span>' for name, value in shown)
    return f'<div class="figures">{cells}</div>{notes}'


def towards(reshape: Reshape) -> str:
    """`tp 2 · pp 2 · dp 2 · ZeRO-1 → tp 4 · pp 1 · dp 2 · ZeRO-1`."""
    ends = list(dict.fromkeys(map(_named, (reshape.source, reshape.target))))
    return " → ".join(ends) if len(ends) > 1 else f"{ends[0]}, as it is"


def step(step: Step, with_code: bool) -> str:
    """A step's sentence and, of a checkpoint, the Python that shows the same."""
    line = f'<pre class="line">{escape(step.code)}</pre>' if with_code and step.code else ""
    return f"<p>{escape(step.text)}</p>{line}"


def _named(catalog: Catalog) -> str:
    stage = "whole tensors" if catalog.zero_stage is None else f"ZeRO-{catalog.zero_stage}"
    return f"{catalog.mesh} · {stage}"


def static(subject: Subject, choice: Choice) -> str:
    """The current state as a page without a kernel: the layout, the target with memory and plan, the Python line."""
    catalog, name = subject.catalog, subject.tensor(choice).name
    flat = buffer(catalog, name, choice.state, choice.rank)
    parts = [
        f'<div class="subhead">{escape(subject.title)}</div>',
        row(
            viz.mesh(catalog.mesh, highlight=choice.rank).svg,
            layout(catalog, name, choice.state, choice.rank),
        ),
        *([row(flat)] if flat else []),
    ]
    target = subject.target(choice)
    start = subject.start()
    changed = (choice.mesh, choice.zero_stage) != (start.mesh, start.zero_stage)
    if isinstance(target, Refusal):
        parts.append(refusal(target))
    else:
        quick = len(catalog.tensors) < MANY or "plan" in vars(target)
        if changed:
            parts += [
                f'<div class="subhead">{towards(target)}</div>',
                figures(target, target.cost() if quick else None, choice.activations),
                row(layout(target.target, name, choice.state), moves(target) if quick else ""),
            ]
        parts.append(row(viz.memory(target.target, activations=choice.activations).svg))
    parts.append(code(subject.reshaping(choice) if changed else subject.opening(choice)))
    quiet = "A picture of the widget as it was when the cell ran; with a kernel it answers to the mouse."
    return block("".join([*parts, f'<div class="quiet">{quiet}</div>']))


def layout(catalog: Catalog, name: str, state: str, rank: int | None = None, width: int | None = None) -> str:
    """The tensor as its holders have it, over dp too where dp cuts it. SVG."""
    shown = state if state in catalog[name].states else None
    return viz.placed(catalog, name, shown, rank=rank, width=width).svg


def buffer(catalog: Catalog, name: str, state: str, rank: int, width: int | None = None) -> str:
    """The flat buffers that hold the state, for the tp of a rank and its pp stage (or the tensor's own); SVG, empty
    where it is in none."""
    tensor = catalog[name]
    if not catalog.is_flat(tensor.name, state):
        return ""
    placement = catalog.placement(tensor.name, state)
    mine = placement.holder(rank) or placement.holders[0]
    return viz.flat(catalog.flat(tensor.name, mine)[0], tensor=None, width=width, **mine).svg


def moves(reshape: Reshape) -> str:
    """Who sends how much to whom. SVG."""
    return viz.plan(reshape.plan, reshape.source.mesh, reshape.mesh).svg


def row(*pictures: str) -> str:
    """Pictures side by side."""
    return f'<div class="row">{"".join(f"<div>{svg}</div>" for svg in pictures)}</div>'
