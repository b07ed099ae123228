"""A line of a family: how parts lie in the tensor that they make up."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ckptlab.arguments import explained
from ckptlab.draw import Drawing
from ckptlab.draw.parts import Sheet, Strip, parts
from ckptlab.layout.notation import names as names_in
from ckptlab.layout.notation import parse
from ckptlab.sharding.families.lines import Line, other
from ckptlab.sharding.families.tables import Steps, Term, shape_of, terms

_LENGTHS = {"kv": 2, "q": 2, "h": 4, "d": 4, "p": 3, "two": 2, "ffn": 6, "e": 3, "in": 8, "out": 8}


@explained
def family(line: Line, **lengths: int) -> Drawing:
    """How parts lie in the tensor that they make up, for a line of a family: that tensor and the parts side by side,
    what is the same in one colour, strip by strip with its indices (`kv 1 · q 0`).

    lengths: of the names in the line's notation; small ones for those that are not given. Of a line that only renames
    there is one strip. Cells: class `piece`, data-part, data-start and data-count along the dim that is drawn, and
    data-kv … with the index of each name.
    """
    if line.text is None:
        here, there = line.names(line.joined)[0], line.names(other(line.joined))[0]
        return _beside(line, [_plain(here)], [_plain(there)], [(0, "the same tensor")])
    known = {n: lengths.get(n) or dict(line.lengths).get(n) or _LENGTHS.get(n, 4) for n in sorted(line.known)}
    told = terms(line.text, known)
    theirs = [terms(text, known)[0] for text in line.texts]
    hued = _coloured_by(line)
    drawn = _Drawn(known, hued, frozenset(_inner(a, b) for a, b in zip(told, theirs, strict=True)))
    whole = drawn.sheet(line.whole, line.text, list(enumerate(told)), line.stacks)
    sides: list[Sheet] = []
    for index in range(known["e"] if line.stacks else 1):
        for k, (template, text) in enumerate(zip(line.templates[other(line.joined)], line.texts, strict=True)):
            name = str(template).replace("{e}", str(index)) if line.stacks else str(template)
            sides.append(drawn.sheet(name, text, [(k, theirs[k])]))
    if hued is None:
        legend = [(k, name.removesuffix(".weight").rsplit(".", 1)[-1]) for k, (name, _) in enumerate(line.parts)]
    else:
        legend = [(k, f"{hued} {k}") for k in range(known[hued])]
    return _beside(line, [whole], sides, legend, known)


def _beside(
    line: Line,
    whole: Sequence[Sheet],
    sides: Sequence[Sheet],
    legend: Sequence[tuple[int, str]],
    known: Mapping[str, int] | None = None,
) -> Drawing:
    left, right = (whole, sides) if line.joined == "left" else (sides, whole)
    said = ["an example: " + ", ".join(f"{name} {n}" for name, n in known.items())] if known else []
    return parts(left, right, title=line.text or "renamed", legend=legend, notes=said)


def _coloured_by(line: Line) -> str | None:
    """Of a line with one part, the name whose indices have colours: what another order moves."""
    if len(line.parts) > 1:
        return None
    if line.lengths:
        return line.lengths[0][0]
    assert line.text is not None
    texts = (line.text, line.texts[0])
    here, there = (
        [n for dim in parse(text) for n in names_in(dim) if not (line.stacks and n == "e")] for text in texts
    )
    return next((a for a, b in zip(here, there, strict=False) if a != b), here[0])


def _plain(name: str) -> Sheet:
    return Sheet(name, "", 8, 8, 0, [Strip(0, 8, 0, "", name, {"part": 0})])


def _inner(here: Term, there: Term) -> str | None:
    """The name that runs fastest on both sides, which no strip is cut by; None where another does on each."""
    a, b = (max((steps.names for steps in term if steps.names != ("e",)), key=len) for term in (here, there))
    return a[-1] if a and a[-1] == b[-1] else None


@dataclass(frozen=True)
class _Drawn:
    """How tensors of one line are drawn: lengths, the name whose indices have colours (None: each part has one), and
    the names that no strip is cut by."""

    known: Mapping[str, int]
    hued: str | None
    inner: frozenset[str | None]

    def sheet(self, name: str, text: str, told: Sequence[tuple[int, Term]], stacked: bool = False) -> Sheet:
        """A tensor with its parts, cut into strips along one dim; stacked: its first dim is put before that."""
        shape = shape_of(text, self.known)
        along = self._along(told)
        before = 0 if stacked and "e" in told[0][1][0].names else along
        size = math.prod(shape[before : along + 1])
        found: list[Strip] = []
        for part, term in told:
            steps = term[along].steps
            stepped = (("e", shape[along]), *steps) if before != along else steps
            found += self._strips(part, Steps(term[along].start, stepped))
        found.sort(key=lambda strip: strip.start)
        return Sheet(name, text, size, math.prod(shape) // size, 0 if before == 0 else 1, found)

    def _along(self, told: Sequence[tuple[int, Term]]) -> int:
        """The dim that is drawn in strips: that of a sum, else where the name with colours stands, else the one with
        the most names."""
        dims = range(len(told[0][1]))
        summed = [d for d in dims if len({term[d].start for _, term in told}) > 1]
        hued = [d for d in dims if self.hued in told[0][1][d].names]
        return (summed or hued or [max(dims, key=lambda d: len(told[0][1][d].names))])[0]

    def _strips(self, part: int, steps: Steps) -> list[Strip]:
        """The strips of a term: one for each index of the names that cut."""
        outer, length = list(steps.steps), 1
        if outer and outer[-1][0] in self.inner and outer[-1][0] != self.hued:
            length = self.known[outer.pop()[0]]
        found = []
        for index in np.ndindex(*(self.known[name] for name, _ in outer)):
            at = dict(zip((name for name, _ in outer), map(int, index), strict=True))
            start = steps.start + sum(at[name] * stride for name, stride in outer)
            label = " ".join(f"{name} {k}" for name, k in at.items())
            tip = " · ".join(filter(None, (f"part {part}", label)))
            hue = part if self.hued is None else at[self.hued]
            found.append(Strip(start, length, hue, label, tip, {"part": part, **at}))
        return found
