"""From notation to indices: which elements of a joined tensor are which of its parts.

Every term of a line in notation is an affine map: an element's place in a dim is a start and a sum of strides, one for
each named length of the term. Two tensors that share a term agree where those lengths agree.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from ckptlab.aliases import Shape
from ckptlab.catalog.seen import Piece, Runs
from ckptlab.errors import LayoutError, NotationError
from ckptlab.layout.notation import Name, Node, Number, Product, Sum, names, parse
from ckptlab.layout.solve import Geometry
from ckptlab.mesh import Mesh

Lengths = Mapping[str, int]


@dataclass(frozen=True)
class Steps:
    """A term in a dim: an element at k of each named length lies at `start + sum(k * stride)`; `steps` are
    (name, stride), the slowest first."""

    start: int = 0
    steps: tuple[tuple[str, int], ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(name for name, _ in self.steps)

    def fixed(self, at: Mapping[str, int]) -> Steps:
        """The same with some of the named places taken."""
        start = self.start + sum(at[name] * stride for name, stride in self.steps if name in at)
        return Steps(start, tuple(step for step in self.steps if step[0] not in at))


Term = tuple[Steps, ...]
"""One part of a tensor, a `Steps` for each of its dims."""


def solved(text: str, shape: Shape, known: Lengths, name: str) -> dict[str, int]:
    """All lengths of a line of notation for a tensor of that shape. LayoutError, with the tensor's name, where it does
    not fit or leaves something open."""
    tree = parse(text)
    if len(tree) != len(shape):
        raise LayoutError(f"{name}: {text!r} has {len(tree)} dims, shape {shape} has {len(shape)}")
    there = {name for dim in tree for name in names(dim)}
    given = tuple((k, n) for k, n in sorted(known.items()) if k in there)
    try:
        return dict(_solved(text, shape, given))
    except LayoutError as error:
        said = ", ".join(f"{k} {n}" for k, n in given)
        raise LayoutError(f"{name}, shape {shape}, read as {text!r}{said and f' with {said}'}: {error}") from None


@lru_cache(maxsize=1024)
def _solved(text: str, shape: Shape, given: tuple[tuple[str, int], ...]) -> tuple[tuple[str, int], ...]:
    geometry = Geometry(parse(text), shape, Mesh(), dict(given), {}, {})
    return tuple((k, n) for k, n in geometry.lengths.items() if isinstance(n, int))


def shape_of(text: str, lengths: Lengths) -> Shape:
    """The shape of a tensor that a line of notation says."""
    return tuple(_terms_of(dim, lengths)[0] for dim in parse(text))


def terms(text: str, lengths: Lengths) -> list[Term]:
    """The terms of a line, in the order in which they stand there."""
    return list(_terms(text, tuple(sorted(lengths.items()))))


@lru_cache(maxsize=1024)
def _terms(text: str, lengths: tuple[tuple[str, int], ...]) -> tuple[Term, ...]:
    known = dict(lengths)
    return tuple(itertools.product(*(_terms_of(dim, known)[1] for dim in parse(text))))


def term_names(text: str) -> list[tuple[tuple[str, ...], ...]]:
    """For each term of a line, dim by dim, the names that it has."""
    tree = parse(text)
    lengths = dict.fromkeys((name for dim in tree for name in names(dim)), 1)
    return [tuple(steps.names for steps in term) for term in terms(text, lengths)]


def _terms_of(node: Node, lengths: Lengths) -> tuple[int, list[Steps]]:
    """The length of a node, and its terms."""
    if isinstance(node, Name):
        return lengths[node.text], [Steps(0, ((node.text, 1),))]
    if isinstance(node, Number):
        raise NotationError(f"the {node} of a family's line needs a name, whose length is given beside it")
    if isinstance(node, Sum):
        start, found = 0, []
        for term in node.terms:
            extent, inner = _terms_of(term, lengths)
            found += [Steps(start + s.start, s.steps) for s in inner]
            start += extent
        return start, found
    assert isinstance(node, Product)
    extent, found = 1, [Steps()]
    for factor in reversed(node.factors):
        own, outer = _terms_of(factor, lengths)
        scaled = [Steps(s.start * extent, tuple((n, stride * extent) for n, stride in s.steps)) for s in outer]
        found = [Steps(a.start + b.start, a.steps + b.steps) for a in scaled for b in found]
        extent *= own
    return extent, found


def piece(stored: str, seen: Term, there: Term, lengths: Lengths) -> Piece:
    """The piece of the stored tensor `stored` that a term is: `seen` as it stands in the tensor that is seen, `there`
    as it stands in the stored one. NotationError where a dim of the one is spread over several of the other."""
    dims: list[int | tuple[int, Runs]] = []
    taken: set[int] = set()
    for steps in there:
        if not steps.steps:
            dims.append(steps.start)
            continue
        dim = next((d for d, other in enumerate(seen) if set(other.names) == set(steps.names)), None)
        if dim is None:
            raise NotationError(
                f"{stored}: {' '.join(steps.names)} is one dim, and not one dim of the other tensor, which has "
                f"{', '.join('(' + ' '.join(s.names) + ')' for s in seen)}"
            )
        taken.add(dim)
        spec = tuple((lengths[name], dict(seen[dim].steps)[name], stride) for name, stride in steps.steps)
        dims.append((dim, _runs(seen[dim].start, steps.start, spec)))
    alone = [dim for dim, steps in enumerate(seen) if dim not in taken]
    if any(seen[dim].steps for dim in alone):
        raise NotationError(f"{stored} has no dim for {' '.join(n for dim in alone for n in seen[dim].names)}")
    return Piece(stored, tuple(dims), tuple((dim, seen[dim].start) for dim in alone))


@lru_cache(maxsize=1024)
def _runs(seen: int, stored: int, spec: tuple[tuple[int, int, int], ...]) -> Runs:
    """Runs of the elements of a term: spec has (length, stride in the seen dim, stride in the stored one) of each
    name."""
    a, b = np.array([seen], np.int64), np.array([stored], np.int64)
    for length, stride_a, stride_b in spec:
        k = np.arange(length, dtype=np.int64)
        a, b = ((x[:, None] + k * s).reshape(-1) for x, s in ((a, stride_a), (b, stride_b)))
    order = np.argsort(a, kind="stable")
    runs = _progressions(*_intervals(a[order], b[order]))
    runs.setflags(write=False)
    return runs


def _intervals(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Starts and lengths of what ascends by one in both."""
    first = np.flatnonzero(np.r_[True, (np.diff(a) != 1) | (np.diff(b) != 1)][: len(a)])
    return a[first], b[first], np.diff(np.r_[first, len(a)])


def _progressions(a: np.ndarray, b: np.ndarray, lengths: np.ndarray) -> Runs:
    """Intervals of one length at constant steps in both, together."""
    found: list[tuple[int, ...]] = []
    rows: Sequence[tuple[int, int, int]] = list(zip(a.tolist(), b.tolist(), lengths.tolist(), strict=True))
    i = 0
    while i < len(rows):
        at_a, at_b, length = rows[i]
        count, step_a, step_b = 1, 0, 0
        if i + 1 < len(rows) and rows[i + 1][2] == length:
            step_a, step_b = rows[i + 1][0] - at_a, rows[i + 1][1] - at_b
            while step_b > 0 and i + count < len(rows):
                if rows[i + count] != (at_a + count * step_a, at_b + count * step_b, length):
                    break
                count += 1
        found.append((at_a, at_b, length, count, step_a if count > 1 else 0, step_b if count > 1 else 0))
        i += count
    return np.array(found, np.int64).reshape(-1, 6)
