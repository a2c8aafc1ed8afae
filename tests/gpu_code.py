"""Machine code of a Triton kernel for a GPU that this machine need not have: compile ahead of time, and count."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
_SASS = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?\s*([A-Z0-9_.]+)", re.M)
_GCN = re.compile(r"^\t([a-z]\w+)", re.M)


@dataclass
class Code:
    """text: PTX, or AMD assembly. instructions: of the SASS, or of AMD's machine code, in order, without padding."""

    text: str
    instructions: list[str]
    spills: int
    registers: int

    def count(self, *prefixes: str) -> int:
        """Machine instructions whose name begins with one of the prefixes."""
        return sum(name.startswith(prefixes) for name in self.instructions)

    def float_ops(self) -> Counter[str]:
        """Arithmetic on float32 in the PTX: instruction -> times written; one on a pair (f32x2, sm_100) counts as two."""
        arithmetic = r"\b((?:add|sub|mul|mad|fma|div|sqrt|rcp|ex2|lg2|sin|cos|rsqrt)\.[\w.]*f32)(x2)?\b"
        counts: Counter[str] = Counter()
        for name, pair in re.findall(arithmetic, self.text):
            counts[name] += 2 if pair else 1
        return counts


def _tool(name: str, cubin: bytes, *options: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([TOOLS / name, *options, file.name], capture_output=True, text=True, check=True).stdout


def compile_for(
    target: str,
    kernel: Any,
    signature: Mapping[str, Any],
    constants: Mapping[str, Any],
    *,
    divisible_by_16: Iterable[str] = (),
    equal_to_1: Iterable[str] = (),
    **options: Any,
) -> Code:
    """The code of `kernel` for one of TARGETS. signature: argument -> "*fp32", "i32", ("fp32", "fp32"), ...; options: num_warps, enable_fp_fusion, ..."""
    fixed = {**constants, **dict.fromkeys(equal_to_1, 1)}
    types = {name: "constexpr" if name in fixed else signature[name] for name in kernel.arg_names}
    attributes = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in divisible_by_16}
    source = ASTSource(fn=kernel, signature=types, constexprs=fixed, attrs=attributes)
    compiled = triton.compile(source, target=TARGETS[target], options=options)
    if TARGETS[target].backend == "hip":
        text = compiled.asm["amdgcn"]
        spills = sum(int(n) for n in re.findall(r"\.[sv]gpr_spill_count:\s*(\d+)", text))
        (registers,) = (int(n) for n in re.findall(r"\.vgpr_count:\s*(\d+)", text))
        return Code(text, _GCN.findall(text), spills, registers)
    cubin = compiled.asm["cubin"]
    instructions = [name for name in _SASS.findall(_tool("nvdisasm", cubin, "-c")) if name != "NOP"]
    usage = _tool("cuobjdump", cubin, "-res-usage")
    (registers,) = (int(n) for n in re.findall(r"REG:(\d+)", usage))
    spills = sum(name.startswith(("LDL", "STL")) for name in instructions)
    return Code(compiled.asm["ptx"], instructions, spills, registers)
