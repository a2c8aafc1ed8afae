"""Kernels that share their work: one compiled function for one thread and for many.

A parallel twin of a kernel is compiled four times over by Numba (the kernel, the body of the loop, its wrapper, the twin),
which took three times as long as the kernel. So a kernel whose first argument is a share calls itself instead:

    @jit()
    def kernel(share, ...):
        if share[ME] < 0:
            on_threads(share)  # comes back here for every worker
            return
        me, workers, _ = share
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import int64, prange, types
from numba.core import cgutils

from .jit import jit, with_address
from .scalars import intrinsic

Share = tuple[int, int, int]  # number of this worker, or -1 before they start; how many; address of what starts them
ALONE: Share = (0, 1, 0)
ME, WORKERS = 0, 1
_I8, _I64 = ir.IntType(8), ir.IntType(64)


@intrinsic
def _call_member(typingctx: Any, member: Any, arguments: Any, me: Any) -> Any:
    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        kind = ir.FunctionType(ir.VoidType(), [_I64, _I64])
        builder.call(builder.inttoptr(args[0], kind.as_pointer()), args[1:])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), codegen


@with_address(types.void(types.int64, types.int64, types.int64), parallel=True)
def _numba_threads(workers, member, arguments):
    """member(arguments, 0), ..., member(arguments, workers - 1) on Numba's threads."""
    for me in prange(workers):
        _call_member(member, arguments, int64(me))


@intrinsic
def on_threads(typingctx: Any, share: Any) -> Any:
    """Call the kernel that calls this again with its own arguments, but me = 0 .. workers - 1 in its first, the share; and wait."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        kernel, module = builder.function, builder.module
        result, error, *arguments = kernel.args  # Numba's calling convention; tuples are flattened
        record = ir.LiteralStructType([a.type for a in arguments])
        kept = cgutils.alloca_once(builder, record)
        for i, argument in enumerate(arguments):
            builder.store(argument, cgutils.gep_inbounds(builder, kept, 0, i))

        member = ir.Function(module, ir.FunctionType(ir.VoidType(), [_I64, _I64]), module.get_unique_name("member"))
        member.linkage = "internal"
        inner = ir.IRBuilder(member.append_basic_block())
        again = inner.inttoptr(member.args[0], record.as_pointer())
        values = [inner.load(cgutils.gep_inbounds(inner, again, 0, i)) for i in range(len(arguments))]
        values[ME] = member.args[1]
        own = [inner.alloca(pointer.type.pointee) for pointer in (result, error)]
        inner.call(kernel, own + values, cconv=kernel.calling_convention)
        inner.ret_void()

        _, workers, start = cgutils.unpack_tuple(builder, args[0], 3)
        kind = ir.FunctionType(ir.VoidType(), [_I64] * 3)
        addresses = [builder.ptrtoint(pointer, _I64) for pointer in (member, kept)]
        builder.call(builder.inttoptr(start, kind.as_pointer()), [workers, *addresses])
        return context.get_dummy_value()

    return types.void(types.UniTuple(types.int64, 3)), codegen


@jit()
def part_of(share, count):
    """First and last of what the worker does of `count` tasks."""
    return count * share[ME] // share[WORKERS], count * (share[ME] + 1) // share[WORKERS]


def among(workers: int) -> Share:
    """The share to call a kernel with."""
    return ALONE if workers == 1 else (-1, workers, _numba_threads.address)
