"""Vector IR of the products with few batch rows: 16 slots at once, whose X values are looked up in a block of columns.

On AVX-512 the block stays in registers and vpermi2ps looks up (0.07 ns a survivor, measured); elsewhere, and in float64, a
gather does (0.31 ns).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

from ..core.target import has_avx512
from ..core.vectors import (
    LANES,
    ROWS,
    Loop,
    by_number,
    element_size,
    element_type,
    filled,
    folded,
    fused,
    intrinsic,
    live_lanes,
    masked_call,
    shuffled,
    splat,
    vector_at,
)
from .index import BLOCK, WIDE_BLOCK
from .units_ir import unit_rows

_I8, _I32, _I64 = ir.IntType(8), ir.IntType(32), ir.IntType(64)


def _vector(element: ir.Type) -> ir.VectorType:
    return ir.VectorType(element, LANES)


def _permutes(element: ir.Type) -> bool:
    return has_avx512() and element == ir.FloatType()


def lookup_table(builder: Any, x: Any, element: ir.Type, columns: int) -> list[Any]:
    """The block in registers, or nothing where a gather looks up."""
    if not _permutes(element):
        return []
    return [vector_at(builder, x, i * LANES, element, 64) for i in range(columns // LANES)]


def _by_block(builder: Any, block: Any, element: ir.Type, write: Callable[[int], None]) -> None:
    """Code for blocks of both sizes where they stay in registers."""
    by_number(builder, block, (BLOCK, WIDE_BLOCK) if _permutes(element) else (BLOCK,), write)


def lookup(builder: Any, table: list[Any], x: Any, numbers: Any, element: ir.Type, live: Any) -> Any:
    """x[number] of 16 lanes."""
    if not table:
        spread = splat(builder, builder.ptrtoint(x, _I64))
        size = filled(_vector(_I64), element_size(element))
        places = builder.add(spread, builder.mul(builder.zext(numbers, _vector(_I64)), size))
        pointers = builder.inttoptr(places, _vector(element.as_pointer()))
        kind = ir.FunctionType(_vector(element), [pointers.type, _I32, live.type, _vector(element)])
        name = f"llvm.masked.gather.v{LANES}f{8 * element_size(element)}.v{LANES}p0"
        function = cgutils.get_or_insert_function(builder.module, kind, name)
        align = ir.Constant(_I32, element_size(element))
        return builder.call(function, [pointers, align, live, filled(_vector(element), 0.0)])
    wide = builder.zext(numbers, _vector(_I32))
    kind = ir.FunctionType(_vector(element), [_vector(element), wide.type, _vector(element)])
    permute = cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.avx512.vpermi2var.ps.512")
    found = [builder.call(permute, [a, wide, b]) for a, b in zip(table[::2], table[1::2], strict=True)]
    bit = 2 * LANES
    while len(found) > 1:
        high = builder.icmp_unsigned("!=", builder.and_(wide, filled(wide.type, bit)), filled(wide.type, 0))
        found = [builder.select(high, b, a) for a, b in zip(found[::2], found[1::2], strict=True)]
        bit *= 2
    return found[0]


def _columns(builder: Any, columns: Any, place: Any, live: Any) -> Any:
    kind = _vector(_I8)
    where = builder.bitcast(builder.gep(columns, [place]), kind.as_pointer())
    return masked_call(builder, "load", _I8, kind, [where, ir.Constant(_I32, 1), live, filled(kind, 0)])


AHEAD = 3072  # slots: memory is read at twice the speed that it is without


def _ask(builder: Any, base: Any, slot: Any) -> None:
    """Prefetch base[slot + AHEAD], which need not exist, into the second-level cache."""
    byte = _I8.as_pointer()
    kind = ir.FunctionType(ir.VoidType(), [byte, _I32, _I32, _I32])
    function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
    there = builder.bitcast(builder.gep(base, [builder.add(slot, ir.Constant(_I64, AHEAD))]), byte)
    builder.call(function, [there, *(ir.Constant(_I32, v) for v in (0, 2, 1))])  # read, second level, data


def _slots(builder: Any, steps: Any) -> Any:
    return builder.mul(steps, ir.Constant(_I64, ROWS))


@intrinsic
def matvec_unit(typingctx: Any, block: Any, columns: Any, values: Any, x: Any, y: Any, numbers: Any, steps: Any) -> Any:
    """y[row r] += sum over j < steps of values[4 j + r] * x[column 4 j + r], r = 0..3; x: a block of `block` columns."""
    element = element_type(x.dtype)

    def write(builder: Any, width: int, args: Any) -> None:
        cols, vals, xs, sums, rows, n = args
        table = lookup_table(builder, xs, element, width)
        slots = _slots(builder, n)
        body = Loop(builder, slots, [filled(_vector(element), 0.0)], stride=LANES)
        live = live_lanes(builder, builder.sub(slots, body.j))
        _ask(builder, vals, body.j)
        _ask(builder, cols, body.j)
        where = builder.bitcast(builder.gep(vals, [body.j]), _vector(element).as_pointer())
        align, none = ir.Constant(_I32, element_size(element)), filled(_vector(element), 0.0)
        value = masked_call(builder, "load", element, none.type, [where, align, live, none])
        found = lookup(builder, table, xs, _columns(builder, cols, body.j, live), element, live)
        body.end([fused(builder, value, found, body.carried[0])])
        four = folded(builder, folded(builder, body.carried[0]))
        for r, line in enumerate(unit_rows(builder, sums, rows, 1)):
            total = builder.extract_element(four, ir.Constant(_I32, r))
            builder.store(builder.fadd(builder.load(line), total), line)

    def codegen(ctx: Any, builder: Any, sig: Any, args: Any) -> Any:
        _by_block(builder, args[0], element, lambda width: write(builder, width, args[1:]))
        return ctx.get_dummy_value()

    return types.void(types.int64, columns, values, x, y, types.uint32, types.int64), codegen


@intrinsic
def outer_unit(typingctx: Any, block: Any, columns: Any, sums: Any, x: Any, y: Any, numbers: Any, steps: Any) -> Any:
    """sums[4 j + r] += y[row r] * x[column 4 j + r] for j < steps, r = 0..3; writes no slot beyond."""
    element = element_type(x.dtype)

    def write(builder: Any, width: int, args: Any) -> None:
        cols, out, xs, dy, rows, n = args
        table = lookup_table(builder, xs, element, width)
        four = ir.Constant(ir.VectorType(element, LANES), ir.Undefined)
        for r, line in enumerate(unit_rows(builder, dy, rows, 1)):
            four = builder.insert_element(four, builder.load(line), ir.Constant(_I32, r))
        factors = shuffled(builder, four, four, [i % ROWS for i in range(LANES)])
        slots = _slots(builder, n)
        body = Loop(builder, slots, [], stride=LANES)
        live = live_lanes(builder, builder.sub(slots, body.j))
        found = lookup(builder, table, xs, _columns(builder, cols, body.j, live), element, live)
        where = builder.bitcast(builder.gep(out, [body.j]), _vector(element).as_pointer())
        align, none = ir.Constant(_I32, element_size(element)), filled(_vector(element), 0.0)
        before = masked_call(builder, "load", element, none.type, [where, align, live, none])
        after = fused(builder, factors, found, before)
        masked_call(builder, "store", element, ir.VoidType(), [after, where, align, live])
        body.end([])

    def codegen(ctx: Any, builder: Any, sig: Any, args: Any) -> Any:
        _by_block(builder, args[0], element, lambda width: write(builder, width, args[1:]))
        return ctx.get_dummy_value()

    return types.void(types.int64, columns, sums, x, y, types.uint32, types.int64), codegen
