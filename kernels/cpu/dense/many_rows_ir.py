"""Vector IR of the blocked dense float32 products: a tile of 8 x 32 sums in registers, and the lines that it reads and leaves."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

from ..core.vectors import (
    LANES,
    Loop,
    filled,
    fused,
    intrinsic,
    live_lanes,
    masked_call,
    splat,
    store_vector,
    transposed,
    vector_at,
)
from .few_rows_ir import load_lanes, rows_at, store_lanes

PANEL = 2 * LANES  # columns of a tile
GROUP = 8  # rows of a tile

_I8, _I16, _I32, _I64, _FLOAT = (ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType())
_LINE = ir.VectorType(_FLOAT, LANES)
_POINTER = types.CPointer(types.float32)
_BYTES = types.CPointer(types.uint8)


def _const(value: int) -> ir.Constant:
    return ir.Constant(_I64, value)


def _halves(builder: Any, width: Any) -> list[Any]:
    """The live lanes of both vectors of a line of `width` <= 32 columns."""
    return [live_lanes(builder, builder.sub(width, _const(v * LANES))) for v in (0, 1)]


@intrinsic
def tile(
    typingctx: Any, rows: Any, a: Any, a_row: Any, a_step: Any, panel: Any, depth: Any, out: Any, first: Any
) -> Any:
    """out[r * 32 + c] = sum over j < depth of a[r * a_row + j * a_step] panel[j * 32 + c]; if not `first` it is added.

    rows: a tuple of as many entries as there are rows, at most 8. Every sum is a chain of fma in the order of j.
    """
    R = len(rows)

    def codegen(ctx: Any, builder: Any, sig: Any, args: Any) -> Any:
        _, factors, row, step, lines, n, target, alone = args
        starts = rows_at(builder, factors, row, R)
        loop = Loop(builder, n, [filled(_LINE, 0.0)] * (2 * R))
        place = builder.mul(loop.j, step)
        columns = [
            vector_at(builder, builder.gep(lines, [builder.mul(loop.j, _const(PANEL))]), v * LANES, _FLOAT, 64)
            for v in (0, 1)
        ]
        sums = []
        for r in range(R):
            factor = splat(builder, builder.load(builder.gep(starts[r], [place])))
            sums += [fused(builder, factor, columns[v], loop.carried[2 * r + v]) for v in (0, 1)]
        loop.end(sums)
        for i, total in enumerate(loop.carried):
            before = vector_at(builder, target, i * LANES, _FLOAT, 64)
            store_vector(builder, builder.select(alone, total, builder.fadd(before, total)), target, i * LANES, 64)
        return ctx.get_dummy_value()

    i64 = types.int64
    return types.void(rows, _POINTER, i64, i64, _POINTER, i64, _POINTER, types.boolean), codegen


@intrinsic
def copy_lines(typingctx: Any, source: Any, step: Any, count: Any, width: Any, out: Any, ahead: Any) -> Any:
    """out[j * 32 + c] = source[j * step + c] for j < count, c < width, else 0. ahead: rows that will be read so much later are asked for."""

    def codegen(ctx: Any, builder: Any, sig: Any, args: Any) -> Any:
        start, stride, n, columns, target, later = args
        live = _halves(builder, columns)
        byte = _I8.as_pointer()
        kind = ir.FunctionType(ir.VoidType(), [byte, _I32, _I32, _I32])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        hints = [ir.Constant(_I32, hint) for hint in (0, 2, 1)]  # read, second-level cache, data
        loop = Loop(builder, n, [])
        line = builder.gep(start, [builder.mul(loop.j, stride)])
        coming = builder.gep(start, [builder.mul(builder.add(loop.j, later), stride)])
        for v in (0, 1):
            there = builder.gep(coming, [_const(v * LANES)])
            builder.call(function, [builder.bitcast(there, byte), *hints])
            value = load_lanes(builder, line, _const(v * LANES), live[v])
            store_vector(builder, value, target, builder.add(builder.mul(loop.j, _const(PANEL)), _const(v * LANES)), 64)
        loop.end([])
        return ctx.get_dummy_value()

    i64 = types.int64
    return types.void(_POINTER, i64, i64, i64, _POINTER, i64), codegen


@intrinsic
def copy_square(typingctx: Any, source: Any, step: Any, rows: Any, columns: Any, out: Any, out_step: Any) -> Any:
    """out[j * out_step + i] = source[i * step + j] for i < rows, j < columns, else 0; 16 x 16 are written."""

    def codegen(ctx: Any, builder: Any, sig: Any, args: Any) -> Any:
        start, stride, many, width, target, target_step = args
        live, nothing = live_lanes(builder, width), filled(ir.VectorType(ir.IntType(1), LANES), 0)
        lines = []
        for i in range(LANES):
            inside = builder.icmp_signed("<", _const(i), many)
            line = builder.gep(start, [builder.mul(_const(i), stride)])
            lines.append(load_lanes(builder, line, _const(0), builder.select(inside, live, nothing)))
        for j, line in enumerate(transposed(builder, lines)):
            store_vector(builder, line, target, builder.mul(_const(j), target_step), 64)
        return ctx.get_dummy_value()

    i64 = types.int64
    return types.void(_POINTER, i64, i64, i64, _POINTER, i64), codegen


@intrinsic
def leave_lines(typingctx: Any, source: Any, count: Any, width: Any, add: Any, out: Any, step: Any) -> Any:
    """out[j * step + c] = source[j * 32 + c] + add[c] for j < count, c < width."""

    def codegen(ctx: Any, builder: Any, sig: Any, args: Any) -> Any:
        start, n, columns, more, target, stride = args
        live = _halves(builder, columns)
        added = [vector_at(builder, more, v * LANES, _FLOAT, 4) for v in (0, 1)]
        loop = Loop(builder, n, [])
        line = builder.gep(start, [builder.mul(loop.j, _const(PANEL))])
        to = builder.gep(target, [builder.mul(loop.j, stride)])
        for v in (0, 1):
            value = builder.fadd(vector_at(builder, line, v * LANES, _FLOAT, 64), added[v])
            store_lanes(builder, value, to, _const(v * LANES), live[v])
        loop.end([])
        return ctx.get_dummy_value()

    i64 = types.int64
    return types.void(_POINTER, i64, i64, _POINTER, _POINTER, i64), codegen


@intrinsic
def leave_masked(typingctx: Any, source: Any, count: Any, width: Any, mask: Any, out: Any, step: Any) -> Any:
    """out[j * step + c] = source[j * 32 + c] where the byte mask[j * step + c] is not 0, else 0, for j < count, c < width."""

    def codegen(ctx: Any, builder: Any, sig: Any, args: Any) -> Any:
        start, n, columns, survives, target, stride = args
        live, byte = _halves(builder, columns), ir.VectorType(_I8, LANES)
        loop = Loop(builder, n, [])
        line = builder.gep(start, [builder.mul(loop.j, _const(PANEL))])
        moved = builder.mul(loop.j, stride)
        for v in (0, 1):
            where = builder.bitcast(builder.gep(survives, [builder.add(moved, _const(v * LANES))]), byte.as_pointer())
            arguments = [where, ir.Constant(_I32, 1), live[v], filled(byte, 0)]
            kept = builder.icmp_unsigned("!=", masked_call(builder, "load", _I8, byte, arguments), filled(byte, 0))
            value = builder.select(kept, vector_at(builder, line, v * LANES, _FLOAT, 64), filled(_LINE, 0.0))
            store_lanes(builder, value, builder.gep(target, [moved]), _const(v * LANES), live[v])
        loop.end([])
        return ctx.get_dummy_value()

    i64 = types.int64
    return types.void(_POINTER, i64, i64, _BYTES, _POINTER, i64), codegen


@intrinsic
def take_survivors(typingctx: Any, source: Any, room: Any, lanes: Any, out: Any) -> Any:
    """out[0 .. 15] = the next values of `source` where a bit of the uint16 `lanes` is set, else 0. room: values that can be read.

    A load, and then the expansion: as one instruction, which LLVM must be kept from, it takes twice as long, and reads memory at a fifth of its rate.
    """

    def codegen(ctx: Any, builder: Any, sig: Any, args: Any) -> Any:
        values, left, bits, target = args
        kept = builder.bitcast(bits, ir.VectorType(ir.IntType(1), LANES))
        with builder.if_else(builder.icmp_signed(">=", left, _const(LANES)), likely=True) as (whole, rest):
            with whole:
                all_lanes, from_whole = vector_at(builder, values, 0, _FLOAT, 4), builder.block
            with rest:
                some_lanes = load_lanes(builder, values, _const(0), live_lanes(builder, left))
                from_rest = builder.block
        value = builder.phi(_LINE)
        value.add_incoming(all_lanes, from_whole)
        value.add_incoming(some_lanes, from_rest)
        loaded = builder.asm(ir.FunctionType(_LINE, [_LINE]), "", "=v,0", [value], False)
        kind = ir.FunctionType(_LINE, [_LINE, _LINE, kept.type])
        function = cgutils.get_or_insert_function(builder.module, kind, f"llvm.x86.avx512.mask.expand.v{LANES}f32")
        store_vector(builder, builder.call(function, [loaded, filled(_LINE, 0.0), kept]), target, 0, 64)
        return ctx.get_dummy_value()

    return types.void(_POINTER, types.int64, types.uint16, _POINTER), codegen


@intrinsic
def leave_survivors(typingctx: Any, line: Any, lanes: Any, count: Any, out: Any) -> Any:
    """out[0 .. count - 1] = the values of line[0 .. 15] where a bit of the uint16 `lanes`, of which `count` are set, is."""

    def codegen(ctx: Any, builder: Any, sig: Any, args: Any) -> Any:
        source, bits, many, target = args
        kept = builder.bitcast(bits, ir.VectorType(ir.IntType(1), LANES))
        value = vector_at(builder, source, 0, _FLOAT, 64)
        kind = ir.FunctionType(_LINE, [_LINE, kept.type, _LINE])
        function = cgutils.get_or_insert_function(
            builder.module, kind, f"llvm.experimental.vector.compress.v{LANES}f32"
        )
        value = builder.call(function, [value, kept, filled(_LINE, 0.0)])
        store_lanes(builder, value, target, _const(0), live_lanes(builder, many))
        return ctx.get_dummy_value()

    return types.void(_POINTER, types.uint16, types.int64, _POINTER), codegen


def _reader(bits: int) -> Any:
    """An intrinsic: the unsigned integer of so many bits at an address, of any alignment."""
    result: Any = {8: types.uint8, 32: types.uint32, 64: types.uint64}[bits]

    def reader(typingctx: Any, address: Any) -> Any:
        def codegen(ctx: Any, builder: Any, sig: Any, args: Any) -> Any:
            return builder.load(builder.inttoptr(args[0], ir.IntType(bits).as_pointer()), align=1)

        return result(types.int64), codegen

    return intrinsic(reader)


byte_at, word_at, long_at = _reader(8), _reader(32), _reader(64)
