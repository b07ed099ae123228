"""Same-shaped layers as one line: `{2..5}.mlp.dense.weight` for four tensors."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from ckptlab.catalog import Tensor
from ckptlab.catalog.stacks import is_number
from ckptlab.words import ranges, shape_text


@dataclass(frozen=True)
class Line:
    """Tensors that differ in the numbers of their name alone (and in their pp stage); `tensor` is the first of them.

    `name` has ranges for the numbers that differ, `stages` are the pp stages of each, without repeats, `elements` those
    of all.
    """

    name: str
    tensor: Tensor
    count: int
    stages: tuple[tuple[int, ...], ...]
    elements: int

    @property
    def shape(self) -> str:
        """`101 × 16`; `101 (112) × 16` where 101 rows are padded to 112."""
        padded = dict(self.tensor.layout.padded)
        sizes = (f"{n} ({padded[i]})" if i in padded else str(n) for i, n in enumerate(self.tensor.shape))
        return shape_text(sizes)

    @property
    def layout(self) -> str:
        """The notation, and what is beside it; `?` where nothing says how the tensor would be cut over tp."""
        layout = self.tensor.layout
        if not (self.tensor.layout_known or self.is_cut):
            return "?"
        uneven = [f"{name} {'+'.join(map(str, n))}" for name, n in layout.sizes if isinstance(n, tuple)]
        beside = ["uneven" if len(u) > 20 else u for u in uneven] + [
            word for replicas, word in (("mean", "averaged"), ("sum", "summed")) if layout.replicas == replicas
        ]
        return ", ".join([layout.text, *beside])

    @property
    def is_cut(self) -> bool:
        """The notation says more than the names of the dims."""
        layout = self.tensor.layout
        return layout.text.split() != list(layout.dims)

    @property
    def pp(self) -> str:
        """Stages: `0–1` dealt over them, `0+1` copies on both."""
        if all(len(s) == 1 for s in self.stages):
            return ranges(s[0] for s in self.stages)
        return ", ".join("+".join(map(str, s)) for s in self.stages)

    def kind(self, usual: Mapping[str, frozenset[str]]) -> str:
        """`frozen`; `parameter: fp32` for a tensor with other states than are `usual` for its kind."""
        kind, held = self.tensor.kind, self.tensor.states
        return kind if usual.get(kind) == frozenset(held) else f"{kind}: {', '.join(held) or 'no state'}"


def fold(tensors: Iterable[Tensor]) -> list[Line]:
    """One line for each kind of tensor, in the order of the first of each."""
    groups: dict[tuple, list[tuple[Tensor, list[int]]]] = {}
    for tensor in tensors:
        parts = tensor.name.split(".")
        numbers = [int(p) for p in parts if is_number(p)]
        if not numbers or len(parts) == 1:
            groups[(tensor.name,),] = [(tensor, numbers)]  # like no other
            continue
        pattern = tuple(["" if is_number(p) else p for p in parts])
        layout = tensor.layout
        alike = (layout.text, layout.padded, layout.sizes, layout.replicas, tensor.layout_known, tensor.kind)
        key = (pattern, tensor.shape, frozenset(tensor.states.items()), *alike)
        groups.setdefault(key, []).append((tensor, numbers))
    return [_line(pattern, members) for (pattern, *_), members in groups.items()]


def usual_states(lines: Iterable[Line]) -> dict[str, frozenset[str]]:
    """The states that most tensors of each kind have."""
    seen: defaultdict[str, Counter[frozenset[str]]] = defaultdict(Counter)
    for line in lines:
        seen[line.tensor.kind][frozenset(line.tensor.states)] += line.count
    return {kind: states.most_common(1)[0][0] for kind, states in seen.items()}


def unfolded(tensors: Iterable[Tensor]) -> list[Line]:
    """A line for every tensor."""
    return [Line(t.name, t, 1, (t.stages,), t.numel) for t in tensors]


def _line(pattern: tuple[str, ...], members: list[tuple[Tensor, list[int]]]) -> Line:
    first = members[0][0]
    if len(members) == 1:
        return Line(first.name, first, 1, (first.stages,), first.numel)
    columns = _numbers([numbers for _, numbers in members])
    name = ".".join(part or next(columns) for part in pattern)
    stages = tuple(dict.fromkeys(t.stages for t, _ in members))
    return Line(name, first, len(members), stages, first.numel * len(members))


def _numbers(rows: list[list[int]]) -> Iterator[str]:
    for column in zip(*rows, strict=True):
        text = ranges(column, to="..").replace(" ", "")
        yield text if text.isdecimal() else f"{{{text}}}"
