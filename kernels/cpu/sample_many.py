"""Sampling into a list of tensors on the CPU: one parallel region, cut by what the values cost and not by tensors.

A tensor is cut into blocks of TILES tiles. What is done to a block after sampling (zeros where pruned, moments, the
choice of survivors) is done while it is in the caches. Sums are per block, then over the blocks in order, so that
nothing depends on the number of threads.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numba import carray, float64, int64, prange, uint16, uint32, uint64
from torch import Tensor

from ..contract import NORMAL, TILE, UNIFORM
from .jit import jit, threads
from .sample import _CODES, _FLOAT16, _FLOAT32, _FLOAT64, _constants, _pieces, sample_
from .vector import bits_float, full_vectors, half_float, pointer

_TILES = 8  # tiles of a block: 32 KiB of float32, within the first-level cache
_SPAN = _TILES * TILE
_LANES = 32  # running sums of a block
_CONSTANT = -1  # a kind of this file: every value has the bits that stand in PARAMS
# What a block of each costs, as a constant one does; measured. _SERIAL: costs below which threads cost more than they save.
_COST = {_CONSTANT: 1, UNIFORM: 3, NORMAL: 5}
_TRUNCATED_COST = 7
_SERIAL = 8 * 5

_COLUMNS = 11
ADDRESS, CODE, COUNT, KIND, PARAMS, STREAM, MASK, BITS, COST, FIRST_BLOCK, FIRST_COST = range(_COLUMNS)
N, MEAN, SQUARES = range(3)  # of a block's record: values, their mean, the sum of (value - mean)^2

Mask = Tensor | None


@jit()
def _filled(address: Any, size: Any, first: Any, last: Any, bits: Any) -> None:
    full_vectors()
    if size == 2:
        half = carray(pointer(address, np.uint16), last)[first:]
        half[:] = uint16(bits)
    elif size == 4:
        single = carray(pointer(address, np.uint32), last)[first:]
        single[:] = uint32(bits)
    else:
        double = carray(pointer(address, np.uint64), last)[first:]
        double[:] = uint64(bits)


@jit()
def _zeroed(values: Any, mask: Any) -> None:
    """0 where the mask is; both of one length."""
    full_vectors()
    zero = values.dtype.type(0)
    for i in range(values.size):
        values[i] = values[i] if mask[i] != 0 else zero


@jit()
def _prune(address: Any, size: Any, first: Any, last: Any, mask: Any) -> None:
    alive = carray(pointer(mask, np.uint8), last)[first:]
    if size == 2:
        _zeroed(carray(pointer(address, np.uint16), last)[first:], alive)
    elif size == 4:
        _zeroed(carray(pointer(address, np.uint32), last)[first:], alive)
    else:
        _zeroed(carray(pointer(address, np.uint64), last)[first:], alive)


@jit()
def _survivors(values: Any, bits: Any, out: Any) -> int:
    """values[i] of every set bit i, in order; returns how many. Moved within `values` first: `out` has no room to spare."""
    count = 0
    for byte in range(bits.size):
        word = bits[byte]
        if word:
            for k in range(8):
                values[count] = values[8 * byte + k]
                count += (word >> k) & 1
    for i in range(count):
        out[i] = values[i]
    return count


@jit()
def _pick(scratch: Any, address: Any, size: Any, at: Any, bits: Any) -> int:
    if size == 2:
        out = carray(pointer(address, np.uint16), at + _SPAN)[at:]
        return _survivors(scratch.view(np.uint16), bits, out)
    if size == 4:
        return _survivors(scratch.view(np.uint32), bits, carray(pointer(address, np.uint32), at + _SPAN)[at:])
    return _survivors(scratch, bits, carray(pointer(address, np.uint64), at + _SPAN)[at:])


@jit(inline="always")
def _bits_set(bits: Any) -> int:
    count = 0
    for byte in bits:
        word = byte - ((byte >> 1) & 0x55)
        word = (word & 0x33) + ((word >> 2) & 0x33)
        count += (word + (word >> 4)) & 0x0F
    return count


@jit()
def _widened(address: Any, code: Any, first: Any, last: Any, out: Any) -> None:
    """Values first to last - 1 as float64."""
    full_vectors()
    n = last - first
    if code == _FLOAT32:
        single = carray(pointer(address, np.float32), last)[first:]
        for i in range(n):
            out[i] = float64(single[i])
    elif code == _FLOAT64:
        double = carray(pointer(address, np.float64), last)[first:]
        for i in range(n):
            out[i] = double[i]
    elif code == _FLOAT16:
        half = carray(pointer(address, np.uint16), last)[first:]
        for i in range(n):
            out[i] = float64(half_float(half[i]))
    else:
        brain = carray(pointer(address, np.uint16), last)[first:]
        for i in range(n):
            out[i] = float64(bits_float(uint32(brain[i]) << uint32(16)))


@jit()
def _sums(values: Any, mask: Any, masked: Any, origin: Any, sums: Any) -> None:
    """sums[0], sums[1] += sum of (value - origin), of its square, in LANES running sums folded in a fixed tree."""
    full_vectors()
    sums[:] = 0.0
    n = values.size
    whole = n // _LANES * _LANES
    for start in range(0, whole, _LANES):
        for j in range(_LANES):
            d = values[start + j] - origin
            if masked:
                d = d if mask[start + j] != 0 else 0.0
            sums[0, j] += d
            sums[1, j] += d * d
    for i in range(whole, n):
        d = values[i] - origin if not masked or mask[i] != 0 else 0.0
        sums[0, i - whole] += d
        sums[1, i - whole] += d * d
    half = _LANES // 2
    while half:
        for j in range(half):
            sums[0, j] += sums[0, j + half]
            sums[1, j] += sums[1, j + half]
        half //= 2


@jit()
def _measure(address: Any, code: Any, first: Any, last: Any, mask: Any, values: Any, sums: Any, record: Any) -> None:
    """The record of the finite values first to last - 1 that survive; mask: an address, or 0."""
    n = last - first
    if n == 0:
        record[:] = 0.0
        return
    values = values[:n]
    _widened(address, code, first, last, values)
    alive = carray(pointer(mask, np.uint8), last)[first:]
    origin, count = 0.0, 0
    if mask:
        for i in range(n):
            count += alive[i] != 0
        for i in range(n):
            if alive[i] != 0 and math.isfinite(values[i]):
                origin = values[i]
                break
    else:
        count, origin = n, values[0] if math.isfinite(values[0]) else 0.0
    _sums(values, alive, mask != 0, origin, sums)
    first_sum, second_sum = sums[0, 0], sums[1, 0]
    if not math.isfinite(second_sum):  # float16 overflows: what is not finite counts for nothing
        first_sum, second_sum, count = 0.0, 0.0, 0
        for i in range(n):
            if (mask == 0 or alive[i] != 0) and math.isfinite(values[i]):
                d = values[i] - origin
                first_sum += d
                second_sum += d * d
                count += 1
    share = first_sum / count if count else 0.0
    record[N], record[MEAN] = count, origin + share
    record[SQUARES] = max(second_sum - first_sum * share, 0.0)


@jit(inline="always")
def _row_of(plan: Any, column: Any, number: Any) -> int:
    """The last row whose `column` is at most `number`."""
    low, high = 0, len(plan) - 1
    while high - low > 1:
        middle = (low + high) // 2
        if plan[middle, column] <= number:
            low = middle
        else:
            high = middle
    return low


@jit()
def _block_at(plan: Any, cost: Any) -> int:
    """The first block that begins at `cost` or later."""
    s = plan[_row_of(plan, FIRST_COST, cost)]
    return s[FIRST_BLOCK] + -(-(cost - s[FIRST_COST]) // max(s[COST], 1))


@jit()
def _share(plan: Any, sizes: Any, k0: Any, k1: Any, begin: Any, end: Any, starts: Any, records: Any) -> None:
    """Blocks begin to end - 1 of the list."""
    scratch = np.empty(_SPAN + 8, np.uint64)
    scratch = scratch[(64 - scratch.ctypes.data % 64) % 64 // 8 :][:_SPAN]
    wide, sums = np.empty(_SPAN if len(records) else 1), np.empty((2, _LANES))
    t = _row_of(plan, FIRST_BLOCK, begin)
    block = begin
    while block < end:
        while block >= plan[t + 1, FIRST_BLOCK]:
            t += 1
        s = plan[t]
        address, code, n, kind, params = s[ADDRESS], s[CODE], s[COUNT], s[KIND], s[PARAMS]
        stream, size = uint64(s[STREAM]), sizes[code]
        key = uint64(k0), uint64(k1), stream & uint64(0xFFFFFFFF), stream >> uint64(32)
        here = block - s[FIRST_BLOCK]
        blocks = 1
        if s[MASK] == 0 and s[BITS] == 0 and len(records) == 0:
            blocks = min(end, plan[t + 1, FIRST_BLOCK]) - block
        first, last = here * _SPAN, min((here + blocks) * _SPAN, n)
        if s[BITS]:
            bits = carray(pointer(s[BITS], np.uint8), last // 8)[first // 8 :]
            first, last = starts[block], starts[block] + _bits_set(bits)
            if last == first:
                pass
            elif kind == _CONSTANT:
                _filled(address, size, first, last, params)
            else:
                start = here * _SPAN
                _pieces(
                    here * _TILES, (min(start + _SPAN, n) + TILE - 1) // TILE, scratch.ctypes.data - start * size, code,
                    n, kind, params, key, int64(0), n, int64(0),
                )  # fmt: skip
                _pick(scratch, address, size, first, bits)
        elif kind == _CONSTANT:
            _filled(address, size, first, last, params)
        else:
            _pieces(
                here * _TILES, (last + TILE - 1) // TILE, address, code, n, kind, params, key, int64(0), n, int64(0)
            )
        if s[MASK]:
            _prune(address, size, first, last, s[MASK])
        if len(records):
            _measure(address, code, first, last, s[MASK], wide, sums, records[block])
        block += blocks


@jit()
def _combined(plan: Any, records: Any, result: Any) -> None:
    """Mean and variance of every row: records in order, means about the first of them."""
    for t in range(len(plan) - 1):
        first, last = plan[t, FIRST_BLOCK], plan[t + 1, FIRST_BLOCK]
        count, total, origin, squares = 0.0, 0.0, math.nan, 0.0
        for b in range(first, last):
            if records[b, N] > 0:
                origin = records[b, MEAN] if count == 0 else origin
                count += records[b, N]
                total += records[b, N] * (records[b, MEAN] - origin)
        mean = origin + total / count if count else math.nan
        for b in range(first, last):
            if records[b, N] > 0:
                squares += records[b, SQUARES] + records[b, N] * (records[b, MEAN] - mean) ** 2
        result[0, t] = mean
        result[1, t] = squares / count if count else math.nan


@jit()
def _planned(plan: Any) -> None:
    for t in range(len(plan) - 1):
        s, after = plan[t], plan[t + 1]
        blocks = (s[COUNT] + _SPAN - 1) // _SPAN
        after[FIRST_BLOCK] = s[FIRST_BLOCK] + blocks
        after[FIRST_COST] = s[FIRST_COST] + blocks * s[COST]


@jit()
def _counted(plan: Any, starts: Any) -> None:
    """starts[b]: survivors of the row before block b."""
    for t in range(len(plan) - 1):
        s = plan[t]
        if s[BITS]:
            bits, total = carray(pointer(s[BITS], np.uint8), s[COUNT] // 8), 0
            for b in range(plan[t + 1, FIRST_BLOCK] - s[FIRST_BLOCK]):
                starts[s[FIRST_BLOCK] + b] = total
                total += _bits_set(bits[b * (_SPAN // 8) : (b + 1) * (_SPAN // 8)])


@jit()
def _serial(plan: Any, sizes: Any, k0: Any, k1: Any, starts: Any, records: Any, result: Any) -> None:
    _counted(plan, starts)
    _share(plan, sizes, k0, k1, int64(0), plan[-1, FIRST_BLOCK], starts, records)
    if len(records):
        _combined(plan, records, result)


@jit(parallel=True)
def _parallel(plan: Any, sizes: Any, k0: Any, k1: Any, chunks: Any, starts: Any, records: Any, result: Any) -> None:
    _counted(plan, starts)
    total = plan[-1, FIRST_COST]
    for c in prange(chunks):
        begin = _block_at(plan, total * c // chunks)
        end = plan[-1, FIRST_BLOCK] if c + 1 == chunks else _block_at(plan, total * (c + 1) // chunks)
        _share(plan, sizes, k0, k1, begin, end, starts, records)
    if len(records):
        _combined(plan, records, result)


@lru_cache(maxsize=4096)
def _formula(kind: int, params: tuple[float, ...], dtype: torch.dtype) -> tuple[int, int, int, np.ndarray | None]:
    """KIND, PARAMS and COST of a row, and what must live as long as PARAMS is used."""
    if kind == UNIFORM and params[0] == 0:
        one = sample_(torch.empty(1, dtype=dtype, device="cpu"), kind, params, 0, 0)
        word = one.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize])
        return _CONSTANT, int(word), _COST[_CONSTANT], None
    constants, address = _constants(params)
    return kind, address, _COST.get(kind, _TRUNCATED_COST), constants


_SIZES = np.array([dtype.itemsize for dtype in _CODES])
_NOTHING = np.empty((0, 3))


def sample_many_(
    outs: Sequence[Tensor],
    distributions: Sequence[tuple[int, tuple[float, ...]]],
    streams: Sequence[int],
    seed: int,
    masks: Sequence[Mask] | None = None,
    moments: bool = False,
) -> Tensor | None:
    """See initperf.reference.sample_many.sample_many_."""
    plan = np.zeros((len(outs) + 1, _COLUMNS), np.int64)
    rows, alive = [], []
    for i, (out, (kind, params), stream) in enumerate(zip(outs, distributions, streams, strict=True)):
        kind, address, cost, constants = _formula(kind, params, out.dtype)
        mask = masks[i] if masks is not None else None
        count, where, bits = out.numel(), 0, 0
        if mask is not None and mask.dtype == torch.uint8:
            count, bits = 8 * mask.numel(), mask.data_ptr()
        elif mask is not None:
            where = mask.data_ptr()
        signed = stream - (stream >> 63 << 64)
        rows.append((out.data_ptr(), _CODES[out.dtype], count, kind, address, signed, where, bits, cost))
        alive.append(constants)
    if rows:
        plan[:-1, :FIRST_BLOCK] = rows
    _planned(plan)
    blocks = int(plan[-1, FIRST_BLOCK])
    result = torch.empty((2, len(outs) if moments else 0), dtype=torch.float64, device="cpu")
    records = np.empty((blocks if moments else 0, 3))
    starts = np.empty(blocks if plan[:, BITS].any() else 0, np.int64)
    words = seed & 0xFFFFFFFF, seed >> 32
    count = threads() if plan[-1, FIRST_COST] > _SERIAL else 1
    if count > 1:
        _parallel(plan, _SIZES, *words, 8 * count, starts, records, result.numpy())
    else:
        _serial(plan, _SIZES, *words, starts, records, result.numpy())
    return result if moments else None
