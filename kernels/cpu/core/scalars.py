"""LLVM instructions that Numba has no name for. Each float operation here is one IEEE-754 operation, and vectorizes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llvmlite import ir
from numba import extending, types
from numba.core import cgutils

intrinsic: Any = (
    extending.intrinsic
)  # untyped, so that the functions below keep their own signatures out of type checks


def _llvm_call(builder: Any, name: str, result: ir.Type, args: Any) -> Any:
    function_type = ir.FunctionType(result, [a.type for a in args])
    return builder.call(cgutils.get_or_insert_function(builder.module, function_type, name), args)


@intrinsic
def float_bits(typingctx: Any, x: Any) -> Any:
    """The uint32 with the bits of a float32."""
    return types.uint32(types.float32), lambda ctx, b, sig, args: b.bitcast(args[0], ir.IntType(32))


@intrinsic
def bits_float(typingctx: Any, x: Any) -> Any:
    """The float32 with the bits of a uint32."""
    return types.float32(types.uint32), lambda ctx, b, sig, args: b.bitcast(args[0], ir.FloatType())


@intrinsic
def sqrt(typingctx: Any, x: Any) -> Any:
    """Square root of a float32, correctly rounded."""
    return types.float32(types.float32), lambda ctx, b, sig, args: _llvm_call(b, "llvm.sqrt.f32", ir.FloatType(), args)


@intrinsic
def fma(typingctx: Any, x: Any, y: Any, z: Any) -> Any:
    """x * y + z of float32, rounded once."""
    sig = types.float32(types.float32, types.float32, types.float32)
    return sig, lambda ctx, b, sig, args: _llvm_call(b, "llvm.fma.f32", ir.FloatType(), args)


@intrinsic
def pointer(typingctx: Any, address: Any, dtype: Any) -> Any:
    """The integer `address` as a pointer to `dtype` (np.float32, np.uint16, ...), for numba.carray: costs a microsecond less than an array argument."""
    kind = types.CPointer(dtype.instance_type)

    def codegen(ctx: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], ctx.get_value_type(kind))

    return kind(types.uintp, dtype), codegen


@intrinsic
def copy_bytes(typingctx: Any, to: Any, source: Any, size: Any) -> Any:
    """memcpy between two addresses."""

    def codegen(ctx: Any, builder: Any, sig: Any, args: Any) -> Any:
        byte = ir.IntType(8).as_pointer()
        to, source = (builder.inttoptr(a, byte) for a in args[:2])
        cgutils.raw_memcpy(builder, to, source, args[2], 1)
        return ctx.get_dummy_value()

    return types.void(types.uintp, types.uintp, types.uintp), codegen


@intrinsic
def prefetch(typingctx: Any, address: Any) -> Any:
    """Ask for the cache line at an address, which need not exist, for the second-level cache."""

    def codegen(ctx: Any, builder: Any, sig: Any, args: Any) -> Any:
        there = builder.inttoptr(args[0], ir.IntType(8).as_pointer())
        hints = [ir.Constant(ir.IntType(32), hint) for hint in (0, 2, 1)]  # read, keep, data
        _llvm_call(builder, "llvm.prefetch.p0", ir.VoidType(), [there, *hints])
        return ctx.get_dummy_value()

    return types.void(types.uintp), codegen


def horner(coefficients: Sequence[float]) -> Any:
    """A function of a float32: the polynomial with these coefficients, lowest power first, by Horner's rule in fma."""

    @intrinsic
    def polynomial(typingctx: Any, x: Any) -> Any:
        def codegen(ctx: Any, builder: Any, sig: Any, args: Any) -> Any:
            result = ir.Constant(ir.FloatType(), coefficients[-1])
            for c in coefficients[-2::-1]:
                result = _llvm_call(builder, "llvm.fma.f32", ir.FloatType(), [result, args[0], result.type(c)])
            return result

        return types.float32(types.float32), codegen

    return polynomial


@intrinsic
def full_vectors(typingctx: Any) -> Any:
    """Let LLVM use the widest vectors in the function that calls this; by itself it stops at 256 bits on AVX-512 machines.

    And align its stack to them: constants that find no register wait there, and each that straddles two cache lines costs
    as much as ten operations (truncated normals ran at half their speed, depending on the caller's stack).
    """

    def codegen(ctx: Any, builder: Any, sig: Any, args: Any) -> Any:
        set.add(builder.function.attributes, '"prefer-vector-width"="512"')
        builder.function.attributes.alignstack = 64
        return ctx.get_dummy_value()

    return types.void(), codegen


@intrinsic
def all_ones(typingctx: Any) -> Any:
    """0xFFFFFFFF as a value that LLVM does not know, for `word ^ all_ones()`.

    It writes ~word with vpternlogd, whose all-ones operand takes over what its register last held: each turn of a loop
    then waits for the one before (truncated normals: 75 cycles a vector instead of 36).
    """

    def codegen(ctx: Any, builder: Any, sig: Any, args: Any) -> Any:
        word = ir.IntType(32)
        return builder.asm(ir.FunctionType(word, [word]), "", "=r,0", [word(0xFFFFFFFF)], False)

    return types.uint32(), codegen


@intrinsic
def half_bits(typingctx: Any, x: Any) -> Any:
    """The uint16 with the bits of the float16 nearest to a float32."""

    def codegen(ctx: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.bitcast(builder.fptrunc(args[0], ir.HalfType()), ir.IntType(16))

    return types.uint16(types.float32), codegen


@intrinsic
def half_float(typingctx: Any, x: Any) -> Any:
    """The float32 with the value of the float16 whose bits are a uint16."""

    def codegen(ctx: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.fpext(builder.bitcast(args[0], ir.HalfType()), ir.FloatType())

    return types.float32(types.uint16), codegen


@intrinsic
def population(typingctx: Any, word: Any) -> Any:
    """How many bits of a uint64 are set."""
    sig = types.uint64(types.uint64)
    return sig, lambda ctx, b, sig, args: _llvm_call(b, "llvm.ctpop.i64", ir.IntType(64), args)


@intrinsic
def trailing_zeros(typingctx: Any, word: Any) -> Any:
    """The place of the lowest bit that is set in a uint64 other than 0."""

    def codegen(ctx: Any, builder: Any, sig: Any, args: Any) -> Any:
        never_zero = ir.Constant(ir.IntType(1), 1)
        return _llvm_call(builder, "llvm.cttz.i64", ir.IntType(64), [args[0], never_zero])

    return types.uint64(types.uint64), codegen


@intrinsic
def expand_line(typingctx: Any, like: Any, source: Any, target: Any, mask: Any) -> Any:
    """16 elements of the array `like`'s type at address `target`: the next of `source` where a bit of the uint16 is set, else 0.

    Reads as many elements as bits are set. One instruction with AVX-512; elsewhere LLVM writes it out.
    """
    width = like.dtype.bitwidth

    def codegen(ctx: Any, builder: Any, sig: Any, args: Any) -> Any:
        line = ir.VectorType(ir.IntType(width), 16)
        source, target = (builder.inttoptr(a, line.as_pointer()) for a in args[1:3])
        lanes = builder.bitcast(args[3], ir.VectorType(ir.IntType(1), 16))
        values = _llvm_call(
            builder, f"llvm.masked.expandload.v16i{width}", line, [source, lanes, ir.Constant(line, None)]
        )
        builder.store(values, target, align=width // 8)
        return ctx.get_dummy_value()

    return types.void(like, types.int64, types.int64, types.uint16), codegen
