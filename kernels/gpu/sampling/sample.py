"""Sampling on a GPU: a program fills TILES tiles of 1024 indices with whole-lane stores.

Formulas and their order are those of initperf/rng/contract.py. Compiled without fusion, approximations and flushing, so that the
bits are those of the CPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ... import contract
from .philox import philox

_BITS = tl.constexpr(contract.BITS)
_UNIFORM = tl.constexpr(contract.UNIFORM)
_NORMAL = tl.constexpr(contract.NORMAL)
_TRUNC_CENTER = tl.constexpr(contract.TRUNC_CENTER)
_TRUNC_NORMAL = tl.constexpr(contract.TRUNC_NORMAL)
_TRUNC_TAIL = tl.constexpr(contract.TRUNC_TAIL)
_TRUNC_FAR = tl.constexpr(contract.TRUNC_FAR)
_SLOPE = tl.constexpr(contract.LOG_SLOPE)
_LOG = tl.constexpr(contract.LOG)
_SIN = tl.constexpr(contract.SIN)
_COS = tl.constexpr(contract.COS)
_CENTER = tl.constexpr(contract.CENTER)
_NEAR_PIECES = tl.constexpr(contract.PIECES[contract.TRUNC_NORMAL])
_TAIL_PIECES = tl.constexpr(contract.PIECES[contract.TRUNC_TAIL])

# By bytes of an element: (tiles a program, warps of 32), so that every store of a thread is 128 bits wide and nothing spills.
# Programs with masks, which store element by element, take one tile.
TILES = {2: (2, 2), 4: (2, 4), 8: (1, 4)}
_INTERPRETED = triton.knobs.runtime.interpret
_WARP = 2 if torch.version.hip else 1  # in units of 32 threads


@triton.jit
def _horner(x, COEFFICIENTS: tl.constexpr, DEGREE: tl.constexpr):
    y = tl.fma(x, COEFFICIENTS[DEGREE], COEFFICIENTS[DEGREE - 1])
    for k in tl.static_range(2, DEGREE + 1):
        y = tl.fma(y, x, COEFFICIENTS[DEGREE - k])
    return y


@triton.jit
def _log(x, EXPONENT: tl.constexpr, start):
    """start - 2 ln(x 2^-EXPONENT)"""
    bits = x.to(tl.uint32, bitcast=True)
    linear = (bits - ((127 + EXPONENT) << 23)).to(tl.int32, bitcast=True).to(tl.float32)
    t = ((bits & 0x7FFFFF) | 0x3F800000).to(tl.float32, bitcast=True) - 1.5
    g = tl.fma(-t, t, 0.25)
    return tl.fma(linear, _SLOPE, tl.fma(g, _horner(t, _LOG, 7), start))


@triton.jit
def _signed(word):
    return word.to(tl.int32, bitcast=True).to(tl.float32)


@triton.jit
def _flipped(word):
    """~word, which the interpreter of Triton 3.7 and older refuses for unsigned words."""
    return word ^ 0xFFFFFFFF


@triton.jit
def _normal(v, w, p):
    """The values of a pair of lanes."""
    radius = tl.sqrt_rn(_log((v | 1).to(tl.float32), 32, 0.0)) * p[0]
    radius = (radius.to(tl.uint32, bitcast=True) ^ (v << 31)).to(tl.float32, bitcast=True)
    x = _signed(w) * 2.0**-32
    square = x * x
    return tl.fma(radius, _horner(square, _COS, 4), p[1]), tl.fma(radius, x * _horner(square, _SIN, 4), p[1])


@triton.jit
def _two_tails(word, p, PIECES: tl.constexpr):
    """Quantile beyond the nearer tail mass, and the signed scale."""
    left = tl.fma((word | 1).to(tl.float32), p[4], p[5])
    right = tl.fma((_flipped(word) | 1).to(tl.float32), p[6], p[7])
    on_left = left < right
    t = tl.sqrt_rn(_log(tl.where(on_left, left, right), 0, p[8]))
    # Up to Triton 3.7 a tuple out of a constexpr tuple is no constexpr.
    near = _horner(t - PIECES[1], tl.constexpr(PIECES[2]), 8)
    far = _horner(t - PIECES[3], tl.constexpr(PIECES[4]), 8)
    z = tl.where(t < PIECES[0], near, far)
    return z, tl.where(on_left, -p[0], p[0])


@triton.jit
def _series(x, p, START: tl.constexpr):
    """x times the polynomial with coefficients p[START : START + 8]."""
    y = tl.fma(x, p[START + 7], p[START + 6])
    for k in tl.static_range(5, -1, -1):
        y = tl.fma(y, x, p[START + k])
    return x * y


@triton.jit
def _value(word, p, KIND: tl.constexpr):
    """The float32 value of a word, of every kind but NORMAL."""
    scale = p[0]
    if KIND == _UNIFORM:
        z = (word >> 8).to(tl.int32, bitcast=True).to(tl.float32)
    elif KIND == _TRUNC_CENTER:
        y = tl.fma(_signed(word), p[4], p[5])
        z = y * _horner(_log(tl.fma(-y, y, 1.0), 0, 0.0), _CENTER, 6)
    elif KIND == _TRUNC_NORMAL:
        z, scale = _two_tails(word, p, _NEAR_PIECES)
    elif KIND == _TRUNC_TAIL:
        z, scale = _two_tails(word, p, _TAIL_PIECES)
    elif KIND == _TRUNC_FAR:
        z = _series(_log(tl.fma((_flipped(word) | 1).to(tl.float32), p[4], p[5]), 0, 0.0), p, 6)
    else:
        z = _series(_signed(word) * 2.0**-32, p, 4)
    value = tl.fma(z, scale, p[1])
    value = tl.where(value < p[2], p[2], value)
    return tl.where(value > p[3], p[3], value)


@triton.jit
def _values(a, b, c, d, p, KIND: tl.constexpr):
    """Values of the four lanes."""
    if KIND == _NORMAL:
        a, b = _normal(a, b, p)
        c, d = _normal(c, d, p)
    elif KIND != _BITS:
        a, b = _value(a, p, KIND), _value(b, p, KIND)
        c, d = _value(c, p, KIND), _value(d, p, KIND)
    return a, b, c, d


@triton.jit
def _rounded(value, dtype: tl.constexpr, INTERPRETED: tl.constexpr):
    """To the tensor's dtype, to nearest even; the interpreter's own cast to bfloat16 truncates."""
    if dtype == tl.int32:
        result = value.to(tl.int32, bitcast=True)
    elif dtype == tl.bfloat16 and INTERPRETED:
        bits = value.to(tl.uint32, bitcast=True)
        result = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        result = value.to(dtype)
    return result


@triton.jit(do_not_specialize=["n", "k0", "k1", "s0", "s1", "first_tile", "groups", "run", "stride"])
def _fill(
    out_ptr,
    n,
    k0,
    k1,
    s0,
    s1,
    first_tile,
    shift,
    groups,
    run,
    stride,
    p,
    KIND: tl.constexpr,
    TILES: tl.constexpr,
    ONE_RUN: tl.constexpr,
    MASKED: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Program row * groups + g: tiles g TILES to (g + 1) TILES - 1 of a run, whose index 0 is entry `shift` of its first tile."""
    if ONE_RUN:
        low, high = tl.zeros((), tl.int64), n.to(tl.int64)
        tile = tl.program_id(0).to(tl.int64) * TILES
        at = tile * 1024 - shift  # the element that entry 0 of `tile` goes to, if it lies in the run
        tile += first_tile
    else:
        row = (tl.program_id(0) // groups).to(tl.int64)
        low = row * run
        high = tl.minimum(low + run, n)
        start = first_tile.to(tl.int64) * 1024 + shift + row * stride
        tile = start // 1024 + tl.program_id(0) % groups * TILES
        at = low + tile * 1024 - start
    part = tl.arange(0, TILES)[:, None]
    i = tl.arange(0, 256)[None, :]
    block = (tile + part) * 256
    zero = tl.zeros((TILES, 256), tl.uint32)
    c0 = block.to(tl.uint32) | i.to(tl.uint32)
    c1 = zero + (block >> 32).to(tl.uint32)
    c2, c3 = zero + s0.to(tl.uint32, bitcast=True), zero + s1.to(tl.uint32, bitcast=True)
    a, b, c, d = philox(c0, c1, c2, c3, k0.to(tl.uint32, bitcast=True), k1.to(tl.uint32, bitcast=True))
    a, b, c, d = _values(a, b, c, d, p, KIND)
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    a, b = _rounded(a, dtype, INTERPRETED), _rounded(b, dtype, INTERPRETED)
    c, d = _rounded(c, dtype, INTERPRETED), _rounded(d, dtype, INTERPRETED)
    entry = part * 1024 + i
    to = out_ptr + at + entry
    if MASKED:
        entry += at
        tl.store(to, a, mask=(entry >= low) & (entry < high))
        tl.store(to + 256, b, mask=(entry >= low - 256) & (entry < high - 256))
        tl.store(to + 512, c, mask=(entry >= low - 512) & (entry < high - 512))
        tl.store(to + 768, d, mask=(entry >= low - 768) & (entry < high - 768))
    else:
        tl.store(to, a)
        tl.store(to + 256, b)
        tl.store(to + 512, c)
        tl.store(to + 768, d)


def _int32(word: int) -> int:
    """The word as a signed number, so that its type does not depend on its value."""
    return word - (word >> 31 << 32)


def sample_(
    out: Tensor,
    kind: int,
    params: tuple[float, ...],
    seed: int,
    stream: int,
    offset: int = 0,
    run: int = -1,
    stride: int = 0,
    *,
    tiles: int | None = None,
) -> Tensor:
    """See initperf.kernels.reference.sampling.sample.sample_. tiles: tiles a program, for tests; the values do not depend on it."""
    n = out.numel()
    if not n:
        return out
    widest, warps = TILES[out.element_size()]
    one_run = run <= 0 or run >= n
    run = n if one_run else run
    shift = offset % 1024
    program = 1024 * (tiles or widest)
    whole = n // program * program if one_run and not shift else 0
    if 0 < whole < n:  # what fills programs without masks, then the rest
        flat = out.view(-1)
        sample_(flat[:whole], kind, params, seed, stream, offset, tiles=tiles)
        sample_(flat[whole:], kind, params, seed, stream, offset + whole, tiles=tiles)
        return out
    tiles = tiles or (widest if whole else 1)
    touched = (shift + n + 1023) // 1024 if one_run else (run + 1022) // 1024 + 1
    groups = (touched + tiles - 1) // tiles
    double = out.dtype == torch.float64
    words = [_int32(w) for w in (seed & 0xFFFFFFFF, seed >> 32, stream & 0xFFFFFFFF, stream >> 32)]
    _fill[(groups * -(-n // run),)](
        out,
        n,
        *words,
        offset // 1024,
        shift,
        groups,
        run,
        stride,
        params[:2] + (-float("inf"), float("inf")) + params[4:] if double else params,
        KIND=kind,
        TILES=tiles,
        ONE_RUN=one_run,
        MASKED=not whole,
        INTERPRETED=_INTERPRETED,
        num_warps=warps // _WARP,
        enable_fp_fusion=False,
    )
    if double and params[2:4] != (-float("inf"), float("inf")):
        out.clamp_(params[2], params[3])
    return out
