"""Packed bits of a mask in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

_BITS = 8


def unpacked(bits: Tensor) -> Tensor:
    """The bool mask of packed bits, lowest bit first; 8 entries a byte."""
    return (bits[:, None] >> torch.arange(_BITS, dtype=torch.uint8, device=bits.device) & 1).flatten().bool()
