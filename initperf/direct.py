"""Calls of an op without the dispatcher, which takes 8 us to reach Python, where nothing could tell the difference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

DEVICES = ("cpu", "cuda")


def plain(x: Tensor) -> bool:
    """Whether only autograd can be listening to an op on `x`: no mode, no transform, no tracing, no autocast, no subclass."""
    return (
        type(x) is Tensor
        and x.device.type in DEVICES
        and not torch.compiler.is_compiling()
        and not torch._C._len_torch_dispatch_stack()
        and not torch._C._len_torch_function_stack()
        and torch._C._functorch.peek_interpreter_stack() is None
        and not torch.is_autocast_enabled(x.device.type)
    )


def below(op: Any, run: Callable[..., Tensor], *args: Any) -> Tensor:
    """An op as the forward of an autograd.Function calls it."""
    if plain(args[0]):
        return run(*args)
    with torch._C._AutoDispatchBelowAutograd():
        return op(*args)


def backward(op: Any, run: Callable[..., Tensor], *args: Any) -> Tensor:
    """An op as a backward calls it: with gradients of its own only under create_graph."""
    return run(*args) if not torch.is_grad_enabled() and plain(args[0]) else op(*args)
