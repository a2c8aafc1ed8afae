"""Plain-torch sampling: the definition in initperf/rng/contract.py, index by index. float32's fma is computed exactly in float64."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...contract import (
    BITS,
    CENTER,
    COS,
    LOG,
    LOG_SLOPE,
    NORMAL,
    PHILOX_MULTIPLIERS,
    PHILOX_WEYL,
    PIECES,
    SIN,
    TRUNC_CENTER,
    TRUNC_FAR,
    TRUNC_NARROW,
    UNIFORM,
)

_CHUNK = 1 << 14  # values at a time: temporaries stay in the cache, and below the size from which torch uses threads
_WORD = 0xFFFFFFFF
Number = Tensor | float


def fma(x: Tensor, y: Number, z: Number) -> Tensor:
    """x * y + z, rounded once. The float64 product is exact; its sum with z is rounded to odd, so that rounding again to float32 is right."""
    product = x.double() * (y.double() if isinstance(y, Tensor) else y)
    addend = z.double() if isinstance(z, Tensor) else z
    total = product + addend
    part = total - product
    error = (product - (total - part)) + (addend - part)
    bits = total.view(torch.int64)
    inexact_even = (error != 0) & (bits & 1 == 0)
    toward = torch.where((error > 0) == (total > 0), 1, -1)
    return (bits + torch.where(inexact_even, toward, 0)).view(torch.float64).float()


def sqrt(x: Tensor) -> Tensor:
    """The nearest float32, by way of float64: no root of a float32 is near enough to a midpoint for that to matter, and torch's float32 sqrt is sometimes a unit off."""
    return x.double().sqrt().float()


def horner(x: Tensor, coefficients: Sequence[float]) -> Tensor:
    """The polynomial with these coefficients, lowest power first."""
    result = fma(x, coefficients[-1], coefficients[-2])
    for c in coefficients[-3::-1]:
        result = fma(result, x, c)
    return result


def philox(c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor, k0: int, k1: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The four words of the block with this counter and key; a word is an int64 below 2^32."""
    for _ in range(10):
        p0, p1 = c0 * PHILOX_MULTIPLIERS[0], c2 * PHILOX_MULTIPLIERS[1]
        c0, c1, c2, c3 = (p1 >> 32 & _WORD) ^ c1 ^ k0, p1 & _WORD, (p0 >> 32 & _WORD) ^ c3 ^ k1, p0 & _WORD
        k0, k1 = (k0 + PHILOX_WEYL[0]) & _WORD, (k1 + PHILOX_WEYL[1]) & _WORD
    return c0, c1, c2, c3


def _words(index: Tensor, seed: int, stream: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The four words of the block that holds each index."""
    block = (index >> 10 << 8) | (index & 255)
    low, high = (torch.full_like(index, word) for word in (stream & _WORD, stream >> 32))
    return philox(block & _WORD, block >> 32 & _WORD, low, high, seed & _WORD, seed >> 32)


def _signed(word: Tensor) -> Tensor:
    return word.to(torch.int32).float()


def _log(x: Tensor, exponent: int, start: float = 0.0) -> Tensor:
    """start - 2 ln(x 2^-exponent) of positive float32."""
    bits = x.view(torch.int32)
    linear = (bits - ((127 + exponent) << 23)).float()
    t = ((bits & 0x7FFFFF) | 0x3F800000).view(torch.float32) - 1.5
    g = fma(-t, t, 0.25)
    return fma(linear, LOG_SLOPE, fma(g, horner(t, LOG), start))


def _finish(z: Tensor, scale: Number, params: Sequence[float], dtype: torch.dtype) -> Tensor:
    value = fma(z, scale, params[1])
    if dtype == torch.float64:
        value = value.double()
    value = torch.where(value < params[2], params[2], value)
    return torch.where(value > params[3], params[3], value).to(dtype)


def _normal(words: Sequence[Tensor], lane: Tensor, params: Sequence[float]) -> Tensor:
    low = lane < 2
    v, w = torch.where(low, words[0], words[2]), torch.where(low, words[1], words[3])
    radius = sqrt(_log((v | 1).float(), 32)) * params[0]
    radius = torch.where(v & 1 == 1, -radius, radius)
    x = _signed(w) * 2.0**-32
    square = x * x
    return fma(radius, torch.where(lane & 1 == 0, horner(square, COS), x * horner(square, SIN)), params[1])


def _quantile(kind: int, word: Tensor, params: Sequence[float]) -> tuple[Tensor, Number]:
    """z and its scale for the kinds of truncated normals."""
    scale, rest = params[0], params[4:]
    if kind == TRUNC_NARROW:
        x = _signed(word) * 2.0**-32
        return x * horner(x, rest), scale
    if kind == TRUNC_CENTER:
        y = fma(_signed(word), rest[0], rest[1])
        return y * horner(_log(fma(-y, y, 1.0), 0), CENTER), scale
    above = ((word ^ _WORD) | 1).float()
    if kind == TRUNC_FAR:
        s = _log(fma(above, rest[0], rest[1]), 0)
        return s * horner(s, rest[2:]), scale
    left, right = fma((word | 1).float(), rest[0], rest[1]), fma(above, rest[2], rest[3])
    t = sqrt(_log(torch.where(left < right, left, right), 0, rest[4]))
    border, low_center, low, high_center, high = PIECES[kind]
    z = torch.where(t < border, horner(t - low_center, low), horner(t - high_center, high))
    return z, torch.where(left < right, -scale, scale)


def _values(index: Tensor, dtype: torch.dtype, kind: int, params: Sequence[float], seed: int, stream: int) -> Tensor:
    words = _words(index, seed, stream)
    lane = index >> 8 & 3
    if kind == NORMAL:
        return _normal(words, lane, params).to(dtype)
    word = torch.stack(list(words)).gather(0, lane[None])[0]
    if kind == BITS:
        return word.to(torch.int32)
    if kind == UNIFORM:
        return _finish((word >> 8).float(), params[0], params, dtype)
    z, scale = _quantile(kind, word, params)
    return _finish(z, scale, params, dtype)


@torch.no_grad()
def sample_(
    out: Tensor,
    kind: int,
    params: Sequence[float],
    seed: int,
    stream: int,
    offset: int = 0,
    run: int = -1,
    stride: int = 0,
) -> Tensor:
    """Fill contiguous `out` by the contract; element i has index offset + (i // run) stride + i % run, or offset + i for run = -1.

    out: float32, bfloat16, float16, float64, or int32 for the words (BITS). seed and stream: 64 bits.
    """
    flat = out.view(-1)
    for start in range(0, out.numel(), _CHUNK):
        piece = flat[start : start + _CHUNK]
        index = torch.arange(start, start + piece.numel(), device=out.device)
        if run > 0:
            index = torch.div(index, run, rounding_mode="floor") * stride + index % run
        piece.copy_(_values(index + offset, out.dtype, kind, params, seed, stream))
    return out
