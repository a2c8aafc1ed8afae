"""The loops of the dense float32 products with few batch rows, of a weight that is dense or compressed.

With 2 to 16 rows MKL spends several times what reading the weight costs. Here weight rows stream through the registers once,
in groups; a compressed weight is expanded by groups into the first-level cache, and the weight gradient is masked, or
compressed, as it is written. Every sum has one fixed order: the bits do not depend on threads, or on how the weight is stored.
Arguments as in kernels/cpu/dense/many_rows.py.
"""

from __future__ import annotations

import numpy as np
from numba import carray

from ..core.jit import jit
from ..core.scalars import pointer
from ..core.vectors import LANES, load, shifted, storage_pointer, store
from .few_rows_ir import add_rows, dot_rows, outer_rows
from .packed_weight import compress, expand, pointers, survivors_before

TOGETHER = 4  # weight rows, of the forward pass and of the weight gradient
_ADDED = 8  # weight rows, of the input gradient
CHUNK = 512  # columns: of 8 rows they take 16 KiB, so that what is expanded stays in the first-level cache
_FLOATS, _MASK = np.zeros(1, np.float32), np.zeros(1, np.uint8)
_0: tuple[int, ...] = ()
_1, _2, _3, _4, _8 = ((0,) * n for n in (1, 2, 3, 4, 8))


def memory_bytes(N: int) -> int:
    """That a thread works in."""
    return 4 * _ADDED * CHUNK + 8 * N


@jit()
def _memory(scratch, N):
    """What a thread's memory holds: chunks of weight rows, and an int64 a row."""
    places = carray(pointer(np.uintp(scratch + 4 * _ADDED * CHUNK), np.int64), (N,))
    return storage_pointer(scratch, _FLOATS), places


@jit()
def _dots(rows, batch, w, w_step, x, x_step, length, out):
    """dot_rows for 1 to 4 batch rows."""
    if batch == 4:
        dot_rows(rows, _4, w, w_step, x, x_step, length, out)
    elif batch == 3:
        dot_rows(rows, _3, w, w_step, x, x_step, length, out)
    elif batch == 2:
        dot_rows(rows, _2, w, w_step, x, x_step, length, out)
    else:
        dot_rows(rows, _1, w, w_step, x, x_step, length, out)


@jit()
def forward(sizes, at, bits, scratch, first, last):
    """Outputs first..last."""
    B, N, K = sizes
    w, x, y = pointers(at)
    bias = storage_pointer(at[2], _FLOATS)
    lines, places = _memory(scratch, N)
    found = np.empty(TOGETHER * 4, np.float32)
    out = storage_pointer(np.int64(found.ctypes.data), _FLOATS)
    if bits[0]:
        survivors_before(bits, K, first, 0, places[first:last])
    n = first
    while n < last:
        rows = TOGETHER if n + TOGETHER <= last else 1
        for k in range(0, K, CHUNK):
            width = min(CHUNK, K - k)
            line, step = shifted(w, n * K + k), K
            if bits[0]:
                vectors = (width + LANES - 1) // LANES
                line, step = lines, vectors * LANES
                expand(w, bits, K, n, k, width, places[n : n + rows], lines, vectors, False)
            for b in range(0, B, 4):
                batch = min(4, B - b)
                if rows == TOGETHER:
                    _dots(_4, batch, line, step, shifted(x, b * K + k), K, width, out)
                else:
                    _dots(_1, batch, line, step, shifted(x, b * K + k), K, width, out)
                for r in range(rows):
                    add = load(bias, n + r) if at[2] else np.float32(0)
                    for i in range(batch):
                        place = (b + i) * N + n + r
                        store(y, place, found[r * batch + i] + (load(y, place) if k else add))
        n += rows


@jit()
def grad_input(sizes, at, bits, scratch, first, last):
    """Columns first..last."""
    B, N, K = sizes
    w, dy, dx = pointers(at)
    lines, places = _memory(scratch, N)
    if bits[0]:
        survivors_before(bits, K, 0, first, places)
    for b in range(B):
        for k in range(first, last):
            store(dx, b * K + k, np.float32(0))
    n = 0
    while n < N:
        rows = _ADDED if n + _ADDED <= N else 1
        for k in range(first, last, CHUNK if bits[0] else last - first):
            width = min(CHUNK, last - k) if bits[0] else last - first
            line, step = shifted(w, n * K + k), K
            if bits[0]:
                vectors = (width + LANES - 1) // LANES
                line, step = lines, vectors * LANES
                expand(w, bits, K, n, k, width, places[n : n + rows], lines, vectors, False)
            for b in range(0, B, 2):
                factors, target = shifted(dy, b * N + n), shifted(dx, b * K + k)
                if rows == _ADDED and b + 2 <= B:
                    add_rows(_8, _2, line, step, factors, N, width, target, K)
                elif rows == _ADDED:
                    add_rows(_8, _1, line, step, factors, N, width, target, K)
                elif b + 2 <= B:
                    add_rows(_1, _2, line, step, factors, N, width, target, K)
                else:
                    add_rows(_1, _1, line, step, factors, N, width, target, K)
        n += rows


@jit()
def grad_weight(sizes, at, bits, scratch, first, last):
    """Weight rows first..last."""
    B, N, K = sizes
    dy, x, dw = pointers(at)
    mask = storage_pointer(at[2], _MASK)
    lines, places = _memory(scratch, N)
    if bits[0]:
        survivors_before(bits, K, first, 0, places[first:last])
    n = first
    while n < last:
        rows = TOGETHER if n + TOGETHER <= last else 1
        factors, target, survives = shifted(dy, n), shifted(dw, n * K), shifted(mask, n * K)
        if bits[0]:
            for k in range(0, K, CHUNK):
                width = min(CHUNK, K - k)
                vectors = (width + LANES - 1) // LANES
                if rows == TOGETHER:
                    outer_rows(_4, _0, factors, N, shifted(x, k), K, B, width, survives, lines, vectors * LANES)
                else:
                    outer_rows(_1, _0, factors, N, shifted(x, k), K, B, width, survives, lines, vectors * LANES)
                compress(lines, bits, K, n, k, width, places[n : n + rows], dw, vectors)
        elif at[2]:
            if rows == TOGETHER:
                outer_rows(_4, _1, factors, N, x, K, B, K, survives, target, K)
            else:
                outer_rows(_1, _1, factors, N, x, K, B, K, survives, target, K)
        elif rows == TOGETHER:
            outer_rows(_4, _0, factors, N, x, K, B, K, survives, target, K)
        else:
            outer_rows(_1, _0, factors, N, x, K, B, K, survives, target, K)
        n += rows


@jit()
def grad_bias(sizes, dy_at, db_at, first, last):
    """Outputs first..last: the sum over the batch."""
    dy, db = storage_pointer(dy_at, _FLOATS), storage_pointer(db_at, _FLOATS)
    for n in range(first, last):
        total = load(dy, n)
        for b in range(1, sizes[0]):
            total += load(dy, b * sizes[1] + n)
        store(db, n, total)
