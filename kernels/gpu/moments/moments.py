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

from .records import (
    ADDRESS,
    CHUNKS,
    FIRST_RECORD,
    FIRST_TASK,
    KIND,
    RECORD,
    RECORDS_A_STEP,
    STEP_A,
    STEP_C,
    VALUES,
    A,
    C,
    I,
    combine,
    merged,
    power,
    segment,
)

Shape = tuple[int, int, int, int, int]  # A, C, I, step of A, step of C, in elements

KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
FLOAT64 = tl.constexpr(3)
# By class: values or rows of a tile, its columns, tiles of a chunk, warps. No register spills on any target.
TILES = (
    {"rows": 4096, "columns": 1, "tiles": 16, "warps": 8},  # along memory
    {"rows": 1024, "columns": 1, "tiles": 64, "warps": 4},  # along memory, float64
    {"rows": 256, "columns": 16, "tiles": 4, "warps": 8},  # across columns
    {"rows": 128, "columns": 16, "tiles": 4, "warps": 8},  # across columns, float64
)


@triton.jit
def _spread(x, AXIS: tl.constexpr):
    """What a reduction along AXIS left, a value a thread: of columns every thread has 4, whose float64 sums would spill."""
    if AXIS == 0:
        x = tl.gather(x, tl.arange(0, x.shape[0]), 0)
    return x


@triton.jit
def _tile(x, live, AXIS: tl.constexpr):
    """count, mean, m2, m3, m4, exponent, low, high, zeros of the live, finite values along AXIS of a tile."""
    good = live & (tl.abs(x) < float("inf"))
    low = tl.min(tl.where(good, x, float("inf")), AXIS)
    high = tl.max(tl.where(good, x, float("-inf")), AXIS)
    packed = tl.sum(good.to(tl.int32) + ((good & (x == 0)).to(tl.int32) << 16), AXIS)
    top = tl.where(packed > 0, tl.maximum(tl.abs(low), tl.abs(high)), 0.0)
    p, k = power(top)
    z = tl.where(good, x * tl.expand_dims(p, AXIS), 0.0)
    centre = (tl.sum(z, AXIS).to(tl.float64) / tl.maximum(packed & 0xFFFF, 1)).to(x.dtype)
    d = tl.where(good, z - tl.expand_dims(centre, AXIS), 0.0)
    square = d * d
    e, v2 = _spread(tl.sum(d, AXIS), AXIS), _spread(tl.sum(square, AXIS), AXIS)
    v3, v4 = _spread(tl.sum(square * d, AXIS), AXIS), _spread(tl.sum(square * square, AXIS), AXIS)
    low, high, packed = _spread(low, AXIS), _spread(high, AXIS), _spread(packed, AXIS)
    p, k, centre = _spread(p, AXIS), _spread(k, AXIS), _spread(centre, AXIS)
    n, zeros = (packed & 0xFFFF).to(tl.float64), (packed >> 16).to(tl.float64)
    safe = tl.where(n > 0, n, 1.0)
    e = e.to(tl.float64) / safe  # what rounding left of the mean
    v2, v3, v4 = v2.to(tl.float64) / safe, v3.to(tl.float64) / safe, v4.to(tl.float64) / safe
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
        x = tl.load(tl.multiple_of(p, 16) + offsets)
    else:
        x = tl.load(p + offsets, live, 0)
    return x


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
        n, mean, m2, m3, m4, k = merged(n, mean, m2, m3, m4, k, n_b, mean_b, m2_b, m3_b, m4_b, k_b)
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
def _read(
    segments_ptr, records_ptr, segments, total,
    WIDE: tl.constexpr, ACROSS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TILES_A_CHUNK: tl.constexpr,
):  # fmt: skip
    task = tl.program_id(0).to(tl.int64)
    COLUMN: tl.constexpr = FIRST_TASK + 2 * ACROSS + WIDE
    s = segment(segments_ptr, segments, COLUMN, task)
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
    """Moments of tensors on one GPU: see kernels/reference/moments/moments.py for the arguments and the result."""
    device = tensors[0].device
    plan, tasks, records, channels = _plan(tensors, shapes, correction)
    segments = torch.from_numpy(plan)
    if device.type == "cuda":
        segments = segments.pin_memory().to(device, non_blocking=True)
    parts = torch.empty((RECORD, max(records, 1)), dtype=torch.float64, device=device)
    values = torch.empty((VALUES, channels), dtype=torch.float64, device=device)
    number, total = len(tensors), parts.shape[1]
    for kind, (programs, tile) in enumerate(zip(tasks, TILES, strict=True)):
        if programs:
            _read[(programs,)](
                segments, parts, number, total,
                WIDE=kind % 2, ACROSS=kind // 2, ROWS=tile["rows"], COLUMNS=tile["columns"],
                TILES_A_CHUNK=tile["tiles"], num_warps=tile["warps"], enable_fp_fusion=True,
            )  # fmt: skip
    if channels:
        combine[(channels,)](
            segments, parts, values, number, total, channels,
            HIGH_ORDER=order > 2, RECORDS=RECORDS_A_STEP, num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
    return values
