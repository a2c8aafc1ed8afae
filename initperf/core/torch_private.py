"""Every private name of torch that the package uses. No other file may use one (tests/project/test_torch_private.py).

torch 2.11.0, 2.12.1, 2.13.0, 2.14.1 and 2.15.0 have them all. A version that lacks one gets its substitute here, and
nowhere else. "Public:" is what torch documents for the same, and why it is not used; without it there is nothing.
Modules bind these names when they are imported, so that a call costs what it costs in torch. Times are of an AMD EPYC
(Zen 4).
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial, reduce
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._C import (
    DisableTorchFunction,  # context manager: nor does a mode of __torch_function__ see what is called in it
    DispatchKey,
    DispatchKeySet,
    _AutoDispatchBelowAutograd,
    _current_graph_task_id,
    _ExcludeDispatchKeyGuard,
    _functorch,
    _increment_version,
    _is_any_autocast_enabled,
    _is_tracing,
    _len_torch_dispatch_stack,
    _len_torch_function_stack,
)
from torch._C._dynamo import eval_frame
from torch.autograd import forward_ad
from torch.nn.init import _calculate_correct_fan as correct_fan
from torch.nn.init import _calculate_fan_in_and_fan_out as fans
from torch.nn.modules import module as _hooks_of_all
from torch.nn.modules.batchnorm import _NormBase as NormBase  # Public: its subclasses, one by one
from torch.nn.modules.conv import _ConvNd as ConvNd  # Public: its subclasses, one by one
from torch.nn.modules.conv import _ConvTransposeNd as ConvTransposeNd
from torch.nn.utils.parametrizations import _Orthogonal as OrthogonalStep  # of a chain in module.parametrizations
from torch.nn.utils.parametrizations import _SpectralNorm as SpectralNormStep
from torch.nn.utils.parametrizations import _WeightNorm as WeightNormStep
from torch.overrides import _get_current_function_mode_stack as function_mode_stack
from torch.utils._device import DeviceContext  # the mode that torch.device is as a context

__all__ = [
    "AUTOCAST_KEYS",
    "MEMBERS",
    "WRAPPERS",
    "ConvNd",
    "ConvTransposeNd",
    "DeviceContext",
    "DisableTorchFunction",
    "NormBase",
    "OrthogonalStep",
    "SpectralNormStep",
    "WeightNormStep",
    "any_autocast",
    "below_autocast",
    "below_autograd",
    "correct_fan",
    "dispatch_modes",
    "fans",
    "function_mode_stack",
    "function_modes",
    "function_transform",
    "global_backward_hooks",
    "global_backward_pre_hooks",
    "global_forward_hooks",
    "global_forward_pre_hooks",
    "graph_task",
    "has_unscaled",
    "hook",
    "increment_version",
    "init_worker",
    "is_compiled",
    "is_tracing",
    "not_compiled",
    "scale_of",
    "shard_offset",
    "single_level_apply",
    "transformed",
]

# What modules read of torch's objects, or override, under torch's own names, since it cannot be bound.
MEMBERS: dict[type, tuple[str, ...]] = {
    # The entries as they are. Public: getattr, register_parameter, register_buffer, named_parameters, slower or with checks
    nn.Module: (
        *("_parameters", "_buffers", "_modules"),
        *("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"),
        *("_apply", "_load_from_state_dict"),  # overridden. Public for the latter: hooks, which cannot replace it
    ),
    nn.Conv2d: ("_conv_forward", "_reversed_padding_repeated_twice"),
    nn.RNNBase: ("_init_flat_weights",),
    nn.MultiheadAttention: ("_reset_parameters",),
    nn.Transformer: ("_reset_parameters",),
    Tensor: ("_version",),
}

# What wrappers (torch.compile, FSDP, checkpointing, and DistributedDataParallel's public `module`) put in the paths of parameters.
WRAPPERS = frozenset({"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})

F = TypeVar("F", bound=Callable[..., Any])

# --- what is at work around a call ---
dispatch_modes: Callable[[], int] = _len_torch_dispatch_stack
function_modes: Callable[[], int] = _len_torch_function_stack
function_transform: Callable[[], Any] = (
    _functorch.peek_interpreter_stack
)  # the innermost transform of torch.func, or None
is_tracing: Callable[[], bool] = _is_tracing  # torch.jit. Public: torch.jit.is_tracing, thrice the time
any_autocast: Callable[[], bool] = _is_any_autocast_enabled  # Public: torch.is_autocast_enabled, device by device


def transformed() -> bool:
    """Whether a transform of torch.func, or forward-mode differentiation, is at work."""
    return function_transform() is not None or forward_ad._current_level >= 0


def graph_task() -> int:
    """The number of the backward pass that is running in this thread; -1 outside of one."""
    return _current_graph_task_id()


# --- dispatch and autograd ---
below_autograd: Callable[[], Any] = _AutoDispatchBelowAutograd  # context manager
# Of devices that autocast has a dispatch key for.
AUTOCAST_KEYS = tuple(f"Autocast{device}" for device in ("CPU", "CUDA", "MPS", "XPU", "HPU", "PrivateUse1"))
# Context manager. Public: torch.autocast(device, enabled=False), 2.4 us more, and it empties autocast's cache
below_autocast: Callable[[], Any] = partial(
    _ExcludeDispatchKeyGuard,
    reduce(
        DispatchKeySet.add,
        (getattr(DispatchKey, key) for key in AUTOCAST_KEYS[1:]),
        DispatchKeySet(DispatchKey.AutocastCPU),
    ),
)
# Of each tensor of a tuple. Public: torch.autograd.graph.increment_version, 0.2 us more
increment_version: Callable[[tuple[Tensor, ...]], None] = _increment_version


def single_level_apply(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """`function.apply` for calls where no transform of torch.func is at work. Public: apply, 1.4 us more in torch 2.13, 0.1 in 2.15."""
    apply: Callable[..., Any] = super(torch.autograd.Function, function).apply  # type: ignore[misc]
    return apply


def hook(tensor: Tensor, hooks: dict[int, Callable[[Tensor], Tensor | None]]) -> None:
    """Let the dict's functions be the hooks of a tensor that has a grad_fn and no hooks. Public: register_hook, whose handle takes 2 us."""
    tensor._backward_hooks = hooks
    tensor.grad_fn._register_hook_dict(tensor)  # type: ignore[union-attr]


# --- torch.compile ---
_SKIP = eval_frame._FrameExecStrategy(eval_frame._FrameAction.SKIP, eval_frame._FrameAction.SKIP)


def not_compiled(function: F) -> F:
    """torch.compile breaks the graph at `function` and leaves all it calls alone.

    Public: torch.compiler.disable, whose import takes seconds and which costs 0.5 us a call.
    """
    eval_frame.set_code_exec_strategy(function.__code__, _SKIP)
    function._torchdynamo_disable = True  # type: ignore[attr-defined]
    return function


def is_compiled(module: nn.Module) -> bool:
    """Whether it is what torch.compile returned, or module.compile() was called."""
    dynamo = sys.modules.get("torch._dynamo")  # nothing is compiled before it is imported, which takes seconds
    return isinstance(module, getattr(dynamo, "OptimizedModule", ())) or module._compiled_call_impl is not None


# --- torch.nn ---
# Hooks of every module: one dict each, written in place.
global_forward_hooks: dict[int, Any] = _hooks_of_all._global_forward_hooks
global_forward_pre_hooks: dict[int, Any] = _hooks_of_all._global_forward_pre_hooks
global_backward_hooks: dict[int, Any] = _hooks_of_all._global_backward_hooks
global_backward_pre_hooks: dict[int, Any] = _hooks_of_all._global_backward_pre_hooks


def init_worker(name: str) -> str:
    """Which function of torch.nn.init its public `name` (uniform_, normal_, trunc_normal_) and others there call."""
    return f"_no_grad_{name}"


# --- torch.amp, torch.distributed ---
def scale_of(scaler: torch.amp.GradScaler) -> Tensor | None:
    """A GradScaler's scale on its device; None before its first use. Public: get_scale(), which waits for the device."""
    return scaler._scale


def has_unscaled(scaler: torch.amp.GradScaler) -> bool:
    """Whether, since its last update, it divided some optimizer's gradients by the scale, by unscale_ or in step."""
    stages = (state["stage"] for state in scaler._per_optimizer_states.values())
    return any(stage is not torch.amp.grad_scaler.OptState.READY for stage in stages)


def shard_offset(parameter: Any) -> tuple[int, ...]:
    """Where the local part of a DTensor begins in the whole."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    _, start = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    return tuple(start)
