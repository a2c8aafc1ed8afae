"""Sampling into a list of tensors on a GPU, in one launch: a program finds its tensor in a table and fills TILES tiles of it.

What differs between tensors (dtype, distribution, mask) is read from the table, so that all threads of a program branch
alike. Formulas are those of kernels/gpu/sampling/sample.py, compiled in the same way, so that the bits are the same.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from ... import contract
from ..moments.moments import moments as moments_of
from .philox import philox
from .sample import _INTERPRETED, _WARP, _int32, _rounded, _values

TILES, WARPS = (
    4,
    4,
)  # tiles of 1024 a program, warps of 32: 8 values a thread and lane, two bytes each are a store of 128 bits
_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
_CONSTANT = tl.constexpr(-1)  # a kind of this file: every value is params[1]
_UNIFORM = tl.constexpr(contract.UNIFORM)
_NORMAL = tl.constexpr(contract.NORMAL)
_TRUNC_NORMAL = tl.constexpr(contract.TRUNC_NORMAL)
_TRUNC_CENTER = tl.constexpr(contract.TRUNC_CENTER)
_TRUNC_TAIL = tl.constexpr(contract.TRUNC_TAIL)
_TRUNC_FAR = tl.constexpr(contract.TRUNC_FAR)
_TRUNC_NARROW = tl.constexpr(contract.TRUNC_NARROW)
# Columns of the table, int64: addresses, numbers of elements, two float64 and, from PARAMS on, float32 in pairs.
_PARAMETERS = 14
ADDRESS, CODE, COUNT, KIND, STREAM, MASK, BITS, STARTS, FIRST, LEAST, GREATEST, PARAMS = (
    tl.constexpr(i) for i in range(12)
)
COLUMNS = tl.constexpr(11 + _PARAMETERS // 2)


@triton.jit
def _row_of(table_ptr, rows, program):
    """The last row whose FIRST is at most `program`."""
    low, high = 0, rows
    while high - low > 1:
        middle = (low + high) // 2
        below = tl.load(table_ptr + middle * COLUMNS + FIRST) <= program
        low = tl.where(below, middle, low)
        high = tl.where(below, high, middle)
    return table_ptr + low * COLUMNS


@triton.jit
def _sampled(s, kind, a, b, c, d):
    """The float32 values of four lanes of words."""
    q = (s + PARAMS).to(tl.pointer_type(tl.float32))
    p = (
        tl.load(q), tl.load(q + 1), tl.load(q + 2), tl.load(q + 3), tl.load(q + 4), tl.load(q + 5), tl.load(q + 6),
        tl.load(q + 7), tl.load(q + 8), tl.load(q + 9), tl.load(q + 10), tl.load(q + 11), tl.load(q + 12), tl.load(q + 13),
    )  # fmt: skip
    v, w = tl.zeros(a.shape, tl.float32) + p[1], tl.zeros(a.shape, tl.float32) + p[1]
    x, y = v, v
    if kind == _UNIFORM:
        v, w, x, y = _values(a, b, c, d, p, _UNIFORM)
    elif kind == _NORMAL:
        v, w, x, y = _values(a, b, c, d, p, _NORMAL)
    elif kind == _TRUNC_NORMAL:
        v, w, x, y = _values(a, b, c, d, p, _TRUNC_NORMAL)
    elif kind == _TRUNC_CENTER:
        v, w, x, y = _values(a, b, c, d, p, _TRUNC_CENTER)
    elif kind == _TRUNC_TAIL:
        v, w, x, y = _values(a, b, c, d, p, _TRUNC_TAIL)
    elif kind == _TRUNC_FAR:
        v, w, x, y = _values(a, b, c, d, p, _TRUNC_FAR)
    elif kind == _TRUNC_NARROW:
        v, w, x, y = _values(a, b, c, d, p, _TRUNC_NARROW)
    return v, w, x, y


@triton.jit
def _below(word, bit):
    """How many of the lowest `bit` bits of a word are set."""
    x = word & ((1 << bit.to(tl.uint32)) - 1)
    x -= (x >> 1) & 0x55555555
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    return (((x + (x >> 4)) & 0x0F0F0F0F) * 0x01010101) >> 24


@triton.jit
def _to(address, dtype: tl.constexpr, at, value, dead, live, FULL: tl.constexpr, INTERPRETED: tl.constexpr):
    p = address.to(tl.pointer_type(dtype))
    value = _rounded(tl.where(dead, 0.0, value), dtype, INTERPRETED)
    if FULL:
        tl.store(tl.multiple_of(p, 16) + at, value)
    else:
        tl.store(p + at, value, mask=live)


@triton.jit
def _store(s, address, code, at, value, dead, live, FULL: tl.constexpr, INTERPRETED: tl.constexpr):
    if code == 0:
        _to(address, tl.float32, at, value, dead, live, FULL, INTERPRETED)
    elif code == 1:
        _to(address, tl.bfloat16, at, value, dead, live, FULL, INTERPRETED)
    elif code == 2:
        _to(address, tl.float16, at, value, dead, live, FULL, INTERPRETED)
    else:
        least = tl.load(s + LEAST).to(tl.float64, bitcast=True)
        greatest = tl.load(s + GREATEST).to(tl.float64, bitcast=True)
        wide = value.to(tl.float64)
        wide = tl.where(wide < least, least, wide)
        _to(address, tl.float64, at, tl.where(wide > greatest, greatest, wide), dead, live, FULL, INTERPRETED)


@triton.jit
def _lane(
    s, address, code, n, first, entry, value, LANE: tl.constexpr, FULL: tl.constexpr, INTERPRETED: tl.constexpr
):  # fmt: skip
    """One lane of a program's tiles, whose entry 0 is index `first`: pruned, or only the survivors, and stored."""
    at = entry + 256 * LANE
    live = at < n - first
    mask, bits = tl.load(s + MASK), tl.load(s + BITS)
    size = tl.where(code == 3, 8, tl.where(code == 0, 4, 2))
    dead = live & False
    if mask != 0:
        dead = tl.load((mask + first).to(tl.pointer_type(tl.uint8)) + at, mask=live, other=0) == 0
    if FULL:
        _store(s, address + first * size, code, at, value, dead, live, True, INTERPRETED)
    elif bits == 0:
        _store(s, address + first * size, code, at, value, dead, live, False, INTERPRETED)
    else:
        starts = tl.load(s + STARTS)
        word = tl.load((bits + first // 8).to(tl.pointer_type(tl.uint32)) + at // 32, mask=live, other=0)
        start = tl.load((starts + first // 4).to(tl.pointer_type(tl.int64)) + at // 32, mask=live, other=0)
        bit = at % 32
        alive = ((word >> bit.to(tl.uint32)) & 1) != 0
        _store(s, address, code, start + _below(word, bit), value, dead, live & alive, False, INTERPRETED)


@triton.jit
def _lanes(s, address, code, n, first, entry, v, w, x, y, FULL: tl.constexpr, INTERPRETED: tl.constexpr):
    _lane(s, address, code, n, first, entry, v, 0, FULL, INTERPRETED)
    _lane(s, address, code, n, first, entry, w, 1, FULL, INTERPRETED)
    _lane(s, address, code, n, first, entry, x, 2, FULL, INTERPRETED)
    _lane(s, address, code, n, first, entry, y, 3, FULL, INTERPRETED)


@triton.jit(do_not_specialize=["rows", "k0", "k1"])
def _fill_many(table_ptr, rows, k0, k1, TILES: tl.constexpr, INTERPRETED: tl.constexpr):
    program = tl.program_id(0).to(tl.int64)
    s = _row_of(table_ptr, rows, program)
    address, code, kind = tl.load(s + ADDRESS), tl.load(s + CODE), tl.load(s + KIND)
    n, stream = tl.load(s + COUNT), tl.load(s + STREAM)
    tile = (program - tl.load(s + FIRST)) * TILES
    part = tl.arange(0, TILES)[:, None]
    i = tl.arange(0, 256)[None, :]
    block = (tile + part) * 256
    zero = tl.zeros((TILES, 256), tl.uint32)
    c0, c1 = block.to(tl.uint32) | i.to(tl.uint32), zero + (block >> 32).to(tl.uint32)
    c2, c3 = zero + stream.to(tl.uint32), zero + (stream >> 32).to(tl.uint32)
    a, b, c, d = philox(c0, c1, c2, c3, k0.to(tl.uint32, bitcast=True), k1.to(tl.uint32, bitcast=True))
    v, w, x, y = _sampled(s, kind, a, b, c, d)
    first, entry = tile * 1024, part * 1024 + i
    if ((tile + TILES) * 1024 <= n) & (address % 16 == 0) & (tl.load(s + BITS) == 0):
        _lanes(s, address, code, n, first, entry, v, w, x, y, True, INTERPRETED)
    else:
        _lanes(s, address, code, n, first, entry, v, w, x, y, False, INTERPRETED)


def _bits_by_word(bits: Tensor) -> tuple[Tensor, Tensor]:
    """The bits as whole 32-bit words, aligned, and how many are set before each word (int64)."""
    bits = torch.nn.functional.pad(bits, (0, -bits.numel() % 4))
    pairs = bits - (bits >> 1 & 0x55)
    nibbles = (pairs & 0x33) + (pairs >> 2 & 0x33)
    counts = ((nibbles + (nibbles >> 4)) & 0x0F).view(-1, 4).sum(1)
    return bits, counts.cumsum(0) - counts


def _constants(kind: int, params: tuple[float, ...], dtype: torch.dtype) -> tuple[int, list[float], np.ndarray]:
    """KIND; LEAST and GREATEST; the float32 parameters."""
    p = np.zeros(_PARAMETERS, np.float32)
    p[: len(params)] = params
    if kind == contract.UNIFORM and params[0] == 0:
        kind, p[1] = _CONSTANT.value, min(max(float(p[1]) + 0.0, float(p[2])), float(p[3]))
    if dtype == torch.float64:
        p[2:4] = -math.inf, math.inf
    return kind, list(params[2:4]), p


def _table(
    outs: Sequence[Tensor],
    distributions: Sequence[tuple[int, tuple[float, ...]]],
    streams: Sequence[int],
    masks: Sequence[Tensor | None],
    tiles: int,
) -> tuple[np.ndarray, int, list[Tensor]]:
    """The table, the programs to run, and what must live until they have run."""
    table = np.zeros((len(outs), COLUMNS.value), np.int64)
    floats, singles = table[:, LEAST.value : PARAMS.value].view(np.float64), table[:, PARAMS.value :].view(np.float32)
    programs, alive = 0, []
    for i, (out, (kind, params), stream, mask) in enumerate(zip(outs, distributions, streams, masks, strict=True)):
        kind, floats[i], singles[i] = _constants(kind, params, out.dtype)
        count, where, bits, starts = out.numel(), 0, 0, 0
        if mask is not None and mask.dtype == torch.uint8:
            words, ranks = _bits_by_word(mask)
            alive += [words, ranks]
            count, bits, starts = 8 * mask.numel(), words.data_ptr(), ranks.data_ptr()
        elif mask is not None:
            where = mask.data_ptr()
        signed = stream - (stream >> 63 << 64)
        row = out.data_ptr(), _CODES[out.dtype], count, kind, signed, where, bits, starts, programs
        table[i, : LEAST.value] = row
        programs += -(-count // (1024 * tiles))
    return table, programs, alive


def sample_many_(
    outs: Sequence[Tensor],
    distributions: Sequence[tuple[int, tuple[float, ...]]],
    streams: Sequence[int],
    seed: int,
    masks: Sequence[Tensor | None] | None = None,
    moments: bool = False,
) -> Tensor | None:
    """See initperf.kernels.reference.sampling.sample_many.sample_many_. The moments are a second pass, of kernels/gpu/moments/moments.py."""
    if not outs:
        return torch.empty((2, 0), dtype=torch.float64) if moments else None
    masks = masks if masks is not None else [None] * len(outs)
    device = outs[0].device
    table, programs, alive = _table(outs, distributions, streams, masks, TILES)
    rows = torch.from_numpy(table)
    if device.type == "cuda":
        rows = rows.pin_memory().to(device, non_blocking=True)
    if programs:
        _fill_many[(programs,)](
            rows,
            len(outs),
            _int32(seed & 0xFFFFFFFF),
            _int32(seed >> 32),
            TILES=TILES,
            INTERPRETED=_INTERPRETED,
            num_warps=WARPS // _WARP,
            enable_fp_fusion=False,
        )
    del alive
    if not moments:
        return None
    kept = [
        out if mask is None or mask.dtype == torch.uint8 else out[mask.view(out.shape)]
        for out, mask in zip(outs, masks, strict=True)
    ]
    return moments_of(kept, [(1, 1, x.numel(), 0, 0) for x in kept], 2, 0.0)[:2]
