"""What a launcher would run on a GPU that this machine need not have: its launches captured, compiled, and read.

`capture("sm_90")` lets any launcher run on meta or CPU tensors: instead of running, each of its launches is compiled for
that target with exactly the specialization (divisible by 16, equal to 1, 32-bit pointers) that the real call would have.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "initperf" / "gpu_code"
TARGETS = {
    name: GPUTarget("cuda", int(name[3:]), 32) for name in ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
}
TARGETS |= {name: GPUTarget("hip", name, 64) for name in ("gfx942", "gfx950")}

_FLOAT_OP = re.compile(r"\b((?:add|sub|mul|mad|fma|div|sqrt|rcp|ex2|lg2|sin|cos|rsqrt)\.[\w.]*f32)(x2)?\b")
_SASS = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?\s*([A-Z][A-Zx0-9_.]+)([^;]*);")
_GCN = re.compile(r"^\t([a-z]\w+)\s*(.*)")
_WIDTHS = {"dwordx4": 128, "dwordx3": 96, "dwordx2": 64, "dword": 32, "short": 16, "ushort": 16, "byte": 8, "ubyte": 8}


@dataclass(frozen=True)
class Code:
    """Machine code of one kernel: its instructions in order, without padding, and what they take.

    loops: (first, last) instruction of each, outermost first where they nest. text: PTX, or AMD assembly.
    """

    target: str
    instructions: list[str]
    loops: list[tuple[int, int]]
    registers: int
    spills: int
    stack: int
    shared: int
    warps: int
    text: str = ""

    def count(self, *prefixes: str) -> int:
        return sum(name.startswith(prefixes) for name in self.instructions)

    def widths(self, kind: str) -> Counter[int]:
        """Bits a thread moves by each global "load" or "store" -> instructions."""
        return Counter(bits for name in self.instructions if (bits := access(name, kind)))

    def float_ops(self) -> Counter[str]:
        """Arithmetic on float32 in the PTX: instruction -> times written; one on a pair (f32x2, sm_100) counts as two."""
        counts: Counter[str] = Counter()
        for name, pair in _FLOAT_OP.findall(self.text):
            counts[name] += 2 if pair else 1
        return counts

    @property
    def matrix(self) -> list[str]:
        """Kinds of matrix instructions."""
        return sorted(
            {n for n in self.instructions if re.match(r"(U?[A-Z]*(GMMA|TC\w*MMA)|[HDIQ]MMA|v_mfma|v_smfmac)", n)}
        )


@dataclass(frozen=True)
class Launch:
    kernel: str
    grid: tuple[int, ...]
    code: Code
    arguments: dict[str, Any]
    fusion: bool | None = None  # of multiplications and additions, if the launcher says

    @property
    def programs(self) -> int:
        product = 1
        for n in self.grid:
            product *= n
        return product


def access(name: str, kind: str) -> int:
    """Bits a thread moves by an instruction that is a global "load" or "store", else 0."""
    parts = name.split(".")
    if parts[0] in {"load": ("LDG", "LDGSTS"), "store": ("STG",)}[kind]:
        for part in parts[1:]:
            if part in ("128", "64", "U16", "S16", "U8", "S8", "16", "8"):
                return int(part.lstrip("US"))
        return 32
    if parts[0].startswith({"load": ("UTMALDG", "UBLKCP"), "store": ("UTMASTG",)}[kind]):
        return 128
    match = re.match(rf"(?:global|buffer|flat)_{kind}_(?:lds_)?(\w+)", name)
    if not match:
        return 0
    return next((bits for suffix, bits in _WIDTHS.items() if match.group(1).startswith(suffix)), 32)


class _Driver:
    """Stands for a GPU of the target: enough for Triton to specialize and compile, nothing to run with."""

    def __init__(self, target: str) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return TARGETS[self.target]

    def get_current_device(self) -> int:
        return list(TARGETS).index(self.target)

    def get_current_stream(self, device: int) -> int:
        return 0


@contextlib.contextmanager
def capture(target: str) -> Iterator[list[Launch]]:
    """Compile every Triton launch inside the block for `target`, run none; yields the list that they are put in."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise RuntimeError("Expected TRITON_INTERPRET to be unset before triton is imported. Got 1.")
    launches: list[Launch] = []
    run = JITFunction.run

    def record(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        compiled = run(self, *args, grid=grid, warmup=True, **kwargs)
        named = dict(zip(self.arg_names, args, strict=False)) | {k: v for k, v in kwargs.items() if k in self.arg_names}
        shape = tuple(grid(named)) if callable(grid) else tuple(grid)
        scalars = {k: v for k, v in named.items() if isinstance(v, int | float | bool | str)}
        launches.append(
            Launch(self.fn.__name__, shape, _read(compiled, target), scalars, kwargs.get("enable_fp_fusion"))
        )
        return compiled

    JITFunction.run = record
    driver = triton.runtime.driver
    previous, driver._active = driver._active, _Driver(target)
    try:
        yield launches
    finally:
        JITFunction.run = run
        driver._active = previous


def changed(kernel: JITFunction, old: str, new: str) -> JITFunction:
    """A copy of the kernel with a piece of its source replaced: for planted faults, and for twins without a mask."""
    if old not in kernel.src:
        raise ValueError(f"Expected {old!r} in the source of {kernel.fn.__name__}. Got no such text.")
    copy = JITFunction(kernel.fn, do_not_specialize=[p.name for p in kernel.params if p.do_not_specialize])
    copy._unsafe_update_src(kernel.src.replace(old, new))
    return copy


def _read(compiled: Any, target: str) -> Code:
    """The code of a compiled kernel, from the cache if these very bytes were read before."""
    machine = compiled.asm["cubin"] if target.startswith("sm") else compiled.asm["amdgcn"].encode()
    path = CACHE / f"{hashlib.sha256(machine + Path(__file__).read_bytes()).hexdigest()}.json"
    text = compiled.asm["ptx" if target.startswith("sm") else "amdgcn"]
    if path.exists():
        stored = json.loads(path.read_text())
        return Code(**{**stored, "loops": [tuple(pair) for pair in stored["loops"]], "text": text})
    read = _read_sass if target.startswith("sm") else _read_gcn
    code = Code(target=target, shared=compiled.metadata.shared, warps=compiled.metadata.num_warps, **read(machine))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}")
    temporary.write_text(json.dumps(asdict(code)))
    temporary.replace(path)
    return Code(**{**asdict(code), "text": text})


def _tool(name: str, machine: bytes, *options: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(machine)
        file.flush()
        return subprocess.run([TOOLS / name, *options, file.name], capture_output=True, text=True, check=True).stdout


def _read_sass(cubin: bytes) -> dict[str, Any]:
    names, branches, labels = [], [], {}
    for line in _tool("nvdisasm", cubin, "-c").splitlines():
        if label := re.match(r"^(\.L_\w+):", line):
            labels[label.group(1)] = len(names)
        elif (match := _SASS.match(line)) and match.group(1) != "NOP":
            names.append(match.group(1))
            if match.group(1).startswith("BRA") and (to := re.search(r"(\.L_\w+)", match.group(2))):
                branches.append((to.group(1), len(names) - 1))
    usage = _tool("cuobjdump", cubin, "-res-usage")
    return {
        "instructions": names,
        "loops": _loops(labels, branches),
        "registers": int(re.findall(r"REG:(\d+)", usage)[0]),
        "stack": int(re.findall(r"STACK:(\d+)", usage)[0]),
        "spills": sum(name.startswith(("LDL", "STL")) for name in names),
    }


def _read_gcn(assembly: bytes) -> dict[str, Any]:
    names, branches, labels = [], [], {}
    text = assembly.decode()
    for line in text.splitlines():
        if label := re.match(r"^(\.LBB\w+):", line):
            labels[label.group(1)] = len(names)
        elif (match := _GCN.match(line)) and not match.group(1).startswith(("p2align", "s_nop", "s_code_end")):
            names.append(match.group(1))
            if match.group(1).startswith(("s_cbranch", "s_branch")):
                branches.append((match.group(2).split()[0], len(names) - 1))

    def figure(name: str) -> int:
        return int(re.findall(rf"\.{name}:\s*(\d+)", text)[-1])

    return {
        "instructions": names,
        "loops": _loops(labels, branches),
        "registers": figure("vgpr_count"),
        "stack": figure("private_segment_fixed_size"),
        "spills": figure("vgpr_spill_count") + figure("sgpr_spill_count"),
    }


def _loops(labels: dict[str, int], branches: list[tuple[str, int]]) -> list[tuple[int, int]]:
    """Backward branches, those to one place as one loop; a branch to itself is the end of the program."""
    last: dict[int, int] = {}
    for label, at in branches:
        first = labels.get(label, at)
        if first < at:
            last[first] = max(last.get(first, 0), at)
    return sorted(last.items(), key=lambda pair: (pair[0], -pair[1]))
