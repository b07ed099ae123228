"""Layouts that AutoTP records: `affine_map` in `universal_checkpoint_info`, version 1.

A map says of every tensor which boxes of the whole each tp rank holds, and where in its shard: a piece is a shape with
an offset and strides on either side (the arguments of `torch.as_strided`). Where the boxes follow the ranks it is a
line of notation; any other choice of rows stays what it is, rows. Source: DeepSpeed 0.19.8, `checkpoint/affine.py`.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ckptlab.catalog import Tensor
from ckptlab.errors import CheckpointError, UnsupportedError
from ckptlab.formats.deepspeed.header import Header
from ckptlab.formats.deepspeed.rows import RowsLayout, Run, Runs, in_parts
from ckptlab.layout import Cut, Layout, cut_dim
from ckptlab.layout.notation import Name, Product, Sum, names
from ckptlab.mesh import Mesh
from ckptlab.sharding.strategies import Shape, cut, dim_names, replicated
from ckptlab.stored import row_major_strides

VERSION = 1
_APART = ("mlp", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")  # cut evenly, whatever the heads
_HEADS = ("lm_head", "embed_out")  # likewise, by their whole names


@dataclass(frozen=True)
class AffineMap:
    """How one tensor lies on the tp ranks. `rows[rank][dim]`: the rows of that dim that the rank holds."""

    logical: Shape
    rows: tuple[tuple[Runs, ...], ...]

    @classmethod
    def of(cls, entry: Header, tp: int) -> AffineMap:
        """CheckpointError for a map of another form, UnsupportedError for one that ckptlab does not understand."""
        ranks = {int(rank): value for rank, value in entry.inside("ranks").values.items() if str(rank).isdecimal()}
        if sorted(ranks) != list(range(tp)):
            raise entry.odd("ranks", f"the shards of {tp} tp ranks")
        logical = tuple(entry.integers("logical_shape"))
        found = [Header.of(entry.path, ranks[rank], f"{entry.at}.ranks.{rank}") for rank in range(tp)]
        return cls(logical, tuple(_rows(logical, of_rank) for of_rank in found))

    def layout(self) -> Layout:
        """The line of notation, where the boxes follow the ranks; else `RowsLayout`."""
        ndim, dims = len(self.logical), dim_names(len(self.logical))
        apart = [i for i in range(ndim) if len({of_rank[i] for of_rank in self.rows}) > 1]
        whole = all(self.rows[0][i] == ((0, 0, n, 1, 0),) for i, n in enumerate(self.logical) if i not in apart)
        if not apart and whole:
            return replicated(ndim)
        dim = apart[0] if apart else 0
        if len(apart) == 1 and whole:
            parts = _parts([of_rank[dim] for of_rank in self.rows], self.logical[dim])
            if parts is not None:
                even = len(parts) == 1 and isinstance(parts[0], tuple) and len(set(parts[0])) == 1
                return cut(ndim, dim) if even else in_parts(ndim, dim, parts)
        text = " ".join(f"(tp {n})" if i == dim else n for i, n in enumerate(dims))
        return RowsLayout(text, dims=dims, axis="tp", rows=self.rows)


@dataclass(frozen=True)
class AffineMaps:
    """What `affine_map` says: pattern → map. `unsupported`: pattern → why AutoTP cannot describe those tensors."""

    maps: Mapping[str, AffineMap] = field(default_factory=dict)
    unsupported: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, info: Header, tp: int) -> AffineMaps:
        inside = info.inside("affine_map")
        if "version" in inside:
            inside.refuse_newer(VERSION)
        params = inside.inside("params")
        maps = {pattern: AffineMap.of(params.inside(pattern), tp) for pattern in params.values}
        return cls(maps, info.inside("autotp_unsupported_parameter_patterns").values)

    def __bool__(self) -> bool:
        return bool(self.maps)

    def of_tensor(self, name: str) -> AffineMap | None:
        """The map of a tensor; None if there is none. CheckpointError where AutoTP says that there cannot be one."""
        for pattern, found in self.maps.items():
            if re.match(pattern, name):
                return found
        for pattern, reason in self.unsupported.items():
            if re.match(pattern, name):
                raise CheckpointError(
                    f"{name}: AutoTP did not record how it is cut ({reason}): give its layout with a strategy"
                )
        return None


def _rows(logical: Shape, of_rank: Header) -> tuple[Runs, ...]:
    """What a rank holds along each dim. UnsupportedError where its pieces are no product of rows."""
    shard = tuple(of_rank.integers("shard_shape"))
    if len(shard) != len(logical):
        raise of_rank.odd("shard_shape", f"a shape of {len(logical)} dims")
    pieces = [piece for piece in of_rank.dictionaries("pieces") if 0 not in piece.integers("shape")]
    boxes = [_box(logical, shard, piece) for piece in pieces]
    if not boxes and 0 in shard:  # a rank that has nothing of it
        return tuple(((0, 0, n, 1, 0),) for n in shard)
    dims = tuple(tuple(sorted({box[i] for box in boxes}, key=lambda run: run[1])) for i in range(len(logical)))
    if len(boxes) != math.prod(map(len, dims)) or set(boxes) != set(itertools.product(*dims)):
        raise _not_rows(of_rank)
    return dims


def _box(logical: Shape, shard: Shape, piece: Header) -> tuple[Run, ...]:
    """The rows of a piece, one for each dim."""
    if piece.values.get("scale", 1.0) != 1.0:
        raise UnsupportedError(
            f"{piece.path}: {piece.at}: a shard that holds its tensor times {piece.values['scale']} (a bias that its "
            "tp ranks add up), which ckptlab cannot open yet"
        )
    sizes = piece.integers("shape")
    sides = [_side(piece, key, len(logical)) for key in ("source", "dest")]
    if len(sizes) != len(logical):
        raise _not_rows(piece)
    (offset, strides), (place, within) = sides
    starts, places = _index(offset, logical), _index(place, shard)
    runs: list[Run] = []
    full, own = row_major_strides(logical), row_major_strides(shard)
    for i, n in enumerate(sizes):
        step, rest = divmod(strides[i], full[i]) if n > 1 else (1, 0)
        if rest or step < 1 or (n > 1 and within[i] != own[i]):
            raise _not_rows(piece)
        runs.append((starts[i], places[i], n, 1, 0) if step == 1 else (starts[i], places[i], 1, n, step))
    return tuple(runs)


def _side(piece: Header, key: str, ndim: int) -> tuple[int, list[int]]:
    found = piece.several(key)
    if len(found) != 2 or not isinstance(found[1], (list, tuple)) or len(found[1]) != ndim:
        raise piece.odd(key, f"an offset and {ndim} strides")
    of_side = Header(piece.path, {"offset": found[0], "strides": found[1]}, f"{piece.at}.{key}")
    return of_side.integer("offset"), of_side.integers("strides")


def _not_rows(header: Header) -> UnsupportedError:
    return UnsupportedError(
        f"{header.path}: {header.at}: pieces that are no boxes of rows of the whole, which ckptlab cannot open yet"
    )


def _index(offset: int, shape: Shape) -> tuple[int, ...]:
    """Where the element at an offset lies in a tensor of that shape."""
    found = []
    for stride in row_major_strides(shape):
        found.append(offset // stride)
        offset %= stride
    return tuple(found)


def _parts(ranks: Sequence[Runs], size: int) -> list[tuple[int, ...] | int] | None:
    """The parts of a dim, of which each rank's rows are the k-th in turn: the width that all have where these are the
    same on every rank, and those on each where they follow each other rank by rank. None where it is not so."""
    if len({len(runs) for runs in ranks}) > 1 or any(count != 1 for runs in ranks for *_, count, _ in runs):
        return None
    parts: list[tuple[int, ...] | int] = []
    end, places = 0, [0] * len(ranks)
    for part in zip(*ranks, strict=True):
        widths = tuple(run[2] for run in part)
        following = tuple(itertools.accumulate(widths[:-1], initial=end))  # where each begins behind those before it
        starts = tuple(run[0] if run[2] else after for run, after in zip(part, following, strict=True))
        if any(run[1] != place for run, place in zip(part, places, strict=True)):
            return None
        places = [place + width for place, width in zip(places, widths, strict=True)]
        if starts == following:
            parts.append(widths)
            end += sum(widths)
        elif set(starts) == {end} and len(set(widths)) == 1:
            parts.append(widths[0])
            end += widths[0]
        else:
            return None
    return parts if end == size else None


# ------------------------------------------------------------------ for another tp


def shard_widths(total: int, tp: int, name: str, kv_heads: int | None, grain: int) -> tuple[int, ...]:
    """What AutoTP gives each of `tp` ranks of `total` rows of a module: whole key/value heads, where it knows their
    number and the module is attention's, else an even share of the grains, the last rank what is left
    (`module_inject/tp_shard.py`, `get_shard_size`)."""
    unit, rest = 0, 0
    if kv_heads and total % kv_heads == 0 and _by_heads(name):
        count, unit = kv_heads, total // kv_heads
    elif total >= grain:
        (count, rest), unit = divmod(total, grain), grain
    else:
        count, unit = total, 1
    widths = [(count // tp + (rank < count % tp)) * unit for rank in range(tp)]
    widths[-1] += rest
    return tuple(widths)


def _by_heads(module: str) -> bool:
    """Whether AutoTP cuts a module between heads, where it knows their number."""
    return module not in _HEADS and not any(part in module for part in _APART)


def on_tp(layout: Layout, tensor: str, shape: Shape, tp: int, kv_heads: int | None, grain: int) -> Layout:
    """The layout that AutoTP has for another tp degree. One that follows no rule stays: it cannot be resolved there."""
    dim = cut_dim(layout, "tp")
    if dim is None or isinstance(layout, RowsLayout):
        return layout
    node, module = layout.tree[dim], tensor.rpartition(".")[0]
    known: dict[str, Any] = dict(layout.sizes)
    totals = dict(layout.totals)
    for term in node.terms if isinstance(node, Sum) else (node,):
        if Name("tp") not in (term.factors if isinstance(term, Product) else ()):
            continue
        (label,) = (name for name in names(term) if name != "tp")
        given = known.pop(label, totals.pop(label, None))
        total = shape[dim] if given is None else sum(given) if isinstance(given, tuple) else given
        widths = shard_widths(total, tp, module, kv_heads, grain)
        if len(set(widths)) > 1:
            known[label] = widths
        elif isinstance(node, Sum):
            totals[label] = total
    return layout.replace(sizes=known, totals=totals)


def _trained(tensor: Tensor, mesh: Mesh) -> Cut:
    """The cut on the mesh of the run, where what is stored may be whole tensors."""
    return tensor.cut if tensor.cut.mesh.tp == mesh.tp else tensor.layout.resolve(tensor.shape, mesh)


def told_heads(tensors: Mapping[str, Tensor], mesh: Mesh, heads: int | None) -> int | None:
    """The number of key/value heads, where key projections tell it: by an uneven cut on the run's mesh (ranks have n or
    n + 1 of them), by the norm of one head's keys, or of all heads', or where the number of attention heads is known by
    the rows of a query projection."""
    for name, tensor in tensors.items():
        if re.search(r"\bk_proj\.weight$", name) is None:
            continue
        cut = _trained(tensor, mesh)
        widths = [cut.shard_shape(at)[0] for at in cut.coordinates()]
        if len(set(widths)) > 1:
            return sum(widths) // math.gcd(*widths)
        prefix, rows = name.removesuffix("k_proj.weight"), tensor.shape[0]
        norm = tensors[f"{prefix}k_norm.weight"].shape if f"{prefix}k_norm.weight" in tensors else ()
        if len(norm) == 2 and math.prod(norm) == rows:
            return norm[0]
        if len(norm) == 1 and rows > norm[0] > 0 == rows % norm[0]:
            return rows // norm[0]
        queries = tensors.get(f"{prefix}q_proj.weight")
        if heads and queries is not None and rows * heads % queries.shape[0] == 0:
            return rows * heads // queries.shape[0]
    return None


def divided_heads(tensors: Mapping[str, Tensor], mesh: Mesh) -> int | None:
    """A number that divides that of key/value heads, if AutoTP knew it: the run's degree, where every tp rank has as
    much of all that is cut between heads."""
    for tensor in tensors.values():
        if _by_heads(tensor.name.rpartition(".")[0]):
            cut = _trained(tensor, mesh)
            if len({cut.shard_shape(at) for at in cut.coordinates()}) > 1:
                return None
    return mesh.tp


def map_of(tensor: Tensor, axis: str = "tp") -> dict[str, Any]:
    """The affine map of a tensor that is cut over one axis, as DeepSpeed writes it."""
    at = [tensor.cut.coordinate({axis: rank}) for rank in range(tensor.cut.mesh[axis])]
    dims = range(len(tensor.shape))
    rows = [[plain_rows(of_dim) for of_dim in tensor.cut.rows(place)] for place in at]
    edges = [sorted({edge for of_rank in rows for s, _, n in of_rank[i] for edge in (s, s + n)}) for i in dims]
    boxes = [_boxes([_broken(of_dim, edges[i]) for i, of_dim in enumerate(of_rank)]) for of_rank in rows]
    holders: dict[Any, list[int]] = {}
    for rank, held in enumerate(boxes):
        for starts, _, sizes in held:
            holders.setdefault((starts, sizes), []).append(rank)
    ranks = {}
    for rank, held in enumerate(boxes):
        shard = tensor.cut.shard_shape(at[rank])
        pieces = [
            {
                "shape": list(sizes),
                "source": _strided(starts, tensor.shape),
                "dest": _strided(places, shard),
                "locations": holders[starts, sizes],
            }
            for starts, places, sizes in held
        ]
        ranks[rank] = {"shard_shape": list(shard), "pieces": pieces}
    return {"logical_shape": list(tensor.shape), "ranks": ranks}


def plain_rows(rows: Any) -> list[tuple[int, int, int]]:
    """(start in the whole, start in the shard, length) of each row."""
    return [(s + k * stride, place + k * n, n) for s, place, n, count, stride in rows.tolist() for k in range(count)]


def _broken(rows: Sequence[tuple[int, int, int]], edges: Sequence[int]) -> list[tuple[int, int, int]]:
    """Rows broken where any rank's begins or ends, so that all elements of each are held by the same ranks."""
    found = []
    for start, place, n in rows:
        inside = [edge for edge in edges if start < edge < start + n]
        for low, high in itertools.pairwise((start, *inside, start + n)):
            found.append((low, place + low - start, high - low))
    return found


def _boxes(
    rows: Sequence[Sequence[tuple[int, int, int]]],
) -> list[tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]:
    """(starts in the whole, starts in the shard, sizes) of the boxes that rows of each dim make."""
    boxes = []
    for box in itertools.product(*rows):
        starts, places, sizes = zip(*box, strict=True) if box else ((), (), ())
        boxes.append((tuple(starts), tuple(places), tuple(sizes)))
    return boxes


def _strided(starts: Sequence[int], shape: Shape) -> list[Any]:
    strides = row_major_strides(shape)
    return [sum(start * stride for start, stride in zip(starts, strides, strict=True)), list(strides)]
