"""Windows of elements: all that were asked for, or an error, and what is asked of them while they are in the
processor's cache: finite? zero? rounded? equal, and if not, how far apart?

Two reductions answer most of it: the least and the greatest element are NaN or infinite if any is, and say whether
something is negative or all is zero. 16-bit numbers are looked at as integers, which numpy reduces many times faster.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import ml_dtypes
import numpy as np

from ckptlab.arrays import Reader
from ckptlab.errors import CheckpointError
from ckptlab.layout import Cut

WINDOW = 1 << 20  # elements that a window has at most, if not said

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
_INFINITY = {BFLOAT16: 0x7F80, np.dtype(np.float16): 0x7C00}  # the magnitude bits of infinity
_BITS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
_HALF_UNIT = 0x8000  # half a unit in the last place of a bfloat16, in the bits of a float32


def joined(gather: Reader, cut: Cut, at: tuple[int, ...], lo: int, hi: int) -> np.ndarray:
    """Elements lo … hi-1 of shard `at` of `cut`, flattened, as one piece: states need not lie in the same fragments.

    CheckpointError, with the tensor's name, where some are not stored.
    """
    found = list(pieces(gather, cut, at, lo, hi, hi - lo))
    return found[0] if len(found) == 1 else np.concatenate(found)


def pieces(gather: Reader, cut: Cut, at: tuple[int, ...], lo: int, hi: int, window: int) -> Iterator[np.ndarray]:
    """`Gather.chunks`, each of at most `window` elements; CheckpointError after the last where some are not stored."""
    done = 0
    for piece in gather.chunks(cut, at, lo, hi, window):
        yield piece
        done += len(piece)
    if done != hi - lo:
        raise CheckpointError(
            f"{gather.name}: {gather.state}: of elements {lo} to {hi} of its shard of shape {cut.shard_shape(at)} only "
            f"{done} are stored: the checkpoint is incomplete, see what `ckptlab check` says of it"
        )


def runs(gather: Reader, cut: Cut, at: tuple[int, ...], size: int) -> Iterator[tuple[Cut, tuple[int, ...], int, int]]:
    """(cut, coordinate, first element, the one behind the last) of runs of at most `size` elements that together are a
    shard, in any order."""
    for part, place in gather.unordered(cut, at):
        numel = math.prod(part.shard_shape(place))
        yield from ((part, place, lo, min(lo + size, numel)) for lo in range(0, numel, size))


class Extremes(NamedTuple):
    """Whether a window is finite, all zero, and (where it was asked) free of negative elements."""

    finite: bool
    zero: bool
    negative: bool


def extremes(x: np.ndarray, signed: bool = False) -> Extremes:
    """Look over a flat window. signed: also whether an element is below zero (-0 is not)."""
    if x.dtype in _INFINITY:
        top = int((x.view(np.uint16) & 0x7FFF).max())
        below = signed and bool((x.astype(np.float32) < 0).any())
        return Extremes(top < _INFINITY[x.dtype], top == 0, below)
    if x.dtype.kind in "iub":
        return Extremes(True, not x.any(), False)
    if x.dtype not in (np.float32, np.float64):
        x = np.abs(x) if x.dtype.kind == "c" else x.astype(np.float32)
    low, high = float(x.min()), float(x.max())
    return Extremes(math.isfinite(low) and math.isfinite(high), low == high == 0, signed and low < 0)


def unfinite(x: np.ndarray) -> np.ndarray:
    """Indices of elements that are NaN or infinite."""
    wide = x if x.dtype.kind == "c" or x.dtype.itemsize > 2 else x.astype(np.float32)
    return np.flatnonzero(~np.isfinite(wide))


_TWO = np.array([0x9E3779B97F4A7C15, 0xD1342543DE82EF95], np.uint64)


def unequal(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Indices at which two windows differ: in their bits, or in value where their dtypes differ (NaN equals NaN)."""
    if a.dtype != b.dtype:
        x, y = wide(a), wide(b)
        return np.flatnonzero((x != y) & ~(np.isnan(x) & np.isnan(y)))
    bits = _BITS.get(a.dtype.itemsize)
    if bits is None:  # complex128
        return np.flatnonzero((a.view(np.uint64) != b.view(np.uint64)).reshape(-1, 2).any(axis=1))
    same = np.equal(a.view(bits), b.view(bits))
    return np.flatnonzero(~same) if not same.all() else np.empty(0, np.int64)


def content(x: np.ndarray) -> int:
    """A number of the bits of some elements that does not depend on their order: a sum, modulo 2^64, of each mixed
    thoroughly."""
    bits = _BITS.get(x.dtype.itemsize)
    mixed = x.view(bits).astype(np.uint64) if bits is not None else x.view(np.uint64).reshape(-1, 2) @ _TWO
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):  # splitmix64's
        mixed ^= mixed >> np.uint64(shift)
        mixed *= np.uint64(factor)
    return int((mixed ^ (mixed >> np.uint64(31))).sum(dtype=np.uint64))


def unrounded(master: np.ndarray, weight: np.ndarray, scratch: np.ndarray) -> np.ndarray:
    """Indices at which a float32 master does not round to the weight.

    A master in the very middle between two bfloat16 may round to either. scratch: uint32, at least as long.
    """
    if master.dtype != np.float32 or weight.dtype not in (BFLOAT16, np.float16, np.float32):
        suspects = np.arange(len(master))
    elif weight.dtype == BFLOAT16:
        apart = scratch[: len(master)]
        np.copyto(apart, weight.view(np.uint16))
        np.left_shift(apart, 16, out=apart)
        np.subtract(master.view(np.uint32), apart, out=apart)
        np.add(apart, _HALF_UNIT, out=apart)
        if int(apart.max()) <= 2 * _HALF_UNIT:
            return np.empty(0, np.int64)
        suspects = np.flatnonzero(apart > 2 * _HALF_UNIT)
    else:
        suspects = unequal(master.astype(weight.dtype), weight)
    if not len(suspects):
        return suspects
    rounded, held = (v.astype(np.float32) for v in (master[suspects].astype(weight.dtype), weight[suspects]))
    return suspects[(rounded != held) & ~(np.isnan(rounded) & np.isnan(held))]


def wide(x: np.ndarray) -> np.ndarray:
    """In float64, or complex128."""
    return x.astype(np.complex128 if x.dtype.kind == "c" else np.float64, copy=False)


def apart(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """|a - b| in float64; inf where only one is NaN or they are different infinities."""
    x, y = wide(a), wide(b)
    with np.errstate(invalid="ignore"):
        distance = np.abs(x - y)
    distance[np.isnan(distance)] = np.inf
    distance[(np.isnan(x) & np.isnan(y)) | (x == y)] = 0.0
    return distance


def relative(distances: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """What is `apart`, as a share of the larger of |a| and |b|."""
    with np.errstate(invalid="ignore", divide="ignore"):
        ratio = distances / np.maximum(np.abs(wide(a)), np.abs(wide(b)))
    ratio[distances == 0] = 0.0
    ratio[np.isnan(ratio)] = np.inf
    return ratio
