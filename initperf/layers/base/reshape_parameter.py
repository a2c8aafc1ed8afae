"""Giving a Parameter values of another shape while it stays the same object, for optimizers, hooks and parameter groups."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.weak import WeakIdKeyDictionary

from initperf.core.checks import InitPerfRuntimeError, fail

FOLLOWERS: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()  # optimizers given to mask_optimizer_


_changed = WeakIdKeyDictionary()  # Parameter -> the shapes that it had
_changes = 0  # how often any was
_stale = WeakIdKeyDictionary()  # tensors of optimizers, made for values that have moved since
_checked: weakref.WeakKeyDictionary[torch.optim.Optimizer, int] = weakref.WeakKeyDictionary()  # after how many changes


@torch.no_grad()
def reshape(parameter: nn.Parameter, move: Callable[[Tensor], Tensor]) -> None:
    """parameter, its gradient and its state in the optimizers that follow = move(each): any tensor of the parameter's shape.

    Optimizers that do not follow, and have state, raise at their next step.
    """
    global _changes
    shape, data, gradient = parameter.shape, move(parameter.detach()), parameter.grad
    for optimizer in list(FOLLOWERS):
        move_state(optimizer, parameter, shape, move)
    for optimizer in set(_checked) - set(FOLLOWERS):
        for value in optimizer.state.get(parameter, {}).values():
            if isinstance(value, Tensor) and value.shape == shape:
                _stale[value] = True
    parameter.grad = None
    # An older graph may hold the node that adds up gradients, with the old shape; only another dtype makes autograd forget it.
    parameter.data = data.new_empty(0, dtype=torch.float16 if data.dtype != torch.float16 else torch.float32)
    parameter.data = data
    if gradient is not None:
        parameter.grad = move(gradient)
    _changed.setdefault(parameter, set()).add(shape)
    _changes += 1


@cache
def watch_optimizers() -> None:
    """From now on every optimizer's step begins with _check_state."""
    register_optimizer_step_pre_hook(_check_state)


def _check_state(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    """Raise for state of other values than the parameter has, or of a shape that it had: torch's fused optimizers do not look."""
    checked = _checked.get(optimizer)
    if checked == _changes:
        return
    for parameter, shapes in list(_changed.items()):
        for key, value in optimizer.state.get(parameter, {}).items():
            if not isinstance(value, Tensor):
                continue
            if value in _stale or (value.shape != parameter.shape and value.shape in shapes):
                fail(
                    f"optimizer state {key!r} made for its parameter's values, shape {tuple(parameter.shape)}",
                    f"{tuple(value.shape)}, from before a layer was compressed, expanded or given another mask (hand the "
                    "optimizer to sparsify and densify, or to mask_optimizer_ before such changes, or clear its state)",
                    kind=InitPerfRuntimeError,
                )
    if checked is None:
        optimizer.register_load_state_dict_post_hook(_doubt)
    _checked[optimizer] = _changes


def _doubt(optimizer: torch.optim.Optimizer) -> None:
    _checked[optimizer] = -1


@torch.no_grad()
def move_state(
    optimizer: torch.optim.Optimizer, parameter: nn.Parameter, shape: torch.Size, move: Callable[[Tensor], Tensor]
) -> None:
    """Replace the parameter's state tensors of `shape` by move(tensor)."""
    state = optimizer.state.get(parameter, {})
    for key, value in state.items():
        if isinstance(value, Tensor) and value.shape == shape:
            state[key] = move(value)
