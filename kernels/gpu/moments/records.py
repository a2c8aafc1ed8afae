"""Records of chunks, and how they are combined: the second launch of kernels/gpu/moments/moments.py, in a fixed order.

A record is count, mean, m2, m3, m4, low, high, zeros of a chunk's values times 2^-exponent, and the exponent, in float64;
two are combined by the formula of Chan, Golub & LeVeque (1983).
"""

from __future__ import annotations

import triton
import triton.language as tl

RECORD = 9
EXPONENT = tl.constexpr(8)  # the last row
VALUES = 12  # rows of the result, as in kernels/reference/moments/moments.py
RECORDS_A_STEP = 256
# Columns of a segment, the plan of one tensor; sizes and steps in elements.
SEGMENT = 11
ADDRESS, KIND, A, C, I, STEP_A, STEP_C, CHUNKS, FIRST_RECORD, FIRST_CHANNEL, CORRECTION = (  # noqa: E741
    tl.constexpr(i) for i in range(SEGMENT)
)
FIRST_TASK = tl.constexpr(SEGMENT)  # four columns, one a class; a class is 2 * across + wide
SEGMENT_SIZE = tl.constexpr(SEGMENT + 4)


@triton.jit
def power(top):
    """2^-k, k near the exponent of `top` >= 0 and such that neither the power nor its inverse is subnormal; and k."""
    if top.dtype == tl.float64:
        k = tl.minimum(tl.maximum((top.to(tl.int64, bitcast=True) >> 52) - 1023, -1021), 1021)
        p = ((1023 - k) << 52).to(tl.float64, bitcast=True)
    else:
        k = tl.minimum(tl.maximum((top.to(tl.int32, bitcast=True) >> 23) - 127, -125), 125)
        p = ((127 - k) << 23).to(tl.float32, bitcast=True)
    return p, k.to(tl.int32)


@triton.jit
def _exp2(k):
    """2^k in float64 for integers |k| <= 2,100, in two factors so that both are normal numbers."""
    half = k // 2
    a = ((half.to(tl.int64) + 1023) << 52).to(tl.float64, bitcast=True)
    b = (((k - half).to(tl.int64) + 1023) << 52).to(tl.float64, bitcast=True)
    return a, b


@triton.jit
def scaled(x, k):
    """x * 2^k."""
    a, b = _exp2(k)
    return x * a * b


@triton.jit
def merged(n, mean, m2, m3, m4, e, n_b, mean_b, m2_b, m3_b, m4_b, e_b):
    """Moments of two parts together. mean * 2^e is a part's mean and m_k * 2^(k e) its central moments."""
    top = tl.where(n_b > 0, tl.where(n > 0, tl.maximum(e, e_b), e_b), e)
    down, down_b = tl.minimum(tl.maximum(e - top, -500), 0), tl.minimum(tl.maximum(e_b - top, -500), 0)
    r, r_b = scaled(tl.full(n.shape, 1.0, tl.float64), down), scaled(tl.full(n.shape, 1.0, tl.float64), down_b)
    total = n + n_b
    safe = tl.where(total > 0, total, 1.0)
    w, w_b = n / safe, n_b / safe
    mean, mean_b = mean * r, mean_b * r_b
    gap = mean_b - mean
    new = tl.where(n > 0, mean + w_b * gap, mean_b)
    d, d_b = tl.where(n > 0, mean - new, 0.0), tl.where(n_b > 0, mean_b - new, 0.0)
    m2, m3, m4 = m2 * r * r, m3 * r * r * r, m4 * (r * r) * (r * r)
    m2_b, m3_b, m4_b = m2_b * r_b * r_b, m3_b * r_b * r_b * r_b, m4_b * (r_b * r_b) * (r_b * r_b)
    q2 = w * (m2 + d * d) + w_b * (m2_b + d_b * d_b)
    q3 = w * (m3 + 3 * d * m2 + d * d * d) + w_b * (m3_b + 3 * d_b * m2_b + d_b * d_b * d_b)
    q4 = w * (m4 + 4 * d * m3 + 6 * d * d * m2 + d * d * d * d)
    q4 += w_b * (m4_b + 4 * d_b * m3_b + 6 * d_b * d_b * m2_b + d_b * d_b * d_b * d_b)
    return total, new, q2, q3, q4, top


@triton.jit
def segment(segments_ptr, count, COLUMN: tl.constexpr, number):
    """The last segment whose COLUMN is at most `number`."""
    low, high = 0, count
    while high - low > 1:
        middle = (low + high) // 2
        below = tl.load(segments_ptr + middle * SEGMENT_SIZE + COLUMN) <= number
        low = tl.where(below, middle, low)
        high = tl.where(below, high, middle)
    return segments_ptr + low * SEGMENT_SIZE


@triton.jit
def combine(
    segments_ptr, records_ptr, values_ptr, segments, total, channels,
    HIGH_ORDER: tl.constexpr, RECORDS: tl.constexpr,
):  # fmt: skip
    channel = tl.program_id(0).to(tl.int64)
    s = segment(segments_ptr, segments, FIRST_CHANNEL, channel)
    a, c, i, chunks = tl.load(s + A), tl.load(s + C), tl.load(s + I), tl.load(s + CHUNKS)
    base = records_ptr + tl.load(s + FIRST_RECORD) + channel - tl.load(s + FIRST_CHANNEL)
    lane = tl.arange(0, RECORDS)
    # Lane j takes chunks j, j + RECORDS, ... in turn; then neighbours are merged in a tree.
    n = tl.zeros((RECORDS,), tl.float64)
    mean, m2, m3, m4, zeros = n, n, n, n, n
    k = tl.zeros((RECORDS,), tl.int32)
    low, high = n + float("inf"), n - float("inf")
    at = chunks * 0
    while at < chunks:
        there = at + lane
        live, p = there < chunks, base + there * c
        part = tl.load(p, live, 0.0)
        e = tl.load(p + EXPONENT * total, live, 0.0).to(tl.int32)
        n, mean, m2, m3, m4, k = merged(
            n, mean, m2, m3, m4, k, part, tl.load(p + total, live, 0.0), tl.load(p + 2 * total, live, 0.0),
            tl.load(p + 3 * total, live, 0.0), tl.load(p + 4 * total, live, 0.0), e,
        )  # fmt: skip
        low = tl.minimum(low, tl.load(p + 5 * total, live, float("inf")))
        high = tl.maximum(high, tl.load(p + 6 * total, live, float("-inf")))
        zeros += tl.load(p + 7 * total, live, 0.0)
        at += RECORDS
    top = tl.max(tl.where(n > 0, k, -2000), 0)
    r = scaled(n * 0 + 1.0, tl.maximum(tl.where(n > 0, k, top) - top, -500))
    count = tl.sum(n, 0)
    safe = tl.where(count > 0, count, 1.0)
    w = n / safe
    mean = mean * r
    # About the largest of the means, so that equal means stay equal to the last bit.
    origin = tl.max(tl.where(n > 0, mean, float("-inf")), 0)
    centre = origin + tl.sum(tl.where(n > 0, w * (mean - origin), 0.0), 0)
    d = tl.where(n > 0, mean - centre, 0.0)
    m2, m3, m4 = m2 * r * r, m3 * r * r * r, m4 * (r * r) * (r * r)
    q2 = tl.sum(w * (m2 + d * d), 0)
    q3 = tl.sum(w * (m3 + 3 * d * m2 + d * d * d), 0)
    q4 = tl.sum(w * (m4 + 4 * d * m3 + 6 * d * d * m2 + d * d * d * d), 0)
    low, high = tl.min(low, 0), tl.max(high, 0)
    varies = (low < high) & (q2 > 0)
    nothing = float("nan")
    q2, q3, q4 = tl.where(varies, q2, 0.0), tl.where(varies, q3, 0.0), tl.where(varies, q4, 0.0)
    spread = tl.where(varies, q2, 1.0)
    skew, kurtosis = q3 / (spread * tl.sqrt(spread)), q4 / (spread * spread)
    free = count - tl.load(s + CORRECTION).to(tl.float64, bitcast=True)
    m2, m3, m4 = scaled(scaled(q2, top), top), q3, q4
    for _ in tl.static_range(3):
        m3 = scaled(m3, top)
    for _ in tl.static_range(4):
        m4 = scaled(m4, top)
    var = tl.where(free > 0, m2 * (count / tl.where(free > 0, free, 1.0)), tl.where(m2 > 0, float("inf"), nothing))
    mean, zeros = tl.where(low < high, scaled(centre, top), low), tl.sum(zeros, 0) / safe
    some, out = count > 0, values_ptr + channel
    full = some & HIGH_ORDER
    tl.store(out, tl.where(some, mean, nothing))
    tl.store(out + channels, tl.where(some, var, nothing))
    tl.store(out + 2 * channels, tl.where(full & varies, skew, nothing))
    tl.store(out + 3 * channels, tl.where(full & varies, kurtosis, nothing))
    tl.store(out + 4 * channels, tl.where(some, low, nothing))
    tl.store(out + 5 * channels, tl.where(some, high, nothing))
    tl.store(out + 6 * channels, tl.where(some, zeros, nothing))
    tl.store(out + 7 * channels, tl.where(some, m2, nothing))
    tl.store(out + 8 * channels, tl.where(full, m3, nothing))
    tl.store(out + 9 * channels, tl.where(full, m4, nothing))
    tl.store(out + 10 * channels, count)
    tl.store(out + 11 * channels, (a * i).to(tl.float64) - count)
