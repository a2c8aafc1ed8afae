"""Vector IR of the dense float32 products with few batch rows: groups of weight rows that stream through the registers once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir
from numba import types

from ..core.vectors import (
    LANES,
    ROWS,
    Loop,
    filled,
    fused,
    intrinsic,
    live_lanes,
    masked_call,
    splat,
    store_vector,
    sum_lanes,
    vector_at,
)

_I32, _I64, _FLOAT = ir.IntType(32), ir.IntType(64), ir.FloatType()
_LINE = ir.VectorType(_FLOAT, LANES)
_POINTER = types.CPointer(types.float32)
_MASK = types.CPointer(types.uint8)


def _const(value: int) -> ir.Constant:
    return ir.Constant(_I64, value)


def rows_at(builder: Any, base: Any, step: Any, count: int) -> list[Any]:
    """Pointers to `count` rows."""
    return [builder.gep(base, [builder.mul(step, _const(i))]) for i in range(count)]


def load_lanes(builder: Any, line: Any, j: Any, live: Any = None) -> Any:
    if live is None:
        return vector_at(builder, line, j, _FLOAT, 4)
    where = builder.bitcast(builder.gep(line, [j]), _LINE.as_pointer())
    return masked_call(builder, "load", _FLOAT, _LINE, [where, ir.Constant(_I32, 4), live, filled(_LINE, 0.0)])


def store_lanes(builder: Any, value: Any, line: Any, j: Any, live: Any = None) -> None:
    if live is None:
        store_vector(builder, value, line, j, 4)
        return
    where = builder.bitcast(builder.gep(line, [j]), _LINE.as_pointer())
    masked_call(builder, "store", _FLOAT, ir.VoidType(), [value, where, ir.Constant(_I32, 4), live])


def _along(builder: Any, length: Any, step: Callable[..., list[Any]], start: Sequence[Any] = ()) -> list[Any]:
    """new carried = step(j, carried, live lanes or None) for j in steps of 16: whole vectors, then what is left, at most once."""
    end = builder.and_(length, _const(-LANES))
    loop = Loop(builder, end, list(start), stride=LANES)
    loop.end(step(loop.j, loop.carried, None))
    rest = Loop(builder, length, loop.carried, first=end, stride=LANES)
    rest.end(step(rest.j, rest.carried, live_lanes(builder, builder.sub(length, rest.j))))
    return rest.carried


@intrinsic
def dot_rows(
    typingctx: Any, rows: Any, batch: Any, w: Any, w_step: Any, x: Any, x_step: Any, length: Any, out: Any
) -> Any:
    """out[r * B + b] = sum over k < length of w[r * w_step + k] x[b * x_step + k]; R, B: lengths of the tuples `rows`, `batch`."""
    R, B = len(rows), len(batch)

    def codegen(ctx: Any, builder: Any, sig: Any, args: Any) -> Any:
        _, _, weight, weight_step, inputs, inputs_step, n, target = args
        w_lines, x_lines = rows_at(builder, weight, weight_step, R), rows_at(builder, inputs, inputs_step, B)

        def step(j: Any, sums: list[Any], live: Any) -> list[Any]:
            xs = [load_lanes(builder, line, j, live) for line in x_lines]
            ws = [load_lanes(builder, line, j, live) for line in w_lines]
            return [fused(builder, ws[r], xs[b], sums[r * B + b]) for r in range(R) for b in range(B)]

        sums = _along(builder, n, step, [filled(_LINE, 0.0)] * (R * B))
        sums += [filled(_LINE, 0.0)] * (-R * B % ROWS)
        for i in range(0, len(sums), ROWS):
            store_vector(builder, sum_lanes(builder, sums[i : i + ROWS]), target, _const(i), 4)
        return ctx.get_dummy_value()

    i64 = types.int64
    return types.void(rows, batch, _POINTER, i64, _POINTER, i64, i64, _POINTER), codegen


@intrinsic
def add_rows(
    typingctx: Any,
    rows: Any,
    batch: Any,
    w: Any,
    w_step: Any,
    dy: Any,
    dy_step: Any,
    length: Any,
    out: Any,
    out_step: Any,
) -> Any:
    """out[b * out_step + k] += sum over r of dy[b * dy_step + r] w[r * w_step + k], k < length."""
    R, B = len(rows), len(batch)

    def codegen(ctx: Any, builder: Any, sig: Any, args: Any) -> Any:
        _, _, weight, weight_step, factors, factors_step, n, target, target_step = args
        w_lines, out_lines = rows_at(builder, weight, weight_step, R), rows_at(builder, target, target_step, B)
        scalars = [
            [splat(builder, builder.load(builder.gep(line, [_const(r)]))) for r in range(R)]
            for line in rows_at(builder, factors, factors_step, B)
        ]

        def step(j: Any, _: list[Any], live: Any) -> list[Any]:
            ws = [load_lanes(builder, line, j, live) for line in w_lines]
            for b, line in enumerate(out_lines):
                total = load_lanes(builder, line, j, live)
                for r in range(R):
                    total = fused(builder, scalars[b][r], ws[r], total)
                store_lanes(builder, total, line, j, live)
            return []

        _along(builder, n, step)
        return ctx.get_dummy_value()

    i64 = types.int64
    return types.void(rows, batch, _POINTER, i64, _POINTER, i64, i64, _POINTER, i64), codegen


@intrinsic
def outer_rows(
    typingctx: Any,
    rows: Any,
    masked: Any,
    dy: Any,
    dy_step: Any,
    x: Any,
    x_step: Any,
    batch: Any,
    length: Any,
    mask: Any,
    out: Any,
    out_step: Any,
) -> Any:
    """out[r * out_step + k] = sum over b < batch of dy[b * dy_step + r] x[b * x_step + k] ; if masked,
    a tuple, is not empty, where the byte mask[r * out_step + k] is not 0, else 0."""
    R = len(rows)

    def codegen(ctx: Any, builder: Any, sig: Any, args: Any) -> Any:
        _, _, factors, factors_step, inputs, inputs_step, many, n, survives, target, target_step = args
        out_lines = rows_at(builder, target, target_step, R)
        mask_lines = rows_at(builder, survives, target_step, R)
        byte = ir.VectorType(ir.IntType(8), LANES)

        def step(j: Any, _: list[Any], live: Any) -> list[Any]:
            over = Loop(builder, many, [filled(_LINE, 0.0)] * R)
            x = load_lanes(builder, builder.gep(inputs, [builder.mul(over.j, inputs_step)]), j, live)
            line = builder.gep(factors, [builder.mul(over.j, factors_step)])
            sums = []
            for r in range(R):
                factor = splat(builder, builder.load(builder.gep(line, [_const(r)])))
                sums.append(fused(builder, factor, x, over.carried[r]))
            over.end(sums)
            for r in range(R):
                if not masked:
                    store_lanes(builder, over.carried[r], out_lines[r], j, live)
                    continue
                where = builder.bitcast(builder.gep(mask_lines[r], [j]), byte.as_pointer())
                if live is None:
                    found = builder.load(where)
                    found.align = 1
                else:
                    align = ir.Constant(_I32, 1)
                    found = masked_call(builder, "load", ir.IntType(8), byte, [where, align, live, filled(byte, 0)])
                kept = builder.icmp_unsigned("!=", found, filled(byte, 0))
                value = builder.select(kept, over.carried[r], filled(_LINE, 0.0))
                store_lanes(builder, value, out_lines[r], j, live)
            return []

        _along(builder, n, step)
        return ctx.get_dummy_value()

    i64 = types.int64
    return types.void(rows, masked, _POINTER, i64, _POINTER, i64, i64, i64, _MASK, _POINTER, i64), codegen
