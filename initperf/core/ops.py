"""The table of ops: torch.library schema -> implementation by device, imported when first called.

An op `x` of module `room.m` is the function `x` in kernels/cpu/room/m.py (Numba), kernels/gpu/room/m.py (Triton) and
kernels/reference/room/m.py (plain torch), all with the same signature. The reference runs where a compiler or a kernel is
missing, and on every device but CPUs and CUDA's (CUDA, ROCm): the logger "initperf" then says so, once for each cause.
"""

from __future__ import annotations

import logging
import os
import sys
from collections import Counter
from collections.abc import Callable
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch

from initperf.core.extras import installation
from initperf.core.torch_private import AUTOCAST_KEYS, below_autocast

LIB = torch.library.Library("initperf", "DEF")
MODULES: dict[str, str] = {}  # op name -> module below kernels/cpu, gpu and reference
CALLS: Counter[tuple[str, str]] = Counter()  # (op name, backend) -> calls in this process
_BACKENDS = {"cpu": ("numba", "initperf.kernels.cpu"), "cuda": ("triton", "initperf.kernels.gpu")}
# On devices without kernels these run on the CPU, since they count on 64-bit integers and on float64.
_EXACT = ("sample_", "kth_smallest", "cut")
_TOO_OLD = "compiles for a processor without"
_log = logging.getLogger("initperf")


@cache
def _failure(compiler: str) -> str:
    """Why a compiler cannot be imported, or not be used on this processor; empty if it can."""
    try:
        import_module(compiler)
    except ModuleNotFoundError as error:
        return "is not installed" if error.name == compiler else f"cannot be imported ({error})"
    except ImportError as error:  # Numba beside a NumPy that it does not know
        return f"cannot be imported ({error})"
    if compiler == "numba" and (missing := _missing_instructions()):
        return f"{_TOO_OLD} {missing}"
    return ""


def _missing_instructions() -> str:
    from initperf.kernels.cpu.core.target import lacks

    return lacks()


def usable(compiler: str) -> bool:
    """Whether "numba" or "triton" is there, and knows this processor; imports it."""
    return not _failure(compiler)


@cache
def _exists(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # not even its package
        return False


def backend_of(name: str, device_type: str) -> str:
    """Which implementation runs op `name` on "cpu", "cuda" or another device: "numba", "triton" or "reference" (INITPERF_BACKEND=reference forces the last)."""
    compiler, package = _BACKENDS.get(device_type, ("", ""))
    if not compiler or os.environ.get("INITPERF_BACKEND") == "reference" or _failure(compiler):
        return "reference"
    return compiler if _exists(f"{package}.{MODULES[name]}") else "reference"


def lacking(device_type: str) -> str:
    """Why no kernel at all runs on a device, and the remedy, in words; empty where they run, or were not wanted."""
    if os.environ.get("INITPERF_BACKEND") == "reference" or device_type == "meta":
        return ""
    compiler, _ = _BACKENDS.get(device_type, ("", ""))
    if not compiler:
        return (
            f"There are no kernels for devices of type {device_type}: results are right, but layers run torch's own dense products "
            "there, and sampling and pruning run on the CPU. Remedy: move the model to a CPU or to a CUDA or ROCm device, if "
            "it is too slow."
        )
    failure = _failure(compiler)
    if not failure:
        return ""
    where = "on the CPU" if device_type == "cpu" else "on the GPU"
    return f"{compiler} {failure}: {where} every op runs in plain torch, right but slow. Remedy: {_remedy(compiler)}."


def _remedy(compiler: str) -> str:
    if compiler == "numba":
        if _failure(compiler).startswith(_TOO_OLD):
            return "a processor with AVX2 (2013 or later); unset NUMBA_CPU_NAME and NUMBA_CPU_FEATURES if this is one"
        return "pip install --upgrade numba"
    if torch.version.hip is not None:
        return "install the Triton of torch's ROCm build, from where that torch came"
    return installation("gpu") if sys.platform == "linux" else "pip install triton-windows"


@cache
def explain(device_type: str) -> None:
    """Warn, once a process, if no kernel runs on a device."""
    if cause := lacking(device_type):
        _log.warning(cause)


@cache
def implementation(name: str, device_type: str) -> Callable[..., Any]:
    """The launcher of op `name` for a device, counting its calls. For callers that need no dispatcher (fresh plain tensors)."""
    backend = backend_of(name, device_type)
    if backend == "reference":
        explain(device_type)
        if device_type not in _BACKENDS and name in _EXACT:
            return _on_the_cpu(name)
    package = "initperf.kernels.reference" if backend == "reference" else _BACKENDS[device_type][1]
    function = getattr(import_module(f"{package}.{MODULES[name]}"), name)
    key = (name, backend)

    def counted(*args: Any, **kwargs: Any) -> Any:
        CALLS[key] += 1
        return function(*args, **kwargs)

    return counted


def _on_the_cpu(name: str) -> Callable[..., Any]:
    """An op of _EXACT for tensors of another device: on copies, and what it writes or returns is copied back."""
    run = implementation(name, "cpu")

    def moved(first: Any, *args: Any) -> Any:
        device = (first if isinstance(first, torch.Tensor) else first[0]).device
        copy = _moved(first, "cpu")
        with torch.device("cpu"):  # for what the kernel makes, whatever the default device
            result = run(copy, *(_moved(value, "cpu") for value in args))
        return first.copy_(copy) if name.endswith("_") else _moved(result, device)

    return moved


def _moved(value: Any, device: Any) -> Any:
    if isinstance(value, list):
        return [_moved(v, device) for v in value]
    return value.to(device) if isinstance(value, torch.Tensor) else value


def reference(op: Any) -> Callable[..., Any]:
    """The implementation of an OpOverload in plain torch, which every transform of torch knows."""
    name = op.name().split("::")[1]
    function: Callable[..., Any] = getattr(import_module(f"initperf.kernels.reference.{MODULES[name]}"), name)
    return function


def register(name: str, module: str) -> None:
    """Enter an op that is called through `implementation` only, with no torch.library schema."""
    MODULES[name] = module


# here, since tickets, masks and data splits call it without initperf.rng.sampling
register("sample_", "sampling.sample")


def define(schema: str, *, module: str, fake: Callable[..., Any], run: Callable[..., Any]) -> Any:
    """Define `initperf::schema` for tensors of every device; returns the OpOverload.

    run: the implementation, which chooses by the device of its tensors, and counts, its backend; fake: that of tensors without values.
    """
    name = schema.split("(", 1)[0]
    register(name, module)
    LIB.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIB.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"initperf::{name}", fake, lib=LIB)
    return getattr(torch.ops.initperf, name).default


def differentiate(name: str, function: Callable[..., Any]) -> None:
    """Enter what runs where gradients may be needed: it calls an autograd.Function, whose forward calls the op below autograd."""
    LIB.impl(name, function, "Autograd")


def autocast(op: Any) -> None:
    """Under autocast, cast the op's float32 and 16-bit tensors to autocast's dtype, as for torch's own matrix products."""
    name = op.name().split("::")[1]

    def lower(*args: Any) -> Any:
        dtype = torch.get_autocast_dtype(args[0].device.type)
        with below_autocast():
            return op(*(_lowered(a, dtype) for a in args))

    for key in AUTOCAST_KEYS:
        LIB.impl(name, lower, key)


def _lowered(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, torch.Tensor) and value.is_floating_point() and value.dtype != torch.float64:
        return value.to(dtype)
    return value
