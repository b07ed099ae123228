"""Questions about a layout that need no mesh: where an axis cuts, into what parts, and the whole that shards imply."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from ckptlab.aliases import Shape
from ckptlab.errors import LayoutError
from ckptlab.layout.layout import Layout
from ckptlab.layout.notation import Name, Node, Number, Product, Sum, below, names, rebuilt, show
from ckptlab.layout.solve import RESERVED
from ckptlab.mesh import Mesh


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
    """The layout for another degree of a mesh axis: widths of an uneven cut over it become totals, to be cut evenly.

    A total that the layout does not tell is left to the shape.
    """
    uneven = {n: w for n, w in layout.sizes if isinstance(w, tuple) and len(w) != degree and _follows(layout, n, axis)}
    if not uneven:
        return layout
    found = {n: _term_total(layout, n, axis, len(w)) for n, w in uneven.items()}
    return layout.replace(
        sizes={n: w for n, w in layout.sizes if n not in uneven},
        totals={**dict(layout.totals), **{n: total for n, total in found.items() if total is not None}},
    )


def without(layout: Layout, axes: Iterable[str]) -> Layout:
    """The layout over the other mesh axes alone: what these cut is whole. Widths of an uneven cut in their dims go."""
    left_out = set(axes)
    touched = [bool(left_out & set(names(node))) for node in layout.tree]
    if not any(touched):
        return layout
    tree = tuple(_less(node, left_out) for node in layout.tree)
    uneven = {n for node, cut in zip(layout.tree, touched, strict=True) if cut for n in names(node)}
    known = {name for node in tree for name in names(node)}

    def kept(lengths: Iterable[tuple[str, Any]]) -> dict[str, Any]:
        return {n: k for n, k in lengths if n in known and not (isinstance(k, tuple) and n in uneven)}

    return layout.replace(text=show(tree), dims=layout.dims, sizes=kept(layout.sizes), totals=kept(layout.totals))


def _less(node: Node, left_out: set[str]) -> Node:
    if not isinstance(node, Product):
        return rebuilt(node, lambda term: _less(term, left_out))
    kept = tuple(_less(f, left_out) for f in node.factors if not (isinstance(f, Name) and f.text in left_out))
    return kept[0] if len(kept) == 1 else Product(kept)


def with_lengths(layout: Layout, known: Layout, shape: Shape, mesh: Mesh) -> Layout:
    """The layout with what it leaves open taken from a layout of the same tensor that is known to fit on `mesh`: names
    of dims that have none, whole lengths of the parts of a sum in their order (`((tp q) + (kv k) + (kv v)) in` from
    `((tp a) + (tp b) + (tp c)) in`)."""
    told = {name for name, _ in (*layout.sizes, *layout.totals)}
    totals: dict[str, int] = {}
    summed = any(isinstance(node, Sum) for node in layout.tree)
    for node, parts in zip(layout.tree, known.parts(shape, mesh), strict=True) if summed else ():
        terms = node.terms if isinstance(node, Sum) and len(node.terms) == len(parts) else ()
        lasts = [list(names(term))[-1] for term in terms]  # of `kv k` the length: what stands before are mesh axes
        totals.update((n, length) for n, (_, length) in zip(lasts, parts, strict=False) if n not in (*told, *RESERVED))
    dims = [k if d == f"dim{i}" else d for i, (d, k) in enumerate(zip(layout.dims, known.dims, strict=True))]
    dims = dims if len(set(dims)) == len(dims) else list(layout.dims)
    return layout.replace(totals={**dict(layout.totals), **totals}, dims=dims)


def _follows(layout: Layout, name: str, axis: str) -> bool:
    return any(name in names(node) and axis in names(node) for node in layout.tree)


def _term_total(layout: Layout, name: str, axis: str, degree: int) -> int | None:
    """The whole length of the term in which an uneven name stands beside its axis; None where the layout alone does not
    tell it."""
    term = next((t for node in layout.tree if (t := _term_of(node, name))), None)
    if term is None or Name(axis) not in term.factors:
        return None
    sizes, total = dict(layout.sizes), 0
    for k in range(degree):
        length = 1
        for factor in term.factors:
            size = factor.value if isinstance(factor, Number) else sizes.get(str(factor))
            if factor == Name(axis):
                continue
            if size is None:
                return None
            length *= size[k] if isinstance(size, tuple) else size
        total += length
    return total


def _term_of(node: Node, name: str) -> Product | None:
    """The innermost product that a name is a factor of."""
    if isinstance(node, Product) and Name(name) in node.factors:
        return node
    return next((found for part in below(node) if (found := _term_of(part, name))), None)


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
