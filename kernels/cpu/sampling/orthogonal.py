"""QR by Householder reflections in one fixed order of IEEE operations: the same bits for any number of threads and any vector width.

LAPACK's result differs with threads and machine in the last bit. Here every sum runs over the rows in rising order, and
what is vectorized and shared among threads is the columns, which never meet. Blocked: PANEL reflectors act together as
I - V T V' (Schreiber & Van Loan 1989), so a large matrix is read once a panel.
"""

from __future__ import annotations

import numpy as np
from numba import uintp
from torch import Tensor

from ..core.jit import jit, threads
from ..core.shares import ME, among, on_threads, part_of

PANEL = 64
TILE = 128  # columns updated together: their sums stay in the first-level cache
STEP = 16  # reflectors whose sums are formed together
SERIAL = 1 << 15  # matrices of fewer elements are not worth a parallel region


@jit()
def _factor(m, tau, sign, g, start):
    """The columns of m become reflectors, each zero above its own row; tau, and the sign of R's diagonal."""
    width = uintp(m.shape[1])
    zero = tau[0] * 0
    for k in range(width):
        row = uintp(start) + k
        for r in range(width):
            g[r] = zero
        for i in range(row, uintp(m.shape[0])):
            line = m[i]
            x = line[k]
            for r in range(width):
                g[r] += x * line[r]
        norm = np.sqrt(g[k])
        head = m[row, k]
        sign[k] = zero - 1 if head >= 0 else zero + 1
        shift = sign[k] * norm
        square = norm * (norm + abs(head))
        tau[k] = 1 / square if square > 0 else zero
        for r in range(width):
            g[r] = (g[r] - shift * m[row, r]) * tau[k] if r > k else zero
        m[row, k] = head - shift
        for i in range(row, uintp(m.shape[0])):
            line = m[i]
            x = line[k]
            for r in range(width):
                line[r] -= x * g[r]
    for k in range(width):
        for i in range(uintp(start) + k):
            m[i, k] = zero


@jit()
def _products(v, m, out, start):
    """out = v' m over the rows from `start` on, each sum in rising order."""
    for first in range(uintp(0), uintp(v.shape[1]), uintp(STEP)):
        last = min(first + uintp(STEP), uintp(v.shape[1]))
        for p in range(first, last):
            out[p, :] = 0
        for i in range(uintp(start), uintp(m.shape[0])):
            row = m[i]
            for p in range(first, last):
                x, sums = v[i, p], out[p]
                for r in range(uintp(row.size)):
                    sums[r] += x * row[r]


@jit()
def _subtract(v, w, m, start):
    """m -= v w, reflector by reflector."""
    for first in range(uintp(0), uintp(v.shape[1]), uintp(STEP)):
        last = min(first + uintp(STEP), uintp(v.shape[1]))
        for i in range(uintp(start), uintp(m.shape[0])):
            row = m[i]
            for p in range(first, last):
                x, y = v[i, p], w[p]
                for r in range(uintp(row.size)):
                    row[r] -= x * y[r]


@jit()
def _triangle(v, tau, start):
    """T of I - V T V' (upper triangular), from the products of the reflectors with one another."""
    width = v.shape[1]
    gram, t = np.empty((width, width), v.dtype), np.zeros((width, width), v.dtype)
    _products(v, v, gram, start)
    for j in range(width):
        t[j, j] = tau[j]
        for i in range(j):
            total = t[i, i] * gram[i, j]
            for k in range(i + 1, j):
                total += t[i, k] * gram[k, j]
            t[i, j] = -tau[j] * total
    return t


@jit()
def _reflect(v, t, m, start):
    """m -= v t (v' m): the panel's reflectors applied to a tile of columns."""
    products, w = np.empty((v.shape[1], m.shape[1]), m.dtype), np.empty((v.shape[1], m.shape[1]), m.dtype)
    _products(v, m, products, start)
    _products(t.T.copy(), products, w, np.int64(0))
    _subtract(v, w, m, start)


@jit()
def _reflect_tiles(share, v, t, m, start, first):
    """The panel's reflectors applied to a share of the tiles of m's columns from `first` on, copied out, so that rows are contiguous."""
    if share[ME] < 0:
        on_threads(share)
        return
    n = m.shape[1]
    tiles = part_of(share, (n - first + TILE - 1) // TILE)
    for tile in range(tiles[0], tiles[1]):
        a = first + tile * TILE
        b = min(a + TILE, n)
        columns = m[:, a:b].copy()
        _reflect(v, t, columns, start)
        m[:, a:b] = columns


@jit()
def _qr(share, m, q, sign):
    """m's columns become reflectors, q's the orthonormal vectors. q starts as the identity."""
    n = m.shape[1]
    panels = (n + PANEL - 1) // PANEL
    triangles = np.zeros((panels, PANEL, PANEL), m.dtype)
    tau, g = np.empty(PANEL, m.dtype), np.empty(PANEL, m.dtype)
    for panel in range(panels):
        first, last = panel * PANEL, min(panel * PANEL + PANEL, n)
        v = m[:, first:last].copy()
        tau[:] = 0
        _factor(v, tau, sign[first:last], g, first)
        t = _triangle(v, tau, first)
        m[:, first:last] = v
        triangles[panel, : last - first, : last - first] = t
        _reflect_tiles(share, v, t.T.copy(), m, first, last)
    for back in range(panels):
        panel = panels - 1 - back
        first, last = panel * PANEL, min(panel * PANEL + PANEL, n)
        v = m[:, first:last].copy()
        t = triangles[panel, : last - first, : last - first].copy()
        _reflect_tiles(share, v, t, q, first, first)
    for i in range(uintp(q.shape[0])):
        for k in range(uintp(n)):
            q[i, k] *= sign[k]


def orthogonal_(matrix: Tensor) -> Tensor:
    """Replace `matrix` (m, n), m >= n, contiguous float32 or float64, by the Q of its QR decomposition whose R has a positive diagonal."""
    m = matrix.numpy()
    q, sign = np.zeros_like(m), np.empty(m.shape[1], m.dtype)
    np.fill_diagonal(q, 1)
    _qr(among(1 if m.size < SERIAL else threads()), m, q, sign)
    m[:] = q
    return matrix
