"""Which weights of a module the parameters of an optimizer are that names none: the one way in which their shapes, in
the module's order, and the elements at their ends fit."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ckptlab.formats.deepspeed.header import Shape, Shapes
from ckptlab.formats.deepspeed.optimfile import WholeOptimizer
from ckptlab.stored import Stored

_SAMPLE = 32  # elements at either end of a tensor by which it is recognised
_MOST = 20_000  # ways to go on that are followed at a time


@dataclass(frozen=True)
class Weight:
    """A weight of the module, whole or, where experts are one tensor, in a file for each of them. `apart`: what is
    trained is a copy, which need not be equal to it."""

    shape: Shape
    parts: tuple[Stored, ...]
    of_experts: bool = False
    apart: bool = False

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    def ends(self) -> Iterator[tuple[int, np.ndarray]]:
        """(first element, elements) of a sample at either end."""
        first, last = self.parts[0].flat, self.parts[-1].flat
        count = min(_SAMPLE, len(first), len(last))
        yield 0, first[:count]
        yield self.numel - count, last[len(last) - count :]


Named = Sequence[tuple[str, Weight]]


@dataclass(frozen=True)
class Group:
    """A parameter group whose parameters have no names. `masters` are one for each of `shapes`, or, where there are no
    shapes, one flat tensor in pieces; none where the module's own weights are. `end`: parameters, or elements.
    `experts`: whether it is one of experts' (None: nothing says it). `by_shape`: larger shapes stand first, as Muon
    puts them, and those of one shape in the module's order."""

    shapes: tuple[tuple[int, ...] | None, ...]
    masters: tuple[Stored, ...]
    end: int
    experts: bool | None = None
    by_shape: bool = False

    @classmethod
    def of(cls, optimizer: WholeOptimizer) -> list[Group]:
        """The groups of an optimizer without ZeRO."""
        found = []
        said = any(options.get("moe") for options in optimizer.options)
        for g, states in enumerate(optimizer.states):
            experts = bool(optimizer.options[g].get("moe")) if said else None
            masters = () if optimizer.masters is None else optimizer.masters[g]
            kept = (next(iter(one.values()), None) for one in states)
            shapes: list[tuple[int, ...] | None] = [m.shape for m in masters]
            shapes = shapes or [None if s is None else s.shape for s in kept]
            flat = optimizer.fused
            held, end = ((), masters[0].numel) if flat else (tuple(shapes), len(shapes))
            found.append(cls(held, masters, end, experts, bool(optimizer.options[g].get("use_muon")) and not flat))
        return found

    def runs(self) -> list[Group]:
        """The parts of it that are in the module's order, one after the other."""
        if not self.by_shape:
            return [self]
        found, at = [], 0
        for _, alike in itertools.groupby(self.shapes):
            shapes = tuple(alike)
            masters = self.masters[at : at + len(shapes)]
            found.append(replace(self, shapes=shapes, masters=masters, end=len(shapes)))
            at += len(shapes)
        return found

    def takes(self, weight: Weight) -> bool:
        """Whether a weight may be one of the group's."""
        return self.experts is None or self.experts == weight.of_experts

    def before(self, end: int, weight: Weight) -> int | None:
        """Where the weight begins if it is what ends at `end`; None if that cannot be."""
        if not self.shapes:
            at = end - weight.numel
            return at if at >= 0 and (weight.apart or _rounds(self.masters, at, weight)) else None
        at = end - 1
        if at < 0 or self.shapes[at] not in (None, weight.shape):
            return None
        return at if not self.masters or _rounds((self.masters[at],), 0, weight) else None

    def places(self, named: Named) -> list[_Places]:
        """For each weight where it may stand, so that those after it can make up the rest of the group."""
        found, reached = [], frozenset({self.end})
        for _, weight in reversed(named):
            ends = reached if self.takes(weight) else ()
            found.append(({at: end for end in ends if (at := self.before(end, weight)) is not None}, reached))
            reached |= found[-1][0].keys()
        return found[::-1]


def in_runs(named: Named, groups: Sequence[Group]) -> tuple[Shapes, ...] | None:
    """`assigned` of groups that need not be in the module's order throughout."""
    runs = [group.runs() for group in groups]
    found = assigned(named, list(itertools.chain.from_iterable(runs)))
    if found is None:
        return None
    left = iter(found)
    return tuple({n: s for one in itertools.islice(left, len(of)) for n, s in one.items()} for of in runs)


def _rounds(parts: Sequence[Stored], at: int, weight: Weight) -> bool:
    """Whether a weight is the master from element `at` of these pieces on, rounded: by the elements at both ends."""
    for lo, held in weight.ends():
        found = _elements(parts, at + lo, len(held)).astype(held.dtype)
        if not np.array_equal(held, found, equal_nan=held.dtype.kind == "f"):
            return False
    return True


def _elements(parts: Sequence[Stored], lo: int, count: int) -> np.ndarray:
    found, begin = [], 0
    for part in parts:
        first, last = max(lo - begin, 0), min(lo + count - begin, part.numel)
        if first < last:
            found.append(part.reshape((part.numel,)).elements(first, last - first).map())
        begin += part.numel
    return np.concatenate(found) if found else np.empty(0, np.float32)


# where a weight may begin in a group → where it ends there; how far the group may be when the weight is dealt
_Places = tuple[dict[int, int], frozenset[int]]
# how far each group is → (in how many ways, from where, by which group), as far as 2
_Ways = dict[tuple[int, ...], tuple[int, tuple[int, ...] | None, int | None]]


def assigned(named: Named, groups: Sequence[Group], frozen: bool = True) -> tuple[Shapes, ...] | None:
    """The one way in which the groups' parameters, each group in the module's order, are weights of the module.

    frozen: weights may be left over. None if there is no way, or more than one.
    """
    steps: list[_Ways] = [{(0,) * len(groups): (1, None, None)}]
    for places in zip(*(group.places(named) for group in groups), strict=True):
        ways: _Ways = {}
        for at, (count, _, _) in steps[-1].items():
            nexts: list[tuple[tuple[int, ...], int | None]] = [(at, None)] if frozen else []
            for g, (ends, _) in enumerate(places):
                if (end := ends.get(at[g])) is not None:
                    nexts.append(((*at[:g], end, *at[g + 1 :]), g))
            for after_all, by in nexts:
                if any(done not in reached for done, (_, reached) in zip(after_all, places, strict=True)):
                    continue
                known = ways.get(after_all, (0, None, None))[0]
                ways[after_all] = (min(known + count, 2), at, by)
        if len(ways) > _MOST:
            return None
        steps.append(ways)
    reached: tuple[int, ...] | None = tuple(group.end for group in groups)
    if reached not in steps[-1] or steps[-1][reached][0] != 1:
        return None
    found: list[list[tuple[str, Weight]]] = [[] for _ in groups]
    for one, ways in zip(reversed(named), reversed(steps), strict=False):
        assert reached is not None
        _, reached, by = ways[reached]
        if by is not None:
            found[by].append(one)
    return tuple({name: weight.shape for name, weight in reversed(group)} for group in found)
