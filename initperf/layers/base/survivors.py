"""Between a dense tensor and the survivors (nnz, 1) of a mask in row-major order, for whole layers and their optimizer's state."""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from initperf.core import ops
from initperf.core.bits import pack_bits, unpack_bits


def spread(values: Tensor, bits: Tensor, shape: Sequence[int]) -> Tensor:
    """A new tensor of `shape` with the values (nnz, 1) where a bit of the packed mask is set, else 0."""
    kernels = _kernels(values, bits)
    if kernels is None:
        mask = unpack_bits(bits, shape).to(values.device)
        return values.new_zeros(tuple(shape)).masked_scatter_(mask, values)
    dense = kernels.expand(values.contiguous(), bits.contiguous(), 1, math.prod(shape)).view(tuple(shape))
    return dense.clone() if dense.data_ptr() == values.data_ptr() else dense


def pick(dense: Tensor, mask: Tensor) -> Tensor:
    """A new tensor (nnz, 1) with the values of `dense` where the bool mask, of the same shape, is True."""
    kernels = _kernels(dense, mask)
    if kernels is None:
        return dense.masked_select(mask.to(dense.device))[:, None]
    values = kernels.compress(dense.contiguous().view(1, -1), pack_bits(mask), int(mask.count_nonzero()))
    return values.clone() if values.data_ptr() == dense.data_ptr() else values


def _kernels(values: Tensor, mask: Tensor) -> ModuleType | None:
    """Our kernels, which take a tenth of the time, where they run."""
    plain = values.is_cpu and mask.is_cpu and values.element_size() in (2, 4, 8) and not values.is_neg()
    if not plain or not values.numel() or type(values) not in (Tensor, torch.nn.Parameter):
        return None
    if values.is_complex() or ops.backend_of("sparse_tensors", "cpu") == "reference":
        return None
    from initperf.kernels.cpu.linear import sparse_linear

    return sparse_linear
