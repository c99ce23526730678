"""The crc32 of a file, of parts that are read beside each other."""

from __future__ import annotations

import os
import zlib
from functools import lru_cache, partial

from adafisher_dist.checkpoint.read_ahead import ReadAhead

# Bytes that a thread sums up, and those that it reads at a time: they stay in the cache.
_PART, _BUFFER = 1 << 24, 1 << 20

# The polynomial of crc32, the coefficient of x⁰ in the highest bit, as everywhere below.
_POLYNOMIAL = 0xEDB88320
_ONE = 1 << 31


def checksum_of(handle: int, nbytes: int) -> int:
    """The crc32 of a file of so many bytes.

    Raises:
        OSError: it cannot be read.
    """
    crc32 = 0
    with ReadAhead() as ahead:
        parts = ahead.in_order(partial(_of_part, handle, nbytes, ahead), range(0, nbytes, _PART))
        for start, part in parts:
            crc32 = combined(crc32, part, min(_PART, nbytes - start))
    return crc32


def _of_part(handle: int, nbytes: int, ahead: ReadAhead, start: int) -> int:
    crc32, stop = 0, min(nbytes, start + _PART)
    buffer = memoryview(bytearray(_BUFFER))
    while start < stop and (count := os.preadv(handle, [buffer[: stop - start]], start)):
        crc32, start = zlib.crc32(buffer[:count], crc32), start + count
        ahead.tick()
    return crc32


def combined(first: int, second: int, nbytes: int) -> int:
    """The crc32 of two texts in a row, from that of each; `nbytes`: of the second.

    A crc32 is the remainder of a polynomial, and more bytes after a text multiply it by x⁸ each;
    what crc32 does to begin and to end with cancels out (as zlib's own crc32_combine has it).
    """
    return _product(first, _power_of_x(8 * nbytes)) ^ second


def _product(a: int, b: int) -> int:
    """Of two polynomials, modulo that of crc32."""
    product, bit = 0, _ONE
    while bit:
        if a & bit:
            product ^= b
        b = b >> 1 ^ (_POLYNOMIAL if b & 1 else 0)
        bit >>= 1
    return product


@lru_cache(maxsize=64)
def _power_of_x(exponent: int) -> int:
    power, square = _ONE, _ONE >> 1
    while exponent:
        if exponent & 1:
            power = _product(power, square)
        square = _product(square, square)
        exponent >>= 1
    return power
