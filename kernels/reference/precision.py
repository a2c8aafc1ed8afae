"""float64 where a device has it. MPS and some of Intel's GPUs have none."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor


@cache
def widest(device_type: str) -> torch.dtype:
    """float64, or float32 on devices without it."""
    if device_type in ("cpu", "cuda", "meta"):
        return torch.float64
    try:
        torch.zeros(1, dtype=torch.float64, device=device_type).add_(1)
    except (TypeError, RuntimeError):  # of MPS the one, of XPU the other
        return torch.float32
    return torch.float64


def in_float64(tensor: Tensor) -> Tensor:
    """A tensor in float64: on its device, or on the CPU where the device has none."""
    return (tensor if widest(tensor.device.type) is torch.float64 else tensor.cpu()).double()
