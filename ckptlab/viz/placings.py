"""A tensor as the ranks of a run hold it: cut over the mesh by its layout, and over dp where a flat buffer lies
below."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np

from ckptlab.aliases import Int64
from ckptlab.arguments import explained
from ckptlab.catalog import Catalog, Tensor
from ckptlab.draw import Axes, Drawing, Fragment
from ckptlab.draw.fragments import MOST, Area, rectangles
from ckptlab.errors import LayoutError
from ckptlab.layout.cut import Coordinate
from ckptlab.layout.rows import intervals
from ckptlab.plan import Placement
from ckptlab.viz.cuts import Parts, picture
from ckptlab.viz.tensors import notes_of
from ckptlab.words import ranges


@explained
def placed(
    catalog: Catalog,
    name: str,
    state: str | None = None,
    *,
    rank: int | None = None,
    hue: int | None = None,
    width: float | None = None,
) -> Drawing:
    """One state of a tensor (None: its first) as the ranks of a catalog hold it.

    As `tensor` draws it, but where ZeRO cuts flattened shards over dp, so does the picture: each fragment lies where
    its elements do, named by who holds it. rank: what it holds stands out, and beside; of a rank that holds nothing,
    that is said. hue: one colour in tints, by its number, instead of one for each coordinate. width: of the page, in
    pixels. Cells: class `piece` (`fragment`, `marked`, `dimmed`), data-tp, data-dp, …, data-from and data-count (of a
    fragment, in the flattened shard).
    """
    tensor = catalog[name]
    state = next(iter(tensor.states)) if state is None else state
    placement = catalog.placement(tensor.name, state)
    notes = notes_of(tensor.layout)
    fragments: list[Fragment] = []
    each = math.prod(placement.mesh[axis] for axis in placement.data)
    if placement.flats and each > 1:
        fragments = list(_fragments(placement)) if len(tensor.shape) <= 2 else []
        if not fragments or sum(len(f.areas) for f in fragments) > MOST:
            fragments = []
            notes.append(
                f"each shard is cut over {' · '.join(placement.data)} into up to {each:,} fragments: not drawn"
            )
        else:
            notes.append(f"flattened, each shard is cut over {' · '.join(placement.data)} in the order of its elements")
    at = None if rank is None else placement.mesh.coordinate(rank)
    nothing = ""
    if rank is not None and not _holds(placement, rank):
        nothing = f"rank {rank} ({catalog.mesh.place(rank)}) holds nothing of it"
    over = {
        *placement.cut.axes,
        *(placement.data if placement.flats else ()),
        *placement.mesh.leaves("pp"),
        *placement.at,
    }
    copies = [(axis, n) for axis, n in placement.mesh.degrees.items() if n > 1 and axis not in over]
    if len(placement.stages) > 1:
        copies.append(("pp", len(placement.stages)))
    return picture(
        placement.cut,
        tensor.layout.dims,
        _parts(tensor, placement),
        title=f"{tensor.name} · {state}",
        notation=tensor.layout.text,
        rank=at,
        notes=notes,
        copies=copies,
        fragments=fragments,
        nothing=nothing,
        hue=hue,
        everyone="every rank" if catalog.mesh.pp == 1 else f"every rank of pp {ranges(placement.stages)}",
        width=width,
    )


def _parts(tensor: Tensor, placement: Placement) -> Sequence[Parts]:
    """What lies one after the other in each dim; of a layout that does not say its uneven cut itself, nothing."""
    try:
        return tensor.layout.parts(tensor.shape, placement.mesh)
    except LayoutError:
        return [()] * len(tensor.shape)


def _holds(placement: Placement, rank: int) -> bool:
    """Whether a rank holds an element."""
    holder = placement.holder(rank)
    if holder is None:
        return False
    if not placement.flats:
        return math.prod(placement.shape(holder)) > 0
    flat, index = placement.flats[holder]
    dp = int(np.flatnonzero(placement.ranks(holder) == rank)[0])
    return bool((flat.fragments(index)[:, 0] == dp).any())


def _fragments(placement: Placement) -> Iterator[Fragment]:
    """Of every shard, held by whoever comes first, what each coordinate on the data axes has."""
    data = Axes(placement.data, tuple(placement.mesh[axis] for axis in placement.data))
    seen: set[Coordinate] = set()
    for holder in placement.on(placement.stages[0]):
        at = placement.coordinate(holder)
        if at in seen or not placement.flats:
            continue
        seen.add(at)
        cut = dict(zip(placement.cut.axes, at, strict=True))
        rows, columns = _spans(placement, at)
        high, wide = (int(spans[:, 2].sum()) for spans in (rows, columns))
        flat, index = placement.flats[holder]
        alone = all(placement.mesh[axis] == 1 for axis in placement.cut.axes)
        for shade, (d, start, _, count) in enumerate(flat.fragments(index).tolist()):
            areas = tuple(_areas(rows, columns, start, count, wide))
            place = {axis: k for axis, k in {**cut, **_place(data, d)}.items() if placement.mesh[axis] > 1}
            hue = d if alone else len(seen) - 1
            yield Fragment(start, count, (high, wide), areas, place, hue, 0 if alone else shade)


def _place(data: Axes, d: int) -> dict[str, int]:
    return {axis: int(k) for axis, k in data.data([d]).items()}


def _spans(placement: Placement, at: Coordinate) -> tuple[Int64, Int64]:
    """For rows and columns (start in the whole, start in the shard, length); of a vector there is one row."""
    dims = zip(placement.cut.dims, placement.cut.per_dim(at), strict=True)
    found = [intervals(dim.runs[place])[:, :3] for dim, place in dims]
    one = np.array([[0, 0, 1]], np.int64)
    return (one,) * (2 - len(found)) + tuple(found)  # type: ignore[return-value]


def _areas(rows: Int64, columns: Int64, start: int, count: int, wide: int) -> Iterator[Area]:
    for r0, r1, c0, c1 in rectangles(start, count, wide):
        for top, bottom in _within(rows, r0, r1):
            for left, right in _within(columns, c0, c1):
                yield top, bottom, left, right


def _within(spans: Int64, low: int, high: int) -> list[tuple[int, int]]:
    """What indices of a shard from `low` to `high` are in the whole, neighbours joined."""
    found: list[tuple[int, int]] = []
    for whole, start, length in sorted(spans.tolist()):
        first, last = max(low, start), min(high, start + length)
        if first >= last:
            continue
        a, b = whole + first - start, whole + last - start
        if found and found[-1][1] == a:
            found[-1] = (found[-1][0], b)
        else:
            found.append((a, b))
    return found
