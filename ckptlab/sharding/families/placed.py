"""Where a tensor lies that is made of pieces of others: what follows from where those lie."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from ckptlab.catalog import Catalog, Piece
from ckptlab.errors import LayoutError, NotationError
from ckptlab.layout import Cut, DimCut, Layout
from ckptlab.layout.notation import Name, Product, Sum, names, parse
from ckptlab.layout.rows import elements, intersect, intervals
from ckptlab.mesh import Mesh
from ckptlab.sharding.strategies import dim_names

Held = dict[tuple[int, ...], np.ndarray]
"""Coordinate on some axes → the indices of a dim that are held there, ascending."""


def layout_of(
    shape: tuple[int, ...], pieces: Sequence[Piece], base: Catalog, text: str | None, lengths: Mapping[str, int]
) -> Layout | None:
    """The layout of a tensor that is made of these pieces, on the mesh that the base's tensors are cut over. text: the
    line of notation that says what it is made of, lengths: those in it. None where no line that is known here says it:
    then no rank is said to hold a part of it."""
    cuts = [base.tensors[piece.name].cut for piece in pieces]
    for piece, cut in zip(pieces, cuts, strict=True):
        if any(isinstance(dim, int) and cut.dims[d].axes for d, dim in enumerate(piece.dims)):
            return None
    called = dims(text, len(shape))
    terms, sizes = [], {}
    for dim, size in enumerate(shape):
        held = _held(dim, pieces, cuts, base.mesh)
        found = None if held is None else _term(called[dim], size, *held, base.mesh, _tree(text, dim), lengths)
        if found is None:
            return None
        terms.append(found[0])
        sizes.update(found[1])
    layout = Layout(" ".join(terms), dims=called, sizes=sizes)
    try:
        layout.resolve(shape, base.mesh)
    except LayoutError:  # one axis in two dims
        return None
    return layout


def dims(text: str | None, ndim: int) -> tuple[str, ...]:
    """Names of dims: those of the notation where a dim is one name there, else out, in, …"""
    tree = parse(text) if text is not None else ()
    said = [node.text if isinstance(node, Name) else None for node in tree] or [None] * ndim
    free = iter([n for n in (*dim_names(max(ndim, 2)), *(f"dim{i}" for i in range(ndim))) if n not in said])
    return tuple(next(free) if name is None else name for name in said)


def _tree(text: str | None, dim: int) -> Name | Product | Sum | None:
    node = parse(text)[dim] if text is not None else None
    return node if isinstance(node, (Name, Product, Sum)) else None


def _held(dim: int, pieces: Sequence[Piece], cuts: Sequence[Cut], mesh: Mesh) -> tuple[tuple[str, ...], Held] | None:
    """The axes that cut a dim, and what is held of it at each coordinate on them; None where pieces that have the same
    of it are cut otherwise."""
    parts: dict[object, tuple[tuple[str, ...], Held]] = {}
    for piece, cut in zip(pieces, cuts, strict=True):
        fixed = dict(piece.at)
        if dim in fixed:
            key: object = fixed[dim]
            one: tuple[tuple[str, ...], Held] = ((), {(): np.array([fixed[dim]], np.int64)})
        else:
            d, runs = next((d, of[1]) for d, of in enumerate(piece.dims) if not isinstance(of, int) and of[0] == dim)
            key, one = runs[:, [0, 2, 3, 4]].tobytes(), _held_of(cut.dims[d], runs)
        if key in parts and not _same(parts[key], one):
            return None
        parts[key] = one
    used = {axis for axes, _ in parts.values() for axis in axes}
    axes = tuple(axis for axis in mesh.axes if axis in used)
    held: Held = {}
    for place in itertools.product(*(range(mesh[axis]) for axis in axes)):
        at = dict(zip(axes, place, strict=True))
        held[place] = np.sort(np.concatenate([of[tuple(at[a] for a in own)] for own, of in parts.values()]))
    return axes, held


def _held_of(cut: DimCut, runs: np.ndarray) -> tuple[tuple[str, ...], Held]:
    """What of the seen dim lies at each coordinate of a stored one's dim."""
    there = runs[:, [1, 0, 2, 3, 5, 4]]
    held: Held = {}
    for place in cut.rows:
        plain = intervals(intersect(cut.runs[place], there))
        held[place] = np.sort(elements(plain[:, 1], plain[:, 2]))
    return cut.axes, held


def _same(a: tuple[tuple[str, ...], Held], b: tuple[tuple[str, ...], Held]) -> bool:
    return a[0] == b[0] and all(np.array_equal(a[1][place], b[1][place]) for place in a[1])


def _term(
    name: str,
    size: int,
    axes: tuple[str, ...],
    held: Held,
    mesh: Mesh,
    line: Name | Product | Sum | None,
    lengths: Mapping[str, int],
) -> tuple[str, dict[str, int | tuple[int, ...]]] | None:
    """The term of notation for a dim of which ranks hold that, and sizes beside it."""
    for term, sizes in _candidates(name, axes, held, line, lengths):
        try:
            dim = Layout(term, dims=("dim",), sizes=sizes).resolve((size,), mesh).dims[0]
        except (LayoutError, NotationError):
            continue
        if dim.axes == axes and all(np.array_equal(dim.positions(at), rows) for at, rows in held.items()):
            return term, sizes
    return None


def _candidates(
    name: str, axes: tuple[str, ...], held: Held, line: Name | Product | Sum | None, lengths: Mapping[str, int]
) -> Iterator[tuple[str, dict[str, int | tuple[int, ...]]]]:
    if not axes:
        yield name, {}
        return
    over = " ".join(axes)
    if line is not None and "+" in str(line):
        told = [n for n in dict.fromkeys(names(line)) if n in lengths]
        if isinstance(line, Sum):
            parts = " + ".join(f"({over} {str(t)[1:-1] if isinstance(t, Product) else t})" for t in line.terms)
            yield f"({parts})", {n: lengths[n] for n in told[1:]}
        else:
            yield f"({over} {str(line)[1:-1]})", {n: lengths[n] for n in told[1:]}
    for term in (f"({over} {name})", f"(2 {over} {name})", f"(3 {over} {name})", f"({name} {over})"):
        yield term, {}
    if len(axes) == 1 and all(len(of) for of in held.values()):  # who has nothing of it has no share of its heads
        yield f"({over} {name})", {name: tuple(len(held[at]) for at in sorted(held))}
