"""Parallel regions on the OpenMP threads that torch itself uses, where its runtime can be found.

Numba's own pool is a second one beside torch's: after every operator of torch its threads have to be woken, which takes a
tenth of a millisecond. GOMP_parallel is what compilers emit for `#pragma omp parallel` (libgomp's and LLVM's runtimes).
"""

from __future__ import annotations

import ctypes
import os
import sys
from functools import cache
from typing import Any

from llvmlite import ir
from numba import types

from .scalars import intrinsic

_I32, _I64 = ir.IntType(32), ir.IntType(64)
Team = tuple[int, int, int]  # addresses of GOMP_parallel, omp_get_thread_num, omp_get_num_threads
NO_TEAM: Team = (0, 0, 0)


@cache
def team() -> Team:
    """For `in_team`; NO_TEAM where torch's OpenMP runtime is another one or cannot be found."""
    if not sys.platform.startswith("linux"):
        return NO_TEAM
    try:  # by its name, as torch's own libraries found it; never a second copy
        library = ctypes.CDLL("libgomp.so.1", mode=os.RTLD_NOLOAD | os.RTLD_LAZY)
        functions = (library.GOMP_parallel, library.omp_get_thread_num, library.omp_get_num_threads)
    except (OSError, AttributeError):
        return NO_TEAM
    one, two, three = (ctypes.cast(f, ctypes.c_void_p).value or 0 for f in functions)
    return one, two, three


@cache
def members(work: Any) -> tuple[Team, int]:
    """torch's threads, and the address of what each does (jit.with_address), compiled when first asked for."""
    return team(), work.address


@intrinsic
def in_team(typingctx: Any, parallel: Any, function: Any, data: Any, workers: Any) -> Any:
    """Call `function` (the address of a cfunc of one address) with `data` on each of up to `workers` threads, and wait."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        kind = ir.FunctionType(ir.VoidType(), [_I64, _I64, _I32, _I32])
        address, work, data, workers = args
        count = builder.trunc(workers, _I32)
        builder.call(builder.inttoptr(address, kind.as_pointer()), [work, data, count, ir.Constant(_I32, 0)])
        return context.get_dummy_value()

    return types.void(types.uintp, types.uintp, types.uintp, types.uintp), codegen


@intrinsic
def number(typingctx: Any, function: Any) -> Any:
    """What the function of no arguments at this address returns: which thread this is, or of how many."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        kind = ir.FunctionType(_I32, [])
        return builder.sext(builder.call(builder.inttoptr(args[0], kind.as_pointer()), []), _I64)

    return types.int64(types.uintp), codegen
