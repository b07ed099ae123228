"""A widget as one file: its parts for a few meshes, in a page that needs neither a kernel nor a network."""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from html import escape
from itertools import product
from typing import Any

from ckptlab.errors import CkptlabError
from ckptlab.mesh import Mesh
from ckptlab.widgets import numbers, parts
from ckptlab.widgets.steps import TITLES
from ckptlab.widgets.subject import Choice, Refusal, Subject, pairs

STATES = 6_000  # that a page holds at most
READ = 1 << 26  # elements that are read without being asked for
TENSORS = 60  # of more, only those of the first layers

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>:root{{color-scheme:light dark}}body{{margin:16px auto;max-width:1500px;padding:0 12px}}
{style}</style></head>
<body><div id="ckptlab"></div><noscript>This page needs JavaScript.</noscript>
<script type="application/json" id="traits">{traits}</script>
<script type="text/plain" id="parts">{parts}</script>
<script type="module">
{script}
const bytes = Uint8Array.from(atob(document.getElementById("parts").textContent), (c) => c.charCodeAt(0));
const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
const stored = await new Response(stream).json();
const traits = JSON.parse(document.getElementById("traits").textContent);
const model = {{
  parts: new Map(Object.entries(stored.of).map(([name, index]) => [name, stored.contents[index]])),
  get: (name) => traits[name],
  set: (name, value) => {{ traits[name] = value; }},
  on: () => {{}}, off: () => {{}}, save_changes: () => {{}},
}};
render({{ model, el: document.getElementById("ckptlab") }});
</script></body></html>
"""


def page(
    subject: Subject,
    choice: Choice,
    traits: Mapping[str, Any],
    code: tuple[str, str],
    *,
    meshes: Sequence[Mesh] | None,
    tensors: Sequence[str] | None,
    values: Sequence[str] | None,
    width: int,
) -> str:
    """What a widget shows as one page of HTML: see `Explorer.to_html`.

    traits: those that the widget's script reads; code: the script and its style sheet.
    """
    choice = replace(choice, width=width, window=())
    tabs = [tab for tab in traits["plan"]["tabs"] if tab != "Model"]
    here = {name: traits[name] for name in parts.FIELDS} | {"width": width, "window": []}
    here["tab"] = here["tab"] if here["tab"] in tabs else "Look"
    targets = _near(subject, choice) if meshes is None else [choice.mesh, *meshes]
    for mesh in targets:
        if isinstance(refused := subject.target(replace(choice, mesh=mesh)), Refusal) and mesh != choice.mesh:
            raise CkptlabError(f"{mesh}: {refused}")
    names = list(dict.fromkeys([choice.tensor, *(_some(subject) if tensors is None else tensors)]))
    told = [choice.tensor] if values is None and numbers.read(subject, choice) <= READ else [*(values or ())]
    names += [name for name in told if name not in names]
    found: dict[str, int] = {}
    contents: dict[str, int] = {}
    for state, its in _states(subject, choice, here, targets, (names, told), tabs):
        for slot, key in parts.wanted(state):
            if key in found or slot in parts.OPTIONAL:
                continue
            content = json.dumps(parts.part(slot, subject, its), ensure_ascii=False)
            found[key] = contents.setdefault(content, len(contents))
    stored = json.dumps({"of": found}, ensure_ascii=False)[:-1] + f', "contents": [{",".join(contents)}]}}'
    plan = {**traits["plan"], "tabs": {tab: parts.TABS[tab] for tab in tabs}}
    said = json.dumps({**traits, **here, "plan": plan, "view": {}, "presets": {}}, ensure_ascii=False)
    script, style = code
    return _PAGE.format(
        title=escape(subject.title),
        style=style,
        traits=said.replace("<", "\\u003c"),
        parts=base64.b64encode(zlib.compress(stored.encode("utf-8"), 9)).decode(),
        script=script.replace("export default { render };", ""),
    )


def _near(subject: Subject, choice: Choice) -> list[Mesh]:
    """The chosen mesh, the source's, and those with one degree halved or doubled that work."""
    found = [choice.mesh, subject.trained_on.joined()]
    for axis, degree in choice.mesh.degrees.items():
        for n in (degree // 2, degree * 2):
            if (
                n
                and n != degree
                and degree * 2 <= 4096
                and subject.fits(choice.mesh.replace(**{axis: n}), choice.zero_stage)
            ):
                found.append(choice.mesh.replace(**{axis: n}))
    return [m for m in dict.fromkeys(found) if subject.fits(m, choice.zero_stage)]


def _some(subject: Subject) -> list[str]:
    names = list(subject.catalog.tensors)
    return names if len(names) <= TENSORS else [*names[: TENSORS - 2], *names[-2:]]


def _state(subject: Subject, name: str, state: str) -> str:
    """The state, or the first that a tensor has where it has no such."""
    held = subject.catalog[name].states
    return state if state in held else next(iter(held))


def _states(
    subject: Subject,
    choice: Choice,
    here: dict[str, Any],
    meshes: Sequence[Mesh],
    of: tuple[Sequence[str], Sequence[str]],
    tabs: Sequence[str],
) -> Iterator[tuple[dict[str, Any], Choice]]:
    """Every state that the page is to answer to: what is nearest to what is chosen first, at most STATES.

    of: the tensors that can be chosen, and those of which values are shown.
    """
    stage, (names, told) = choice.zero_stage, of
    plain = [tab for tab in tabs if tab != "Values"]
    ranks = [choice.rank, *(r for r in range(min(subject.catalog.mesh.size, 16)) if r != choice.rank)]

    def all_of() -> Iterator[tuple[str, Choice]]:
        yield here["tab"], choice
        for mesh in meshes:
            for tab in plain:
                yield tab, replace(choice, mesh=mesh)
            yield from (("Steps", replace(choice, mesh=mesh, step=i)) for i in range(len(TITLES)))
        for name in told if "Values" in tabs else ():
            for state in subject.catalog[name].states:
                yield "Values", replace(choice, tensor=name, state=state)
        for name in names:
            chosen = replace(choice, tensor=name, state=_state(subject, name, choice.state))
            yield from (("Look", replace(chosen, rank=rank)) for rank in ranks)
            yield from (("Look", replace(chosen, state=state)) for state in subject.catalog[name].states)
        for mesh, name in product(meshes, names):
            yield "Reshape", replace(choice, tensor=name, state=_state(subject, name, choice.state), mesh=mesh)
        for name in names:
            yield from (("Steps", replace(choice, tensor=name, step=i)) for i in range(len(TITLES)))
        for mesh in meshes:
            chosen = replace(choice, mesh=mesh)
            yield from (("Reshape", replace(chosen, target_rank=r)) for r in range(min(mesh.size, 32)))

    for count, (tab, its) in enumerate(all_of()):
        if count >= STATES:
            return
        mesh = [list(p) for p in pairs(its.mesh)]
        its_own = {"tensor": its.tensor, "state": its.state, "rank": its.rank, "target_rank": its.target_rank}
        yield {**here, **its_own, "tab": tab, "mesh": mesh, "zero_stage": stage, "step": its.step}, its
