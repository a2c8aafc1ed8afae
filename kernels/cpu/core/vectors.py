"""Vector IR: loads and stores of 16 lanes in any float dtype, whole or masked, 16 x 16 transposes, loops.

Numba has no vector types, and its loops over small arrays spill; an intrinsic that writes LLVM vectors keeps the sums in
registers. A storage pointer says its dtype by its type: float32, float64, uint16 = bfloat16, int16 = float16. Arithmetic is
float32, and float64 for float64. LLVM splits the 16 lanes where the machine's vectors are shorter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic as _intrinsic

from .target import has_avx512

ZERO = np.float32(0)

intrinsic: Any = _intrinsic

LANES = 16
ROWS = 4  # rows of a unit: as many independent chains of sums, and one 32-bit load brings their four columns

_I16, _I32, _I64 = ir.IntType(16), ir.IntType(32), ir.IntType(64)
_HALVES = (types.uint16, types.int16)  # bfloat16, float16


def _const(value: int) -> ir.Constant:
    return ir.Constant(_I64, value)


def _vector(element: ir.Type) -> ir.VectorType:
    return ir.VectorType(element, LANES)


def compute_type(storage: Any) -> Any:
    """The Numba type that arithmetic runs in."""
    return types.float32 if storage in _HALVES else storage


def element_type(storage: Any) -> ir.Type:
    return {types.float32: ir.FloatType(), types.float64: ir.DoubleType()}.get(storage, _I16)


def _like(value: Any, scalar: ir.Type) -> ir.Type:
    """`scalar`, as a vector if `value` is one."""
    return ir.VectorType(scalar, value.type.count) if isinstance(value.type, ir.VectorType) else scalar


def filled(kind: ir.Type, value: float) -> ir.Constant:
    return ir.Constant(kind, [value] * kind.count if isinstance(kind, ir.VectorType) else value)


def widen(builder: Any, value: Any, storage: Any) -> Any:
    if storage == types.uint16:
        wide = builder.zext(value, _like(value, _I32))
        return builder.bitcast(builder.shl(wide, filled(wide.type, 16)), _like(value, ir.FloatType()))
    if storage == types.int16:
        return builder.fpext(builder.bitcast(value, _like(value, ir.HalfType())), _like(value, ir.FloatType()))
    return value


def narrow(builder: Any, value: Any, storage: Any) -> Any:
    """One rounding, to nearest even. bfloat16 by integers: LLVM would call a library function, or flush subnormals."""
    if storage == types.int16:
        return builder.bitcast(builder.fptrunc(value, _like(value, ir.HalfType())), _like(value, _I16))
    if storage != types.uint16:
        return value
    bits = builder.bitcast(value, _like(value, _I32))
    constant = lambda v: filled(bits.type, v)  # noqa: E731
    high = builder.lshr(bits, constant(16))
    even = builder.add(builder.and_(high, constant(1)), constant(0x7FFF))
    rounded = builder.lshr(builder.add(bits, even), constant(16))
    nan = builder.fcmp_unordered("uno", value, value)
    return builder.trunc(builder.select(nan, builder.or_(high, constant(0x40)), rounded), _like(value, _I16))


def _at(builder: Any, base: Any, offset: Any) -> Any:
    return builder.gep(base, [offset if isinstance(offset, ir.Value) else _const(offset)])


def vector_at(builder: Any, base: Any, offset: Any, element: ir.Type, align: int) -> Any:
    value = builder.load(builder.bitcast(_at(builder, base, offset), _vector(element).as_pointer()))
    value.align = align
    return value


def store_vector(builder: Any, value: Any, base: Any, offset: Any, align: int) -> None:
    builder.store(value, builder.bitcast(_at(builder, base, offset), value.type.as_pointer())).align = align


def shuffled(builder: Any, x: Any, y: Any, lanes: list[int]) -> Any:
    return builder.shuffle_vector(x, y, ir.Constant(ir.VectorType(_I32, len(lanes)), lanes))


def splat(builder: Any, scalar: Any) -> Any:
    empty = ir.Constant(_vector(scalar.type), ir.Undefined)
    return shuffled(builder, builder.insert_element(empty, scalar, ir.Constant(_I32, 0)), empty, [0] * LANES)


def fused(builder: Any, x: Any, y: Any, z: Any) -> Any:
    suffix = "f32" if x.type.element == ir.FloatType() else "f64"
    function_type = ir.FunctionType(x.type, [x.type] * 3)
    function = cgutils.get_or_insert_function(builder.module, function_type, f"llvm.fma.v{LANES}{suffix}")
    return builder.call(function, [x, y, z])


def _zip(builder: Any, x: Any, y: Any, group: int, *, high: bool) -> Any:
    """Groups of lanes taken in turn from the lower (or higher) halves of the 2-group blocks of x and of y."""
    shift = group if high else 0
    lanes = []
    for k in range(0, x.type.count, 2 * group):
        lanes += [k + shift + i for i in range(group)] + [x.type.count + k + shift + i for i in range(group)]
    return shuffled(builder, x, y, lanes)


def transposed(builder: Any, rows: list[Any]) -> list[Any]:
    for group in (1, 2, 4, 8):
        swapped = list(rows)
        for i in range(LANES):
            if not i & group:
                swapped[i] = _zip(builder, rows[i], rows[i | group], group, high=False)
                swapped[i | group] = _zip(builder, rows[i], rows[i | group], group, high=True)
        rows = swapped
    return rows


@intrinsic
def storage_pointer(typingctx: Any, address: Any, kind: Any) -> Any:
    """The integer `address` as a pointer to the dtype of the array `kind`, of which only the type counts."""
    result = types.CPointer(kind.dtype)
    return result(types.int64, kind), lambda ctx, builder, sig, args: builder.inttoptr(
        args[0], ctx.get_value_type(result)
    )


@intrinsic
def compute_pointer(typingctx: Any, address: Any, kind: Any) -> Any:
    """The same, to the dtype that arithmetic runs in."""
    result = types.CPointer(compute_type(kind.dtype))
    return result(types.int64, kind), lambda ctx, builder, sig, args: builder.inttoptr(
        args[0], ctx.get_value_type(result)
    )


@intrinsic
def load(typingctx: Any, base: Any, offset: Any) -> Any:
    """base[offset], widened."""

    def codegen(ctx: Any, builder: Any, sig: Any, args: Any) -> Any:
        return widen(builder, builder.load(_at(builder, *args)), base.dtype)

    return compute_type(base.dtype)(base, types.int64), codegen


@intrinsic
def store(typingctx: Any, base: Any, offset: Any, value: Any) -> Any:
    """base[offset] = value, rounded once."""

    def codegen(ctx: Any, builder: Any, sig: Any, args: Any) -> Any:
        pointer, place, number = args
        builder.store(narrow(builder, number, base.dtype), _at(builder, pointer, place))
        return ctx.get_dummy_value()

    return types.void(base, types.int64, compute_type(base.dtype)), codegen


@intrinsic
def shifted(typingctx: Any, base: Any, offset: Any) -> Any:
    """The pointer base + offset elements."""
    return base(base, types.int64), lambda ctx, builder, sig, args: _at(builder, *args)


@intrinsic
def prefetch(typingctx: Any, base: Any, offset: Any) -> Any:
    """Ask for the cache line of base[offset], into the second-level cache. The address need not exist."""

    def codegen(ctx: Any, builder: Any, sig: Any, args: Any) -> Any:
        byte = ir.IntType(8).as_pointer()
        i32 = _I32
        function_type = ir.FunctionType(ir.VoidType(), [byte, i32, i32, i32])
        function = cgutils.get_or_insert_function(builder.module, function_type, "llvm.prefetch.p0")
        read, second_level, data = (ir.Constant(i32, v) for v in (0, 2, 1))
        builder.call(function, [builder.bitcast(_at(builder, *args), byte), read, second_level, data])
        return ctx.get_dummy_value()

    return types.void(base, types.int64), codegen


@intrinsic
def stream(typingctx: Any, source: Any, out: Any, offset: Any) -> Any:
    """out[offset : offset + 16] = source[offset : offset + 16], past the caches; both aligned to 16 elements."""

    def codegen(ctx: Any, builder: Any, sig: Any, args: Any) -> Any:
        src, dst, place = args
        element = element_type(source.dtype)
        align = LANES * element_size(element)
        value = vector_at(builder, src, place, element, align)
        target = builder.bitcast(_at(builder, dst, place), value.type.as_pointer())
        instruction = builder.store(value, target)
        instruction.align = align
        instruction.set_metadata("nontemporal", builder.module.add_metadata([ir.Constant(_I32, 1)]))
        return ctx.get_dummy_value()

    return types.void(source, source, types.int64), codegen


@intrinsic
def transpose_in(typingctx: Any, source: Any, stride: Any, rows: Any, out: Any, out_stride: Any) -> Any:
    """out[j * out_stride + i] = source[i * stride + j] for 16 x 16, widened; lanes i >= rows are 0, and not read."""

    def codegen(ctx: Any, builder: Any, sig: Any, args: Any) -> Any:
        src, step, valid, dst, dst_step = args
        element = element_type(source.dtype)
        lines = []
        for i in range(LANES):
            inside = builder.icmp_signed("<", _const(i), valid)
            row = builder.select(inside, _const(i), _const(0))
            line = vector_at(builder, src, builder.mul(row, step), element, element_size(element))
            lines.append(builder.select(inside, line, _zero(line.type)))
        lines = [widen(builder, line, source.dtype) for line in lines]
        for j, line in enumerate(transposed(builder, lines)):
            store_vector(builder, line, dst, builder.mul(_const(j), dst_step), 64)
        return ctx.get_dummy_value()

    return types.void(source, types.int64, types.int64, out, types.int64), codegen


@intrinsic
def transpose_out(typingctx: Any, source: Any, stride: Any, out: Any, out_stride: Any, rows: Any) -> Any:
    """out[i * out_stride + j] = source[j * stride + i] for 16 x 16, rounded once; rows i >= `rows` are not written."""

    def codegen(ctx: Any, builder: Any, sig: Any, args: Any) -> Any:
        src, step, dst, dst_step, valid = args
        wide = element_type(source.dtype)
        lines = [vector_at(builder, src, builder.mul(_const(j), step), wide, 64) for j in range(LANES)]
        for i, line in enumerate(transposed(builder, lines)):
            with builder.if_then(builder.icmp_signed("<", _const(i), valid), likely=True):
                line = narrow(builder, line, out.dtype)
                store_vector(builder, line, dst, builder.mul(_const(i), dst_step), element_size(line.type.element))
        return ctx.get_dummy_value()

    return types.void(source, types.int64, out, types.int64, types.int64), codegen


def element_size(element: ir.Type) -> int:
    return {_I16: 2, ir.FloatType(): 4, ir.DoubleType(): 8}[element]


def _zero(kind: ir.VectorType) -> ir.Constant:
    return ir.Constant(kind, [0 if isinstance(kind.element, ir.IntType) else 0.0] * kind.count)


class Loop:
    """for j in range(first, steps, stride): the body is what is written before end(); `carried` starts as `start`."""

    def __init__(self, builder: Any, steps: Any, start: list[Any], first: Any = None, stride: int = 1) -> None:
        self.stride = stride
        self.builder, self.steps = builder, steps
        self.entry = builder.block
        self.head, self.body, self.done = (builder.append_basic_block(n) for n in ("head", "body", "done"))
        builder.branch(self.head)
        builder.position_at_end(self.head)
        self.j = builder.phi(_I64)
        self.j.add_incoming(_const(0) if first is None else first, self.entry)
        self.carried = [builder.phi(s.type) for s in start]
        for phi, s in zip(self.carried, start, strict=True):
            phi.add_incoming(s, self.entry)
        builder.cbranch(builder.icmp_signed("<", self.j, steps), self.body, self.done)
        builder.position_at_end(self.body)

    def end(self, new: list[Any]) -> None:
        builder = self.builder
        self.j.add_incoming(builder.add(self.j, _const(self.stride)), builder.block)
        for phi, value in zip(self.carried, new, strict=True):
            phi.add_incoming(value, builder.block)
        builder.branch(self.head)
        builder.position_at_end(self.done)


def by_number(builder: Any, number: Any, numbers: Sequence[int], write: Callable[[int], None]) -> None:
    """Code for each of `numbers`, of which the int64 `number` is one at run time: what would be so many kernels is one."""
    if len(numbers) == 1:
        write(numbers[0])
        return
    done = builder.append_basic_block("done")
    cases = [builder.append_basic_block("case") for _ in numbers]
    switch = builder.switch(number, cases[0])
    for value, block in zip(numbers, cases, strict=True):
        if value != numbers[0]:
            switch.add_case(_const(value), block)
        builder.position_at_end(block)
        write(value)
        builder.branch(done)
    builder.position_at_end(done)


def line_vectors() -> tuple[int, ...]:
    """Numbers of vectors of 16 lanes that a line may have: 512-bit registers hold 4 x 4 sums, others 4 x 1."""
    return (4, 2, 1) if has_avx512() else (1,)


def sum_lanes(builder: Any, vectors: list[Any]) -> Any:
    """Four vectors of 16 lanes -> one vector of their four sums."""
    a, b, c, d = (folded(builder, v) for v in vectors)
    pairs = lambda x, y, group: builder.fadd(  # noqa: E731
        _zip(builder, x, y, group, high=False), _zip(builder, x, y, group, high=True)
    )
    return folded(builder, pairs(pairs(a, b, 1), pairs(c, d, 1), 2))


def folded(builder: Any, x: Any) -> Any:
    """The higher half of the lanes added to the lower."""
    half = x.type.count // 2
    empty = ir.Constant(x.type, ir.Undefined)
    return builder.fadd(
        shuffled(builder, x, empty, list(range(half))), shuffled(builder, x, empty, list(range(half, 2 * half)))
    )


def live_lanes(builder: Any, count: Any) -> Any:
    """Lanes below `count`, an int64 of any value: as a word of bits, since a comparison of 16 counts costs more."""
    zero, most = ir.Constant(_I64, 0), ir.Constant(_I64, LANES)
    count = builder.select(builder.icmp_signed("<", count, zero), zero, count)
    count = builder.select(builder.icmp_signed("<", count, most), count, most)
    ones = builder.sub(builder.shl(ir.Constant(_I64, 1), count), ir.Constant(_I64, 1))
    return builder.bitcast(builder.trunc(ones, ir.IntType(LANES)), ir.VectorType(ir.IntType(1), LANES))


def masked_call(builder: Any, operation: str, element: ir.Type, result: ir.Type, arguments: list[Any]) -> Any:
    suffix = f"i{element.width}" if isinstance(element, ir.IntType) else f"f{8 * element_size(element)}"
    kind = ir.FunctionType(result, [a.type for a in arguments])
    name = f"llvm.masked.{operation}.v{LANES}{suffix}.p0"
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), arguments)
