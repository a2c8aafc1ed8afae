"""The three masked products by their definition. M is the mask, bool, True = survives; o is elementwise."""

from __future__ import annotations

import torch
from torch import Tensor


def masked_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor, pattern: list[Tensor], premasked: bool
) -> Tensor:
    """y = x (W o M)^T + b.

    x: (B, K); weight, mask: (N, K); bias: (N,) or None; returns (B, N). One float dtype; float32 sums for the 16-bit ones.
    pattern: what kernels/reference/sparse/index.py makes of the mask for the device, or []. premasked: the caller promises W = W o M.
    """
    return torch.nn.functional.linear(x, _masked(weight, mask, premasked), bias)


def masked_grad_input(dy: Tensor, weight: Tensor, mask: Tensor, pattern: list[Tensor], premasked: bool) -> Tensor:
    """dx = dy (W o M): dy (B, N) -> (B, K)."""
    return torch.mm(dy, _masked(weight, mask, premasked))


def masked_grad_weight(dy: Tensor, x: Tensor, mask: Tensor, pattern: list[Tensor]) -> Tensor:
    """dW = (dy^T x) o M: dy (B, N), x (B, K) -> (N, K), exactly zero where pruned."""
    return _masked(torch.mm(dy.t(), x), mask, False)


def _masked(weight: Tensor, mask: Tensor, premasked: bool) -> Tensor:
    return weight if premasked else torch.where(mask, weight, 0)
