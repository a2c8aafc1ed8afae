"""Calls of an op without the dispatcher, which takes 8 us to reach Python, where nothing could tell the difference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from initperf.core import ops
from initperf.core.checks import InitPerfRuntimeError, fail
from initperf.core.torch_private import (
    any_autocast,
    below_autograd,
    dispatch_modes,
    function_modes,
    is_tracing,
    transformed,
)

_is_compiling = torch.compiler.is_compiling
_is_traced = torch.compiler.is_dynamo_compiling  # sooner told; what export traces by itself is no plain Tensor
_is_autocast_enabled = torch.is_autocast_enabled
_is_grad_enabled = torch.is_grad_enabled


def plain(x: Tensor) -> bool:
    """Whether `x` has memory of its own and only autograd can be listening to an op on it: no mode, no transform, no tracing (of compilers and torch.jit), no tangents, no autocast, no subclass, no negation that is still to be done."""
    if type(x) is not Tensor or _is_traced():
        return False
    try:
        x.data_ptr()
    except RuntimeError:  # see _has_memory
        return False
    return (
        ((on_cpu := x.is_cpu) or x.is_cuda)
        and not dispatch_modes()
        and not function_modes()
        and not transformed()
        and not is_tracing()
        and not (any_autocast() and _is_autocast_enabled("cpu" if on_cpu else "cuda"))
        and not x.is_neg()
    )


def writable(gradient: Tensor) -> bool:
    """Whether kernels may be handed the memory of a gradient: only autograd, without create_graph, sees what they do. Sooner told than plain."""
    return (
        type(gradient) is Tensor
        and not _is_grad_enabled()
        and not dispatch_modes()
        and not transformed()
        and not gradient.is_neg()
        and _has_memory(gradient)
    )


def _has_memory(x: Tensor) -> bool:
    """Not so for the gradients of torch.autograd.grad(..., is_grads_batched=True), which are many in one."""
    try:
        x.data_ptr()
    except RuntimeError:
        return False
    return True


def check_saved(shapes: tuple[torch.Size, ...], *saved: Tensor) -> None:
    """Raise unless tensors come to a backward pass in the shapes they had: kernels get addresses, which do not tell. `.data` and hooks of saved tensors may have changed them."""
    for shape, tensor in zip(shapes, saved, strict=True):
        if tensor.shape != shape:
            fail(f"a saved tensor of shape {tuple(shape)}", tuple(tensor.shape), kind=InitPerfRuntimeError)


TINY = 1 << 14  # weights up to which three ops of torch take less time than Python's part of an autograd.Function


def below(op: Any, run: Callable[..., Tensor], *args: Any) -> Tensor:
    """An op as the forward of an autograd.Function calls it."""
    if plain(args[0]):
        return run(*args)
    with below_autograd():
        return op(*args)


def backward(op: Any, run: Callable[..., Tensor], *args: Any, reference: Callable[..., Tensor] | None = None) -> Tensor:
    """An op as a backward calls it: with gradients of its own only under create_graph, and of many gradients at once by torch's ops."""
    if not _is_grad_enabled() and plain(args[0]):
        return run(*args)
    return op(*args) if _has_memory(args[0]) or _is_compiling() else (reference or ops.reference(op))(*args)
