"""What is done to a block of sampled values while it is in the caches: constants, zeros where pruned, survivors, moments.

A block is elements `first` to `last` - 1 at an address; a mask is the address of one byte an element, or 0.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, float64, int64, types, uint16, uint32, uint64, uintp
from numba.core import cgutils

from ..core.jit import jit
from ..core.scalars import bits_float, full_vectors, half_float, intrinsic, pointer, population, trailing_zeros
from .formulas import _BFLOAT16, _FLOAT16, _FLOAT32, _FLOAT64

LANES = 16
N, MEAN, SQUARES = range(3)  # of a block's record: values, their mean, the sum of (value - mean)^2
_I8, _I32, _I64 = ir.IntType(8), ir.IntType(32), ir.IntType(64)
_FLOAT, _DOUBLE = ir.FloatType(), ir.DoubleType()
_STORED = {_FLOAT32: (_FLOAT, 4), _BFLOAT16: (ir.IntType(16), 2), _FLOAT16: (ir.HalfType(), 2), _FLOAT64: (_DOUBLE, 8)}


@jit()
def fill(address: Any, size: Any, first: Any, last: Any, bits: Any) -> None:
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


@intrinsic
def _stream_line(typingctx: Any, source: Any, target: Any) -> Any:
    """64 bytes from one aligned address to another, past the caches."""

    def codegen(ctx: Any, b: Any, sig: Any, args: Any) -> Any:
        line = ir.VectorType(_I32, 16).as_pointer()
        value = b.load(b.inttoptr(args[0], line), align=64)
        store = b.store(value, b.inttoptr(args[1], line), align=64)
        store.set_metadata("nontemporal", b.module.add_metadata([ir.Constant(_I32, 1)]))
        return ctx.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


@jit()
def copy_past_caches(source: Any, target: Any, size: Any) -> None:
    """Copy `size` bytes between addresses that 64 divides: large results must not read the lines that they replace."""
    full_vectors()
    whole = size // 64 * 64
    for at in range(0, whole, 64):
        _stream_line(source + at, target + at)
    rest = carray(pointer(source + whole, np.uint8), size - whole)
    out = carray(pointer(target + whole, np.uint8), size - whole)
    for i in range(size - whole):
        out[i] = rest[i]


@jit()
def _zeroed(values: Any, mask: Any) -> None:
    """0 where the mask is; both of one length."""
    full_vectors()
    zero = values.dtype.type(0)
    for i in range(values.size):
        values[i] = values[i] if mask[i] != 0 else zero


@jit()
def prune(address: Any, size: Any, first: Any, last: Any, mask: Any) -> None:
    alive = carray(pointer(mask, np.uint8), last)[first:]
    if size == 2:
        _zeroed(carray(pointer(address, np.uint16), last)[first:], alive)
    elif size == 4:
        _zeroed(carray(pointer(address, np.uint32), last)[first:], alive)
    else:
        _zeroed(carray(pointer(address, np.uint64), last)[first:], alive)


@jit()
def _survivors(values: Any, words: Any, out: Any) -> None:
    """out[j] = values[place of the j-th set bit]."""
    count = uintp(0)
    for k in range(words.size):
        word, start = words[k], uintp(64 * k)
        while word:
            out[count] = values[start + trailing_zeros(word)]
            word &= word - uint64(1)
            count += uintp(1)


@jit()
def pick(scratch: Any, address: Any, size: Any, first: Any, last: Any, words: Any) -> None:
    if size == 2:
        _survivors(scratch.view(np.uint16), words, carray(pointer(address, np.uint16), last)[first:])
    elif size == 4:
        _survivors(scratch.view(np.uint32), words, carray(pointer(address, np.uint32), last)[first:])
    else:
        _survivors(scratch, words, carray(pointer(address, np.uint64), last)[first:])


@jit(inline="always")
def words_of(bits: Any, first: Any, last: Any) -> Any:
    """The words that hold bits first to last - 1; `first` is the first of a word."""
    return carray(pointer(bits, np.uint64), (last + 63) // 64)[first // 64 :]


@jit(inline="always")
def bits_set(words: Any) -> Any:
    count = uint64(0)
    for word in words:
        count += population(word)
    return int64(count)


@jit(inline="always")
def _value(address: Any, code: Any, i: Any) -> float:
    if code == _FLOAT32:
        return float64(carray(pointer(address, np.float32), i + 1)[i])
    if code == _FLOAT64:
        return carray(pointer(address, np.float64), i + 1)[i]
    word = carray(pointer(address, np.uint16), i + 1)[i]
    return float64(half_float(word) if code == _FLOAT16 else bits_float(uint32(word) << uint32(16)))


def _vector_sums(code: int, masked: bool) -> Any:
    """A function (address, mask, steps, origin, out): sums of value - origin and of its square, over `steps` times 2 LANES values.

    Lane i of out[0] adds values i, i + LANES, ... in this order, whatever the machine's vectors; out[1] has the squares.
    What the mask leaves out counts as `origin`.
    """
    stored, size = _STORED[code]

    def vector(element: ir.Type) -> ir.VectorType:
        return ir.VectorType(element, LANES)

    def codegen(ctx: Any, b: Any, sig: Any, args: Any) -> Any:
        address, mask, steps, origin, out = args
        zero = ir.Constant(vector(_DOUBLE), [0.0] * LANES)
        nothing = ir.Constant(vector(_DOUBLE), ir.Undefined)
        first = b.insert_element(nothing, origin, ir.Constant(_I32, 0))
        about = b.shuffle_vector(first, nothing, ir.Constant(vector(_I32), [0] * LANES))
        sums = [cgutils.alloca_once_value(b, zero) for _ in range(4)]

        def load(start: Any, index: Any, element: ir.Type, width: int) -> Any:
            where = b.add(start, b.mul(index, ir.Constant(_I64, LANES * width)))
            return b.load(b.inttoptr(where, vector(element).as_pointer()), align=width)

        with cgutils.for_range(b, steps) as loop:
            for half in (0, 1):
                index = b.add(b.mul(loop.index, ir.Constant(_I64, 2)), ir.Constant(_I64, half))
                x = load(address, index, stored, size)
                if code == _BFLOAT16:
                    x = b.bitcast(
                        b.shl(b.zext(x, vector(_I32)), ir.Constant(vector(_I32), [16] * LANES)), vector(_FLOAT)
                    )
                if code != _FLOAT64:
                    x = b.fpext(x, vector(_DOUBLE))
                d = b.fsub(x, about)
                if masked:
                    alive = load(mask, index, _I8, 1)
                    d = b.select(b.icmp_unsigned("!=", alive, ir.Constant(vector(_I8), [0] * LANES)), d, zero)
                b.store(b.fadd(b.load(sums[half]), d), sums[half])
                fma = ir.FunctionType(d.type, [d.type] * 3)
                square = cgutils.get_or_insert_function(b.module, fma, f"llvm.fma.v{LANES}f64")
                b.store(b.call(square, [d, d, b.load(sums[2 + half])]), sums[2 + half])
        for row in (0, 1):
            total = b.fadd(b.load(sums[2 * row]), b.load(sums[2 * row + 1]))
            where = b.add(out, ir.Constant(_I64, row * LANES * 8))
            b.store(total, b.inttoptr(where, vector(_DOUBLE).as_pointer()), align=8)
        return ctx.get_dummy_value()

    @intrinsic
    def sums(typingctx: Any, address: Any, mask: Any, steps: Any, origin: Any, out: Any) -> Any:
        return types.void(types.int64, types.int64, types.int64, types.float64, types.int64), codegen

    return sums


_float32_sums, _float32_surviving = (_vector_sums(_FLOAT32, masked) for masked in (False, True))
_bfloat16_sums, _bfloat16_surviving = (_vector_sums(_BFLOAT16, masked) for masked in (False, True))
_float16_sums, _float16_surviving = (_vector_sums(_FLOAT16, masked) for masked in (False, True))
_float64_sums, _float64_surviving = (_vector_sums(_FLOAT64, masked) for masked in (False, True))


@jit()
def _lane_sums(code: Any, address: Any, mask: Any, steps: Any, origin: Any, out: Any) -> None:
    if code == _FLOAT32:
        _float32_surviving(address, mask, steps, origin, out) if mask else _float32_sums(
            address, mask, steps, origin, out
        )
    elif code == _BFLOAT16:
        _bfloat16_surviving(address, mask, steps, origin, out) if mask else _bfloat16_sums(
            address, mask, steps, origin, out
        )
    elif code == _FLOAT16:
        _float16_surviving(address, mask, steps, origin, out) if mask else _float16_sums(
            address, mask, steps, origin, out
        )
    else:
        _float64_surviving(address, mask, steps, origin, out) if mask else _float64_sums(
            address, mask, steps, origin, out
        )


@jit(inline="always")
def _folded(lanes: Any) -> float:
    """The sum of LANES lanes, in a fixed tree."""
    half = LANES // 2
    while half:
        for j in range(half):
            lanes[j] += lanes[j + half]
        half //= 2
    return lanes[0]


@jit()
def measure(address: Any, code: Any, size: Any, first: Any, last: Any, mask: Any, sums: Any, record: Any) -> None:
    """The record of a block's finite values that survive. sums: scratch, float64 (2, LANES)."""
    n, origin = last - first, 0.0
    alive = carray(pointer(mask, np.uint8), last)[first:]
    i = 0
    while i < n and mask and alive[i] == 0:
        i += 1
    if i < n and math.isfinite(_value(address, code, first + i)):
        origin = _value(address, code, first + i)  # near enough to the mean that sums about it lose nothing
    steps = n // (2 * LANES)
    _lane_sums(code, address + first * size, mask + first if mask else mask, steps, origin, int64(sums.ctypes.data))
    count = n
    if mask:
        count = 0
        for i in range(n):
            count += alive[i] != 0
    for i in range(steps * 2 * LANES, n):
        if mask == 0 or alive[i] != 0:
            d = _value(address, code, first + i) - origin
            sums[0, i % LANES] += d
            sums[1, i % LANES] += d * d
    total, squares = _folded(sums[0]), _folded(sums[1])
    if not math.isfinite(squares):  # float16 overflows: what is not finite counts for nothing
        total, squares, count = 0.0, 0.0, 0
        for i in range(n):
            value = _value(address, code, first + i)
            if (mask == 0 or alive[i] != 0) and math.isfinite(value):
                d = value - origin
                total += d
                squares += d * d
                count += 1
    share = total / count if count else 0.0
    record[N], record[MEAN] = count, origin + share
    record[SQUARES] = max(squares - total * share, 0.0)
