"""What a cut looks like: its rows as plain numbers for `draw`, its parts by name; and a layout by itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ckptlab.draw import Axes, Drawing, Edge, Fragment, sheet
from ckptlab.errors import LayoutError
from ckptlab.layout import Cut, DimCut, Layout
from ckptlab.layout.rows import intervals
from ckptlab.mesh import Mesh
from ckptlab.shown import shows
from ckptlab.viz.example import example

Parts = Sequence[tuple[str, int]]
Inner = Sequence[tuple[int, str, int, int]]


def picture(
    cut: Cut,
    dims: Sequence[str],
    parts: Sequence[Parts],
    *,
    title: str = "",
    notation: str = "",
    rank: Mapping[str, int] | None = None,
    notes: Sequence[str] = (),
    copies: Sequence[tuple[str, int]] | None = None,
    fragments: Sequence[Fragment] = (),
    inner: Sequence[Inner] = (),
    nothing: str = "",
    everyone: str = "every rank",
    hue: int | None = None,
    width: float | None = None,
) -> Drawing:
    """A cut drawn. dims: names; parts: for each dim (name, length) of what is cut on its own, or nothing.

    rank: the coordinate that stands out; axes that do not cut the tensor are passed over. copies: (axis, number) of
    those that hold the same (None: all axes that do not cut it). inner: see `Edge`; fragments, nothing, everyone, hue,
    width: see `sheet`.
    """
    edges = [
        _edge(dim, true, name, part, within, cut.mesh)
        for dim, true, name, part, within in zip(
            cut.dims, cut.logical, dims, parts, inner or [()] * len(dims), strict=True
        )
    ]
    for axis, k in (rank or {}).items():
        if axis in cut.axes and not (isinstance(k, int) and 0 <= k < cut.mesh[axis]):
            raise LayoutError(f"rank: {axis}={k!r} is outside {axis}({cut.mesh[axis]}) of {cut.mesh!r}")
    over = {*cut.axes, *(axis for f in fragments for axis in f.place)}
    marked = None if rank is None else {axis: k for axis, k in rank.items() if axis in over}
    shard = None
    if marked is not None and not set(cut.axes) - set(marked):
        places = zip(cut.dims, cut.per_dim(cut.coordinate(marked)), strict=True)
        shard = [[(int(s), int(n)) for s, n in intervals(dim.runs[at])[:, [0, 2]]] for dim, at in places]
    return sheet(
        edges,
        title=title,
        notation=notation,
        copies=_copies(cut) if copies is None else copies,
        marked=marked,
        shard=shard,
        notes=notes,
        fragments=fragments,
        nothing=nothing,
        everyone=everyone,
        hue=hue,
        room=width,
    )


def by_itself(cut: Cut) -> Drawing:
    """A cut of which nothing else is known: its dims by number."""
    dims = [f"dim{i}" for i in range(len(cut.dims))]
    return picture(cut, dims, [()] * len(dims), title=f"cut of {cut.logical} on {cut.mesh}")


def on_paper(layout: Layout) -> Drawing:
    """A layout by itself, on a small mesh and shape that it fits; of one that fits none of those, the notation."""
    full, shape, mesh = example(layout)
    said = [f"an example: shape {shape} on {mesh}"]
    if lengths := {**dict(layout.sizes), **dict(layout.totals)}:
        said.append("lengths that are said: " + ", ".join(f"{name} {n}" for name, n in lengths.items()))
    if layout.padded:
        said.append("padded: " + ", ".join(f"{layout.dims[i]} to {n:,}" for i, n in layout.padded))
    try:
        cut, parts, inner = full.resolve(shape, mesh), full.parts(shape, mesh), full.blocks(shape, mesh)
    except LayoutError:
        return sheet([], title=repr(layout), notes=["no small example of it: give it a shape and a mesh"])
    return picture(cut, layout.dims, parts, notation=layout.text, notes=said, inner=inner)


def _edge(dim: DimCut, true: int, name: str, parts: Parts, inner: Inner, mesh: Mesh) -> Edge:
    axes = Axes(dim.axes, tuple(mesh[axis] for axis in dim.axes))
    held = [intervals(dim.runs[at])[:, [0, 2]] for at in sorted(dim.runs)]
    return Edge(name, dim.size, min(true, dim.size), axes, held, parts, inner)


def _copies(cut: Cut) -> list[tuple[str, int]]:
    """The axes along which ranks hold the same, with their degrees. Of pp, the tensor's stages tell."""
    stages = cut.mesh.leaves("pp")
    return [(axis, n) for axis, n in cut.mesh.degrees.items() if n > 1 and axis not in (*cut.axes, *stages)]


shows(Cut, html=lambda cut: by_itself(cut)._repr_html_())
shows(Layout, html=lambda layout: on_paper(layout)._repr_html_())
