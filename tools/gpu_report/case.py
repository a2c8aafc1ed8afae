"""What gpu_static compiles, as data: a call of a launcher, what it computes, and what its code must be like."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from initperf.layers.choice.gpu_devices import Device
from tools.gpu_report.aot import Launch

SIZE = 4096  # N = K, unless a case says otherwise
MAIN = ("sm_80", "sm_90", "sm_100", "gfx942")
F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
SHORT = {F32: "float32", BF16: "bfloat16", F16: "float16", F64: "float64", torch.int32: "int32"}


@dataclass(frozen=True)
class Work:
    """What a case computes: `units` of `unit`, `nbytes` at least through memory; the rest as gpu_model.predict has it."""

    unit: str
    units: float
    nbytes: float
    program_macs: float = 0.0
    step_macs: float = 0.0
    precision: str = "16bit"
    conflicts: dict[int, float] | None = None
    l2_bytes: float = 0.0
    dense_bytes: float = 0.0  # of the dense rival, which on the pre-masked weight is bound by these
    dense_macs: float = 0.0  # or by these


@dataclass(frozen=True)
class Case:
    op: str
    label: str
    run: Callable[[], object]
    work: Callable[[list[Launch], Device], Work] | None = None
    first: bool = False  # compiled for every target, not only the four main ones, and in the tests for those
    tested: tuple[str, ...] = ()  # targets that the tests compile it for too
    load_bits: int = 128  # the widest load and store of its first kernel: what must not get narrower
    store_bits: int = 128
    load_share: float = 0.5  # of the bytes that its main loop loads, at least this come in loads so wide
    amd_bits: int = 128  # at most this on AMD, where a warp is 64 threads and a matrix result 4 neighbours a thread
    matrix: bool = False  # must use the target's matrix instruction
    contract: bool = False  # its PTX must keep the RNG contract


def meta(*shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    return torch.empty(*shape, device="meta", dtype=dtype)


def index(*shape: int) -> torch.Tensor:
    return meta(*shape, dtype=torch.int32)


@contextlib.contextmanager
def allow_tf32(allowed: bool) -> Iterator[None]:
    """Whether float32 products may run in TF32 inside the block."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


@contextlib.contextmanager
def replaced(module: Any, **names: Any) -> Iterator[None]:
    """Names of a module set to something else inside the block."""
    before = {name: getattr(module, name) for name in names}
    for name, value in names.items():
        setattr(module, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(module, name, value)
