"""A shape and a mesh on which a layout by itself can be shown: small, and true to what the layout says of lengths."""

from __future__ import annotations

import math

from ckptlab.layout.layout import Layout
from ckptlab.layout.notation import Name, Node, Number, Product, Sum, names
from ckptlab.layout.solve import RESERVED
from ckptlab.mesh import Mesh

_DEGREE, _LENGTH = 2, 4


def example(layout: Layout) -> tuple[Layout, tuple[int, ...], Mesh]:
    """(the layout with all lengths said, shape, mesh).

    Every axis has degree 2, unless the widths of an uneven cut say otherwise; a length that is not said is 4, among
    others of its term 2. Padding, units and stages are left out.
    """
    degrees = {n: _DEGREE for dim in layout.tree for n in names(dim) if n in RESERVED}
    for name, widths in layout.sizes:
        if isinstance(widths, tuple):
            over = next(dim for dim in layout.tree if name in names(dim))
            degrees.update({axis: len(widths) for axis in names(over) if axis in degrees})
    said = {*dict(layout.sizes), *dict(layout.totals), *degrees}
    lengths = {name: size for dim in layout.tree for name, size in _lengths(dim).items() if name not in said}
    full = layout.replace(sizes={**dict(layout.sizes), **lengths}, padded=(), units=(), stages=None, dims=layout.dims)
    return full, tuple(_extent(full, dim, degrees) for dim in layout.tree), Mesh(**degrees)


def _lengths(node: Node) -> dict[str, int]:
    """A length for every name."""
    if isinstance(node, Sum):
        return {name: size for term in node.terms for name, size in _lengths(term).items()}
    found = list(names(node))
    free = [name for name in found if name not in RESERVED]
    return dict.fromkeys(found, _LENGTH if len(free) < 2 else _DEGREE)


def _extent(layout: Layout, node: Node, degrees: dict[str, int]) -> int:
    if isinstance(node, Sum):
        return sum(_extent(layout, term, degrees) for term in node.terms)
    factors = node.factors if isinstance(node, Product) else (node,)
    totals, sizes = dict(layout.totals), dict(layout.sizes)
    said = [totals[f.text] for f in factors if isinstance(f, Name) and f.text in totals]
    if said:
        return said[0]
    uneven = any(isinstance(f, Name) and isinstance(sizes.get(f.text), tuple) for f in factors)
    lengths = []
    for factor in factors:
        if isinstance(factor, Number):
            lengths.append(factor.value)
        elif not isinstance(factor, Name):
            lengths.append(_extent(layout, factor, degrees))
        elif factor.text in degrees:
            lengths.append(1 if uneven else degrees[factor.text])  # the widths count every coordinate
        else:
            size = sizes[factor.text]
            lengths.append(sum(size) if isinstance(size, tuple) else size)
    return math.prod(lengths)
