"""A shape and a mesh on which a layout by itself can be shown: small, and true to what the layout says of lengths."""

from __future__ import annotations

import math

from ckptlab.layout.layout import Layout
from ckptlab.layout.notation import Name, Node, Number, Product, Sum, names
from ckptlab.layout.solve import RESERVED
from ckptlab.mesh import Mesh

_DEGREE, _LENGTH = 2, 4


def example(layout: Layout) -> tuple[tuple[int, ...], Mesh]:
    """(shape, mesh): every axis has degree 2, unless widths of an uneven cut say otherwise; a length that is not said
    is 4."""
    degrees = {n: _DEGREE for dim in layout.tree for n in names(dim) if n in RESERVED}
    for name, widths in layout.sizes:
        if isinstance(widths, tuple):
            over = next(dim for dim in layout.tree if name in names(dim))
            degrees.update({axis: len(widths) for axis in names(over) if axis in degrees})
    return tuple(_extent(layout, dim, degrees) for dim in layout.tree), Mesh(**degrees)


def _extent(layout: Layout, node: Node, degrees: dict[str, int]) -> int:
    if isinstance(node, Sum):
        return sum(_extent(layout, term, degrees) for term in node.terms)
    factors = node.factors if isinstance(node, Product) else (node,)
    totals, sizes = dict(layout.totals), dict(layout.sizes)
    said = [totals[f.text] for f in factors if isinstance(f, Name) and f.text in totals]
    if said:
        return said[0]
    uneven = [w for f in factors if isinstance(f, Name) and isinstance(w := sizes.get(f.text), tuple)]
    lengths = [sum(widths) for widths in uneven]
    for factor in factors:
        if isinstance(factor, Number):
            lengths.append(factor.value)
        elif not isinstance(factor, Name):
            lengths.append(_extent(layout, factor, degrees))
        elif factor.text in degrees:
            lengths.append(1 if uneven else degrees[factor.text])
        elif not isinstance(size := sizes.get(factor.text, _LENGTH), tuple):
            lengths.append(size)
    return math.prod(lengths)
