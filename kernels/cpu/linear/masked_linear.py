"""The three masked products on a dense weight: y = x (W o M)^T + b, dx = dy (W o M), dW = (dy^T x) o M at survivors only."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.memory import check_alike, gradient_memory
from ..dense import products
from ..masks.zero_pruned import zero_pruned
from ..sparse.many_rows import correlate, multiply


def masked_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor, pattern: list[Tensor], premasked: bool
) -> Tensor:
    """See kernels/reference/linear/masked_linear.py."""
    check_alike(x, weight)
    return multiply(x, (weight.data_ptr(), *weight.stride()), weight.shape[0], bias, pattern[0], pattern[1])


def masked_grad_input(dy: Tensor, weight: Tensor, mask: Tensor, pattern: list[Tensor], premasked: bool) -> Tensor:
    """See kernels/reference/linear/masked_linear.py."""
    check_alike(dy, weight)
    transposed = weight.t()
    return multiply(dy, (weight.data_ptr(), *transposed.stride()), weight.shape[1], None, pattern[2], pattern[3])


def masked_grad_weight(dy: Tensor, x: Tensor, mask: Tensor, pattern: list[Tensor]) -> Tensor:
    """See kernels/reference/linear/masked_linear.py."""
    N, K = dy.shape[1], x.shape[1]
    out = gradient_memory(mask, (N, K), x.dtype)
    if not len(dy) or not out.numel():
        return out.zero_()
    correlate(dy, x, (out.data_ptr(), N, K), pattern[0], pattern[1])
    return out


def dense_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor, pattern: list[Tensor], premasked: bool
) -> Tensor:
    """masked_linear as a dense product: ours where it is faster, else torch's."""
    weight = weight if premasked else torch.where(mask, weight, 0)
    if products.runs(x, weight):
        return products.forward(x, weight, bias, weight.shape[0])
    return torch.nn.functional.linear(x, weight, bias)


def dense_grad_input(dy: Tensor, weight: Tensor, mask: Tensor, pattern: list[Tensor], premasked: bool) -> Tensor:
    """masked_grad_input as a dense product."""
    weight = weight if premasked else torch.where(mask, weight, 0)
    return products.grad_input(dy, weight, weight.shape[1]) if products.runs(dy, weight) else torch.mm(dy, weight)


def dense_grad_weight(dy: Tensor, x: Tensor, mask: Tensor, pattern: list[Tensor]) -> Tensor:
    """masked_grad_weight as a dense product that is masked as it is written, or in place."""
    if products.runs(dy, mask):
        return products.grad_weight(dy, x, mask)
    out = gradient_memory(mask, (dy.shape[1], x.shape[1]), x.dtype)
    if not out.numel():
        return out
    torch.mm(dy.t(), x, out=out)
    return zero_pruned(out, mask)
