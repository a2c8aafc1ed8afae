"""The three masked products as torch ops, closed under backward: each one's gradients are the other two.

    initperf::masked_linear        y  = x (W o M)^T + b
    initperf::masked_grad_input    dx = dy (W o M)
    initperf::masked_grad_weight   dW = (dy^T x) o M

Shapes and arguments: kernels/reference/linear/masked_linear.py. Autograd is written by hand: register_autograd costs 45 us a call more.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from types import ModuleType
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from initperf.core import ops, without_dispatch
from initperf.core.torch_private import single_level_apply
from initperf.kernels.reference.linear import masked_linear as reference
from initperf.layers.choice.table import sparse_pays

if TYPE_CHECKING:
    from initperf.layers.base.pattern import Pattern

_DENSE = {"cpu": "mkl", "cuda": "cublas"}
OWN = "numba-dense"  # as what our own dense products are counted
MOST_COMPOSED = 1 << 22  # weights: their gradient lies in the caches when it is masked; beyond, kept memory pays


def _run(name: str, rows: int, like: Tensor, mask: Tensor, pattern: list[Tensor], *args: Any) -> Tensor:
    device = "cpu" if like.is_cpu else like.device.type  # the first is sooner told
    dense = _dense(name, device)
    if dense is None or (pattern and sparse_pays(name, rows, mask.shape, pattern[1].numel(), like.dtype, device)):
        return ops.implementation(name, device)(*args)
    own = _own_dense() if device == "cpu" else None
    runs = own is not None and own.runs(like, mask if name == "masked_grad_weight" else args[1])
    ops.CALLS[name, OWN if runs else _DENSE[device]] += 1
    return dense(*args)


@cache
def _dense(name: str, device: str) -> Callable[..., Tensor] | None:
    """torch's product for an op; None where the reference runs anyway, and is counted as that."""
    if ops.backend_of(name, device) == "reference":
        return None
    if device != "cpu":
        return getattr(reference, name)
    from initperf.kernels.cpu.linear import masked_linear as masked_matmul

    return getattr(masked_matmul, name.replace("masked", "dense"))


def runs_own(rows: int, mask: Tensor, weight: Tensor) -> bool:
    """Whether our own dense products run, on the CPU: they are faster by more than their calls cost."""
    kernels = _own_dense()
    return (
        kernels is not None
        and kernels.pays(rows, mask.numel(), weight.dtype)
        and weight.is_cpu
        and weight.is_contiguous()
        and mask.is_cpu
        and mask.is_contiguous()
    )


@cache
def _own_dense() -> ModuleType | None:
    if ops.backend_of("masked_linear", "cpu") == "reference":
        return None
    from initperf.kernels.cpu.dense import products as dense

    return dense


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor, pattern: list[Tensor], premasked: bool
) -> Tensor:
    """The op masked_linear for a plain x: without the 8 us of a dispatch to Python, since nothing could tell the difference."""
    if torch.is_grad_enabled() and (
        x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    ):
        return _apply(x, weight, bias, mask, pattern, premasked)
    return _masked_linear(x, weight, bias, mask, pattern, premasked)


def own_linear(x: Tensor, weight: Tensor, bias: Tensor | None, pattern: Pattern) -> Tensor:
    """masked_linear of a weight that obeys its mask where runs_own, for a plain x, with gradients by the same kernels."""
    if x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad):
        return _apply_own(x, weight, bias, pattern)
    return _masked_linear(x, weight, bias, pattern.mask, [], True)


def torch_linear(x: Tensor, weight: Tensor, bias: Tensor | None, pattern: Pattern) -> Tensor:
    """The same by torch's own ops: what nn.Linear computes, bit by bit, and a hook masks the gradient."""
    ops.CALLS["masked_linear", "mkl"] += 1
    transpose = pattern.premasked_transpose(weight)
    return torch.mm(x, transpose) if bias is None else torch.addmm(bias, x, transpose)


def _masked_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor, pattern: list[Tensor], premasked: bool
) -> Tensor:
    return _run("masked_linear", x.shape[0], x, mask, pattern, x, weight, bias, mask, pattern, premasked)


def _masked_grad_input(dy: Tensor, weight: Tensor, mask: Tensor, pattern: list[Tensor], premasked: bool) -> Tensor:
    return _run("masked_grad_input", dy.shape[0], dy, mask, pattern, dy, weight, mask, pattern, premasked)


def _masked_grad_weight(dy: Tensor, x: Tensor, mask: Tensor, pattern: list[Tensor]) -> Tensor:
    return _run("masked_grad_weight", dy.shape[0], dy, mask, pattern, dy, x, mask, pattern)


masked_linear = ops.define(
    "masked_linear(Tensor x, Tensor weight, Tensor? bias, Tensor mask, Tensor[] pattern, bool premasked) -> Tensor",
    module="linear.masked_linear",
    run=_masked_linear,
    fake=lambda x, weight, bias, mask, pattern, premasked: x.new_empty(x.shape[0], mask.shape[0]),
)
masked_grad_input = ops.define(
    "masked_grad_input(Tensor dy, Tensor weight, Tensor mask, Tensor[] pattern, bool premasked) -> Tensor",
    module="linear.masked_linear",
    run=_masked_grad_input,
    fake=lambda dy, weight, mask, pattern, premasked: dy.new_empty(dy.shape[0], mask.shape[1]),
)
masked_grad_weight = ops.define(
    "masked_grad_weight(Tensor dy, Tensor x, Tensor mask, Tensor[] pattern) -> Tensor",
    module="linear.masked_linear",
    run=_masked_grad_weight,
    fake=lambda dy, x, mask, pattern: x.new_empty(mask.shape),
)


class _Linear(torch.autograd.Function):
    """The pattern is a list, which autograd passes on unseen: four tensors less to wrap in every call."""

    @staticmethod
    def forward(ctx, x, weight, bias, mask, pattern, premasked):
        ctx.save_for_backward(x, weight, mask)
        ctx.pattern, ctx.premasked, ctx.shapes = pattern, premasked, (x.shape, weight.shape)
        return without_dispatch.below(masked_linear, _masked_linear, x, weight, bias, mask, pattern, premasked)

    @staticmethod
    def backward(ctx, dy):
        x, weight, mask = ctx.saved_tensors
        without_dispatch.check_saved(ctx.shapes, x, weight)
        pattern, premasked = ctx.pattern, ctx.premasked
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        db = dy.sum(0) if needs_bias else None
        if without_dispatch.writable(dy):  # asked once for both products
            dx = _masked_grad_input(dy, weight, mask, pattern, premasked) if needs_x else None
            dw = _masked_grad_weight(dy, x, mask, pattern) if needs_weight else None
            return dx, dw, db, None, None, None
        products = (masked_grad_input, _masked_grad_input), (masked_grad_weight, _masked_grad_weight)
        dx = without_dispatch.backward(*products[0], dy, weight, mask, pattern, premasked) if needs_x else None
        dw = without_dispatch.backward(*products[1], dy, x, mask, pattern) if needs_weight else None
        return dx, dw, db, None, None, None


class _OwnLinear(torch.autograd.Function):
    """_Linear where all three products are our own dense ones: a step takes 13 us less."""

    @staticmethod
    def forward(ctx, x, weight, bias, pattern):
        ctx.save_for_backward(x, weight)
        ctx.pattern, ctx.shapes = pattern, (x.shape, weight.shape)
        ops.CALLS["masked_linear", OWN] += 1
        return cast(ModuleType, _own_dense()).forward(x, weight, bias, weight.shape[0])

    @staticmethod
    def backward(ctx, dy):
        (x, weight), mask = ctx.saved_tensors, ctx.pattern.unchanged_mask()
        without_dispatch.check_saved(ctx.shapes, x, weight)
        needs_x, needs_weight, needs_bias, _ = ctx.needs_input_grad
        if not (without_dispatch.writable(dy) and weight.is_contiguous() and weight.dtype is x.dtype is dy.dtype):
            products = (masked_grad_input, _masked_grad_input), (masked_grad_weight, _masked_grad_weight)
            dx = without_dispatch.backward(*products[0], dy, weight, mask, [], True) if needs_x else None
            dw = without_dispatch.backward(*products[1], dy, x, mask, []) if needs_weight else None
            return dx, dw, dy.sum(0) if needs_bias else None, None
        ops.CALLS["masked_grad_input", OWN] += needs_x
        ops.CALLS["masked_grad_weight", OWN] += needs_weight
        needs = needs_x, needs_weight, needs_bias
        return *cast(ModuleType, _own_dense()).gradients(dy, x, weight, mask, None, needs), None


_apply: Any = single_level_apply(_Linear)  # where no transform of torch.func is at work
_apply_own: Any = single_level_apply(_OwnLinear)


class _GradInput(torch.autograd.Function):
    @staticmethod
    def forward(ctx, dy, weight, mask, premasked, *pattern):
        ctx.save_for_backward(dy, weight, mask, *pattern)
        ctx.premasked = premasked
        return without_dispatch.below(masked_grad_input, _masked_grad_input, dy, weight, mask, pattern, premasked)

    @staticmethod
    def backward(ctx, g):
        dy, weight, mask, *pattern = ctx.saved_tensors
        needs_dy, needs_weight = ctx.needs_input_grad[:2]
        ddy = masked_linear(g, weight, None, mask, pattern, ctx.premasked) if needs_dy else None
        dw = masked_grad_weight(dy, g, mask, pattern) if needs_weight else None
        return ddy, dw, *(None,) * (2 + len(pattern))


class _GradWeight(torch.autograd.Function):
    @staticmethod
    def forward(ctx, dy, x, mask, *pattern):
        ctx.save_for_backward(dy, x, mask, *pattern)
        return without_dispatch.below(masked_grad_weight, _masked_grad_weight, dy, x, mask, pattern)

    @staticmethod
    def backward(ctx, g):
        dy, x, mask, *pattern = ctx.saved_tensors
        needs_dy, needs_x = ctx.needs_input_grad[:2]
        ddy = masked_linear(x, g, None, mask, pattern, False) if needs_dy else None  # g is any tensor: not masked
        dx = masked_grad_input(dy, g, mask, pattern, False) if needs_x else None
        return ddy, dx, *(None,) * (1 + len(pattern))


ops.differentiate(
    "masked_linear",
    lambda x, weight, bias, mask, pattern, premasked: _Linear.apply(x, weight, bias, mask, pattern, premasked),
)
ops.differentiate(
    "masked_grad_input",
    lambda dy, weight, mask, pattern, premasked: _GradInput.apply(dy, weight, mask, premasked, *pattern),
)
ops.differentiate("masked_grad_weight", lambda dy, x, mask, pattern: _GradWeight.apply(dy, x, mask, *pattern))
for _op in (masked_linear, masked_grad_input, masked_grad_weight):
    ops.autocast(_op)
