"""From the power sums of a chunk to its record, and from the records of a channel to its moments.

A record is (count, mean, spread, skew, kurtosis, low, high, zeros) about its own mean; spread is the root of the
variance, so nothing in a record overflows or vanishes. Records of a channel are combined by the formula of Chan, Golub &
LeVeque (1983), for all chunks at once.
"""

from __future__ import annotations

import math

from numba import int64

from ..core.jit import jit
from ..core.scalars import full_vectors
from .power_sums_ir import COUNT, HIGH, LANES, LOW, ROWS, S1, S2, S3, S4, SCALE, SHIFT, ZEROS

RECORD = 8
N, MEAN, SPREAD, SKEW, KURTOSIS, MIN, MAX, NULLS = range(RECORD)
VALUES = 12  # rows of the result, as in kernels/reference/moments/moments.py
CARRIED = ROWS  # rows of sums of the blocks before
FOUND = CARRIED + 4  # rows of records
SUMS = (FOUND + RECORD) * LANES  # size of `sums` below: flat, so that rows lie at distances that LLVM knows


@jit(error_model="numpy")
def _power(x):
    """A power of two p with x * p in [0.5, 1), as far as p and x * p can be normal numbers."""
    return math.ldexp(1.0, -min(max(math.frexp(x)[1], -1000), 1020))


@jit(error_model="numpy")
def clear(sums):
    for i in range(LANES):
        for row in (COUNT, ZEROS, S1, S2, S3, S4):
            sums[row * LANES + i] = 0.0
        sums[LOW * LANES + i], sums[HIGH * LANES + i] = math.inf, -math.inf


@jit(error_model="numpy")
def place(sums, shift, scale):
    for i in range(LANES):
        sums[SHIFT * LANES + i], sums[SCALE * LANES + i] = shift, scale


@jit(error_model="numpy")
def fold(sums):
    """Lanes into the first lane, in a fixed tree."""
    for half in (8, 4, 2, 1):
        for row in (COUNT, ZEROS, S1, S2, S3, S4):
            for i in range(row * LANES, row * LANES + half):
                sums[i] += sums[i + half]
        for i in range(half):
            low, high = LOW * LANES + i, HIGH * LANES + i
            sums[low] = min(sums[low], sums[low + half])
            sums[high] = max(sums[high], sums[high + half])


@jit(error_model="numpy")
def _found(sums, i, order, tolerance):
    """Write the record of lane i; 1 if it has to be done again, about its mean or scaled."""
    n, scale = sums[COUNT * LANES + i], sums[SCALE * LANES + i]
    low, high = sums[LOW * LANES + i], sums[HIGH * LANES + i]
    share = 1 / max(n, 1.0)
    e, v2 = sums[S1 * LANES + i] * share, sums[S2 * LANES + i] * share
    flat = not low < high
    m2 = 0.0 if flat else max(v2 - e * e, 0.0)
    spread = math.sqrt(m2)
    at, mean = FOUND * LANES + i, (sums[SHIFT * LANES + i] + e) / scale
    sums[at + N * LANES] = n
    sums[at + MEAN * LANES] = low if flat else mean
    sums[at + SPREAD * LANES] = spread / scale
    sums[at + MIN * LANES], sums[at + MAX * LANES] = low, high
    sums[at + NULLS * LANES] = sums[ZEROS * LANES + i]
    finite = (v2 < math.inf) & (abs(e) < math.inf)
    if order > 2:
        v3, v4 = sums[S3 * LANES + i] * share, sums[S4 * LANES + i] * share
        skew = (v3 - 3 * e * v2 + 2 * e * e * e) / (m2 * spread)
        kurtosis = (v4 - 4 * e * v3 + 6 * e * e * v2 - 3 * e * e * e * e) / (m2 * m2)
        sums[at + SKEW * LANES] = skew if m2 > 0 else 0.0
        sums[at + KURTOSIS * LANES] = kurtosis if m2 > 0 else 0.0
        finite &= v4 < math.inf
    # 1e-140: the fourth power of what is smaller would vanish
    good = finite & (flat | ((abs(e) <= tolerance * spread) & (v2 > 1e-140)))
    return int64(0) if good | (n == 0) else int64(1)


@jit(error_model="numpy")
def find_one(sums, order, tolerance):
    """Write the record of the first lane; whether it is good."""
    return _found(sums, int64(0), order, tolerance) == 0


@jit(error_model="numpy")
def find_all(sums, lanes, order, tolerance):
    """Write the records of the first lanes; whether all are good. LLVM makes vectors of a loop only if its count is not constant."""
    full_vectors()
    bad = int64(0)
    if order > 2:
        for i in range(lanes):
            bad += _found(sums, i, int64(4), tolerance)
    else:
        for i in range(lanes):
            bad += _found(sums, i, int64(2), tolerance)
    return bad == 0


@jit(error_model="numpy")
def store(sums, lanes, records, index):
    for row in range(RECORD):
        for i in range(lanes):
            records[index + i, row] = sums[(FOUND + row) * LANES + i]


@jit(error_model="numpy")
def is_finite(sums):
    """Whether the first lane has met finite values only, whose powers are finite too."""
    return (abs(sums[S1 * LANES]) < math.inf) & (sums[S2 * LANES] < math.inf) & (sums[S4 * LANES] < math.inf)


@jit(error_model="numpy")
def recenter(sums, lanes, may_scale):
    """Set SHIFT to the mean that an attempt found, and, once non-finite values are left out, SCALE to suit the largest value."""
    for i in range(lanes):
        low, high = sums[LOW * LANES + i], sums[HIGH * LANES + i]
        e = sums[S1 * LANES + i] / sums[COUNT * LANES + i]
        finite = abs(e) < math.inf
        mean = (sums[SHIFT * LANES + i] + e) / sums[SCALE * LANES + i] if finite else 0.0
        top = max(abs(low), abs(high)) if low <= high else 0.0
        scale = _power(top) if may_scale and top > 0 and not 1e-30 < top < 1e60 else 1.0
        sums[SHIFT * LANES + i], sums[SCALE * LANES + i] = mean * scale, scale


@jit(error_model="numpy")
def _combined(records, first, step, chunks, order):
    """count, zeros, low, high, mean, spread, skew, kurtosis of `chunks` records."""
    if chunks == 1:
        n, mean, spread, skew, kurtosis, low, high, zeros = records[first]
        return n, zeros, low, high, mean, spread, skew, kurtosis
    n, zeros, low, high, top = 0.0, 0.0, math.inf, -math.inf, 0.0
    for j in range(first, first + chunks * step, step):
        n += records[j, N]
        zeros += records[j, NULLS]
        low, high = min(low, records[j, MIN]), max(high, records[j, MAX])
        if records[j, N] > 0:
            top = max(top, abs(records[j, MEAN]), records[j, SPREAD])
    if n == 0:
        return n, zeros, low, high, 0.0, 0.0, 0.0, 0.0
    p = _power(top)
    mean, origin = 0.0, math.nan
    for j in range(first, first + chunks * step, step):
        if records[j, N] > 0:
            here = records[j, MEAN] * p
            origin = here if origin != origin else origin
            mean += records[j, N] / n * (here - origin)
    mean += origin
    m2, m3, m4 = 0.0, 0.0, 0.0
    for j in range(first, first + chunks * step, step):
        if records[j, N] > 0:
            w, d, s = records[j, N] / n, records[j, MEAN] * p - mean, records[j, SPREAD] * p
            s2, d2 = s * s, d * d
            m2 += w * (s2 + d2)
            if order > 2:
                s3 = records[j, SKEW] * s2 * s
                m3 += w * (s3 + 3 * d * s2 + d2 * d)
                m4 += w * (records[j, KURTOSIS] * s2 * s2 + 4 * d * s3 + 6 * d2 * s2 + d2 * d2)
    spread = math.sqrt(m2)
    skew, kurtosis = (m3 / (m2 * spread), m4 / (m2 * m2)) if low < high and m2 > 0 else (0.0, 0.0)
    return n, zeros, low, high, mean / p, spread / p, skew, kurtosis


@jit(error_model="numpy")
def finish(records, first, step, chunks, values, order, correction, table, channel):
    """Write column `channel` of the result, from the records of its `values` values."""
    n, zeros, low, high, mean, spread, skew, kurtosis = _combined(records, first, step, chunks, order)
    if n == 0:
        for row in range(VALUES - 2):
            table[row, channel] = math.nan
    else:
        m2 = spread * spread
        table[0, channel], table[1, channel] = mean, m2 * (n / max(n - correction, 0.0))
        table[2, channel], table[3, channel] = (skew, kurtosis) if spread > 0 else (math.nan, math.nan)
        table[4, channel], table[5, channel], table[6, channel] = low, high, zeros / n
        table[7, channel], table[8, channel], table[9, channel] = m2, skew * m2 * spread, kurtosis * m2 * m2
    table[10, channel], table[11, channel] = n, values - n
    if order == 2:
        for row in (2, 3, 8, 9):
            table[row, channel] = math.nan
