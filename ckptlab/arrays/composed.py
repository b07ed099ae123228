"""Readers of tensors that are seen otherwise than they are stored: what is asked for of one is asked of its pieces.

A shard of the seen tensor is, of each stored one, a shard of a cut that has the rows of that piece and no others: it is
read straight into its place, whatever the order, the strides and the order of dims.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property

import numpy as np

from ckptlab.arrays.readers import Over, Reader, over_zeros
from ckptlab.catalog.seen import LowRank, Piece, Runs
from ckptlab.layout import Cut, DimCut
from ckptlab.layout.cut import Coordinate
from ckptlab.layout.rows import intersect, intervals
from ckptlab.mesh import Mesh


class Renamed(Over):
    """A reader under another tensor's name."""

    def __init__(self, reader: Reader, name: str) -> None:
        super().__init__(reader)
        self.name, self.spares = name, reader.spares

    def read_into(self, out: np.ndarray, cut: Cut, at: Coordinate, starts: Sequence[int]) -> None:
        self.reader.read_into(out, cut, at, starts)

    def box(self, cut: Cut, at: Coordinate, starts: Sequence[int], sizes: Sequence[int]) -> np.ndarray:
        return self.reader.box(cut, at, starts, sizes)

    def chunks(self, cut: Cut, at: Coordinate, lo: int, hi: int, limit: int | None = None) -> Iterator[np.ndarray]:
        return self.reader.chunks(cut, at, lo, hi, limit)

    def is_straight(self, cut: Cut, at: Coordinate) -> bool:
        return self.reader.is_straight(cut, at)

    def unordered(self, cut: Cut, at: Coordinate) -> list[tuple[Cut, Coordinate]]:
        return self.reader.unordered(cut, at)


class Composed(Reader):
    """A tensor of shape `cut.logical`, put together from pieces of others, each with the reader of that other.

    alone: the readers give what one holder has, and the rest is 0.
    """

    spares = True

    def __init__(
        self, name: str, cut: Cut, pieces: Sequence[tuple[Piece, Reader, tuple[int, ...]]], alone: bool = False
    ) -> None:
        self.name, self.state, self.cut, self.alone = name, pieces[0][1].state, cut, alone
        self.dtype = np.result_type(*{reader.dtype for _, reader, _ in pieces})
        self.parts = tuple(_Part(piece, reader, shape) for piece, reader, shape in pieces)

    def leaves_gaps(self, cut: Cut) -> bool:
        return self.alone or any(b > a for a, b in zip(self.cut.logical, cut.shape, strict=True))

    def read_into(self, out: np.ndarray, cut: Cut, at: Coordinate, starts: Sequence[int]) -> None:
        for part in self.parts:
            part.read_into(out, cut, at, starts)


class Adapted(Over):
    """A weight, and the product of two narrow ones added to it, in float32; rounded by whoever asks for less.

    Of b (out, rank) and a (rank, in) just the rows and columns of what is asked for are read.
    """

    def __init__(self, weight: Reader, a: Reader, b: Reader, shapes: tuple[tuple[int, ...], ...], by: LowRank) -> None:
        super().__init__(weight, np.dtype(np.float32))
        self.a, self.b, self.by, self.shapes = a, b, by, shapes

    def read_into(self, out: np.ndarray, cut: Cut, at: Coordinate, starts: Sequence[int]) -> None:
        total = over_zeros(self.reader, out.shape, np.float32, cut, at, starts)
        rows, columns = (1, 0) if self.by.transposed else (0, 1)
        a = self._narrow(self.a, self.shapes[0], 1, cut, at, columns, starts[columns], out.shape[columns])
        b = self._narrow(self.b, self.shapes[1], 0, cut, at, rows, starts[rows], out.shape[rows])
        turned = total.T if self.by.transposed else total
        turned += np.float32(self.by.scale) * (b @ a)
        np.copyto(out, total, casting="unsafe")

    @staticmethod
    def _narrow(
        one: Reader, shape: tuple[int, ...], along: int, cut: Cut, at: Coordinate, dim: int, start: int, size: int
    ) -> np.ndarray:
        """Of a narrow matrix what belongs to a box along one dim of the cut; all of its rank; what is not held is 0."""
        seen, place, rank = cut.dims[dim], cut.per_dim(at)[dim], shape[1 - along]
        dims = [_Strided.shared(seen, place, _all(shape[along]), shape[along]), _Strided.of(_all(rank), rank, rank)]
        sizes, first = [size, rank], [start, 0]
        if along:
            dims, sizes, first = dims[::-1], sizes[::-1], first[::-1]
        return over_zeros(one, sizes, np.float32, Cut(shape, Mesh(), tuple(dims)), (), first)


def _all(length: int, start: int = 0) -> Runs:
    """Indices from `start` on, as one run."""
    return np.array([[start, 0, length, 1, 0, 0]], np.int64)


class _Part:
    """A piece and the reader of the stored tensor, of that true shape. It remembers the cut that was asked for last."""

    def __init__(self, piece: Piece, reader: Reader, shape: tuple[int, ...]) -> None:
        self.piece, self.reader, self.shape = piece, reader, shape
        self._known: tuple[Cut, Coordinate, Cut, tuple[tuple[int, int], ...]] | None = None

    def read_into(self, out: np.ndarray, cut: Cut, at: Coordinate, starts: Sequence[int]) -> None:
        inner, places = self._inner(cut, at)
        if inner is None:
            return
        index: list[int | slice] = [slice(None)] * out.ndim
        for dim, place in places:
            if not starts[dim] <= place < starts[dim] + out.shape[dim]:
                return
            index[dim] = place - starts[dim]
        kept = [dim for dim in range(out.ndim) if isinstance(index[dim], slice)]
        view = out[(*index, ...)]  # with the ellipsis what is left of it stays a view
        dims = [None if isinstance(dim, int) else dim[0] for dim in self.piece.dims]
        view = view.transpose([kept.index(dim) for dim in dims if dim is not None])
        view = view[(*(np.newaxis if dim is None else slice(None) for dim in dims), ...)]
        first = [0 if dim is None else starts[dim] for dim in dims]
        if self.reader.spares:
            self.reader.read_into(view, inner, (), first)
            return
        found = over_zeros(self.reader, view.shape, view.dtype, inner, (), first)
        held = np.ix_(
            *(_held(dim, start, size) for dim, start, size in zip(inner.dims, first, view.shape, strict=True))
        )
        view[held] = found[held]

    def _inner(self, cut: Cut, at: Coordinate) -> tuple[Cut | None, tuple[tuple[int, int], ...]]:
        """The shard as one of the stored tensor; and where in it the dims lie that only the seen one has."""
        known = self._known
        if known is None or known[0] is not cut or known[1] != at:
            places = cut.per_dim(at)
            fixed = []
            for dim, index in self.piece.at:
                found = intersect(cut.dims[dim].runs[places[dim]], _all(1, index))
                if not len(found):
                    return None, ()
                fixed.append((dim, int(found[0, 0])))
            dims: list[DimCut] = []
            for of, size in zip(self.piece.dims, self.shape, strict=True):
                if isinstance(of, int):
                    dims.append(_Strided.of(_all(1, of), size, 1))
                else:
                    dims.append(_Strided.shared(cut.dims[of[0]], places[of[0]], of[1], size))
            known = self._known = cut, at, Cut(self.shape, Mesh(), tuple(dims)), tuple(fixed)
        return known[2], known[3]


def _held(dim: DimCut, start: int, size: int) -> np.ndarray:
    """Which indices of a window of a dim are held."""
    plain = intervals(dim.runs[()])
    inside = np.zeros(size + 1, np.int64)
    low, high = (np.clip(edge - start, 0, size) for edge in (plain[:, 1], plain[:, 1] + plain[:, 2]))
    np.add.at(inside, low, 1)
    np.add.at(inside, high, -1)
    return np.flatnonzero(np.cumsum(inside)[:size])


class _Strided(DimCut):
    """A dim whose rows are runs already, with a stride in the shard too."""

    @staticmethod
    def of(rows: Runs, size: int, width: int) -> _Strided:
        return _Strided(size, (), {(): rows}, {(): width})

    @staticmethod
    def shared(seen: DimCut, place: Coordinate, stored: Runs, size: int) -> _Strided:
        """What a shard of a seen dim has of the runs of a stored one, which is of that size."""
        shared = intersect(seen.runs[place], stored)[:, [1, 0, 2, 3, 5, 4]]
        return _Strided.of(shared, size, seen.widths[place])

    @cached_property
    def runs(self) -> dict[Coordinate, Runs]:
        return dict(self.rows)
