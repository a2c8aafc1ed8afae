"""A model of the meta device gets memory: parameters tied as before, known buffers with their values, no others."""

from __future__ import annotations

import ctypes
import mmap
import sys

import torch
from torch import Tensor, nn

from initperf.core.checks import fail
from initperf.init.model.transformers import owned, rehearsed
from initperf.init.schemes import NORMS

_LARGE = 4 << 20  # bytes: two huge pages
_PAGE = mmap.PAGESIZE
_HUGE = getattr(mmap, "MADV_HUGEPAGE", 14)


def _known(module: nn.Module, name: str, buffer: Tensor) -> bool:
    """Running statistics, and masks of layers (which start as all True)."""
    return isinstance(module, NORMS) or (name.endswith("_mask") and buffer.dtype == torch.bool)


def check_buffers(model: nn.Module) -> bool:
    """Whether buffers of the meta device get their values from `_init_weights` of a transformers model. Raise if nothing tells a value."""
    unknown = [
        (module, name, buffer)
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None and buffer.is_meta and not _known(module, name, buffer)
    ]
    written = rehearsed(model) if unknown and any(True for _ in owned(model)) else set()
    for module, name, buffer in unknown:
        if id(buffer) not in written:
            path = next(path for path, m in model.named_modules() if m is module)
            fail(
                f"buffer {path}.{name} with values (build {type(module).__name__} off the meta device)",
                "a buffer on the meta device, whose values nobody knows",
            )
    return bool(unknown)


def materialize(model: nn.Module, device: torch.device | str) -> dict[int, Tensor]:
    """Give every meta tensor memory on `device`; returns {id of the old parameter: the parameter now}."""
    old = dict(model.named_parameters(remove_duplicate=False))
    moved: dict[int, Tensor] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            key = id(parameter)
            if key not in moved:
                moved[key] = parameter if not parameter.is_meta else _like(parameter, device)
            module._parameters[name] = moved[key]  # type: ignore[assignment]
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_meta:
                fresh = torch.empty_like(buffer, device=device)
                module._buffers[name] = fresh.fill_(True) if fresh.dtype == torch.bool else fresh
        if isinstance(module, nn.RNNBase):
            module._init_flat_weights()
    return {id(parameter): moved[id(parameter)] for parameter in old.values()}


def _like(parameter: Tensor, device: torch.device | str) -> nn.Parameter:
    with torch.no_grad():
        fresh = torch.empty_like(parameter, device=device)
        if fresh.is_cpu and fresh.nbytes >= _LARGE and sys.platform == "linux":
            _ask_for_huge_pages(fresh)
        return nn.Parameter(fresh, requires_grad=parameter.requires_grad)


def _ask_for_huge_pages(tensor: Tensor) -> None:
    """Advice to the system, which may ignore it: page faults of 4 KiB cost more than the values that are written then."""
    first, last = -(-tensor.data_ptr() // _PAGE) * _PAGE, (tensor.data_ptr() + tensor.nbytes) // _PAGE * _PAGE
    madvise = getattr(ctypes.CDLL(None), "madvise", None)
    if madvise is not None:
        madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), _HUGE)
