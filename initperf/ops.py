"""The table of ops: torch.library schema -> implementation by device, imported when first called.

An op `x` of module `m` is the function `x` in kernels/cpu/m.py (Numba), kernels/gpu/m.py (Triton) and
initperf/reference/m.py (plain torch), all with the same signature. A missing compiler falls back to the reference.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch

from initperf.core.torch_private import below_autocast

LIB = torch.library.Library("initperf", "DEF")
MODULES: dict[str, str] = {}  # op name -> module below kernels/cpu and kernels/gpu
CALLS: Counter[tuple[str, str]] = Counter()  # (op name, backend) -> calls in this process
_BACKENDS = {"cpu": ("numba", "initperf.kernels.cpu"), "cuda": ("triton", "initperf.kernels.gpu")}


@cache
def _available(compiler: str) -> bool:
    return find_spec(compiler) is not None


@cache
def _exists(module: str) -> bool:
    return find_spec(module) is not None


def backend_of(name: str, device_type: str) -> str:
    """Which implementation runs op `name` on "cpu" or "cuda": "numba", "triton" or "reference" (INITPERF_BACKEND=reference forces the last)."""
    compiler, package = _BACKENDS.get(device_type, ("", ""))
    if not compiler or os.environ.get("INITPERF_BACKEND") == "reference" or not _available(compiler):
        return "reference"
    return compiler if _exists(f"{package}.{MODULES[name]}") else "reference"


@cache
def implementation(name: str, device_type: str) -> Callable[..., Any]:
    """The launcher of op `name` for a device, counting its calls. For callers that need no dispatcher (fresh plain tensors)."""
    backend = backend_of(name, device_type)
    package = "initperf.reference" if backend == "reference" else _BACKENDS[device_type][1]
    function = getattr(import_module(f"{package}.{MODULES[name]}"), name)
    key = (name, backend)

    def counted(*args: Any, **kwargs: Any) -> Any:
        CALLS[key] += 1
        return function(*args, **kwargs)

    return counted


def reference(op: Any) -> Callable[..., Any]:
    """The implementation of an OpOverload in plain torch, which every transform of torch knows."""
    name = op.name().split("::")[1]
    function: Callable[..., Any] = getattr(import_module(f"initperf.reference.{MODULES[name]}"), name)
    return function


def register(name: str, module: str) -> None:
    """Enter an op that is called through `implementation` only, with no torch.library schema."""
    MODULES[name] = module


register("sample_", "sample")  # here, since tickets, masks and data splits call it without initperf.sampling


def define(schema: str, *, module: str, fake: Callable[..., Any], run: Callable[..., Any] | None = None) -> Any:
    """Define `initperf::schema`, with its CPU, GPU and fake implementations; returns the OpOverload.

    run: an implementation for both devices that chooses, and counts, its backend itself.
    """
    name = schema.split("(", 1)[0]
    register(name, module)
    LIB.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIB.impl(name, run or (lambda *args: implementation(name, "cpu")(*args)), "CPU")
    LIB.impl(name, run or (lambda *args: implementation(name, "cuda")(*args)), "CUDA")
    torch.library.register_fake(f"initperf::{name}", fake, lib=LIB)
    return getattr(torch.ops.initperf, name).default


def differentiate(name: str, function: Callable[..., Any]) -> None:
    """Enter what runs where gradients may be needed: it calls an autograd.Function, whose forward calls the op below autograd."""
    LIB.impl(name, function, "Autograd")


def autocast(op: Any) -> None:
    """Under autocast, cast the op's float32 and 16-bit tensors to autocast's dtype, as for torch's own matrix products."""
    name = op.name().split("::")[1]
    for device, key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):

        def lower(*args: Any, device: str = device) -> Any:
            dtype = torch.get_autocast_dtype(device)
            with below_autocast():
                return op(*(_lowered(a, dtype) for a in args))

        LIB.impl(name, lower, key)


def _lowered(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, torch.Tensor) and value.is_floating_point() and value.dtype != torch.float64:
        return value.to(dtype)
    return value
