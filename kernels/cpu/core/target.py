"""What the processor can do that Numba compiles for, which NUMBA_CPU_NAME, NUMBA_CPU_FEATURES and NUMBA_ENABLE_AVX may narrow.

LLVM is asked by what it makes of four small functions: names of processors imply instructions that no list tells.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import llvmlite.binding as llvm
from numba.core.registry import cpu_target

_PROBES = """
declare float @llvm.fma.f32(float, float, float)
declare <16 x i8> @llvm.masked.load.v16i8.p0(ptr, i32, <16 x i1>, <16 x i8>)
define float @one(float %x, float %y, float %z) {
  %r = call float @llvm.fma.f32(float %x, float %y, float %z)
  ret float %r
}
define half @two(float %x) {
  %r = fptrunc float %x to half
  ret half %r
}
define void @three(ptr %p) "prefer-vector-width"="512" {
  %x = load <16 x float>, ptr %p
  %r = fadd <16 x float> %x, %x
  store <16 x float> %r, ptr %p
  ret void
}
define <16 x i8> @four(ptr %p, i16 %m) {
  %bits = bitcast i16 %m to <16 x i1>
  %r = call <16 x i8> @llvm.masked.load.v16i8.p0(ptr %p, i32 1, <16 x i1> %bits, <16 x i8> zeroinitializer)
  ret <16 x i8> %r
}
"""


@cache
def target() -> tuple[str, str, str]:
    """Triple, processor and features, which are part of the keys of Numba's cache."""
    codegen: Any = cpu_target.target_context.codegen()
    triple, processor, features = codegen.magic_tuple()
    return triple, processor, features


@cache
def _assembly() -> str:
    triple, processor, features = target()
    machine = llvm.Target.from_triple(triple).create_target_machine(cpu=processor, features=features)
    module = llvm.parse_assembly(_PROBES)
    module.triple = triple
    return str(machine.emit_assembly(module))


@cache
def has_avx512() -> bool:
    """Whether vectors have 512 bits, and masks of single bits for elements of any size (AVX-512 F, BW, VL: all but Xeon Phi)."""
    return "zmm" in _assembly() and "{%k" in _assembly()


@cache
def lacks() -> str:
    """The instructions without which kernels are slower than plain torch, and float16 does not run; empty if none is missing."""
    found = _assembly()
    missing = {"FMA": "fmaf" in found, "F16C": "truncsfhf2" in found}  # calls of library functions
    return " and ".join(name for name, calls in missing.items() if calls)
