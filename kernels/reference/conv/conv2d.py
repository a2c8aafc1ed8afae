"""Two-dimensional convolution with a masked weight, and its two gradients, by their definition.

`weight` is stored dense, (N, C / groups, height, width), with `survivors` its bool mask; or as values (nnz, 1), with
`survivors` their int32 positions in the flat weight, ascending. `shape` is the dense weight's. M is the mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

Ints = Sequence[int]


def masked_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    survivors: Tensor,
    pattern: list[Tensor],
    shape: Ints,
    stride: Ints,
    padding: Ints,
    dilation: Ints,
    groups: int,
    premasked: bool,
) -> Tensor:
    """y = x * (W o M) + b, torch's conv2d: x (B, C, H, W) -> (B, N, Ho, Wo). One float dtype.

    pattern: what conv_pattern_tensors makes of the mask for the device, or []. premasked: the caller promises W = W o M.
    """
    dense = dense_weight(weight, survivors, shape, premasked)
    return torch.nn.functional.conv2d(x, dense, bias, stride, padding, dilation, groups)


def masked_conv2d_grad_input(
    dy: Tensor,
    weight: Tensor,
    survivors: Tensor,
    pattern: list[Tensor],
    shape: Ints,
    size: Ints,
    stride: Ints,
    padding: Ints,
    dilation: Ints,
    groups: int,
    premasked: bool,
) -> Tensor:
    """The gradient of x, whose height and width are `size`: dy (B, N, Ho, Wo) -> (B, C, *size)."""
    dense = dense_weight(weight, survivors, shape, premasked)
    x = dy.new_empty(1).expand(dy.shape[0], shape[1] * groups, *size)  # only its shape counts
    geometry = (list(stride), list(padding), list(dilation), False, [0, 0], groups)
    return torch.ops.aten.convolution_backward(dy, x, dense, None, *geometry, [True, False, False])[0]


def masked_conv2d_grad_weight(
    dy: Tensor,
    x: Tensor,
    survivors: Tensor,
    pattern: list[Tensor],
    shape: Ints,
    stride: Ints,
    padding: Ints,
    dilation: Ints,
    groups: int,
) -> Tensor:
    """The gradient of the weight as it is stored: dense and exactly zero where pruned, or (nnz, 1)."""
    return stored(dense_grad_weight(dy, x, shape, stride, padding, dilation, groups), survivors)


def dense_grad_weight(
    dy: Tensor, x: Tensor, shape: Ints, stride: Ints, padding: Ints, dilation: Ints, groups: int
) -> Tensor:
    """The gradient of a weight of which nothing is pruned."""
    dense = x.new_empty(1).expand(*shape)
    geometry = (list(stride), list(padding), list(dilation), False, [0, 0], groups)
    return torch.ops.aten.convolution_backward(dy, x, dense, None, *geometry, [False, True, False])[1]


def dense_weight(weight: Tensor, survivors: Tensor, shape: Ints, premasked: bool) -> Tensor:
    """W o M, of `shape`."""
    if survivors.dtype == torch.bool:
        return weight if premasked else torch.where(survivors, weight, 0)
    return weight.new_zeros(prod(shape)).index_copy_(0, survivors.long(), weight.reshape(-1)).view(*shape)


def stored(dw: Tensor, survivors: Tensor) -> Tensor:
    """A fresh dense gradient as the weight is stored: zero where pruned (in place), or its survivors (nnz, 1)."""
    if survivors.dtype == torch.bool:
        return dw.masked_fill_(~survivors, 0)
    return dw.reshape(-1).index_select(0, survivors).unsqueeze(1)


def conv_pattern_tensors(mask: Tensor, groups: int, compressed: bool) -> list[Tensor]:
    """The reference reads the mask itself."""
    return []
