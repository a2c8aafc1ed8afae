"""Vector IR of the direct sparse convolution: a survivor is one broadcast, and V loads and multiply-adds on shifted pixels.

A pixel is a line of 16 lanes, the batch; so every load is aligned, whatever the shift, stride or dilation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types

from ..core.vectors import LANES, Loop, by_number, element_type, fused, intrinsic, splat, store_vector, vector_at

_I32, _I64 = ir.IntType(32), ir.IntType(64)


PIXELS = (8, 4, 2, 1)  # whose sums stay in registers


def _zero(element: ir.Type) -> ir.Constant:
    return ir.Constant(ir.VectorType(element, LANES), [0.0] * LANES)


def _offset(builder: Any, offsets: Any, j: Any) -> Any:
    return builder.sext(builder.load(builder.gep(offsets, [j])), _I64)


def _by_shape(builder: Any, pixels: Any, step: Any, write: Callable[[int, Any], None]) -> None:
    """write(V, elements from pixel to pixel of x) for every number of pixels, and with a constant for stride 1, the most common."""

    def each(count: int) -> None:
        one = builder.icmp_signed("==", step, ir.Constant(_I64, 1))
        with builder.if_else(one, likely=True) as (then, otherwise):
            with then:
                write(count, ir.Constant(_I64, LANES))
            with otherwise:
                write(count, builder.mul(step, ir.Constant(_I64, LANES)))

    by_number(builder, pixels, PIXELS, each)


def _pixel_at(builder: Any, base: Any, number: int, stride: Any, element: ir.Type) -> Any:
    return vector_at(builder, base, builder.mul(stride, ir.Constant(_I64, number)), element, 64)


@intrinsic
def multiply_row(
    typingctx: Any,
    pixels: Any,
    step: Any,
    offsets: Any,
    values: Any,
    x: Any,
    sums: Any,
    count: Any,
    bias: Any,
    begins: Any,
) -> Any:
    """sums[v] (+)= sum over j < count of values[j] * x[offsets[j] + 16 step v], lines v < V; from `bias` if `begins`.

    pixels: V, of PIXELS; step: the stride. offsets: int32, in elements. All V sums stay in registers.
    """
    element = element_type(x.dtype)

    def write(builder: Any, wide: int, stride: Any, args: Any) -> None:
        places, vals, lines, out, n, first, fresh = args

        def survivor(j: Any, sums: list[Any]) -> list[Any]:
            base = builder.gep(lines, [_offset(builder, places, j)])
            value = splat(builder, builder.load(builder.gep(vals, [j])))
            return [fused(builder, value, _pixel_at(builder, base, v, stride, element), sums[v]) for v in range(wide)]

        zeros = [_zero(element)] * wide
        begins = builder.icmp_signed("!=", fresh, ir.Constant(fresh.type, 0))
        start, first_j = [builder.select(begins, splat(builder, first), _zero(element))] * wide, None
        if wide < 8:  # multiply-adds take four cycles, two a cycle: eight chains at least
            first_j = builder.and_(n, ir.Constant(_I64, -2))
            pairs = Loop(builder, first_j, start + zeros, stride=2)
            odd = survivor(builder.add(pairs.j, ir.Constant(_I64, 1)), pairs.carried[wide:])
            pairs.end(survivor(pairs.j, pairs.carried[:wide]) + odd)
            start = [builder.fadd(a, b) for a, b in zip(pairs.carried[:wide], pairs.carried[wide:], strict=True)]
        loop = Loop(builder, n, start, first=first_j)
        loop.end(survivor(loop.j, loop.carried))
        with builder.if_else(begins) as (then, otherwise):
            with then:
                for v, total in enumerate(loop.carried):
                    store_vector(builder, total, out, v * LANES, 64)
            with otherwise:  # a block's sum is made alone, and then added: as exact as dense blocking
                for v, total in enumerate(loop.carried):
                    before = vector_at(builder, out, v * LANES, element, 64)
                    store_vector(builder, builder.fadd(before, total), out, v * LANES, 64)

    def codegen(ctx: Any, builder: Any, sig: Any, args: Any) -> Any:
        _by_shape(builder, args[0], args[1], lambda wide, stride: write(builder, wide, stride, args[2:]))
        return ctx.get_dummy_value()

    i64 = types.int64
    return types.void(i64, i64, offsets, values, x, sums, i64, x.dtype, i64), codegen


@intrinsic
def correlate_row(
    typingctx: Any,
    pixels: Any,
    step: Any,
    offsets: Any,
    sums: Any,
    x: Any,
    second: Any,
    y: Any,
    count: Any,
) -> Any:
    """sums[j] += sum over lines v < 2 V of y[v] * x[offsets[j] + shift of v], for j < count; sums stay vectors of 16 lanes.

    Shift of v: 16 step v for v < V, second + 16 step (v - V) from there. y stays in registers.
    """
    element = element_type(x.dtype)

    def write(builder: Any, half: int, stride: Any, args: Any) -> None:
        places, totals, lines, shift, dy, n = args
        kept = [vector_at(builder, dy, v * LANES, element, 64) for v in range(2 * half)]
        loop = Loop(builder, n, [])
        base = builder.gep(lines, [_offset(builder, places, loop.j)])
        other = builder.gep(base, [shift])
        place = builder.mul(loop.j, ir.Constant(_I64, LANES))
        total = []
        for first, begin in ((0, base), (half, other)):
            products = builder.fmul(kept[first], vector_at(builder, begin, 0, element, 64))
            for v in range(1, half):
                products = fused(builder, kept[first + v], _pixel_at(builder, begin, v, stride, element), products)
            total.append(products)
        before = vector_at(
            builder, totals, place, element, 64
        )  # a tile's sum is made alone, and then added: more exact
        store_vector(builder, builder.fadd(before, builder.fadd(*total)), totals, place, 64)
        loop.end([])

    def codegen(ctx: Any, builder: Any, sig: Any, args: Any) -> Any:
        _by_shape(builder, args[0], args[1], lambda half, stride: write(builder, half, stride, args[2:]))
        return ctx.get_dummy_value()

    i64 = types.int64
    return types.void(i64, i64, offsets, sums, x, i64, y, i64), codegen


@intrinsic
def copy_line(typingctx: Any, source: Any, start: Any, out: Any, place: Any) -> Any:
    """out[place : place + 16] = source[start : start + 16], both aligned lines of the dtype that arithmetic runs in."""

    def codegen(ctx: Any, builder: Any, sig: Any, args: Any) -> Any:
        src, i, dst, j = args
        store_vector(builder, vector_at(builder, src, i, element_type(source.dtype), 64), dst, j, 64)
        return ctx.get_dummy_value()

    return types.void(source, types.int64, source, types.int64), codegen


@intrinsic
def zero_line(typingctx: Any, out: Any, place: Any) -> Any:
    """out[place : place + 16] = 0."""

    def codegen(ctx: Any, builder: Any, sig: Any, args: Any) -> Any:
        store_vector(builder, _zero(element_type(out.dtype)), args[0], args[1], 64)
        return ctx.get_dummy_value()

    return types.void(out, types.int64), codegen
