"""How a program that begins with a family's tensors cuts them over tensor-parallel ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ckptlab.arguments import explained
from ckptlab.errors import LayoutError
from ckptlab.layout import Layout, cut_dim
from ckptlab.layout.notation import Name, Product, names, parse
from ckptlab.sharding.families.family import Family
from ckptlab.sharding.families.lines import Line
from ckptlab.sharding.families.numbers import numbers as numbers_of
from ckptlab.sharding.families.tables import solved
from ckptlab.sharding.strategies import REGISTRY, Shape, Strategy


@explained
@dataclass(frozen=True)
class Start:
    """A strategy for names of a family's left side, on `tp` ranks: the program's own, but that joined heads are cut
    between key/value heads alone, and a vocabulary that tp does not divide is padded to what it does."""

    family: Family
    program: Strategy
    tp: int
    numbers: tuple[tuple[str, int], ...] = ()

    def layout(self, name: str, shards: Sequence[Shape]) -> Layout | None:
        """See `Strategy.layout`. LayoutError where tp does not divide the heads."""
        layout, (shape, *_) = self.program.layout(name, shards), shards
        if layout is None or cut_dim(layout, "tp") != 0:
            return layout
        line = self._joined(name)
        if line is None:
            rest = -shape[0] % self.tp
            vocabulary = rest and layout.tree[0] == Product((Name("tp"), Name(layout.dims[0])))
            return layout.replace(padded={0: shape[0] + rest}) if vocabulary else layout
        text = str(line.text)
        lengths = solved(text, shape, {**dict(self.numbers), **dict(line.lengths)}, name)
        first, *others = names(parse(text)[0])
        if lengths[first] % self.tp:
            raise LayoutError(f"{name}: {lengths[first]} of {first} are not divided by tp {self.tp}")
        sizes = {n: lengths[n] for n in dict.fromkeys(others)}
        return Layout(f"(tp {text[1:]}", dims=layout.dims, sizes=sizes)

    def _joined(self, name: str) -> Line | None:
        """The line by which heads are joined in a tensor."""
        match = self.family.match(name, "left", dict(self.numbers))
        line = None if match is None else self.family.lines[match[0]]
        if line is None or line.text is None or line.joined != "left":
            return None
        node = parse(line.text)[0]
        return line if isinstance(node, Product) and len(set(names(node))) > 1 else None


@explained
def start(family: Family, tp: int, numbers: Mapping[str, int]) -> Start:
    """The strategy of a family on `tp` ranks. numbers: heads, kv_heads. LayoutError where the family does not know how
    its program cuts tensors."""
    if family.strategy is None:
        raise LayoutError(f"the family {family.name} does not say how its program cuts tensors: give a strategy")
    return Start(family, REGISTRY.get(family.strategy), tp, tuple(sorted(numbers_of(None, numbers).items())))
