"""The two inner loops over a unit of four rows, as vector IR: all sums stay in registers."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types

from ..core.vectors import (
    _I32,
    _I64,
    LANES,
    ROWS,
    Loop,
    _at,
    _const,
    _vector,
    _zero,
    by_number,
    element_size,
    element_type,
    fused,
    intrinsic,
    line_vectors,
    splat,
    store_vector,
    sum_lanes,
    vector_at,
)


def _columns(builder: Any, columns: Any, j: Any, x: Any, width: int) -> list[Any]:
    """Where the four columns of step j begin in the X tile."""
    word = builder.load(builder.bitcast(_at(builder, columns, builder.mul(j, _const(ROWS))), _I32.as_pointer()))
    word.align = 1
    starts = []
    for r in range(ROWS):
        column = builder.and_(builder.lshr(word, ir.Constant(_I32, 8 * r)), ir.Constant(_I32, 255))
        starts.append(_at(builder, x, builder.mul(builder.zext(column, _I64), _const(width * LANES))))
    return starts


@intrinsic
def multiply_unit(
    typingctx: Any, vectors: Any, columns: Any, values: Any, x: Any, y: Any, rows: Any, steps: Any
) -> Any:
    """y[row r] += sum over j < steps of values[4 j + r] * x[column 4 j + r], r = 0..3.

    vectors: V; a line of x or y is V * 16 lanes, of the X tile at [column][lane], of the Y tile at [row][lane].
    rows: the four row numbers, 8 bits each. All 4 V sums stay in registers.
    """
    element = element_type(x.dtype)

    def write(builder: Any, count: int, args: Any) -> None:
        cols, vals, x_tile, y_tile, numbers, n = args
        lines = unit_rows(builder, y_tile, numbers, count * LANES)

        def step(j: Any, sums: list[Any]) -> list[Any]:
            new = []
            base = builder.mul(j, _const(ROWS))
            for r, xs in enumerate(_columns(builder, cols, j, x_tile, count)):
                value = splat(builder, builder.load(_at(builder, vals, builder.add(base, _const(r)))))
                for v in range(count):
                    lanes = vector_at(builder, xs, v * LANES, element, 64)
                    new.append(fused(builder, value, lanes, sums[r * count + v]))
            return new

        size = ROWS * count
        start = [_zero(_vector(element))] * size
        if count == 1:  # registers to spare: two chains of sums, for even and odd steps
            even = builder.and_(n, _const(-2))
            pairs = Loop(builder, even, start * 2, stride=2)
            odd = step(builder.add(pairs.j, _const(1)), pairs.carried[size:])
            pairs.end(step(pairs.j, pairs.carried[:size]) + odd)
            start = [builder.fadd(a, b) for a, b in zip(pairs.carried[:size], pairs.carried[size:], strict=True)]
            loop = Loop(builder, n, start, first=even)
        else:
            loop = Loop(builder, n, start)
        loop.end(step(loop.j, loop.carried))
        for i, total in enumerate(
            loop.carried
        ):  # a block's sum is made alone, and then added: as exact as dense blocking
            line, place = lines[i // count], i % count * LANES
            store_vector(builder, builder.fadd(vector_at(builder, line, place, element, 64), total), line, place, 64)

    def codegen(ctx: Any, builder: Any, sig: Any, args: Any) -> Any:
        by_number(builder, args[0], line_vectors(), lambda count: write(builder, count, args[1:]))
        return ctx.get_dummy_value()

    return types.void(types.int64, columns, values, x, y, types.uint32, types.int64), codegen


@intrinsic
def correlate_unit(typingctx: Any, vectors: Any, columns: Any, sums: Any, x: Any, y: Any, rows: Any, steps: Any) -> Any:
    """sums[4 j + r] += sum over lanes of y[row r] * x[column 4 j + r], for j < steps, r = 0..3. Shapes as in multiply_unit."""
    element = element_type(x.dtype)
    four = ir.VectorType(element, ROWS)

    def write(builder: Any, count: int, args: Any) -> None:
        cols, out, x_tile, y_tile, numbers, n = args
        lines = [
            [vector_at(builder, line, v * LANES, element, 64) for v in range(count)]
            for line in unit_rows(builder, y_tile, numbers, count * LANES)
        ]
        loop = Loop(builder, n, [])
        products = []
        for line, xs in zip(lines, _columns(builder, cols, loop.j, x_tile, count), strict=True):
            lanes = [vector_at(builder, xs, v * LANES, element, 64) for v in range(count)]
            total = builder.fmul(line[0], lanes[0])
            for v in range(1, count):
                total = fused(builder, line[v], lanes[v], total)
            products.append(total)
        place = builder.bitcast(_at(builder, out, builder.mul(loop.j, _const(ROWS))), four.as_pointer())
        before = builder.load(place)
        before.align = element_size(element)
        builder.store(builder.fadd(before, sum_lanes(builder, products)), place).align = element_size(element)
        loop.end([])

    def codegen(ctx: Any, builder: Any, sig: Any, args: Any) -> Any:
        by_number(builder, args[0], line_vectors(), lambda count: write(builder, count, args[1:]))
        return ctx.get_dummy_value()

    return types.void(types.int64, columns, sums, x, y, types.uint32, types.int64), codegen


def unit_rows(builder: Any, tile: Any, numbers: Any, line: int) -> list[Any]:
    """Where the four rows of a unit begin in a tile of lines of `line` elements."""
    lines = []
    for r in range(ROWS):
        row = builder.and_(builder.lshr(numbers, ir.Constant(_I32, 8 * r)), ir.Constant(_I32, 255))
        lines.append(_at(builder, tile, builder.mul(builder.zext(row, _I64), _const(line))))
    return lines
