"""Moments of many tensors in one parallel region: power sums of fixed chunks in float64, combined in a fixed order.

Each chunk becomes a record (count, mean, spread, skew, kurtosis, low, high, zeros) about its own mean; spread is the
root of the variance, so nothing in a record overflows or vanishes. Records of a channel are combined by the formula of
Chan, Golub & LeVeque (1983), for all chunks at once. Chunks, and so all results, are independent of the thread count.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from numba import int64, prange, uintp

from .jit import jit, threads
from .lanes import (
    BFLOAT16,
    COUNT,
    FLOAT16,
    FLOAT32,
    FLOAT64,
    HIGH,
    LANES,
    LOW,
    MASKED,
    PLAIN,
    ROWS,
    S1,
    S2,
    S3,
    S4,
    SCALE,
    SHIFT,
    SHIFTED,
    ZEROS,
    call_lane_sums,
    lane_sums,
)

CHUNK = 131072  # values of a task that reads along memory; a task costs half a microsecond beside them
CHUNK_ROWS = 1024  # rows of a task that reads LANES neighbouring columns
AHEAD = 2048  # bytes; 512 and 8192 are slower
TASK_COST = 512  # what a task costs beside its values, in values
SERIAL_COST = 1 << 17  # in values; below this a parallel call costs more than it saves
BLOCK = 64  # vectors of float64 that are summed before they are added to the rest
CARRIED = 4  # rows of sums of the blocks before, after S4
PROBE = 16  # vectors that tell where the values lie
ATTEMPTS = 6  # the worst needs 4: as it comes, without non-finite values, then scaled, then about its mean

Shape = tuple[int, int, int, int, int]  # A, C, I, step of A, step of C, in elements

KINDS = {torch.float32: FLOAT32, torch.bfloat16: BFLOAT16, torch.float16: FLOAT16, torch.float64: FLOAT64}
RECORD = 8
N, MEAN, SPREAD, SKEW, KURTOSIS, MIN, MAX, NULLS = range(RECORD)
VALUES = 10  # rows of the result: mean, var, skew, kurtosis, min, max, zeros, and the central moments 2, 3, 4
# A segment is the plan of one tensor, seen as (A, C, I): reduced, kept, reduced and contiguous. Steps are in bytes.
SEGMENT = 18
ADDRESS, KIND, SIZE, A, C, I, STEP_A, STEP_C, ACROSS = range(9)  # noqa: E741
PIECES, LENGTH, CUTS, CHUNKS, COST, FIRST_TASK, FIRST_COST, FIRST_RECORD, FIRST_CHANNEL = range(9, SEGMENT)


@jit(error_model="numpy")
def _plan(tensors):
    """Segments of `tensors` (rows: address, kind, size, A, C, I, step of A, step of C), and a last one with the totals."""
    plan = np.zeros((len(tensors) + 1, SEGMENT), np.int64)
    for t in range(len(tensors)):
        s, after = plan[t], plan[t + 1]
        for column in range(ACROSS):
            s[column] = tensors[t, column]
        s[ACROSS] = s[I] == 1 and s[STEP_C] == s[SIZE]
        if s[ACROSS]:
            s[PIECES] = min(s[A], CHUNK_ROWS)
            s[CHUNKS] = -(-s[A] // max(s[PIECES], 1))
            tasks = s[CHUNKS] * -(-s[C] // LANES)
            s[COST] = s[PIECES] * LANES + TASK_COST
        else:
            s[LENGTH] = min(s[I], CHUNK)
            s[CUTS] = -(-s[I] // max(s[LENGTH], 1))
            s[PIECES] = min(s[A], max(1, CHUNK // max(s[I], 1)))
            s[CHUNKS] = -(-s[A] // max(s[PIECES], 1)) * s[CUTS]
            tasks = s[CHUNKS] * s[C]
            s[COST] = s[PIECES] * s[LENGTH] + TASK_COST
        after[FIRST_TASK] = s[FIRST_TASK] + tasks
        after[FIRST_COST] = s[FIRST_COST] + tasks * s[COST]
        after[FIRST_RECORD] = s[FIRST_RECORD] + s[CHUNKS] * s[C]
        after[FIRST_CHANNEL] = s[FIRST_CHANNEL] + s[C]
    return plan


@jit(error_model="numpy")
def _power(x):
    """A power of two p with x * p in [0.5, 1), as far as p and x * p can be normal numbers."""
    return math.ldexp(1.0, -min(max(math.frexp(x)[1], -1000), 1020))


@jit(error_model="numpy")
def _record(sums, lanes, tolerance, records, index):
    """Write the moments of lanes 0.. to records index..; False if a lane has to be done again, about its mean or scaled."""
    good = True
    for i in range(lanes):
        n, scale = sums[COUNT, i], sums[SCALE, i]
        share = 1 / n if n > 0 else 0.0
        e, v2, v3, v4 = sums[S1, i] * share, sums[S2, i] * share, sums[S3, i] * share, sums[S4, i] * share
        flat = not sums[LOW, i] < sums[HIGH, i]
        m2 = 0.0 if flat else max(v2 - e * e, 0.0)
        spread = math.sqrt(m2)
        records[N, index + i] = n
        records[MEAN, index + i] = sums[LOW, i] if flat else (sums[SHIFT, i] + e) / scale
        records[SPREAD, index + i] = spread / scale
        records[SKEW, index + i] = (v3 - 3 * e * v2 + 2 * e * e * e) / (m2 * spread) if m2 > 0 else 0.0
        about = v4 - 4 * e * v3 + 6 * e * e * v2 - 3 * e * e * e * e
        records[KURTOSIS, index + i] = about / (m2 * m2) if m2 > 0 else 0.0
        records[MIN, index + i], records[MAX, index + i] = sums[LOW, i], sums[HIGH, i]
        records[NULLS, index + i] = sums[ZEROS, i]
        finite = v2 < math.inf and v4 < math.inf and abs(e) < math.inf
        # 1e-140: the fourth power of what is smaller would vanish
        good &= n == 0 or (finite and (flat or (abs(e) <= tolerance * spread and v2 > 1e-140)))
    return good


@jit(error_model="numpy")
def _recenter(sums, lanes, attempt):
    """Set SHIFT to the mean that an attempt found, and, once non-finite values are left out, SCALE to suit the largest value."""
    for i in range(lanes):
        low, high, e = sums[LOW, i], sums[HIGH, i], sums[S1, i] / sums[COUNT, i]
        finite = abs(e) < math.inf
        mean = (sums[SHIFT, i] + e) / sums[SCALE, i] if finite else 0.0
        top = max(abs(low), abs(high)) if low <= high else 0.0
        scale = _power(top) if attempt > 1 and top > 0 and not 1e-30 < top < 1e60 else 1.0
        sums[SHIFT, i], sums[SCALE, i] = mean * scale, scale


@jit(error_model="numpy")
def _clear(sums):
    for i in range(LANES):
        for row in (COUNT, ZEROS, S1, S2, S3, S4):
            sums[row, i] = 0.0
        sums[LOW, i], sums[HIGH, i] = math.inf, -math.inf


@jit(error_model="numpy")
def _place(sums, shift, scale):
    for i in range(LANES):
        sums[SHIFT, i], sums[SCALE, i] = shift, scale


@jit(error_model="numpy")
def _fold(sums):
    """Lanes into the first lane, in a fixed tree."""
    half = LANES // 2
    while half:
        for row in (COUNT, ZEROS, S1, S2, S3, S4):
            for i in range(half):
                sums[row, i] += sums[row, i + half]
        for i in range(half):
            sums[LOW, i] = min(sums[LOW, i], sums[LOW, i + half])
            sums[HIGH, i] = max(sums[HIGH, i], sums[HIGH, i + half])
        half //= 2


@jit(error_model="numpy")
def _run(read, kind, order, mode, address, steps, stride, lanes, ahead, sums):
    """lane_sums, in float64 by blocks, so that a sum has tens of roundings and not thousands."""
    out, block = uintp(sums.ctypes.data), BLOCK if kind == FLOAT64 else steps
    for start in range(0, steps, max(block, 1)):
        if start:
            for row in range(S1, S4 + 1):
                for i in range(LANES):
                    sums[row + CARRIED, i] += sums[row, i]
                    sums[row, i] = 0.0
        here, count = uintp(address + start * stride), uintp(min(block, steps - start))
        args = uintp(kind), uintp(order), uintp(mode), here, count, uintp(stride), uintp(lanes), uintp(ahead), out
        call_lane_sums(uintp(read), args)
    if steps > block:
        for row in range(S1, S4 + 1):
            for i in range(LANES):
                sums[row, i] += sums[row + CARRIED, i]
                sums[row + CARRIED, i] = 0.0


@jit(error_model="numpy")
def _read(s, read, order, mode, address, pieces, length, lanes, sums):
    """Add `pieces` rows of `lanes` columns, or `pieces` runs of `length` values, to `sums`."""
    wide = LANES * s[SIZE]
    if s[ACROSS]:
        _run(read, s[KIND], order, mode, address, pieces, s[STEP_A], lanes, 2 * wide, sums)
        return
    whole, rest = length // LANES, length % LANES
    for _ in range(pieces):
        _run(read, s[KIND], order, mode, address, whole, wide, int64(LANES), int64(AHEAD), sums)
        if rest:
            _run(read, s[KIND], int64(4), int64(MASKED), address + whole * wide, int64(1), wide, rest, int64(0), sums)
        address += s[STEP_A]


@jit(error_model="numpy")
def _task(s, read, order, task, sums, records):
    """One chunk: of one channel, or of LANES neighbouring ones."""
    tolerance = 1.0 if s[KIND] == FLOAT64 else 8.0  # |mean| in spreads; 8 costs 1e-12 of a fourth moment
    if s[ACROSS]:
        blocks = -(-s[C] // LANES)
        channel, chunk = task % blocks * LANES, task // blocks
        first, start, length, lanes = chunk * s[PIECES], int64(0), int64(1), min(LANES, s[C] - channel)
    else:
        channel, chunk = task // s[CHUNKS], task % s[CHUNKS]
        first, start, lanes = chunk // s[CUTS] * s[PIECES], chunk % s[CUTS] * s[LENGTH], int64(1)
        length = min(s[LENGTH], s[I] - start)
    pieces = min(s[PIECES], s[A] - first)
    address = s[ADDRESS] + first * s[STEP_A] + channel * s[STEP_C] + start * s[SIZE]
    index = s[FIRST_RECORD] + chunk * s[C] + channel

    _place(sums, 0.0, 1.0)
    mode = MASKED if s[ACROSS] and lanes < LANES else SHIFTED if s[ACROSS] else PLAIN
    steps = pieces if s[ACROSS] else length // LANES
    attempt = 0
    if steps > 4 * PROBE:
        _clear(sums)
        if s[ACROSS]:
            _read(s, read, int64(4), int64(MASKED), address, int64(PROBE), length, lanes, sums)
        else:
            _read(s, read, int64(2), int64(PLAIN), address, int64(1), int64(PROBE * LANES), lanes, sums)
            _fold(sums)
        if s[ACROSS]:
            _recenter(sums, lanes, attempt)
        elif not _record(sums, lanes, tolerance / 2, records, index):
            _recenter(sums, lanes, attempt)
            _place(sums, sums[SHIFT, 0], 1.0)
            mode = SHIFTED
    for attempt in range(1, ATTEMPTS):
        _clear(sums)
        _read(s, read, int64(4 if mode == MASKED else order), int64(mode), address, pieces, length, lanes, sums)
        if not s[ACROSS]:
            _fold(sums)
        if _record(sums, lanes, tolerance, records, index):
            return
        _recenter(sums, lanes, attempt)
        if not s[ACROSS]:
            _place(sums, sums[SHIFT, 0], sums[SCALE, 0])
        mode = MASKED


@jit(error_model="numpy")
def _segment_of(plan, column, number):
    """The last segment whose `column` is at most `number`, empty ones passed over."""
    low, high = 0, len(plan) - 1
    while high - low > 1:
        middle = (low + high) // 2
        if plan[middle, column] <= number:
            low = middle
        else:
            high = middle
    return low


@jit(error_model="numpy")
def _task_at(plan, cost):
    """The first task that begins at `cost` or later, where every task costs what its segment says."""
    s = plan[_segment_of(plan, int64(FIRST_COST), cost)]
    return s[FIRST_TASK] + -(-(cost - s[FIRST_COST]) // max(s[COST], 1))


@jit(error_model="numpy")
def _read_share(plan, read, order, worker, workers, records):
    total, sums = plan[-1, FIRST_COST], np.zeros((ROWS + CARRIED, LANES))
    end = plan[-1, FIRST_TASK] if worker + 1 == workers else _task_at(plan, total * (worker + 1) // workers)
    task = _task_at(plan, total * worker // workers)
    t = _segment_of(plan, int64(FIRST_TASK), task)
    while task < end:
        while task >= plan[t + 1, FIRST_TASK]:
            t += 1
        _task(plan[t], read, order, task - plan[t, FIRST_TASK], sums, records)
        task += 1


@jit(error_model="numpy")
def _combined(records, first, step, chunks):
    """count, zeros, low, high, mean, spread, skew, kurtosis of `chunks` records."""
    n, zeros, low, high, top = 0.0, 0.0, math.inf, -math.inf, 0.0
    for j in range(first, first + chunks * step, step):
        n += records[N, j]
        zeros += records[NULLS, j]
        low, high = min(low, records[MIN, j]), max(high, records[MAX, j])
        if records[N, j] > 0:
            top = max(top, abs(records[MEAN, j]), records[SPREAD, j])
    if n == 0:
        return n, zeros, low, high, 0.0, 0.0, 0.0, 0.0
    if chunks == 1:
        return n, zeros, low, high, records[MEAN, first], records[SPREAD, first], records[SKEW, first], records[KURTOSIS, first]  # fmt: skip
    p = _power(top)
    mean, origin = 0.0, math.nan
    for j in range(first, first + chunks * step, step):
        if records[N, j] > 0:
            here = records[MEAN, j] * p
            origin = here if origin != origin else origin
            mean += records[N, j] / n * (here - origin)
    mean += origin
    m2, m3, m4 = 0.0, 0.0, 0.0
    for j in range(first, first + chunks * step, step):
        if records[N, j] > 0:
            w, d, s = records[N, j] / n, records[MEAN, j] * p - mean, records[SPREAD, j] * p
            s2, d2, s3 = s * s, d * d, records[SKEW, j] * s * s * s
            m2 += w * (s2 + d2)
            m3 += w * (s3 + 3 * d * s2 + d2 * d)
            m4 += w * (records[KURTOSIS, j] * s2 * s2 + 4 * d * s3 + 6 * d2 * s2 + d2 * d2)
    spread = math.sqrt(m2)
    skew, kurtosis = (m3 / (m2 * spread), m4 / (m2 * m2)) if low < high and m2 > 0 else (0.0, 0.0)
    return n, zeros, low, high, mean / p, spread / p, skew, kurtosis


@jit(error_model="numpy")
def _combine_share(plan, order, correction, start, end, records, counts, values):
    t = _segment_of(plan, int64(FIRST_CHANNEL), start)
    for channel in range(start, end):
        while channel >= plan[t + 1, FIRST_CHANNEL]:
            t += 1
        s = plan[t]
        first = s[FIRST_RECORD] + channel - s[FIRST_CHANNEL]
        n, zeros, low, high, mean, spread, skew, kurtosis = _combined(records, first, s[C], s[CHUNKS])
        counts[0, channel], counts[1, channel] = n, s[A] * s[I] - n
        if n == 0:
            for row in range(VALUES):
                values[row, channel] = math.nan
            continue
        m2 = spread * spread
        values[0, channel], values[1, channel] = mean, m2 * (n / max(n - correction, 0.0))
        values[2, channel], values[3, channel] = (skew, kurtosis) if spread > 0 else (math.nan, math.nan)
        values[4, channel], values[5, channel], values[6, channel] = low, high, zeros / n
        values[7, channel], values[8, channel], values[9, channel] = m2, skew * m2 * spread, kurtosis * m2 * m2
        if order == 2:
            for row in (2, 3, 8, 9):
                values[row, channel] = math.nan


@jit(error_model="numpy")
def _serial(plan, read, order, correction, counts, values):
    records = np.empty((RECORD, plan[-1, FIRST_RECORD]))
    _read_share(plan, read, order, int64(0), int64(1), records)
    _combine_share(plan, order, correction, int64(0), counts.shape[1], records, counts, values)


@jit(error_model="numpy", parallel=True)
def _parallel(plan, read, order, correction, workers, counts, values):
    records = np.empty((RECORD, plan[-1, FIRST_RECORD]))
    for worker in prange(workers):
        _read_share(plan, read, order, int64(worker), int64(workers), records)
    channels = counts.shape[1]
    sharers = workers if channels > 256 else 1
    for worker in prange(sharers):
        start, end = channels * worker // sharers, channels * (worker + 1) // sharers
        _combine_share(plan, order, correction, int64(start), int64(end), records, counts, values)


def moments(
    tensors: Sequence[torch.Tensor], shapes: Sequence[Shape], order: int, correction: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Moments of CPU tensors: see initperf/reference/moments.py for the arguments and the result."""
    rows = [
        (x.data_ptr(), KINDS[x.dtype], size := x.element_size(), a, c, i, step_a * size, step_c * size)
        for x, (a, c, i, step_a, step_c) in zip(tensors, shapes, strict=True)
    ]
    plan = _plan(np.array(rows, np.int64))
    channels = int(plan[-1, FIRST_CHANNEL])
    counts = torch.empty((2, channels), dtype=torch.int64)
    values = torch.empty((VALUES, channels), dtype=torch.float64)
    results = counts.numpy(), values.numpy()
    workers = threads() if plan[-1, FIRST_COST] > SERIAL_COST else 1
    if workers > 1:
        _parallel(plan, lane_sums.address, order, correction, workers, *results)
    else:
        _serial(plan, lane_sums.address, order, correction, *results)
    return counts, values
