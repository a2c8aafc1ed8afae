"""Vector IR between rows stored one after another and the slots of a unit, where its four rows take turns."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types

from ..core.vectors import (
    LANES,
    ROWS,
    compute_type,
    element_size,
    element_type,
    intrinsic,
    live_lanes,
    masked_call,
    narrow,
    shuffled,
    store_vector,
    vector_at,
    widen,
)

_I64 = ir.IntType(64)
_HALF = LANES // 2


def _alternate(builder: Any, x: Any, y: Any) -> tuple[Any, Any]:
    """x0 y0 x1 y1 ... of the lower, and of the higher, halves."""
    pairs = [(i, LANES + i) for i in range(LANES)]
    return tuple(shuffled(builder, x, y, [p for pair in half for p in pair]) for half in (pairs[:_HALF], pairs[_HALF:]))


@intrinsic
def interleave(typingctx: Any, lines: Any, counts: Any, out: Any) -> Any:
    """out[4 j + r] = lines[r][j] for j < counts[r], else 0, for j < 16; lines: four pointers, read below counts[r] only."""
    storage = lines.dtype.dtype
    element = element_type(storage)

    def codegen(ctx: Any, builder: Any, sig: Any, args: Any) -> Any:
        pointers, numbers, to = args
        rows = []
        for r in range(ROWS):
            source = builder.extract_value(pointers, r)
            kind = ir.VectorType(element, LANES)
            none = ir.Constant(kind, [0 if isinstance(element, ir.IntType) else 0.0] * LANES)
            align = ir.Constant(ir.IntType(32), element_size(element))
            live = live_lanes(builder, builder.extract_value(numbers, r))
            where = builder.bitcast(source, kind.as_pointer())
            rows.append(
                widen(builder, masked_call(builder, "load", element, kind, [where, align, live, none]), storage)
            )
        even, odd = _alternate(builder, rows[0], rows[2]), _alternate(builder, rows[1], rows[3])
        vectors = [v for x, y in zip(even, odd, strict=True) for v in _alternate(builder, x, y)]
        for i, vector in enumerate(vectors):
            store_vector(builder, vector, to, i * LANES, element_size(vector.type.element))
        return ctx.get_dummy_value()

    return types.void(lines, counts, out), codegen


@intrinsic
def separate(typingctx: Any, source: Any, lines: Any, counts: Any) -> Any:
    """lines[r][j] = source[4 j + r], rounded once, for j < min(counts[r], 16); lines: four pointers."""
    storage = lines.dtype.dtype
    wide = element_type(compute_type(storage))

    def codegen(ctx: Any, builder: Any, sig: Any, args: Any) -> Any:
        start, pointers, numbers = args
        v = [vector_at(builder, start, i * LANES, wide, element_size(wide)) for i in range(ROWS)]
        picks = [[ROWS * j + r for r in pair for j in range(_HALF)] for pair in ((0, 1), (2, 3))]
        rows = []
        for pick in picks:
            low, high = shuffled(builder, v[0], v[1], pick), shuffled(builder, v[2], v[3], pick)
            for half in (0, _HALF):
                lanes = [half + i for i in range(_HALF)] + [LANES + half + i for i in range(_HALF)]
                rows.append(shuffled(builder, low, high, lanes))
        for r, row in enumerate(rows):
            row = narrow(builder, row, storage)
            where = builder.bitcast(builder.extract_value(pointers, r), row.type.as_pointer())
            align = ir.Constant(ir.IntType(32), element_size(row.type.element))
            live = live_lanes(builder, builder.extract_value(numbers, r))
            masked_call(builder, "store", row.type.element, ir.VoidType(), [row, where, align, live])
        return ctx.get_dummy_value()

    return types.void(source, lines, counts), codegen
