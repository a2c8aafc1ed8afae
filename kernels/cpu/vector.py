"""LLVM instructions that Numba has no name for. Each float operation here is one IEEE-754 operation, and vectorizes."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic


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
