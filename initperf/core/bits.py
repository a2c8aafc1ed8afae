"""A mask as packed bits: uint8, row-major, 8 entries a byte, the lowest bit first."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from initperf.core.checks import fail
from initperf.core.torch_private import function_transform
from initperf.kernels.reference.bits import unpacked


def pack_bits(mask: Tensor) -> Tensor:
    """A bool mask as uint8, row-major, 8 entries a byte, the lowest bit first."""
    if mask.device.type == "cpu":
        return torch.from_numpy(np.packbits(mask.detach().numpy(), bitorder="little"))
    flat = torch.nn.functional.pad(mask.reshape(-1).to(torch.uint8), (0, -mask.numel() % 8)).view(-1, 8)
    return (flat << torch.arange(8, dtype=torch.uint8, device=mask.device)).sum(1, dtype=torch.uint8)


def unpack_bits(bits: Tensor, shape: Sequence[int]) -> Tensor:
    """The bool mask of `shape`."""
    size = math.prod(shape)
    if bits.device.type == "cpu" and function_transform() is None:
        flat = np.unpackbits(bits.detach().numpy(), count=size, bitorder="little")
        return torch.from_numpy(flat).view(torch.bool).view(*shape)
    return unpacked(bits)[:size].view(*shape)


def bits_set(bits: Tensor) -> int:
    """How many bits of a uint8 tensor are set."""
    pairs = bits - (bits >> 1 & 0x55)
    nibbles = (pairs & 0x33) + (pairs >> 2 & 0x33)
    return int(((nibbles + (nibbles >> 4)) & 0x0F).sum())


def check_bits(bits: Tensor, shape: Sequence[int], nnz: int, name: str = "mask") -> None:
    """Packed bits of a mask of `shape` with `nnz` survivors: uint8, (elements / 8, rounded up), lowest bit first, 0 behind the end."""
    n = math.prod(shape)
    if bits.dtype != torch.uint8 or bits.dim() != 1 or len(bits) != -(-n // 8):
        fail(f"{name} of {-(-n // 8)} packed bytes for shape {tuple(shape)}", f"{tuple(bits.shape)} of {bits.dtype}")
    if n % 8 and int(bits[-1]) >> n % 8:
        fail(f"{name} whose last byte has no bit behind the {n} of shape {tuple(shape)}", f"{int(bits[-1]):#010b}")
    found = bits_set(bits)
    if found != nnz:
        fail(f"as many values as {name} has survivors ({found})", nnz)
