"""Sampling on the CPU: words of a tile, values of a tile in float32, then the part that is wanted in the tensor's dtype.

Formulas and their order are those of initperf/rng/contract.py.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numba import carray, float32, float64, int32, uint16, uint32, uint64, uintp
from numba.np.unsafe import ndarray
from torch import Tensor

from ... import contract
from ...contract import (
    BLOCKS,
    NORMAL,
    PIECES,
    TILE,
    TRUNC_CENTER,
    TRUNC_FAR,
    TRUNC_NARROW,
    TRUNC_NORMAL,
    TRUNC_TAIL,
    UNIFORM,
)
from ..core.jit import jit, threads
from ..core.scalars import all_ones, bits_float, float_bits, fma, full_vectors, half_bits, horner, pointer, sqrt
from ..core.shares import ME, among, on_threads, part_of
from .philox import tile_words

_WORDS, _FLOAT32, _BFLOAT16, _FLOAT16, _FLOAT64 = range(5)
_CODES = {
    torch.int32: _WORDS,
    torch.float32: _FLOAT32,
    torch.bfloat16: _BFLOAT16,
    torch.float16: _FLOAT16,
    torch.float64: _FLOAT64,
}
_PARALLEL_FROM = 1 << 16  # values; below, starting the threads costs more than they save
_LARGE = 32 << 20  # bytes that no cache will hold until they are used: sample_many_ writes normal values past them
_PARAMS = 16

_to_fixed_tuple: Any = ndarray.to_fixed_tuple
_SLOPE = np.float32(contract.LOG_SLOPE)
_log_polynomial = horner(contract.LOG)
_sin_polynomial = horner(contract.SIN)
_cos_polynomial = horner(contract.COS)
_center_polynomial = horner(contract.CENTER)
_near_polynomial = horner(contract.NEAR)
_middle_polynomial = horner(contract.MIDDLE)
_distant_polynomial = horner(contract.DISTANT)
_NEAR_BORDER, _NEAR_CENTER = PIECES[TRUNC_NORMAL][:2]
_TAIL_BORDER, _MIDDLE_CENTER = PIECES[TRUNC_TAIL][:2]
_DISTANT_CENTER = PIECES[TRUNC_TAIL][3]


@jit(inline="always")
def _log(x: Any, exponent: Any, start: Any) -> Any:
    """start - 2 ln(x 2^-exponent)"""
    bits = float_bits(x)
    linear = float32(int32(uint32(bits - uint32((127 + exponent) << 23))))
    t = bits_float(uint32((bits & uint32(0x7FFFFF)) | uint32(0x3F800000))) - float32(1.5)
    g = fma(-t, t, float32(0.25))
    return fma(linear, _SLOPE, fma(g, _log_polynomial(t), start))


@jit(inline="always")
def _signed(word: Any) -> Any:
    return float32(int32(word))


@jit(inline="always")
def _finish(z: Any, scale: Any, p: Any) -> Any:
    value = fma(z, scale, p[1])
    value = p[2] if value < p[2] else value
    return p[3] if value > p[3] else value


@jit()
def _uniform(words: Any, values: Any, first: Any, last: Any, p: Any) -> None:
    full_vectors()
    for r in range(uintp(first), uintp(last)):
        values[r] = _finish(float32(int32(words[r] >> uint32(8))), p[0], p)


@jit()
def _normal(words: Any, values: Any, first: Any, last: Any, p: Any) -> None:
    """Lanes (0, 1) of blocks first to last - 1; lanes (2, 3), given both arrays from 512 on."""
    full_vectors()
    for i in range(uintp(first), uintp(last)):
        v, w = words[i], words[i + uintp(BLOCKS)]
        radius = sqrt(_log(float32(v | uint32(1)), 32, float32(0))) * p[0]
        radius = bits_float(uint32(float_bits(radius) ^ uint32(v << uint32(31))))
        x = _signed(w) * float32(2.0**-32)
        square = x * x
        values[i] = fma(radius, _cos_polynomial(square), p[1])
        values[i + uintp(BLOCKS)] = fma(radius, x * _sin_polynomial(square), p[1])


@jit()
def _trunc_center(words: Any, values: Any, first: Any, last: Any, p: Any) -> None:
    full_vectors()
    for r in range(uintp(first), uintp(last)):
        y = fma(_signed(words[r]), p[4], p[5])
        s = _log(fma(-y, y, float32(1)), 0, float32(0))
        values[r] = _finish(y * _center_polynomial(s), p[0], p)


@jit(inline="always")
def _tail(word: Any, ones: Any, p: Any) -> Any:
    """t = sqrt(-2 ln(mass beyond the value)), and the signed scale. ones: all_ones()"""
    left = fma(float32(word | uint32(1)), p[4], p[5])
    right = fma(float32(uint32(word ^ ones) | uint32(1)), p[6], p[7])
    t = sqrt(_log(left if left < right else right, 0, p[8]))
    return t, -p[0] if left < right else p[0]


@jit()
def _trunc_normal(words: Any, values: Any, first: Any, last: Any, p: Any) -> None:
    full_vectors()
    ones = all_ones()
    for r in range(uintp(first), uintp(last)):
        t, scale = _tail(words[r], ones, p)
        below = _near_polynomial(t - float32(_NEAR_CENTER))
        above = _middle_polynomial(t - float32(_MIDDLE_CENTER))
        values[r] = _finish(below if t < float32(_NEAR_BORDER) else above, scale, p)


@jit()
def _trunc_tail(words: Any, values: Any, first: Any, last: Any, p: Any) -> None:
    full_vectors()
    ones = all_ones()
    for r in range(uintp(first), uintp(last)):
        t, scale = _tail(words[r], ones, p)
        below = _middle_polynomial(t - float32(_MIDDLE_CENTER))
        above = _distant_polynomial(t - float32(_DISTANT_CENTER))
        values[r] = _finish(below if t < float32(_TAIL_BORDER) else above, scale, p)


@jit(inline="always")
def _series(x: Any, a: Any, b: Any, c: Any, d: Any, e: Any, f: Any, g: Any, h: Any) -> Any:
    y = fma(fma(fma(fma(fma(fma(fma(x, h, g), x, f), x, e), x, d), x, c), x, b), x, a)
    return x * y


@jit()
def _trunc_far(words: Any, values: Any, first: Any, last: Any, p: Any) -> None:
    full_vectors()
    ones = all_ones()
    for r in range(uintp(first), uintp(last)):
        s = _log(fma(float32(uint32(words[r] ^ ones) | uint32(1)), p[4], p[5]), 0, float32(0))
        values[r] = _finish(_series(s, p[6], p[7], p[8], p[9], p[10], p[11], p[12], p[13]), p[0], p)


@jit()
def _trunc_narrow(words: Any, values: Any, first: Any, last: Any, p: Any) -> None:
    full_vectors()
    for r in range(uintp(first), uintp(last)):
        x = _signed(words[r]) * float32(2.0**-32)
        values[r] = _finish(_series(x, p[4], p[5], p[6], p[7], p[8], p[9], p[10], p[11]), p[0], p)


@jit()
def _store(
    address: Any, code: Any, at: Any, words: Any, values: Any, first: Any, last: Any, least: Any, greatest: Any
) -> None:
    """Entries first to last - 1 of a tile to the elements from `at` on, rounded to the tensor's dtype."""
    full_vectors()
    count, r = uintp(last - first), uintp(first)
    end = at + last - first
    if code == _FLOAT32:
        single = carray(pointer(address, np.float32), end)[at:]
        for i in range(count):
            single[i] = values[r + i]
    elif code == _BFLOAT16:
        brain = carray(pointer(address, np.uint16), end)[at:]
        for i in range(count):
            bits = float_bits(values[r + i])
            brain[i] = uint16(uint32(bits + uint32(0x7FFF) + uint32((bits >> uint32(16)) & uint32(1))) >> uint32(16))
    elif code == _FLOAT16:
        half = carray(pointer(address, np.uint16), end)[at:]
        for i in range(count):
            half[i] = half_bits(values[r + i])
    elif code == _FLOAT64:
        double = carray(pointer(address, np.float64), end)[at:]
        for i in range(count):
            value = float64(values[r + i])
            value = least if value < least else value
            double[i] = greatest if value > greatest else value
    else:
        integer = carray(pointer(address, np.uint32), end)[at:]
        for i in range(count):
            integer[i] = words[r + i]


@jit()
def _piece(
    address: Any,
    code: Any,
    at: Any,
    kind: Any,
    p: Any,
    bounds: Any,
    words: Any,
    values: Any,
    tile: Any,
    first: Any,
    last: Any,
    key: Any,
) -> None:
    """Entries first to last - 1 of a tile to the elements from `at` on."""
    if last - first == TILE and code == _FLOAT32:
        values = carray(pointer(address, np.float32), at + TILE)[at:]
    low, high = 0, BLOCKS
    if first // BLOCKS == (last - 1) // BLOCKS:  # within a lane: only its blocks, in whole vectors
        low, high = first % BLOCKS // 16 * 16, (last - 1) % BLOCKS // 16 * 16 + 16
    tile_words(words, tile, low, high, key[0], key[1], key[2], key[3])
    begin, end = first // 16 * 16, (last + 15) // 16 * 16
    if kind == NORMAL:
        for half in range(first // 512 * 512, last, 512):
            _normal(words[half:], values[half:], low, high, p)
    elif kind == UNIFORM:
        _uniform(words, values, begin, end, p)
    elif kind == TRUNC_CENTER:
        _trunc_center(words, values, begin, end, p)
    elif kind == TRUNC_NORMAL:
        _trunc_normal(words, values, begin, end, p)
    elif kind == TRUNC_TAIL:
        _trunc_tail(words, values, begin, end, p)
    elif kind == TRUNC_FAR:
        _trunc_far(words, values, begin, end, p)
    elif kind == TRUNC_NARROW:
        _trunc_narrow(words, values, begin, end, p)
    if last - first < TILE or code != _FLOAT32:
        _store(address, code, at, words, values, first, last, bounds[0], bounds[1])


@jit()
def _pieces(
    begin: Any,
    end: Any,
    address: Any,
    code: Any,
    n: Any,
    kind: Any,
    params: Any,
    key: Any,
    offset: Any,
    run: Any,
    stride: Any,
) -> None:
    """Pieces begin to end - 1: piece k is slot k % slots of run k // slots, one tile's part of that run."""
    scratch = np.empty(2 * TILE + 16, np.uint32)
    scratch = scratch[(64 - scratch.ctypes.data % 64) % 64 // 4 :]
    words, values = scratch[:TILE], scratch[TILE : 2 * TILE].view(np.float32)
    constants = carray(pointer(params, np.float64), _PARAMS)
    bounds = constants[2], constants[3]
    single = constants.astype(np.float32)
    if code == _FLOAT64:
        single[2], single[3] = -np.inf, np.inf
    p = _to_fixed_tuple(single, _PARAMS)
    slots = _slots(run)
    for k in range(begin, end):
        row = k // slots
        start = offset + row * stride
        tile = start // TILE + k % slots
        first = max(start - tile * TILE, 0)
        last = min(start + min(run, n - row * run) - tile * TILE, TILE)
        if first < last:
            at = row * run + tile * TILE + first - start
            _piece(address, code, at, kind, p, bounds, words, values, uint64(tile), first, last, key)


@jit(inline="always")
def _slots(run: Any) -> Any:
    """Tiles that a run can touch, at most."""
    return (run + TILE - 2) // TILE + 1


@jit()
def _fill(
    share: Any,
    address: Any,
    code: Any,
    n: Any,
    kind: Any,
    params: Any,
    k0: Any,
    k1: Any,
    s0: Any,
    s1: Any,
    offset: Any,
    run: Any,
    stride: Any,
) -> None:
    if share[ME] < 0:
        on_threads(share)
        return
    first, last = part_of(share, (n + run - 1) // run * _slots(run))
    key = uint64(k0), uint64(k1), uint64(s0), uint64(s1)
    _pieces(first, last, address, code, n, kind, params, key, offset, run, stride)


@lru_cache(maxsize=4096)
def _constants(params: tuple[float, ...]) -> tuple[np.ndarray, int]:
    array = np.zeros(_PARAMS)
    array[: len(params)] = params
    return array, array.ctypes.data


def sample_(
    out: Tensor,
    kind: int,
    params: tuple[float, ...],
    seed: int,
    stream: int,
    offset: int = 0,
    run: int = -1,
    stride: int = 0,
) -> Tensor:
    """See initperf.kernels.reference.sampling.sample.sample_; params is a tuple."""
    n = out.numel()
    if not n:
        return out
    if kind == NORMAL and out.dtype == torch.float32 and out.nbytes >= _LARGE and offset == 0 and run in (-1, n):
        from .sample_many import sample_many_

        sample_many_([out], [(kind, params)], [stream], seed)
        return out
    constants, address = _constants(params)
    words = seed & 0xFFFFFFFF, seed >> 32, stream & 0xFFFFFFFF, stream >> 32
    arguments = out.data_ptr(), _CODES[out.dtype], n, kind, address, *words, offset, run if run > 0 else n, stride
    count = threads() if n >= _PARALLEL_FROM else 1
    _fill(among(8 * count if count > 1 else 1), *arguments)
    return out
