"""Giving a Parameter values of another shape while it stays the same object, for optimizers, hooks and parameter groups."""

from __future__ import annotations

import weakref
from collections.abc import Callable

import torch
from torch import Tensor, nn

FOLLOWERS: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()  # optimizers given to mask_optimizer_


@torch.no_grad()
def reshape(parameter: nn.Parameter, move: Callable[[Tensor], Tensor]) -> None:
    """parameter, its gradient and its state in the optimizers that follow = move(each): any tensor of the parameter's shape."""
    shape, data, gradient = parameter.shape, move(parameter.detach()), parameter.grad
    for optimizer in list(FOLLOWERS):
        move_state(optimizer, parameter, shape, move)
    parameter.grad = None
    # An older graph may hold the node that adds up gradients, with the old shape; only another dtype makes autograd forget it.
    parameter.data = data.new_empty(0, dtype=torch.float16 if data.dtype != torch.float16 else torch.float32)
    parameter.data = data
    if gradient is not None:
        parameter.grad = move(gradient)


@torch.no_grad()
def move_state(
    optimizer: torch.optim.Optimizer, parameter: nn.Parameter, shape: torch.Size, move: Callable[[Tensor], Tensor]
) -> None:
    """Replace the parameter's state tensors of `shape` by move(tensor)."""
    state = optimizer.state.get(parameter, {})
    for key, value in state.items():
        if isinstance(value, Tensor) and value.shape == shape:
            state[key] = move(value)
