"""A packed mask as the dense products of a compressed weight read it: 16 weights at a time, expanded and compressed in registers.

`bits`: address and bytes of the mask, row-major, 8 weights a byte, the lowest bit first, and the number of values. `places`: of every row, the number of
its next survivor.
"""

from __future__ import annotations

import numpy as np

from ..core.jit import jit
from ..core.scalars import population
from ..core.vectors import LANES, prefetch, shifted, storage_pointer
from .many_rows_ir import byte_at, leave_survivors, long_at, take_survivors, word_at

_FLOATS = np.zeros(1, np.float32)


@jit()
def pointers(at):
    """The first two addresses and the fourth, of what a product reads and writes, as pointers to float32."""
    return storage_pointer(at[0], _FLOATS), storage_pointer(at[1], _FLOATS), storage_pointer(at[3], _FLOATS)


@jit()
def lanes_at(bits, place):
    """The 16 bits of the packed mask from number `place` on; 0 beyond its end. bits: address and bytes."""
    byte, shift = place >> 3, np.uint32(place & 7)
    if byte + 4 <= bits[1]:
        return np.uint32(word_at(bits[0] + byte) >> shift)
    word = np.uint32(0)
    for i in range(bits[1] - byte):
        word |= np.uint32(np.uint32(byte_at(bits[0] + byte + i)) << np.uint32(8 * i))
    return np.uint32(word >> shift)


@jit()
def live(width):
    """Bits of the first `width` lanes, of 16."""
    return np.uint32((1 << min(max(width, 0), LANES)) - 1)


@jit()
def survivors_before(bits, K, row, column, places):
    """places[i] = survivors before column `column` of row row + i, of a mask of K columns."""
    total, byte = np.int64(0), np.int64(0)
    for i in range(places.size):
        place = (row + i) * K + column
        last = place >> 3
        while byte + 8 <= last:
            total += np.int64(population(long_at(bits[0] + byte)))
            byte += 8
        while byte < last:
            total += np.int64(population(np.uint64(byte_at(bits[0] + byte))))
            byte += 1
        places[i] = total
        if place & 7:
            lower = np.uint64(byte_at(bits[0] + last)) & np.uint64((1 << (place & 7)) - 1)
            places[i] += np.int64(population(lower))


@jit()
def expand(values, bits, K, row, column, width, places, out, vectors, asks):
    """out (rows, 16 vectors) = columns column .. column + width - 1 of rows row.. of a compressed weight, and 0; moves `places` on.

    asks: whether each row's next values, needed later, are asked for. bits: also how many values there are.
    """
    for i in range(places.size):
        at, first, v = places[i], (row + i) * K + column, 0
        byte, shift = bits[0] + (first >> 3), np.uint32(first & 7)
        if at + width + LANES <= bits[2] and ((first + width) >> 3) + 4 <= bits[1]:  # nothing ends within these
            for v in range(width // LANES):
                lanes = np.uint16(word_at(byte + 2 * v) >> shift)
                take_survivors(shifted(values, at), LANES, lanes, shifted(out, LANES * (i * vectors + v)))
                at += np.int64(population(np.uint64(lanes)))
            v = width // LANES
        while v < vectors:
            lanes = np.uint16(lanes_at(bits, first + v * LANES) & live(width - v * LANES))
            take_survivors(shifted(values, at), bits[2] - at, lanes, shifted(out, LANES * (i * vectors + v)))
            at += np.int64(population(np.uint64(lanes)))
            v += 1
        if asks:
            prefetch(values, at + LANES)
            prefetch(values, at + 2 * LANES)
        places[i] = at


@jit()
def compress(lines, bits, K, row, column, width, places, values, vectors):
    """The reverse of `expand`. lines, values: pointers."""
    for i in range(places.size):
        at = places[i]
        for v in range(vectors):
            lanes = lanes_at(bits, (row + i) * K + column + v * LANES) & live(width - v * LANES)
            count = min(np.int64(population(np.uint64(lanes))), max(bits[2] - at, 0))  # never beyond the values
            leave_survivors(shifted(lines, (i * vectors + v) * LANES), np.uint16(lanes), count, shifted(values, at))
            at += count
        places[i] = at
