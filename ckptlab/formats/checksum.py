"""CRC-32 of bytes that are not at hand at once: of pieces that were drawn apart, and of zeros that nobody draws.

A CRC-32 is a polynomial over GF(2), modulo `_POLYNOMIAL`; to append n bytes to what it was taken of multiplies it by
x^8n. The method is that of zlib's `crc32_combine` (1.2.12 on), which Python's zlib does not pass on.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache

_POLYNOMIAL = 0xEDB88320  # the terms below x^32, x^0 in the highest bit
_ONE = 1 << 31  # x^0


def combined(pieces: Iterable[tuple[int, int]]) -> int:
    """The CRC-32 of pieces that lie one after the other, of each (its own CRC-32, its bytes)."""
    whole = 0
    for crc, size in pieces:
        whole = _times(_power(8 * size), whole) ^ crc
    return whole


def of_zeros(size: int) -> int:
    """The CRC-32 of so many zero bytes."""
    return _times(_power(8 * size), 0xFFFFFFFF) ^ 0xFFFFFFFF  # it begins as ones, and ends inverted


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
