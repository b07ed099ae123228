"""ZeRO's flat buffers: which fragments each dp rank (of experts each edp rank) holds of one group."""

from __future__ import annotations

from ckptlab.arguments import explained
from ckptlab.catalog import FlatGroup
from ckptlab.draw import Bar, Drawing, Piece, strips
from ckptlab.draw.colours import colour
from ckptlab.errors import MeshError
from ckptlab.plan import FlatBuffer, Holder
from ckptlab.words import number_of

CUTS = 64  # cuts that are drawn in the whole buffer; of more every second, third, …
SHOWN = 8  # dp ranks that are drawn; of more the first and the last


@explained
def flat(
    group: FlatGroup | FlatBuffer,
    *,
    dp: int | None = None,
    tensor: str | None = None,
    width: float | None = None,
    **at: int,
) -> Drawing:
    """The flat buffer of one group (of a catalog's FlatGroup, that of coordinates such as tp=1), one bar for each dp
    rank; where a group lies over a part of dp, as experts' over edp, for each rank of that.

    Above lies the whole buffer with the cuts between ranks. Fragments have their tensors' names and colours; where a
    tensor goes on in the next rank's buffer it is torn; padding is hatched. dp: this rank's alone, without the whole.
    tensor: the name of one that alone has a colour.

    width: of the page, in pixels (None: as wide as it likes). Widths are proportional to elements. Cells: class
    `fragment` (`merged`: several that are too thin; data-tensors counts them) or `padding`, in the whole `span`;
    data-tensor, data-dp (or data-edp), data-tp, data-start and data-count (in the rank's buffer), data-from (in the
    tensor's flattened shard). MeshError for a rank that is not there.
    """
    holder = Holder(**at) if isinstance(group, FlatBuffer) else group.holder(at)
    buffer, over = (group, "dp") if isinstance(group, FlatBuffer) else (group.flats[holder], group.over)
    if dp is not None and not 0 <= dp < buffer.dp:
        raise MeshError(f"{over} {dp} is not among the {buffer.dp} ranks of this buffer")
    shown = [dp] if dp is not None else list(range(buffer.dp))
    omitted = 0
    if len(shown) > SHOWN:
        omitted = len(shown) - SHOWN + 1
        shown = [*shown[: SHOWN - 2], *shown[-1:]]
    made: list[Bar | str] = [_bar(buffer, d, over, holder, tensor) for d in shown]
    if omitted:
        made.insert(len(made) - 1, f"… and {omitted:,} {over} ranks, {shown[-2] + 1} to {shown[-1] - 1}")
    whole, cuts = _whole(buffer, over, tensor) if dp is None else (None, [])
    where = f"group {group.group} · {holder}: " if isinstance(group, FlatGroup) else ""
    title = f"{where}{len(buffer.names):,} tensors, {sum(buffer.counts):,} elements over {over} {buffer.dp}"
    notes = _notes(group, buffer)
    return strips(made, whole=whole, cuts=cuts, title=title, notes=notes, width=width)


def _notes(group: FlatGroup | FlatBuffer, buffer: FlatBuffer) -> list[str]:
    if buffer.partition is None:
        said = ["ZeRO-3: each tensor is cut by itself; every rank has a part of each"]
    else:
        said = [f"ZeRO-1/2: the buffer is cut every {buffer.partition:,} elements, across the borders of tensors"]
        step = -(-buffer.dp // CUTS)
        if step > 1:
            said.append(f"marked: of {buffer.dp - 1:,} cuts one in {step:,}")
    padding = buffer.total - sum(buffer.counts)
    if padding:
        said.append(f"hatched: padding, {number_of(padding, 'element')} in all")
    if isinstance(group, FlatGroup):
        said.append(f"one such buffer for each of {', '.join(f'{s} ({d})' for s, d in group.dtypes.items())}")
    return said


def _whole(buffer: FlatBuffer, over: str, tensor: str | None) -> tuple[Bar | None, list[tuple[int, str]]]:
    """The buffer before it is cut, and where each rank's partition begins: of ZeRO-3, which has none, nothing."""
    if buffer.partition is None or buffer.dp == 1:
        return None, []
    order = sorted(range(len(buffer.names)), key=lambda i: buffer.starts[i])
    pieces = [
        Piece(buffer.names[i], buffer.starts[i], buffer.counts[i], i, tint=_tint(buffer.names[i], tensor))
        for i in order
        if buffer.counts[i]
    ]
    step = -(-buffer.dp // CUTS)
    cuts = [(d * buffer.partition, f"{over} {d}" if step == 1 else f"{over} {d} …") for d in range(0, buffer.dp, step)]
    return Bar("whole", buffer.total, pieces, kind="span"), cuts


def _tint(name: str, tensor: str | None) -> str:
    """Where one tensor alone has a colour: the first, or grey."""
    return "" if tensor is None else colour(0) if name == tensor else "#a8a8a8"


def _bar(buffer: FlatBuffer, d: int, over: str, holder: Holder, tensor: str | None) -> Bar:
    pieces = []
    for index, at, start, count in buffer.within(d).tolist():
        torn = (at > 0, at + count < buffer.counts[index]) if buffer.partition is not None else (False, False)
        tint = _tint(buffer.names[index], tensor)
        pieces.append(Piece(buffer.names[index], start, count, index, torn, {"from": at}, tint))
    return Bar(f"{over} {d}", buffer.size(d), pieces, {**holder, over: d})
