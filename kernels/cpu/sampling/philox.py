"""Philox-4x32-10: the words of one tile."""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types, uint64, uintp

from ...contract import BLOCKS, PHILOX_MULTIPLIERS, PHILOX_WEYL
from ..core.jit import jit
from ..core.scalars import full_vectors, intrinsic, pointer

_I64 = ir.IntType(64)
_HALF = 8  # lanes of 64 bits; two such vectors make one of sixteen words
_VECTOR = ir.VectorType(_I64, _HALF)
_ROUNDS = 10
_LOW = 0xFFFFFFFF


def _constant(value: int) -> ir.Constant:
    return ir.Constant(_VECTOR, [value] * _HALF)


def _splat(builder: Any, scalar: Any) -> Any:
    nothing = ir.Constant(_VECTOR, ir.Undefined)
    lanes = ir.Constant(ir.VectorType(ir.IntType(32), _HALF), [0] * _HALF)
    return builder.shuffle_vector(
        builder.insert_element(nothing, scalar, ir.Constant(ir.IntType(32), 0)), nothing, lanes
    )


def _shuffled(builder: Any, x: Any, y: Any, lanes: list[int]) -> Any:
    """Of the sixteen words of x, and the sixteen of y behind them."""
    kind = ir.VectorType(ir.IntType(32), 2 * _HALF)
    pick = ir.Constant(kind, lanes)
    return builder.bitcast(builder.shuffle_vector(*(builder.bitcast(v, kind) for v in (x, y)), pick), _VECTOR)


def _high(builder: Any, product: Any) -> Any:
    """The upper halves of 64 bits, where the lower were: a shuffle, since a shift needs the multiplier's port on Intel."""
    return _shuffled(builder, product, product, [i | 1 for i in range(2 * _HALF)])


def _rounds(builder: Any, counter: list[Any], keys: list[Any]) -> list[Any]:
    """The words of eight blocks. Each sits in 64 bits whose upper half may hold anything: the multiply reads the lower."""
    c0, c1, c2, c3 = counter
    k0, k1 = keys
    for step in range(_ROUNDS):
        if step:
            k0 = builder.add(k0, ir.Constant(_I64, PHILOX_WEYL[0]))
            k1 = builder.add(k1, ir.Constant(_I64, PHILOX_WEYL[1]))
        low = [builder.and_(c, _constant(_LOW)) for c in (c0, c2)]
        p0, p1 = (builder.mul(x, _constant(m)) for x, m in zip(low, PHILOX_MULTIPLIERS, strict=True))
        high0, high1 = _high(builder, p0), _high(builder, p1)
        c0 = builder.xor(builder.xor(high1, c1), _splat(builder, k0))
        c2 = builder.xor(builder.xor(high0, c3), _splat(builder, k1))
        c1, c3 = p1, p0
    return [c0, c1, c2, c3]


@intrinsic
def _sixteen(typingctx: Any, words: Any, tile: Any, first: Any, k0: Any, k1: Any, s0: Any, s1: Any) -> Any:
    """Words of blocks first to first + 15 of a tile: word of lane j of block i to words[256 j + i].

    Even and odd blocks run in vectors of their own, whose words then interleave in one shuffle: cheaper than narrowing both.
    """

    def codegen(ctx: Any, builder: Any, sig: Any, args: Any) -> Any:
        to, tile, start, *rest = args
        begin = builder.shl(tile, ir.Constant(_I64, 8))
        high = _splat(builder, builder.lshr(begin, ir.Constant(_I64, 32)))
        block = _splat(builder, builder.or_(begin, start))
        halves = []
        for odd in (0, 1):
            numbers = ir.Constant(_VECTOR, [2 * i + odd for i in range(_HALF)])
            counter = [builder.or_(block, numbers), high, *(_splat(builder, s) for s in rest[2:])]
            halves.append(_rounds(builder, counter, rest[:2]))
        for j, (even, odd) in enumerate(zip(*halves, strict=True)):
            pair = _shuffled(builder, even, odd, [i + (2 * _HALF - 1) * (i % 2) for i in range(2 * _HALF)])
            place = builder.gep(to, [builder.add(start, ir.Constant(_I64, j * BLOCKS))])
            store = builder.store(pair, builder.bitcast(place, _VECTOR.as_pointer()))
            store.align = 4
        return ctx.get_dummy_value()

    word = types.uint64
    return types.void(types.CPointer(types.uint32), word, types.uintp, word, word, word, word), codegen


@jit()
def tile_words(words: Any, tile: Any, first: Any, last: Any, k0: Any, k1: Any, s0: Any, s1: Any) -> None:
    """Words of blocks first to last - 1 of a tile, multiples of 16: word of lane j of block i to words[256 j + i]."""
    full_vectors()
    for i in range(uintp(first), uintp(last), uintp(16)):
        _sixteen(pointer(uintp(words.ctypes.data), np.uint32), uint64(tile), i, k0, k1, s0, s1)
