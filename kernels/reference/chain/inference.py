"""A run of compressed layers, by definition."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import linear

Layer = tuple[Tensor, Tensor | None, Tensor, list[Tensor], bool]


def sparse_chain(x: Tensor, layers: list[Layer]) -> Tensor:
    """x (B, inputs) through y = x W^T + b and, where asked for, ReLU, layer by layer: (B, outputs).

    A layer: values (nnz, 1) of the survivors in row-major order, bias or None, mask (N, K) bool, its index for kernels
    ([units, columns, starts]), ReLU or not.
    """
    for values, bias, mask, _, relu in layers:
        x = linear(x, values.new_zeros(mask.shape).masked_scatter_(mask, values), bias)
        x = x.relu() if relu else x
    return x
