"""The three dense products in float32 with many batch rows, blocked for the caches, of a weight that is dense or compressed.

A panel of 32 columns of the weight (rows, for the forward pass), 256 deep, is copied to the first-level cache, and tiles of 8 x 32
sums stay in registers while they run along it. A compressed weight is expanded in that copy alone, so no dense one exists;
the weight gradient leaves masked, or compressed. Every sum is made of chains of 64 fma: its bits do not depend on
threads, on tiles, or on how the weight is stored.
"""

from __future__ import annotations

import numpy as np
from numba import carray

from ..core.jit import jit
from ..core.scalars import pointer
from ..core.vectors import LANES, load, shifted, storage_pointer, store
from .many_rows_ir import GROUP, PANEL, copy_lines, copy_square, leave_lines, leave_masked, tile
from .packed_weight import compress, expand, pointers, survivors_before

DEPTH = 256  # of a panel: 32 KiB
CHAIN = 64  # products that are summed one after another: in longer chains roundings add up
BLOCK = 512  # rows of sums, which the second-level cache holds
PACKED = 1 << 17  # elements of dY that a thread copies at a time, for the weight gradient
_BEFORE = (DEPTH + BLOCK) * PANEL + LANES * LANES  # elements before the packed factors
_FLOATS, _MASK = np.zeros(1, np.float32), np.zeros(1, np.uint8)
_1, _2, _3, _4, _5, _6, _7, _8 = ((0,) * n for n in range(1, 9))


@jit()
def _tile(rows, a, a_row, a_step, panel, depth, out, first):
    """`tile` for 1 to 8 rows, by chains."""
    for j in range(0, depth, CHAIN):
        length, begins = min(CHAIN, depth - j), first and j == 0
        _chain(rows, shifted(a, j * a_step), a_row, a_step, shifted(panel, j * PANEL), length, out, begins)


@jit()
def _chain(rows, a, a_row, a_step, panel, depth, out, first):
    if rows == 8:
        tile(_8, a, a_row, a_step, panel, depth, out, first)
    elif rows == 7:
        tile(_7, a, a_row, a_step, panel, depth, out, first)
    elif rows == 6:
        tile(_6, a, a_row, a_step, panel, depth, out, first)
    elif rows == 5:
        tile(_5, a, a_row, a_step, panel, depth, out, first)
    elif rows == 4:
        tile(_4, a, a_row, a_step, panel, depth, out, first)
    elif rows == 3:
        tile(_3, a, a_row, a_step, panel, depth, out, first)
    elif rows == 2:
        tile(_2, a, a_row, a_step, panel, depth, out, first)
    else:
        tile(_1, a, a_row, a_step, panel, depth, out, first)


@jit()
def _tiles(rows, a, a_row, panel, depth, out, first):
    """out (rows, 32) of a (rows, depth), in groups of like sizes."""
    groups = (rows + GROUP - 1) // GROUP
    begin = 0
    for g in range(groups):
        end = rows * (g + 1) // groups
        _tile(end - begin, shifted(a, begin * a_row), a_row, 1, panel, depth, shifted(out, begin * PANEL), first)
        begin = end


def memory_bytes(B: int, N: int) -> int:
    """That a thread works in."""
    return 4 * (_BEFORE + max(PACKED, GROUP * B) + LANES) + 16 * N


@jit()
def _memory(scratch, B, N):
    """What a worker's memory holds: a panel, sums, a square or a line, packed factors; and as addresses, two int64 a row."""
    panel = storage_pointer(scratch, _FLOATS)
    sums = shifted(panel, DEPTH * PANEL)
    square = shifted(sums, BLOCK * PANEL)
    packed = shifted(square, LANES * LANES)
    rows = scratch + 4 * (_BEFORE + max(PACKED, GROUP * B) + LANES)
    starts = carray(pointer(np.uintp(rows), np.int64), (N,))
    places = carray(pointer(np.uintp(rows + 8 * N), np.int64), (N,))
    return panel, sums, square, packed, starts, places


@jit()
def forward(sizes, at, bits, scratch, first, last):
    """Outputs first..last; first: a multiple of PANEL."""
    B, N, K = sizes
    panel, sums, square, _, starts, places = _memory(scratch, B, N)
    w, x, y = pointers(at)
    bias = storage_pointer(at[2], _FLOATS)
    if bits[0]:
        survivors_before(bits, K, first, 0, starts[first:last])
    for b0 in range(0, B, BLOCK):
        rows = min(BLOCK, B - b0)
        for n0 in range(first, last, PANEL):
            width = min(PANEL, N - n0)
            if bits[0]:
                places[n0 : n0 + width] = starts[n0 : n0 + width]
            for k0 in range(0, K, DEPTH):
                depth = min(DEPTH, K - k0)
                for n in range(n0, n0 + PANEL, LANES):
                    lines = min(LANES, N - n)
                    for k in range(k0, k0 + depth, LANES):
                        columns, to = min(LANES, K - k), shifted(panel, (k - k0) * PANEL + n - n0)
                        if bits[0]:
                            expand(w, bits, K, n, k, columns, places[n : n + max(lines, 0)], square, 1, False)
                            copy_square(square, LANES, lines, columns, to, PANEL)
                        else:
                            copy_square(shifted(w, n * K + k), K, lines, columns, to, PANEL)
                _tiles(rows, shifted(x, b0 * K + k0), K, panel, depth, sums, k0 == 0)
            for c in range(PANEL):
                store(square, c, load(bias, n0 + c) if at[2] and c < width else np.float32(0))
            leave_lines(sums, rows, width, square, shifted(y, b0 * N + n0), N)


@jit()
def grad_input(sizes, at, bits, scratch, first, last):
    """Columns first..last; first: a multiple of PANEL."""
    B, N, K = sizes
    panel, sums, square, _, starts, places = _memory(scratch, B, N)
    w, dy, dx = pointers(at)
    if bits[0]:
        survivors_before(bits, K, 0, first, starts)
    for c in range(PANEL):
        store(square, c, np.float32(0))
    for b0 in range(0, B, BLOCK):
        rows = min(BLOCK, B - b0)
        if bits[0]:
            places[:] = starts
        for k0 in range(first, last, PANEL):
            width = min(PANEL, K - k0)
            for n0 in range(0, N, DEPTH):
                depth = min(DEPTH, N - n0)
                if bits[0]:
                    expand(w, bits, K, n0, k0, width, places[n0 : n0 + depth], panel, 2, True)
                else:
                    copy_lines(shifted(w, n0 * K + k0), K, depth, width, panel, DEPTH)
                _tiles(rows, shifted(dy, b0 * N + n0), N, panel, depth, sums, n0 == 0)
            leave_lines(sums, rows, width, square, shifted(dx, b0 * K + k0), K)


@jit()
def _pack(dy, B, N, n0, rows, packed):
    """packed[g][b][r] = dY[b, n0 + 8 g + r], 0 beyond the rows."""
    for g in range(0, rows, GROUP):
        live = min(GROUP, rows - g)
        for b in range(B):
            for r in range(live):
                store(packed, (g * B + b * GROUP) + r, load(dy, b * N + n0 + g + r))


@jit()
def grad_weight(sizes, at, bits, scratch, first, last):
    """Weight rows first..last; first: a multiple of GROUP."""
    B, N, K = sizes
    panel, sums, square, packed, _, places = _memory(scratch, B, N)
    dy, x, dw = pointers(at)
    mask = storage_pointer(at[2], _MASK)
    for c in range(PANEL):
        store(square, c, np.float32(0))
    if bits[0]:
        survivors_before(bits, K, first, 0, places[first:last])
    block = max(GROUP, min(BLOCK, PACKED // B // GROUP * GROUP))
    for n0 in range(first, last, block):
        rows = min(block, last - n0)
        _pack(dy, B, N, n0, rows, packed)
        for k0 in range(0, K, PANEL):
            width = min(PANEL, K - k0)
            for b0 in range(0, B, DEPTH):
                depth = min(DEPTH, B - b0)
                copy_lines(shifted(x, b0 * K + k0), K, depth, width, panel, DEPTH)
                for g in range(0, rows, GROUP):
                    factors, out = shifted(packed, g * B + b0 * GROUP), shifted(sums, g * PANEL)
                    _tile(min(GROUP, rows - g), factors, 1, GROUP, panel, depth, out, b0 == 0)
            place = n0 * K + k0
            if bits[0]:
                compress(sums, bits, K, n0, k0, width, places[n0 : n0 + rows], dw, 2)
            elif at[2]:
                leave_masked(sums, rows, width, shifted(mask, place), shifted(dw, place), K)
            else:
                leave_lines(sums, rows, width, square, shifted(dw, place), K)
