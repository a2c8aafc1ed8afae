"""The values of the sampling contract on the CPU, from words: formulas and their order are those of initperf/rng/contract.py."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import float32, int32, uint32, uintp

from ... import contract
from ...contract import BLOCKS, PIECES, TRUNC_NORMAL, TRUNC_TAIL
from ..core.jit import jit
from ..core.scalars import all_ones, bits_float, float_bits, fma, full_vectors, horner, sqrt

_WORDS, _FLOAT32, _BFLOAT16, _FLOAT16, _FLOAT64 = range(5)
_CODES = {
    torch.int32: _WORDS,
    torch.float32: _FLOAT32,
    torch.bfloat16: _BFLOAT16,
    torch.float16: _FLOAT16,
    torch.float64: _FLOAT64,
}
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
