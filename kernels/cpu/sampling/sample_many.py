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
from numba import int64, uint64
from torch import Tensor

from ...contract import NORMAL, TILE, UNIFORM
from ..core.jit import jit, threads
from ..core.shares import ALONE, ME, among, on_threads
from .block_work import LANES, MEAN, SQUARES, N, bits_set, copy_past_caches, fill, measure, pick, prune, words_of
from .formulas import _CODES, _FLOAT32
from .tiles import _constants, _fill, _pieces

_LARGE = 32 << 20  # bytes that no cache will hold until they are used: sample_many_ writes normal values past them

_TILES = 8  # tiles of a block: 32 KiB of float32, within the first-level cache
_SPAN = _TILES * TILE
_CONSTANT = -1  # a kind of this file: every value has the bits that stand in PARAMS
# What a tile costs, measured, where one of a constant costs 1; from _PARALLEL on threads save more than they cost.
_COST = {_CONSTANT: 1, UNIFORM: 3, NORMAL: 5}
_TRUNCATED_COST = 7
_PARALLEL = 64 * _COST[NORMAL]

_COLUMNS = 11
ADDRESS, CODE, COUNT, KIND, PARAMS, STREAM, MASK, BITS, COST, FIRST_BLOCK, FIRST_COST = range(_COLUMNS)


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
def _share(
    plan: Any, sizes: Any, k0: Any, k1: Any, large: Any, begin: Any, end: Any, starts: Any, records: Any
) -> None:
    """Blocks begin to end - 1 of the list."""
    scratch = np.empty(_SPAN + 8, np.uint64)
    scratch = scratch[(64 - scratch.ctypes.data % 64) % 64 // 8 :][:_SPAN]
    sums = np.empty((2, LANES))
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
        # Normal values come two lines at a time, which ordinary stores read first: past the caches 1.28x, others 0.7-0.9x.
        streamed = large and kind == NORMAL and code == _FLOAT32 and s[BITS] == 0 and address % 64 == 0
        blocks = 1
        if not (streamed or s[MASK] or s[BITS] or len(records)):
            blocks = min(end, plan[t + 1, FIRST_BLOCK]) - block
        first, last = here * _SPAN, min((here + blocks) * _SPAN, n)
        tiles = here * _TILES, (last + TILE - 1) // TILE
        # Where element 0 would lie if the block were the scratch.
        target = scratch.ctypes.data - first * size if streamed or s[BITS] else address
        kept = last - first
        words = words_of(s[BITS], first, last if s[BITS] else first)
        if s[BITS]:
            first, kept = starts[block], bits_set(words)
            last = first + kept
        if kind == _CONSTANT:
            fill(address, size, first, last, params)
        elif kept:
            _pieces(tiles[0], tiles[1], target, code, n, kind, params, key, int64(0), n, int64(0))
        if s[BITS]:
            target = address
            if kind != _CONSTANT:
                pick(scratch, address, size, first, last, words)
        if s[MASK]:
            prune(target, size, first, last, s[MASK])
        if len(records):
            measure(target, code, size, first, last, s[MASK], sums, records[block])
        if streamed:
            copy_past_caches(scratch.ctypes.data, address + first * size, (last - first) * size)
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
    """Turn COST from that of a tile to that of a block, and fill FIRST_BLOCK and FIRST_COST."""
    for t in range(len(plan) - 1):
        s, after = plan[t], plan[t + 1]
        blocks = (s[COUNT] + _SPAN - 1) // _SPAN
        s[COST] *= min((s[COUNT] + TILE - 1) // TILE, _TILES)
        after[FIRST_BLOCK] = s[FIRST_BLOCK] + blocks
        after[FIRST_COST] = s[FIRST_COST] + blocks * s[COST]


@jit()
def _counted(plan: Any, starts: Any) -> None:
    """starts[b]: survivors of the row before block b."""
    for t in range(len(plan) - 1):
        s = plan[t]
        if s[BITS]:
            total = 0
            for b in range(plan[t + 1, FIRST_BLOCK] - s[FIRST_BLOCK]):
                starts[s[FIRST_BLOCK] + b] = total
                total += bits_set(words_of(s[BITS], b * _SPAN, min((b + 1) * _SPAN, s[COUNT])))


@jit()
def _part(share: Any, plan: Any, sizes: Any, k0: Any, k1: Any, large: Any, starts: Any, records: Any) -> None:
    """A share of equal cost."""
    if share[ME] < 0:
        on_threads(share)
        return
    part, parts, _ = share
    total = plan[-1, FIRST_COST]
    begin = _block_at(plan, total * part // parts) if part else int64(0)
    end = _block_at(plan, total * (part + 1) // parts) if part + 1 < parts else plan[-1, FIRST_BLOCK]
    _share(plan, sizes, k0, k1, large, begin, end, starts, records)


@lru_cache(maxsize=4096)
def _formula(kind: int, params: tuple[float, ...], dtype: torch.dtype) -> tuple[int, int, int, np.ndarray | None]:
    """KIND, PARAMS and COST of a row, and what must live as long as PARAMS is used."""
    constants, address = _constants(params)
    if kind == UNIFORM and params[0] == 0:
        one = torch.empty(1, dtype=dtype, device="cpu")
        _fill(ALONE, one.data_ptr(), _CODES[dtype], 1, kind, address, 0, 0, 0, 0, 0, 1, 0)
        word = one.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize])
        return _CONSTANT, int(word), _COST[_CONSTANT], None
    return kind, address, _COST.get(kind, _TRUNCATED_COST), constants


_SIZES = np.array([dtype.itemsize for dtype in _CODES])


def _in_words(bits: Tensor) -> Tensor:
    """The bytes as whole, aligned words."""
    if bits.numel() % 8 or bits.data_ptr() % 8:
        bits = torch.nn.functional.pad(bits, (0, -bits.numel() % 8))
    return bits


def sample_many_(
    outs: Sequence[Tensor],
    distributions: Sequence[tuple[int, tuple[float, ...]]],
    streams: Sequence[int],
    seed: int,
    masks: Sequence[Tensor | None] | None = None,
    moments: bool = False,
) -> Tensor | None:
    """See initperf.kernels.reference.sampling.sample_many.sample_many_."""
    plan = np.zeros((len(outs) + 1, _COLUMNS), np.int64)
    rows, alive = [], []
    for i, (out, (kind, params), stream) in enumerate(zip(outs, distributions, streams, strict=True)):
        kind, address, cost, constants = _formula(kind, params, out.dtype)
        mask = masks[i] if masks is not None else None
        count, where, bits = out.numel(), 0, 0
        if mask is not None and mask.dtype == torch.uint8:
            mask = _in_words(mask)
            count, bits = 8 * mask.numel(), mask.data_ptr()
        elif mask is not None:
            where = mask.data_ptr()
        signed = stream - (stream >> 63 << 64)
        rows.append((out.data_ptr(), _CODES[out.dtype], count, kind, address, signed, where, bits, cost))
        alive.append((constants, mask))
    if rows:
        plan[:-1, :FIRST_BLOCK] = rows
    _planned(plan)
    blocks = int(plan[-1, FIRST_BLOCK])
    records = np.empty((blocks if moments else 0, 3))
    starts = np.empty(blocks if plan[:, BITS].any() else 0, np.int64)
    words = seed & 0xFFFFFFFF, seed >> 32
    large = sum(out.nbytes for out in outs) >= _LARGE
    if len(starts):
        _counted(plan, starts)
    count = threads() if plan[-1, FIRST_COST] >= _PARALLEL else 1
    _part(among(8 * count if count > 1 else 1), plan, _SIZES, *words, large, starts, records)
    if not moments:
        return None
    result = torch.empty((2, len(outs)), dtype=torch.float64, device="cpu")
    _combined(plan, records, result.numpy())
    return result
