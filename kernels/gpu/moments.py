"""Moments of many tensors: a record for every chunk, then the records of every channel, combined in a fixed order.

The first is one launch for a list of one class (along memory or across columns; float64 or not), the second one more.

A program of the first launch walks one chunk tile by tile, each held in registers: its values are scaled by a power of
two so that no fourth power leaves float32, centred on the tile's mean, and their powers are summed in a tree. Tiles,
and then chunks, are combined in float64 by the formula of Chan, Golub & LeVeque (1983). float64 stays float64.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import triton
import triton.language as tl

Shape = tuple[int, int, int, int, int]  # A, C, I, step of A, step of C, in elements

KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
FLOAT64 = tl.constexpr(3)
VALUES = 12  # rows of the result, as in initperf/reference/moments.py
RECORD = 8  # rows of the records: count, mean, m2, m3, m4, low, high, zeros; of values times 2^-exponent, the ninth row
EXPONENT = tl.constexpr(8)
# By class: values or rows of a tile, its columns, tiles of a chunk, warps. No register spills on any target.
TILES = (
    {"rows": 4096, "columns": 1, "tiles": 16, "warps": 8},  # along memory
    {"rows": 2048, "columns": 1, "tiles": 32, "warps": 8},  # along memory, float64
    {"rows": 256, "columns": 16, "tiles": 4, "warps": 8},  # across columns
    {"rows": 128, "columns": 16, "tiles": 4, "warps": 8},  # across columns, float64
)
RECORDS_A_STEP = 256
# Columns of a segment, the plan of one tensor; sizes and steps in elements.
SEGMENT = 11
ADDRESS, KIND, A, C, I, STEP_A, STEP_C, CHUNKS, FIRST_RECORD, FIRST_CHANNEL, CORRECTION = (  # noqa: E741
    tl.constexpr(i) for i in range(SEGMENT)
)
FIRST_TASK = tl.constexpr(SEGMENT)  # four columns, one a class; a class is 2 * across + wide
SEGMENT_SIZE = tl.constexpr(SEGMENT + 4)


@triton.jit
def _power(top):
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
def _scaled(x, k):
    """x * 2^k."""
    a, b = _exp2(k)
    return x * a * b


@triton.jit
def _merged(n, mean, m2, m3, m4, e, n_b, mean_b, m2_b, m3_b, m4_b, e_b):
    """Moments of two parts together. mean * 2^e is a part's mean and m_k * 2^(k e) its central moments."""
    top = tl.where(n_b > 0, tl.where(n > 0, tl.maximum(e, e_b), e_b), e)
    down, down_b = tl.minimum(tl.maximum(e - top, -500), 0), tl.minimum(tl.maximum(e_b - top, -500), 0)
    r, r_b = _scaled(tl.full(n.shape, 1.0, tl.float64), down), _scaled(tl.full(n.shape, 1.0, tl.float64), down_b)
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
def _tile(x, live, AXIS: tl.constexpr):
    """count, mean, m2, m3, m4, exponent, low, high, zeros of the live, finite values along AXIS of a tile."""
    good = live & (tl.abs(x) < float("inf"))
    low = tl.min(tl.where(good, x, float("inf")), AXIS)
    high = tl.max(tl.where(good, x, float("-inf")), AXIS)
    packed = tl.sum(good.to(tl.int32) + ((good & (x == 0)).to(tl.int32) << 16), AXIS)
    n, zeros = (packed & 0xFFFF).to(tl.float64), (packed >> 16).to(tl.float64)
    safe = tl.where(n > 0, n, 1.0)
    top = tl.where(n > 0, tl.maximum(tl.abs(low), tl.abs(high)), 0.0)
    p, k = _power(top)
    z = tl.where(good, x * tl.expand_dims(p, AXIS), 0.0)
    centre = (tl.sum(z, AXIS).to(tl.float64) / safe).to(x.dtype)
    d = tl.where(good, z - tl.expand_dims(centre, AXIS), 0.0)
    square = d * d
    e = tl.sum(d, AXIS).to(tl.float64) / safe  # what rounding left of the mean
    v2 = tl.sum(square, AXIS).to(tl.float64) / safe
    v3 = tl.sum(square * d, AXIS).to(tl.float64) / safe
    v4 = tl.sum(square * square, AXIS).to(tl.float64) / safe
    varies = low < high
    m2 = tl.where(varies, v2 - e * e, 0.0)
    m3 = tl.where(varies, v3 - 3 * e * v2 + 2 * e * e * e, 0.0)
    m4 = tl.where(varies, v4 - 4 * e * v3 + 6 * e * e * v2 - 3 * e * e * e * e, 0.0)
    mean = tl.where(varies, centre.to(tl.float64) + e, tl.where(n > 0, low * p, 0.0).to(tl.float64))
    return n, mean, m2, m3, m4, k, low.to(tl.float64), high.to(tl.float64), zeros


@triton.jit
def _fetch(address, offsets, live, dtype: tl.constexpr, ALIGNED: tl.constexpr):
    """Values at `offsets`; ALIGNED: all of them, from an address that 16 divides, so that loads are 128 bits wide."""
    p = address.to(tl.pointer_type(dtype))
    if ALIGNED:
        return tl.load(tl.multiple_of(p, 16) + offsets)
    else:  # noqa: RET505  (Triton compiles what follows a constant branch)
        return tl.load(p + offsets, live, 0)


@triton.jit
def _load(address, offsets, live, kind, ALIGNED: tl.constexpr, ALIGNED_16: tl.constexpr):
    """float32 values of a float32, bfloat16 or float16 tensor; ALIGNED_16: also the two of 16 bits are aligned."""
    if kind == 0:
        x = _fetch(address, offsets, live, tl.float32, ALIGNED)
    elif kind == 1:
        word = _fetch(address, offsets, live, tl.uint16, ALIGNED_16)
        x = (word.to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        x = _fetch(address, offsets, live, tl.float16, ALIGNED_16).to(tl.float32)
    return x


@triton.jit
def _chunk(
    records_ptr, total, record, address, kind, a, c, i, step_a, step_c, channel, first, end,
    WIDE: tl.constexpr, ACROSS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The record of rows [first, end) of COLUMNS channels (ACROSS), or of values [first, end) of one channel."""
    AXIS: tl.constexpr = 0 if ACROSS else 1
    LANES: tl.constexpr = COLUMNS if ACROSS else 1
    lane = tl.arange(0, LANES)
    n = tl.zeros((LANES,), tl.float64)
    mean, m2, m3, m4, zeros = n, n, n, n, n
    k = tl.zeros((LANES,), tl.int32)
    low, high = n + float("inf"), n - float("inf")
    size = tl.where(kind == FLOAT64, 8, tl.where(kind == 0, 4, 2))
    at = first
    while at < end:
        row, column = tl.arange(0, ROWS).to(tl.int64), tl.arange(0, COLUMNS).to(tl.int64)
        if ACROSS:
            start = address + (at * step_a + channel * step_c) * size
            full = (at + ROWS <= end) & (channel + COLUMNS <= c) & (step_a % 16 == 0)
            close = row[:, None] * (step_a // 16 * 16) + column[None, :]
            offsets = row[:, None] * step_a + column[None, :]
            live = (row < end - at)[:, None] & (column < c - channel)[None, :]
        else:
            start = address + (channel * step_c + tl.where(a == 1, at, 0)) * size
            full = (at + ROWS <= end) & (a == 1)
            close = row[None, :]
            live = (row < end - at)[None, :]
            if a == 1:
                offsets = row[None, :]
            else:
                position = (at + row)[None, :]
                offsets = position // i * step_a + position % i
        full = full & (start % 16 == 0)
        if WIDE:
            if full:
                x64 = _fetch(start, close, live, tl.float64, True)
            else:
                x64 = _fetch(start, offsets, live, tl.float64, False)
            n_b, mean_b, m2_b, m3_b, m4_b, k_b, low_b, high_b, zeros_b = _tile(x64, live, AXIS)
        else:
            if full:
                # 8 columns a thread would keep 8 float64 sums of each kind in registers, and spill.
                x = _load(start, close, live, kind, True, not ACROSS)
            else:
                x = _load(start, offsets, live, kind, False, False)
            n_b, mean_b, m2_b, m3_b, m4_b, k_b, low_b, high_b, zeros_b = _tile(x, live, AXIS)
        n, mean, m2, m3, m4, k = _merged(n, mean, m2, m3, m4, k, n_b, mean_b, m2_b, m3_b, m4_b, k_b)
        low, high, zeros = tl.minimum(low, low_b), tl.maximum(high, high_b), zeros + zeros_b
        at += ROWS
    out = records_ptr + record + lane
    kept = lane < c - channel
    tl.store(out, n, kept)
    tl.store(out + total, mean, kept)
    tl.store(out + 2 * total, m2, kept)
    tl.store(out + 3 * total, m3, kept)
    tl.store(out + 4 * total, m4, kept)
    tl.store(out + 5 * total, low, kept)
    tl.store(out + 6 * total, high, kept)
    tl.store(out + 7 * total, zeros, kept)
    tl.store(out + 8 * total, k.to(tl.float64), kept)


@triton.jit
def _segment(segments_ptr, count, COLUMN: tl.constexpr, number):
    """The last segment whose COLUMN is at most `number`."""
    low, high = 0, count
    while high - low > 1:
        middle = (low + high) // 2
        below = tl.load(segments_ptr + middle * SEGMENT_SIZE + COLUMN) <= number
        low = tl.where(below, middle, low)
        high = tl.where(below, high, middle)
    return segments_ptr + low * SEGMENT_SIZE


@triton.jit
def _read(
    segments_ptr, records_ptr, segments, total,
    WIDE: tl.constexpr, ACROSS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TILES_A_CHUNK: tl.constexpr,
):  # fmt: skip
    task = tl.program_id(0).to(tl.int64)
    COLUMN: tl.constexpr = FIRST_TASK + 2 * ACROSS + WIDE
    s = _segment(segments_ptr, segments, COLUMN, task)
    address, kind = tl.load(s + ADDRESS), tl.load(s + KIND)
    a, c, i = tl.load(s + A), tl.load(s + C), tl.load(s + I)
    step_a, step_c = tl.load(s + STEP_A), tl.load(s + STEP_C)
    chunks, first_record = tl.load(s + CHUNKS), tl.load(s + FIRST_RECORD)
    task -= tl.load(s + COLUMN)
    if ACROSS:
        blocks = (c + COLUMNS - 1) // COLUMNS
        channel, chunk, values = task % blocks * COLUMNS, task // blocks, a
    else:
        channel, chunk, values = task // chunks, task % chunks, a * i
    first = chunk * ROWS * TILES_A_CHUNK
    end = tl.minimum(first + ROWS * TILES_A_CHUNK, values)
    record = first_record + chunk * c + channel
    _chunk(records_ptr, total, record, address, kind, a, c, i, step_a, step_c, channel, first, end,
           WIDE, ACROSS, ROWS, COLUMNS)  # fmt: skip


@triton.jit
def _combine(
    segments_ptr, records_ptr, values_ptr, segments, total, channels,
    HIGH_ORDER: tl.constexpr, RECORDS: tl.constexpr,
):  # fmt: skip
    channel = tl.program_id(0).to(tl.int64)
    s = _segment(segments_ptr, segments, FIRST_CHANNEL, channel)
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
        n, mean, m2, m3, m4, k = _merged(
            n, mean, m2, m3, m4, k, part, tl.load(p + total, live, 0.0), tl.load(p + 2 * total, live, 0.0),
            tl.load(p + 3 * total, live, 0.0), tl.load(p + 4 * total, live, 0.0), e,
        )  # fmt: skip
        low = tl.minimum(low, tl.load(p + 5 * total, live, float("inf")))
        high = tl.maximum(high, tl.load(p + 6 * total, live, float("-inf")))
        zeros += tl.load(p + 7 * total, live, 0.0)
        at += RECORDS
    top = tl.max(tl.where(n > 0, k, -2000), 0)
    r = _scaled(n * 0 + 1.0, tl.maximum(tl.where(n > 0, k, top) - top, -500))
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
    m2, m3, m4 = _scaled(_scaled(q2, top), top), q3, q4
    for _ in tl.static_range(3):
        m3 = _scaled(m3, top)
    for _ in tl.static_range(4):
        m4 = _scaled(m4, top)
    var = tl.where(free > 0, m2 * (count / tl.where(free > 0, free, 1.0)), tl.where(m2 > 0, float("inf"), nothing))
    mean, zeros = tl.where(low < high, _scaled(centre, top), low), tl.sum(zeros, 0) / safe
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


def _plan(
    tensors: Sequence[torch.Tensor], shapes: Sequence[Shape], correction: float
) -> tuple[np.ndarray, list[int], int, int]:
    """A segment a tensor, and the numbers of tasks of every class, of records and of channels."""
    rows, tasks, records, channels = [], [0, 0, 0, 0], 0, 0
    bits = int(np.float64(correction).view(np.int64))  # a float argument would arrive as float32
    for x, (a, c, i, step_a, step_c) in zip(tensors, shapes, strict=True):
        across = i == 1 and step_c == 1
        tile = TILES[2 * across + (x.dtype == torch.float64)]
        chunks = -(-a * i // (tile["rows"] * tile["tiles"]))
        kind = KINDS[x.dtype]
        rows.append((x.data_ptr(), kind, a, c, i, step_a, step_c, chunks, records, channels, bits, *tasks))
        tasks[2 * across + (kind == 3)] += chunks * (-(-c // tile["columns"]) if across else c)
        records += chunks * c
        channels += c
    return np.array(rows, np.int64), tasks, records, channels


def moments(tensors: Sequence[torch.Tensor], shapes: Sequence[Shape], order: int, correction: float) -> torch.Tensor:
    """Moments of tensors on one GPU: see initperf/reference/moments.py for the arguments and the result."""
    device = tensors[0].device
    plan, tasks, records, channels = _plan(tensors, shapes, correction)
    segments = torch.from_numpy(plan)
    if device.type == "cuda":
        segments = segments.pin_memory().to(device, non_blocking=True)
    parts = torch.empty((RECORD + 1, max(records, 1)), dtype=torch.float64, device=device)
    values = torch.empty((VALUES, channels), dtype=torch.float64, device=device)
    number, total = len(tensors), parts.shape[1]
    for kind, (programs, tile) in enumerate(zip(tasks, TILES, strict=True)):
        if programs:
            _read[(programs,)](
                segments, parts, number, total,
                WIDE=kind % 2, ACROSS=kind // 2, ROWS=tile["rows"], COLUMNS=tile["columns"],
                TILES_A_CHUNK=tile["tiles"], num_warps=tile["warps"],
            )  # fmt: skip
    if channels:
        _combine[(channels,)](
            segments, parts, values, number, total, channels,
            HIGH_ORDER=order > 2, RECORDS=RECORDS_A_STEP, num_warps=4,
        )  # fmt: skip
    return values
