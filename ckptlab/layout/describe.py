"""Questions about a layout that need no mesh: where an axis cuts, into what parts, and the whole that shards imply."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ckptlab.errors import LayoutError
from ckptlab.layout.layout import Layout
from ckptlab.layout.notation import Name, Node, Number, Product, Sum, names

Shape = tuple[int, ...]


def cut_dim(layout: Layout, axis: str) -> int | None:
    """The dim that a mesh axis cuts; None if the layout does not name the axis."""
    return next((i for i, node in enumerate(layout.tree) if axis in names(node)), None)


def sub_parameters(layout: Layout, axis: str) -> list[int]:
    """Whole lengths of the parts of a sum that `axis` cuts each on its own: `((tp q) + (tp k) + (tp v)) in` → q, k, v.

    Empty if the cut dim is no sum. LayoutError if a part's length is not said.
    """
    dim = cut_dim(layout, axis)
    node = None if dim is None else layout.tree[dim]
    if not isinstance(node, Sum):
        return []
    return [_length(layout, term) for term in node.terms]


def equal_parts(layout: Layout, axis: str) -> int:
    """How many equal parts stand before the axis: 2 for `(2 tp ffn) in`, else 1."""
    dim = cut_dim(layout, axis)
    node = None if dim is None else layout.tree[dim]
    if not isinstance(node, Product):
        return 1
    before = node.factors[: node.factors.index(Name(axis))]
    return math.prod(f.value for f in before if isinstance(f, Number))


def whole_shape(layout: Layout, shards: Sequence[Shape], axis: str = "tp") -> Shape:
    """The whole's (padded) shape that shards imply, `shards[i]` being that of coordinate i on `axis`.

    A dim that the axis cuts is as long as its shards together, parts that every rank holds counted once.
    LayoutError if the number of dims is not the layout's.
    """
    if len(layout.tree) != len(shards[0]):
        raise LayoutError(
            f"{layout.text!r} has {len(layout.tree)} dims, the shards have {len(shards[0])}: {tuple(shards[0])}"
        )
    shape = []
    for dim, node in enumerate(layout.tree):
        if axis not in names(node):
            shape.append(shards[0][dim])
            continue
        held_by_all = [t for t in node.terms if axis not in names(t)] if isinstance(node, Sum) else []
        repeated = sum(_length(layout, t) for t in held_by_all)
        shape.append(sum(s[dim] for s in shards) - (len(shards) - 1) * repeated)
    return tuple(shape)


def on_degree(layout: Layout, axis: str, degree: int) -> Layout:
    """The layout for another degree of a mesh axis: widths of an uneven cut over it become totals, to be cut evenly."""
    uneven = {n: w for n, w in layout.sizes if isinstance(w, tuple) and len(w) != degree and _follows(layout, n, axis)}
    if not uneven:
        return layout
    return layout.replace(
        sizes={n: w for n, w in layout.sizes if n not in uneven},
        totals={**dict(layout.totals), **{n: sum(w) for n, w in uneven.items()}},
    )


def _follows(layout: Layout, name: str, axis: str) -> bool:
    return any(name in names(node) and axis in names(node) for node in layout.tree)


def _length(layout: Layout, term: Node) -> int:
    """The whole length of a term, from the layout's totals and sizes."""
    totals, sizes = dict(layout.totals), dict(layout.sizes)
    for name in names(term):
        if name in totals:
            return totals[name]
    length = 1
    for factor in term.factors if isinstance(term, Product) else (term,):
        if isinstance(factor, Number):
            length *= factor.value
        elif isinstance(factor, Name) and factor.text in sizes:
            size = sizes[factor.text]
            length *= sum(size) if isinstance(size, tuple) else size
        elif not (isinstance(factor, Name) and factor.text == "tp"):
            raise LayoutError(
                f"{layout.text!r}: how long {factor} is cannot be told from the shards: say it in sizes or totals"
            )
    return length
