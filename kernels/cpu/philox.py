"""Philox-4x32-10: the words of one tile."""

from __future__ import annotations

from typing import Any

from numba import uint32, uint64, uintp

from ..contract import BLOCKS, PHILOX_MULTIPLIERS, PHILOX_WEYL
from .jit import jit
from .vector import full_vectors

_M0, _M1 = PHILOX_MULTIPLIERS
_W0, _W1 = PHILOX_WEYL


@jit(inline="always")
def philox(c0: Any, c1: Any, c2: Any, c3: Any, k0: Any, k1: Any) -> Any:
    """One block. Every word sits in a uint64, whose upper half may hold anything: LLVM then uses 32 x 32 -> 64 bit multiplies."""
    mask = uint64(0xFFFFFFFF)
    for _ in range(10):
        p0, p1 = uint64(_M0) * (c0 & mask), uint64(_M1) * (c2 & mask)
        c0, c1, c2, c3 = (p1 >> uint64(32)) ^ c1 ^ k0, p1, (p0 >> uint64(32)) ^ c3 ^ k1, p0
        k0, k1 = k0 + uint64(_W0), k1 + uint64(_W1)
    return uint32(c0), uint32(c1), uint32(c2), uint32(c3)


@jit()
def tile_words(words: Any, tile: Any, first: Any, last: Any, k0: Any, k1: Any, s0: Any, s1: Any) -> None:
    """Words of blocks first to last - 1 of a tile: word of lane j of block i to words[256 j + i]."""
    full_vectors()
    start = tile << uint64(8)
    high = start >> uint64(32)  # of all 256 blocks
    for i in range(uintp(first), uintp(last)):
        a, b, c, d = philox(start | uint64(i), high, s0, s1, k0, k1)
        words[i] = a
        words[i + uintp(BLOCKS)] = b
        words[i + uintp(2 * BLOCKS)] = c
        words[i + uintp(3 * BLOCKS)] = d
