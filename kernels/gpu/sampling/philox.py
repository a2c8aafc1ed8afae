"""Philox-4x32-10: the words of tiles, in the layout that stores whole lanes."""

from __future__ import annotations

import triton
import triton.language as tl

from ...contract import PHILOX_MULTIPLIERS, PHILOX_WEYL

_M0 = tl.constexpr(PHILOX_MULTIPLIERS[0])
_M1 = tl.constexpr(PHILOX_MULTIPLIERS[1])
_W0 = tl.constexpr(PHILOX_WEYL[0])
_W1 = tl.constexpr(PHILOX_WEYL[1])


@triton.jit
def _wide(c, MULTIPLIER: tl.constexpr):
    """Upper and lower word of c * MULTIPLIER: one instruction with a 64-bit result."""
    product = c.to(tl.uint64) * MULTIPLIER
    return (product >> 32).to(tl.uint32), product.to(tl.uint32)


@triton.jit
def philox(c0, c1, c2, c3, k0, k1):
    """One block; all uint32."""
    for _ in tl.static_range(10):
        high0, low0 = _wide(c0, _M0)
        high1, low1 = _wide(c2, _M1)
        c0 = high1 ^ c1 ^ k0
        c1 = low1
        c2 = high0 ^ c3 ^ k1
        c3 = low0
        k0 += _W0
        k1 += _W1
    return c0, c1, c2, c3
