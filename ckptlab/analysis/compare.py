"""What checkpoints have in common and where they differ, whatever format and mesh each of them has.

`diff` goes tensor by tensor and window by window: memory stays near two windows for each worker, not near the largest
tensor, and both checkpoints are read once. How far apart they are is summed up on the way (`measure`); tensors that
have another name on the other side are found first, by samples (`renames`).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ckptlab import pool
from ckptlab.analysis import elements
from ckptlab.analysis.found import Compared, Diff, Difference, OnlyIn, Setting
from ckptlab.analysis.measure import Measure, Sums
from ckptlab.analysis.renames import renamed
from ckptlab.arguments import explained, positive
from ckptlab.arrays import Reader, reader
from ckptlab.catalog import Catalog, ParameterGroup, Tensor
from ckptlab.checkpoint import Checkpoint, Source, opened
from ckptlab.errors import CheckpointError, LayoutError
from ckptlab.layout import Cut
from ckptlab.pool import Workers
from ckptlab.sharding import families
from ckptlab.sharding.families import Family
from ckptlab.stored import Stored


@explained
def diff(
    a: Source,
    b: Source,
    *,
    states: Sequence[str] | None = None,
    family: Family | str | None = None,
    progress: bool = False,
    on: Workers = None,
    window: int = elements.WINDOW,
    **numbers: Any,
) -> Diff:
    """Compare two checkpoints: every state that both have of every tensor that both have, bit for bit.

    a, b: opened checkpoints or paths, of any two formats and meshes. states: compare these alone. progress: show a bar
    on stderr. on: how many threads (None: as many as there are cores), an executor or a dask client. window:
    elements of each side that a worker holds at a time. Averaged replicas are averaged first; vocabulary padding is no
    part of a tensor. NaN equals NaN of the same bits. Of tensors that one side alone has, those of one shape and of the
    same or similar content are taken for renamed.

    family: whose names one side has where the other has transformers' (see `ckptlab.families`): both are then compared
    under those. None: where both have names that the other has not, the families that are known are tried. numbers:
    heads, kv_heads, … of the model, where neither says them.

    Raises CheckpointError where there is nothing to compare.
    """
    window = positive("window", window)
    left, right = _together(_catalog(a), _catalog(b), family, numbers)
    wanted = _wanted(left, right, states)
    pairs, only_a, only_b = _pairs(left, right)
    names = renamed(left, right, only_a, only_b)
    pairs += [(left.tensors[r.a], right.tensors[r.b]) for r in names]
    only_a = tuple(n for n in only_a if n not in {r.a for r in names})
    only_b = tuple(n for n in only_b if n not in {r.b for r in names})
    shapes = tuple((ta.name, ta.shape, tb.shape) for ta, tb in pairs if ta.shape != tb.shape)
    same = [(ta, tb) for ta, tb in pairs if ta.shape == tb.shape]
    todo = [(ta, tb, s) for ta, tb in same for s in ta.states if s in tb.states and s in wanted]
    if not todo and not (shapes or only_a or only_b):
        raise CheckpointError(
            f"nothing to compare: {left.path} has {_told(left)}, {right.path} has {_told(right)}: no tensor has a "
            "state on both sides"
        )
    tensors, numel, differ = Counter[str](), Counter[str](), Counter[str]()
    differences, measures = [], []
    for found, measure in _compared(left, right, todo, window, on, progress):
        measures.append(measure)
        tensors[measure.state] += 1
        numel[measure.state] += measure.elements
        if found is not None:
            differences.append(found)
            differ[measure.state] += 1
    return Diff(
        left.path,
        right.path,
        len({ta.name for ta, _, _ in todo}),
        tuple(Compared(s, tensors[s], numel[s], differ[s]) for s in left.states if s in tensors),
        tuple(differences),
        only_a,
        only_b,
        shapes,
        _only_in(same, wanted),
        _only_in([(tb, ta) for ta, tb in same], wanted),
        tuple(_settings(left, right, pairs)),
        names,
        tuple(measures),
    )


def _catalog(source: Source) -> Catalog:
    return source if isinstance(source, Catalog) else opened(source).catalog


def _together(
    left: Catalog, right: Catalog, family: Family | str | None, numbers: dict[str, Any]
) -> tuple[Catalog, Catalog]:
    """Both under transformers' names, where one has them and the other those of a family."""
    apart = _apart(left, right)
    if family is None and not apart:
        return left, right
    told = {**families.told_numbers(right), **families.told_numbers(left), **numbers}
    try:
        seen = families.towards(left, "right", family, **told), families.towards(right, "right", family, **told)
    except LayoutError:
        if family is not None or numbers:
            raise
        return left, right
    return seen if family is not None or numbers or _apart(*seen) < apart else (left, right)


def _apart(left: Catalog, right: Catalog) -> int:
    """How many names the side that lacks fewer of the other's has alone."""
    return min(len(left.tensors.keys() - right.tensors.keys()), len(right.tensors.keys() - left.tensors.keys()))


def _compared(
    left: Catalog, right: Catalog, todo: Sequence[Todo], window: int, on: Workers, progress: bool
) -> Iterator[Found]:
    """What was found of each state of each pair, in order."""
    tasks = (_Task(reader(left, a.name, state), reader(right, b.name, state), a.shape, window) for a, b, state in todo)
    total = sum(t.numel for t, _, _ in todo)
    with pool.progress(total, "comparing", " elements", progress) as bar:
        yield from pool.run(_compare, tasks, on=on, size=lambda task: task.elements, bar=bar)


def _wanted(a: Catalog, b: Catalog, states: Sequence[str] | None) -> Sequence[str]:
    """The states to compare. CheckpointError for one that neither side has."""
    known = list(dict.fromkeys([*a.states, *b.states]))
    states = (states,) if isinstance(states, str) else states
    unknown = [s for s in (() if states is None else states) if s not in known]
    if unknown:
        raise CheckpointError(f"no state {unknown[0]!r} in {a.path} or {b.path}: there are {', '.join(known)}")
    return known if states is None else states


def _told(catalog: Catalog) -> str:
    return f"{len(catalog.tensors):,} tensors with {', '.join(catalog.states) or 'no state'}"


def _pairs(a: Catalog, b: Catalog) -> tuple[list[tuple[Tensor, Tensor]], tuple[str, ...], tuple[str, ...]]:
    """Tensors that both have, under the same name or an alias of it, and the names that one side alone has."""
    names_a, names_b = _by_name(a), _by_name(b)
    there = [(tensor, _find(names_b, tensor)) for tensor in a.tensors.values()]
    matched = {other.name for _, other in there if other is not None}
    back = [(_find(names_a, tensor), tensor) for name, tensor in b.tensors.items() if name not in matched]
    pairs = [(x, y) for x, y in (*there, *back) if x is not None and y is not None]
    return pairs, tuple(x.name for x, y in there if y is None), tuple(y.name for x, y in back if x is None)


def _by_name(catalog: Catalog) -> dict[str, Tensor]:
    """Every tensor by its name and its aliases."""
    aliases = {alias: t for t in catalog.tensors.values() for alias in t.aliases}
    return {**aliases, **catalog.tensors}


def _find(names: Mapping[str, Tensor], tensor: Tensor) -> Tensor | None:
    return next((names[n] for n in (tensor.name, *tensor.aliases) if n in names), None)


def _only_in(pairs: Sequence[tuple[Tensor, Tensor]], wanted: Sequence[str]) -> tuple[OnlyIn, ...]:
    """States that the first of each pair has and the second lacks."""
    lacking: dict[str, list[str]] = {}
    for mine, other in pairs:
        for state in mine.states:
            if state in wanted and state not in other.states:
                lacking.setdefault(state, []).append(mine.name)
    shared = {s for mine, other in pairs for s in mine.states if s in other.states}
    return tuple(OnlyIn(state, tuple(names), state not in shared) for state, names in lacking.items())


Todo = tuple[Tensor, Tensor, str]
Found = tuple[Difference | None, Measure]


@dataclass(frozen=True)
class _Task:
    """One state of one tensor on both sides, to be gone through in windows of so many elements."""

    a: Reader
    b: Reader
    shape: tuple[int, ...]
    window: int

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


def _compare(task: _Task) -> Found:
    """What differs (None if nothing does), and how far apart it is."""
    whole, name, state = Cut.whole(task.shape), task.a.name, task.a.state
    count, worst_rel = 0, 0.0
    worst: tuple[float, int, float, float] | None = None
    sums, moved = Sums(), 0
    for start in range(0, task.elements, task.window):
        stop = min(start + task.window, task.elements)
        a, b = (elements.joined(gather, whole, (), start, stop) for gather in (task.a, task.b))
        where = elements.unequal(a, b)
        if not len(where):
            sums.equal(a)
            continue
        sums.other(a, b)
        count += len(where)
        x, y = a[where], b[where]
        if x.dtype == y.dtype:
            moved += elements.content(x) - elements.content(y)
        apart = elements.apart(x, y)
        worst_rel = max(worst_rel, float(elements.relative(apart, x, y).max()))
        i = int(apart.argmax())
        if worst is None or apart[i] > worst[0]:
            worst = float(apart[i]), start + int(where[i]), float(x[i].real), float(y[i].real)
    measure = Measure(name, state, task.elements, count, worst[0] if worst else 0.0, **vars(sums))
    dtypes = str(task.a.dtype), str(task.b.dtype)
    if worst is None:
        return None if dtypes[0] == dtypes[1] else Difference(name, state, dtypes, task.elements), measure
    at = tuple(int(k) for k in np.unravel_index(worst[1], task.shape))
    figures = worst[0], worst_rel, at, worst[2], worst[3], measure.relative, measure.cosine
    permuted = dtypes[0] == dtypes[1] and moved % (1 << 64) == 0
    return Difference(name, state, dtypes, task.elements, count, *figures, permuted), measure


def _settings(a: Catalog, b: Catalog, pairs: Iterable[tuple[Tensor, Tensor]]) -> Iterator[Setting]:
    """Hyperparameters and steps that differ, of parameter groups that have a tensor in common."""
    step_a, step_b = Checkpoint(a).iteration, Checkpoint(b).iteration
    if None not in (step_a, step_b) and step_a != step_b:
        yield Setting("training", "step", step_a, step_b)
    groups = dict.fromkeys((x.group, y.group) for x, y in pairs if x.group is not None and y.group is not None)
    for i, j in groups:
        mine, other = _told_of(a.groups[i]), _told_of(b.groups[j])
        name = a.groups[i].name or f"group {i}"
        for key in mine:
            if key in other and mine[key] != other[key]:
                yield Setting(name, key, mine[key], other[key])
    for x, y in pairs:
        if x.group is None or y.group is None or not (a.groups[x.group].apart or b.groups[y.group].apart):
            continue
        kept, others = (c.groups[t.group or 0].scalars_of(t.name) for c, t in ((a, x), (b, y)))
        for key in kept:
            if key in others and (one := _value(kept[key])) != (two := _value(others[key])):
                yield Setting(x.name, key, one, two)


def _told_of(group: ParameterGroup) -> dict[str, Any]:
    """A group's hyperparameters and scalars; what is a number in a file is read."""
    told = {**group.scalars, **group.options}
    return {key: _value(value) for key, value in told.items() if key not in ("params", "name")}


def _value(value: Any) -> Any:
    if isinstance(value, Stored):
        value = value.map().astype(np.float64).tolist()
    if isinstance(value, (list, tuple)):
        return [_value(v) for v in value]
    return value if isinstance(value, (int, float, str, type(None), Mapping)) else repr(value)
