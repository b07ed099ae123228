"""From notation to numbers: the lengths that a layout leaves open, and the rows that a coordinate holds."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import product

from ckptlab.errors import LayoutError
from ckptlab.layout.notation import Name, Node, Number, Product, Sum, below, names
from ckptlab.layout.rows import Interval, Rows, nest, rows_of
from ckptlab.mesh import Mesh

RESERVED = ("pp", "dp", "tp", "ep")
"""Names that are mesh axes whether or not the mesh has them (then of degree 1)."""

BLOCKS = 200
"""Blocks of one dim that are told by name."""

Coordinate = dict[str, int]


@dataclass
class Geometry:
    """One layout on one mesh: fills `lengths` so that every dim has its size, then says what each rank holds.

    An *extent* is the length of a part of the notation in the whole, mesh axes included. It is affine in
    any one unknown length, since no name stands twice in a term: two evaluations solve for it.
    """

    dims: tuple[Node, ...]
    sizes: tuple[int, ...]
    mesh: Mesh
    lengths: dict[str, int | tuple[int, ...]]
    totals: Mapping[str, int]
    units: Mapping[str, int]
    widths_of: dict[str, str] = field(default_factory=dict)  # uneven name → the axis whose coordinates it follows

    def __post_init__(self) -> None:
        for name in self.lengths.keys() | self.totals.keys() | self.units.keys():
            if self.is_axis(name):
                raise LayoutError(f"{name} is a mesh axis: its length is its degree, {name}({self.degree(name)})")
        cut: dict[str, int] = {}
        for i, dim in enumerate(self.dims):
            leaves = set(self._check_axes(dim, frozenset(), None))
            for axis in leaves & cut.keys():
                raise LayoutError(f"mesh axis {axis} cuts dim {cut[axis]} and dim {i}; it may cut one")
            cut |= dict.fromkeys(leaves, i)
        self._solve()
        self._check_units()

    def axes(self, dim: int) -> tuple[str, ...]:
        """The mesh axes (parts of split ones) that cut a dim, in mesh order."""
        found = {leaf for name in names(self.dims[dim]) if name in self.mesh for leaf in self.mesh.leaves(name)}
        return tuple(axis for axis in self.mesh.axes if axis in found)

    def rows(self, dim: int) -> dict[tuple[int, ...], Rows]:
        """Coordinate on `axes(dim)` → the rows held there."""
        axes = self.axes(dim)
        held = {}
        for place in product(*(range(self.mesh[axis]) for axis in axes)):
            coordinate = dict(zip(axes, place, strict=True))
            for name in names(self.dims[dim]):
                if name in self.mesh:
                    coordinate[name] = self.mesh.index(name, coordinate)
            held[place] = rows_of(self._held(self.dims[dim], coordinate)[1])
        return held

    def parts(self, dim: int) -> list[tuple[str, int]]:
        """(name, length in the whole) of what follows one another in a dim, each cut on its own; else nothing.

        Of a sum its terms (`q`, `k`, `v`), of `(3 tp out)` three that are equal (`part 0` …).
        """
        node = self.dims[dim]
        if isinstance(node, Sum):
            return [(self._part_name(term), self._extent(term, {})) for term in node.terms]
        if isinstance(node, Product) and isinstance(node.factors[0], Number):
            n = node.factors[0].value
            return [(f"part {k}", self.sizes[dim] // n) for k in range(n)] if n > 1 else []
        return []

    def blocks(self, dim: int) -> list[tuple[int, str, int, int]]:
        """(depth, name, start, length) of the blocks in which what a rank holds of a dim lies, one in the other: of
        `(tp head qkv d)` the heads (`head 3`), and q, k and v in each (a name with a letter for each of them).

        Names count within what they lie in. Nothing where lengths differ from one coordinate to the next, or of more
        than BLOCKS.
        """
        if self.widths_of:
            return []
        found = self._blocks(self.dims[dim], 0, 0)
        return found if len(found) <= BLOCKS else []

    def _blocks(self, node: Node, start: int, depth: int) -> list[tuple[int, str, int, int]]:
        if isinstance(node, Sum):
            found, at = [], start
            for term in node.terms:
                length = self._extent(term, {})
                found += [(depth, self._part_name(term), at, length)] if depth else []
                found += self._blocks(term, at, depth + 1 if depth else 0)
                at += length
            return found
        if not isinstance(node, Product):
            return []
        axes = [i for i, f in enumerate(node.factors) if isinstance(f, Name) and self.is_axis(f.text)]
        begin = axes[-1] + 1 if axes else 0
        outer, inner = node.factors[begin:-1], node.factors[-1]
        if not (outer or (depth and isinstance(inner, Sum))) or (not axes and not depth):
            return []
        whole, found = self._extent(node, {}), []
        level, size = depth, self._extent_of_factors(node.factors[begin:], {})
        for factor in outer:
            n = self._extent(factor, {})
            size //= max(n, 1)
            if whole // max(size, 1) > BLOCKS:
                return []
            letters = str(factor) if len(str(factor)) == n and str(factor).isalpha() else ""
            for k in range(whole // max(size, 1)):
                name = letters[k % n] if letters else f"{factor} {k}"
                found.append((level, name, start + k * size, size))
            level += 1
        if isinstance(inner, Sum):
            inside = self._extent(inner, {})
            for at in range(start, start + whole, inside) if whole // inside <= BLOCKS else ():
                found += self._blocks(inner, at, max(level, 1))
        return found

    def _part_name(self, term: Node) -> str:
        return " ".join(name for name in names(term) if not self.is_axis(name)) or str(term)

    def is_axis(self, name: str) -> bool:
        return name in self.mesh or name in RESERVED

    def degree(self, axis: str) -> int:
        if axis not in self.mesh:
            return 1  # a reserved name
        return self.mesh[axis]

    def _check_axes(self, node: Node, above: frozenset[str], nearest: str | None) -> list[str]:
        """The axes under a node; notes which axis an uneven name follows, refuses an axis twice in a term."""
        if isinstance(node, Name):
            if self.is_axis(node.text):
                leaves = list(self.mesh.leaves(node.text)) if node.text in self.mesh else []
                twice = above.intersection(leaves)
                if twice:
                    raise LayoutError(f"mesh axis {min(twice)} cuts one term twice ({node} has it among its parts)")
                return leaves
            if isinstance(self.lengths.get(node.text), tuple):
                self._follow(node.text, nearest)
            return []
        found: list[str] = []
        if isinstance(node, Sum):
            for term in node.terms:
                found += self._check_axes(term, above, nearest)
        elif isinstance(node, Product):
            for factor in node.factors:
                found += self._check_axes(factor, above.union(found), nearest)
                if isinstance(factor, Name) and self.is_axis(factor.text):
                    nearest = factor.text
        return found

    def _follow(self, name: str, axis: str | None) -> None:
        widths = self.lengths[name]
        assert isinstance(widths, tuple)
        if axis is None:
            raise LayoutError(f"{name} has a width for each coordinate, but no mesh axis stands before it in its term")
        if len(widths) != self.degree(axis):
            raise LayoutError(f"{name} has {len(widths)} widths {widths} for {axis}({self.degree(axis)})")
        if self.widths_of.setdefault(name, axis) != axis:
            raise LayoutError(f"{name} follows mesh axis {self.widths_of[name]} in one term and {axis} in another")

    def _solve(self) -> None:
        equations = [
            (dim, size, f"dim {i} {_quote(dim)}")
            for i, (dim, size) in enumerate(zip(self.dims, self.sizes, strict=True))
        ]
        for name, total in self.totals.items():
            terms = [term for dim in self.dims for term in _terms(dim, name)]
            equations = [(term, total, f"the term {_quote(term)}") for term in terms] + equations
        pending = True
        while pending:
            pending = False
            for node, whole, what in equations:
                unknown = self._unknown(node)
                if len(unknown) == 1:
                    self._solve_one(node, unknown[0], whole, what)
                    pending = True
        open_names = sorted({name for dim in self.dims for name in self._unknown(dim)})
        if open_names:
            raise LayoutError(
                f"the lengths of {', '.join(open_names)} do not follow from the shape: give sizes or totals"
            )
        for node, whole, what in equations:
            found = self._extent(node, {})
            if found != whole:
                raise LayoutError(f"{what} is {found} long, expected {whole}")

    def _unknown(self, node: Node) -> list[str]:
        return list(dict.fromkeys(n for n in names(node) if not self.is_axis(n) and n not in self.lengths))

    def _solve_one(self, node: Node, name: str, whole: int, what: str) -> None:
        rest = whole - self._with(node, name, 0)
        step = self._with(node, name, 1) - self._with(node, name, 0)
        axes = self._axes_over(name)
        parallel = math.prod(self.degree(axis) for axis in axes)
        if name in self.units and step and rest >= 0 and rest * parallel % step == 0:
            self._check_unit(name, rest * parallel // step, axes)
        if rest < 0 or (rest if step == 0 else rest % step):
            fixed = f"{whole} - {whole - rest} = {rest}" if rest != whole else str(whole)
            over = f" ({self._spell(axes)})" if axes else ""
            raise LayoutError(f"{what}: no length of {name} fits, {fixed} is not a multiple of {step}{over}")
        self.lengths[name] = rest // step if step else 0

    def _with(self, node: Node, name: str, length: int) -> int:
        self.lengths[name] = length
        try:
            return self._extent(node, {})
        finally:
            del self.lengths[name]

    def _axes_over(self, name: str) -> list[str]:
        """The mesh axes that divide the length of a name: beside it in its term and in terms around it."""
        return next(axes for dim in self.dims if (axes := self._path(dim, name)) is not None)

    def _path(self, node: Node, name: str) -> list[str] | None:
        if node == Name(name):
            return []
        inner = next((axes for part in below(node) if (axes := self._path(part, name)) is not None), None)
        beside = [f.text for f in below(node) if isinstance(f, Name) and self.is_axis(f.text)]
        return inner if inner is None or isinstance(node, Sum) else beside + inner

    def _spell(self, axes: list[str]) -> str:
        return " * ".join(f"{axis} {self.degree(axis)}" for axis in axes)

    def _check_units(self) -> None:
        for name, unit in self.units.items():
            length = self.lengths[name]
            axes = self._axes_over(name)
            if isinstance(length, int):
                self._check_unit(name, length * math.prod(self.degree(axis) for axis in axes), axes)
                continue
            for k, width in enumerate(length):
                if width % unit:
                    raise LayoutError(
                        f"{name}: width {width} at {self.widths_of[name]} {k} is not a multiple of {unit}"
                    )

    def _check_unit(self, name: str, length: int, axes: list[str]) -> None:
        """`length` elements over all coordinates of `axes` must be whole units on each."""
        unit = self.units[name]
        if length % unit:
            raise LayoutError(f"{name}: {length} is not a multiple of its unit {unit}")
        if length // unit % math.prod(self.degree(axis) for axis in axes):
            raise LayoutError(f"{name}: {length // unit} units of {unit} cannot be divided over {self._spell(axes)}")

    def _extent(self, node: Node, at: Coordinate) -> int:
        if isinstance(node, Number):
            return node.value
        if isinstance(node, Name):
            return self.degree(node.text) if self.is_axis(node.text) else self._length(node.text, at)
        if isinstance(node, Sum):
            return sum(self._extent(term, at) for term in node.terms)
        return self._extent_of_factors(node.factors, at)

    def _extent_of_factors(self, factors: tuple[Node, ...], at: Coordinate) -> int:
        if not factors:
            return 1
        first, tail = factors[0], factors[1:]
        if isinstance(first, Name) and self._is_followed(first.text, tail):
            blocks = range(self.degree(first.text))
            return sum(self._extent_of_factors(tail, at | {first.text: k}) for k in blocks)
        return self._extent(first, at) * self._extent_of_factors(tail, at)

    def _is_followed(self, axis: str, tail: tuple[Node, ...]) -> bool:
        return any(self.widths_of.get(name) == axis for node in tail for name in names(node))

    def _length(self, name: str, at: Coordinate) -> int:
        length = self.lengths[name]
        if isinstance(length, int):
            return length
        axis = self.widths_of[name]
        if axis not in at:
            raise LayoutError(f"{name} differs from one {axis} coordinate to the next: its term has no one length")
        return length[at[axis]]

    def _held(self, node: Node, at: Coordinate) -> tuple[int, list[Interval]]:
        """The extent of a node, and what coordinate `at` holds of it, ascending."""
        if isinstance(node, Name) and self.is_axis(node.text):
            return self.degree(node.text), [(at.get(node.text, 0), 1, 1, 0)]
        if isinstance(node, Name | Number):
            extent = self._extent(node, at)
            return extent, [(0, extent, 1, 0)]
        if isinstance(node, Product):
            return self._held_of_factors(node.factors, at)
        offset = 0
        held: list[Interval] = []
        for term in node.terms:
            extent, part = self._held(term, at)
            held += [(offset + start, n, count, stride) for start, n, count, stride in part]
            offset += extent
        return offset, held

    def _held_of_factors(self, factors: tuple[Node, ...], at: Coordinate) -> tuple[int, list[Interval]]:
        if not factors:
            return 1, [(0, 1, 1, 0)]
        first, tail = factors[0], factors[1:]
        inner_extent, inner = self._held_of_factors(tail, at)
        if isinstance(first, Name) and self._is_followed(first.text, tail):
            blocks = [self._extent_of_factors(tail, at | {first.text: k}) for k in range(self.degree(first.text))]
            before = sum(blocks[: at.get(first.text, 0)])
            return sum(blocks), [(before + start, n, count, stride) for start, n, count, stride in inner]
        extent, outer = self._held(first, at)
        return extent * inner_extent, nest(outer, inner, inner_extent)


def _terms(node: Node, name: str) -> list[Node]:
    """The innermost terms in which a name stands."""
    if isinstance(node, Name):
        return [node] if node.text == name else []
    if isinstance(node, Product) and Name(name) in node.factors:
        return [node]
    return [found for inside in below(node) for found in _terms(inside, name)]


def _quote(node: Node) -> str:
    return f"'{node}'"
