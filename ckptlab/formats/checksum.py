"""CRC-32 of bytes that are not at hand at once: of pieces that were drawn apart, and of zeros that nobody draws.

A CRC-32 is a polynomial over GF(2), modulo `_POLYNOMIAL`; to append n bytes to what it was taken of multiplies it by
x^8n. zlib-ng takes it four times as fast as zlib, and has the multiplication (zlib has it too, but Python's does not
pass it on); where it is not installed both are done without.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from functools import cache

try:
    from zlib_ng.zlib_ng import crc32, crc32_combine
except ImportError:
    from zlib import crc32

    def crc32_combine(crc1: int, crc2: int, crc2_length: int, /) -> int:
        return _times(_power(8 * crc2_length), crc1) ^ crc2


__all__ = ["combined", "crc32", "crc32_combine", "of_zeros", "with_numbers"]

_POLYNOMIAL = 0xEDB88320  # the terms below x^32, x^0 in the highest bit
_ONE = 1 << 31  # x^0


def combined(pieces: Iterable[tuple[int, int]]) -> int:
    """The CRC-32 of pieces that lie one after the other, of each (its own CRC-32, its bytes)."""
    whole = 0
    for crc, size in pieces:
        whole = crc32_combine(whole, crc, size)
    return whole


def of_zeros(size: int) -> int:
    """The CRC-32 of so many zero bytes."""
    return crc32_combine(0xFFFFFFFF, 0, size) ^ 0xFFFFFFFF  # it begins as ones, and ends inverted


def with_numbers(crc: int, size: int, numbers: Iterable[tuple[int, int]]) -> int:
    """The CRC-32 of `size` bytes that had `crc`, after 32-bit numbers were written at places where zeros stood.

    numbers: (place, number), little-endian. Bits that change add their own remainder, whatever the others are.
    """
    for place, number in numbers:
        changed = crc32(struct.pack("<I", number)) ^ crc32(bytes(4))
        crc ^= crc32_combine(changed, 0, size - place - 4)
    return crc


def _times(a: int, b: int) -> int:
    product = 0
    for bit in range(31, -1, -1):
        if a >> bit & 1:
            product ^= b
        b = b >> 1 ^ (_POLYNOMIAL if b & 1 else 0)
    return product


def _power(n: int) -> int:
    """x^n."""
    power, k = _ONE, 0
    while n >> k:
        if n >> k & 1:
            power = _times(_square(k), power)
        k += 1
    return power


@cache
def _square(k: int) -> int:
    """x^(2^k)."""
    return _ONE >> 1 if k == 0 else _times(_square(k - 1), _square(k - 1))
