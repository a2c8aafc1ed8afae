"""A training step of a run of compressed layers, by definition."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

from .inference import Layer


def sparse_chain_training(x: Tensor, dy: Tensor, layers: list[Layer]) -> list[Tensor]:
    """[y, dx, then the gradients of values and bias (where there is one), layer by layer] of what sparse_chain computes, for dy.

    layers: as there, but with the six tensors of sparse_tensors as index.
    """
    x = x.detach().requires_grad_()
    wanted = [x]
    with torch.enable_grad():
        y = x
        for values, bias, mask, _, relu in layers:
            given = [t.detach().requires_grad_() for t in (values, bias) if t is not None]
            wanted += given
            dense = values.new_zeros(mask.shape).masked_scatter(mask, given[0])
            y = linear(y, dense, None if bias is None else given[1])
            y = y.relu() if relu else y
    return [y.detach(), *torch.autograd.grad(y, wanted, dy)]
