"""Which mesh axes cut a grid of chunks, and how: what boxes prove, and what somebody has to say.

`.metadata` names no mesh. A dim that lies in n intervals is cut by axes whose degrees make n; torch cuts each as
`torch.chunk` does, pieces of ceil(size / degree). Of several ways that fit, the one is taken in which the ranks that
stored the chunks stand where it puts them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from ckptlab.errors import LayoutError
from ckptlab.formats.dcp.boxes import Grid, Span
from ckptlab.layout import Cut, DimCut, Layout
from ckptlab.layout.notation import Name, Node, Number, Product, Sum, names
from ckptlab.mesh import Mesh
from ckptlab.sharding.strategies import dim_names

NEUTRAL = "shard"
_SAMPLE = 64  # cells whose ranks are compared with where a way of cutting puts them


Parts = int | tuple[int, ...]


@dataclass(frozen=True)
class DimAxes:
    """How a dim is cut: in `parts` first, so many equal ones or of these lengths, each by every axis in turn, the
    outermost first."""

    axes: tuple[str, ...] = ()
    parts: Parts = 1

    @property
    def count(self) -> int:
        """In how many parts."""
        return self.parts if isinstance(self.parts, int) else len(self.parts)

    def fits(self, size: int) -> bool:
        """Whether the parts make up a dim of that size."""
        return not size % self.parts if isinstance(self.parts, int) else sum(self.parts) == size


Ways = tuple[DimAxes, ...]
Axes = tuple[tuple[str, int], ...]  # name and degree, the slowest first


@dataclass(frozen=True)
class Laid:
    """A grid on mesh axes: its layout and cut."""

    layout: Layout
    cut: Cut

    def within(self, shape: tuple[int, ...]) -> Laid:
        """The same of a tensor that is smaller: what is beyond is padding."""
        padded = {d: size for d, (size, n) in enumerate(zip(self.cut.shape, shape, strict=True)) if size > n}
        if not padded:
            return self
        return Laid(self.layout.replace(padded=padded), replace(self.cut, logical=shape))


def neutral_axes(grids: Iterable[Grid]) -> Axes:
    """`shard0`, `shard1`, … of the degrees that explain the grids: those of the tensor that is cut on most dims; where
    each is cut on one alone, the greatest number of pieces, or two numbers where the smaller divides it."""
    counts = {tuple(n for n in grid.counts if n > 1) for grid in grids}
    deepest = max(counts, key=lambda c: (len(c), math.prod(c)), default=())
    if len(deepest) > 1:
        return tuple((f"{NEUTRAL}{i}", n) for i, n in enumerate(deepest))
    single = sorted({c[0] for c in counts if c})
    if not single:
        return ()
    most = single[-1]
    halves = [n for n in single if n < most and most % n == 0]
    if halves and any(n == halves[-1] and _even(grid, n) for grid in grids for n in grid.counts):
        return ((f"{NEUTRAL}0", halves[-1]), (f"{NEUTRAL}1", most // halves[-1]))
    return ((f"{NEUTRAL}0", most),)


def _even(grid: Grid, count: int) -> bool:
    return not any(grid.hollow) and any(n == count and s % n == 0 for n, s in zip(grid.counts, grid.shape, strict=True))


def lay(grid: Grid, mesh: Mesh, axes: Axes, parts: Sequence[int] = (1,)) -> Laid | None:
    """A grid on some axes of a mesh; None where they cannot have cut it so."""
    ways = _best(grid, mesh, axes, tuple(parts))
    return None if ways is None else laid(grid.shape, mesh, ways)


def lay_as(grid: Grid, mesh: Mesh, layout: Layout, name: str) -> Laid:
    """A grid as a user says that it is cut. LayoutError where the chunks are not cut so."""
    ways = ways_of(layout, mesh.axes)
    if len(ways) != len(grid.shape):
        raise LayoutError(f"{name}: {layout.text!r} has {len(ways)} dims, the tensor {len(grid.shape)}: {grid.shape}")
    for d, way in enumerate(ways):
        degrees = tuple(mesh[axis] for axis in way.axes)
        said = _starts(grid.shape[d], degrees, way.parts)
        if said != tuple(grid.edges[d][:-1].tolist()) and grid.shape[d]:
            raise LayoutError(
                f"{name}: dim {d} of {layout.text!r} on {mesh} would be cut at {_some(said)}, its chunks begin at "
                f"{_some(grid.edges[d][:-1].tolist())}: say another layout, or another mesh"
            )
    made = laid(grid.shape, mesh, ways)
    if not {n for n, _ in made.layout.sizes} <= {n for node in layout.tree for n in names(node)}:
        return made
    return Laid(layout.replace(sizes={**dict(made.layout.sizes), **dict(layout.sizes)}), made.cut)


def lay_alone(grid: Grid) -> Laid:
    """A grid on neutral axes of its own, one a dim, wherever its cuts are."""
    cut_dims = [d for d, n in enumerate(grid.counts) if n > 1]
    axes = {d: f"{NEUTRAL}{i}" for i, d in enumerate(cut_dims)}
    mesh = Mesh(**{axis: grid.counts[d] for d, axis in axes.items()})
    dims = tuple(
        _dim_cut(n, (axes[d],), {(i,): [span] for i, span in enumerate(grid.spans(d))})
        if d in axes
        else Cut.whole((n,)).dims[0]
        for d, n in enumerate(grid.shape)
    )
    labels = dim_names(len(grid.shape))
    text = " ".join(f"({axes[d]} {n})" if d in axes else n for d, n in enumerate(labels))
    sizes = {labels[d]: tuple(length for _, length in grid.spans(d)) for d in axes}
    return Laid(Layout(text, dims=labels, sizes=_uneven(sizes)), Cut(grid.shape, mesh, dims))


def ways_of(layout: Layout, axes: Iterable[str]) -> Ways:
    """What a line of notation says of each dim. LayoutError for a line that says more than chunks can show."""
    known = set(axes)
    return tuple(_way_of(node, layout, known) for node in layout.tree)


def _way_of(node: Node, layout: Layout, known: set[str]) -> DimAxes:
    terms = node.terms if isinstance(node, Sum) else (node,)
    ways, lengths = [], []
    for term in terms:
        factors = term.factors if isinstance(term, Product) else (term,)
        if not all(isinstance(f, Name | Number) for f in factors):
            raise LayoutError(f"{layout.text!r}: what is in brackets within brackets is not told from chunks")
        cutting = [f.text for f in factors if isinstance(f, Name) and f.text in known]
        before = itertools.takewhile(lambda f: not (isinstance(f, Name) and f.text in known), factors)
        parts = math.prod(f.value for f in before if isinstance(f, Number)) if cutting else 1
        ways.append(DimAxes(tuple(cutting), parts))
        lengths.append(dict(layout.totals).get(factors[-1].text) if isinstance(factors[-1], Name) else None)
    if len(terms) == 1:
        return ways[0]
    if len(set(ways)) > 1 or ways[0].parts != 1 or None in lengths:
        raise LayoutError(
            f"{layout.text!r}: parts that are not all cut alike, or of unknown length, are not told from chunks"
        )
    return DimAxes(ways[0].axes, tuple(n for n in lengths if n is not None))


def degrees_of(layouts: Mapping[str, Layout], grids: Mapping[str, Grid]) -> dict[str, int]:
    """The degrees of the axes that layouts name, from the grids that they are of. LayoutError where they do not follow.

    A dim's names but the last are its axes: `(tp dp out) in` names tp and dp.
    """
    told: list[tuple[tuple[str, ...], int]] = []
    axes: dict[str, None] = {}
    for name, layout in layouts.items():
        for d, node in enumerate(layout.tree):
            factors = node.factors if isinstance(node, Product) else ()
            cutting = tuple(f.text for f in factors if isinstance(f, Name))[:-1]
            parts = next((f.value for f in factors if isinstance(f, Number)), 1)
            if cutting and d < len(grids[name].counts):
                axes.update(dict.fromkeys(cutting))
                told.append((cutting, max(grids[name].counts[d] // parts, 1)))
    found: dict[str, int] = {}
    for cutting, count in sorted(told, key=lambda t: (len(t[0]), -t[1])):
        unknown = [axis for axis in cutting if axis not in found]
        if len(unknown) == 1:
            rest = math.prod(found[axis] for axis in cutting if axis in found)
            found[unknown[0]] = max(count // rest, 1)
    missing = [axis for axis in axes if axis not in found]
    if missing:
        raise LayoutError(f"how many ranks {missing[0]} has does not follow from the chunks: give the mesh as well")
    return found


def _best(grid: Grid, mesh: Mesh, axes: Axes, parts: tuple[int, ...]) -> Ways | None:
    best: Ways | None = None
    most = -1.0
    for ways in _candidates(grid, axes, parts):
        agreed = _agreement(grid, mesh, ways)
        if agreed > most:
            best, most = ways, agreed
        if most == 1:
            break
    return best


def _candidates(grid: Grid, axes: Axes, parts: tuple[int, ...]) -> Iterable[Ways]:
    """The ways that explain every interval of every dim, those of few axes first; last that one rank has several."""
    options: list[list[DimAxes]] = []
    for d, (size, edges) in enumerate(zip(grid.shape, grid.edges, strict=True)):
        starts = tuple(edges[:-1].tolist())
        mine = [DimAxes()] if (len(starts) == 1 and not grid.hollow[d]) or not size else []
        if len(starts) > 1 or grid.hollow[d]:
            for count in range(1, len(axes) + 1):
                for chosen in itertools.permutations(axes, count):
                    for p in parts:
                        degrees = tuple(n for _, n in chosen)
                        if math.prod(degrees) * p >= len(starts) and _starts(size, degrees, p) == starts:
                            mine.append(DimAxes(tuple(axis for axis, _ in chosen), p))
            mine += [DimAxes((), p) for p in parts if p > 1 and _starts(size, (), p) == starts]
        options.append(mine)
    for ways in itertools.product(*options):
        used = [axis for way in ways for axis in way.axes]
        if len(used) == len(set(used)):
            yield ways


def _agreement(grid: Grid, mesh: Mesh, ways: Ways) -> float:
    """How many of the cells were stored by a rank that a way of cutting gives them to."""
    cells = np.argwhere(grid.ranks >= 0)[:_SAMPLE].tolist() if grid.cells.size else []
    if not cells:
        return 1
    right = 0
    for cell in cells:
        at = _coordinate(mesh, int(grid.ranks[tuple(cell)]) % mesh.size)
        right += all(
            int(grid.edges[d][k]) in {start for start, _ in pieces_of(grid.shape[d], way, mesh, at)}
            for d, (k, way) in enumerate(zip(cell, ways, strict=True))
        )
    return right / len(cells)


@lru_cache(maxsize=1 << 16)
def _coordinate(mesh: Mesh, rank: int) -> dict[str, int]:
    return mesh.coordinate(rank)


def pieces_of(size: int, way: DimAxes, mesh: Mesh, at: Mapping[str, int]) -> list[Span]:
    """The intervals of a dim that a coordinate has."""
    degrees = tuple(mesh[axis] for axis in way.axes)
    return _split(size, degrees, way.parts)[tuple(at[axis] for axis in way.axes)]


@lru_cache(maxsize=4096)
def _split(size: int, degrees: tuple[int, ...], parts: Parts) -> dict[tuple[int, ...], list[Span]]:
    """Coordinate on the axes, outermost first → what it has of a dim: an interval of each part, empty ones left out."""
    found: dict[tuple[int, ...], list[Span]] = {c: [] for c in itertools.product(*map(range, degrees))}
    if not DimAxes(parts=parts).fits(size):
        return {}
    lengths = (size // parts,) * parts if isinstance(parts, int) else parts
    for start, length in zip(itertools.accumulate(lengths, initial=0), lengths, strict=False):
        spans: dict[tuple[int, ...], Span] = {(): (start, length)}
        for n in degrees:
            spans = {(*at, k): _chunk(span, n, k) for at, span in spans.items() for k in range(n)}
        for at, span in spans.items():
            if span[1]:
                found[at].append(span)
    return found


def _chunk(span: Span, count: int, k: int) -> Span:
    """What `torch.chunk` gives the k-th of `count`: it may be less than the others have, or nothing."""
    start, length = span
    piece = -(-length // count)
    done = min(k * piece, length)
    return start + done, min(piece, length - done)


@lru_cache(maxsize=4096)
def _starts(size: int, degrees: tuple[int, ...], parts: Parts) -> tuple[int, ...]:
    return tuple(sorted(start for spans in _split(size, degrees, parts).values() for start, _ in spans))


@lru_cache(maxsize=4096)
def _axes_cut(size: int, way: DimAxes, mesh: Mesh) -> DimCut:
    axes = tuple(axis for axis in mesh.axes if axis in way.axes)
    order = [way.axes.index(axis) for axis in axes]
    split = _split(size, tuple(mesh[axis] for axis in way.axes), way.parts)
    return _dim_cut(size, axes, {tuple(at[i] for i in order): spans for at, spans in split.items()})


def _dim_cut(size: int, axes: tuple[str, ...], table: Mapping[tuple[int, ...], list[Span]]) -> DimCut:
    rows, widths = {}, {}
    for at, spans in table.items():
        done, held = 0, []
        for start, length in spans:
            held.append((start, done, length, 1, 0))
            done += length
        rows[at] = np.array(held, np.int64).reshape(-1, 5)
        rows[at].setflags(write=False)
        widths[at] = done
    return DimCut(size, axes, rows, widths)


def laid(shape: tuple[int, ...], mesh: Mesh, ways: Ways) -> Laid:
    """A tensor cut in these ways, as torch cuts."""
    dims = tuple(
        _axes_cut(n, way, mesh) if way.axes else Cut.whole((n,)).dims[0] for n, way in zip(shape, ways, strict=True)
    )
    labels = dim_names(len(ways))
    text: list[str] = []
    sizes: dict[str, tuple[int, ...]] = {}
    totals: dict[str, int] = {}
    for d, (label, way) in enumerate(zip(labels, ways, strict=True)):
        axes = " ".join(way.axes)
        if isinstance(way.parts, tuple):
            of_parts = [f"{label}{i}" for i in range(way.count)]
            text.append(f"({' + '.join(f'({axes} {part})' for part in of_parts)})")
            totals |= dict(zip(of_parts, way.parts, strict=True))
            continue
        before = f"{way.parts} {axes}" if way.parts > 1 else axes
        text.append(f"({before} {label})" if way.axes else label)
        widths = _inner_widths(shape[d], way, mesh)
        if widths is not None:
            sizes[label] = widths
    layout = Layout(" ".join(text), dims=labels, sizes=_uneven(sizes), totals=totals)
    return Laid(layout, Cut(shape, mesh, dims))


@lru_cache(maxsize=4096)
def _inner_widths(size: int, way: DimAxes, mesh: Mesh) -> tuple[int, ...] | None:
    """The widths on the innermost axis, where they are the same for every coordinate on the others."""
    if not way.axes:
        return None
    degrees = tuple(mesh[axis] for axis in way.axes)
    split = _split(size, degrees, way.parts)
    widths = {
        outer: tuple(sum(n for _, n in split[(*outer, k)]) // way.count for k in range(degrees[-1]))
        for outer in itertools.product(*map(range, degrees[:-1]))
    }
    return next(iter(widths.values())) if len(set(widths.values())) == 1 else None


def _uneven(sizes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    return {name: widths for name, widths in sizes.items() if len(set(widths)) > 1}


def _some(starts: Sequence[int]) -> str:
    shown = ", ".join(map(str, starts[:6]))
    return f"{shown}, … ({len(starts)} in all)" if len(starts) > 6 else shown
