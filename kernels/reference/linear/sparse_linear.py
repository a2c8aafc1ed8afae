"""The three products on a compressed weight by their definition.

W (N, K) is 0 but at the survivors: bit i of `bits` (uint8, lowest bit first) is set where weight i, row-major, survives, and
values (nnz, 1) are those weights in that order.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..bits import unpacked


def sparse_linear(
    x: Tensor, values: Tensor, bias: Tensor | None, bits: Tensor, rows: int, pattern: list[Tensor]
) -> Tensor:
    """y = x W^T + b.

    x: (B, K); bias: (rows,) or None; returns (B, rows). One float dtype; float32 sums for the 16-bit ones.
    pattern: what sparse_tensors makes of the mask for the device.
    """
    return torch.nn.functional.linear(x, expand(values, bits, rows, x.shape[1]), bias)


def sparse_grad_input(dy: Tensor, values: Tensor, bits: Tensor, columns: int, pattern: list[Tensor]) -> Tensor:
    """dx = dy W: dy (B, N) -> (B, columns)."""
    return torch.mm(dy, expand(values, bits, dy.shape[1], columns))


def sparse_grad_values(dy: Tensor, x: Tensor, bits: Tensor, pattern: list[Tensor]) -> Tensor:
    """dvalues (nnz, 1): dy^T x, of dy (B, N) and x (B, K), at the survivors."""
    product = torch.mm(dy.t(), x)
    return product[_mask(bits, *product.shape)][:, None]


def sparse_tensors(mask: Tensor) -> list[Tensor]:
    """What the kernels of a device read of the bool mask (N, K); plain torch reads its bits."""
    return []


def expand(values: Tensor, bits: Tensor, rows: int, columns: int) -> Tensor:
    """The dense weight (rows, columns)."""
    dense = values.new_zeros(rows, columns)
    return dense.masked_scatter_(_mask(bits, rows, columns), values.detach())


def compress(dense: Tensor, bits: Tensor, nnz: int) -> Tensor:
    """values (nnz, 1) of a dense weight."""
    return dense[_mask(bits, *dense.shape)][:, None]


def _mask(bits: Tensor, rows: int, columns: int) -> Tensor:
    return unpacked(bits)[: rows * columns].bool().view(rows, columns)
