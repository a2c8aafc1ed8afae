"""A run of small compressed layers in training: one autograd.Function for all of them, with its backward written by hand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from initperf.core import ops, without_dispatch
from initperf.core.checks import InitPerfRuntimeError, fail
from initperf.core.torch_private import single_level_apply
from initperf.layers.base.pattern import Pattern, version_of
from initperf.layers.ops import sparse_linear as sparse_ops

Parameters = Sequence[Tensor | None]  # values and bias or None, layer by layer
ops.register("sparse_chain_training", "chain.training")


class Run(NamedTuple):
    """What the layers are, but for their parameters."""

    plan: Any  # kernels/cpu/chain/training.py
    shapes: list[tuple[int, int]]  # of the weights
    parameters: Sequence[tuple[int, ...]]  # shapes of values and bias, layer by layer
    relus: list[bool]
    bits: list[Tensor]
    patterns: list[Pattern]


def fits(run: Run, parameters: Parameters) -> bool:
    """Whether the kernels may be handed the memory of these parameters, the values and biases (or None) of all layers."""
    dtype = run.plan.dtype
    for p, shape in zip(parameters, run.parameters, strict=True):
        if p is None:
            continue
        kind = type(p)
        if not (
            (kind is nn.Parameter or kind is Tensor)
            and p.dtype is dtype
            and p.shape == shape
            and p.is_contiguous()
            and p.is_cpu
            and not p.is_neg()
        ):
            return False
    return True


class _Chain(torch.autograd.Function):
    @staticmethod
    def forward(ctx, run, x, *parameters):
        y, tiles = run.plan.forward(x, parameters)
        needs_x = any(ctx.needs_input_grad[1:3])  # for the first layer's values, too
        ctx.save_for_backward(tiles, *parameters[::2], *([x] if needs_x else ()))
        # Not saved, since they may change before the backward pass, as torch's may: needed only for gradients of gradients.
        ctx.held = [None if needs_x else x, *parameters[1::2]]
        ctx.versions = [0 if held is None else version_of(held) for held in ctx.held]
        ctx.run, ctx.shapes = run, (tiles.shape, *run.parameters[::2], *([x.shape] if needs_x else ()))
        return y

    @staticmethod
    def backward(ctx, dy):
        run, needs = ctx.run, ctx.needs_input_grad[1:]
        saved = ctx.saved_tensors
        without_dispatch.check_saved(ctx.shapes, *saved)
        layers = len(run.shapes)
        tiles, values, x = saved[0], saved[1 : 1 + layers], saved[-1] if len(saved) > 1 + layers else None
        for pattern, bits in zip(run.patterns, run.bits, strict=True):
            if not pattern.is_of(bits):
                fail(
                    "the mask of the forward pass in its backward pass",
                    "one that was changed in between",
                    kind=InitPerfRuntimeError,
                )
        if not (without_dispatch.writable(dy) and _as_saved(run.plan, dy, tiles, values)):
            return None, *_by_layers(ctx, x, values, dy, needs)
        ops.CALLS["sparse_chain_backward", "numba"] += 1
        dx, gradients = run.plan.backward(dy.contiguous(), tiles, values, needs[0], needs[1:])
        return None, dx, *gradients


def _as_saved(plan: Any, dy: Tensor, tiles: Tensor, values: Sequence[Tensor]) -> bool:
    """Whether nothing has another dtype or device now, or is not contiguous, as hooks of saved tensors could give it."""
    dtype = plan.dtype
    if not (dy.dtype is dtype and tiles.is_cpu and tiles.dtype is plan.compute and tiles.is_contiguous()):
        return False
    return all(value.is_cpu and value.dtype is dtype and value.is_contiguous() for value in values)


def _by_layers(
    ctx: Any, x: Tensor | None, values: Sequence[Tensor], dy: Tensor, needs: Sequence[bool]
) -> list[Tensor | None]:
    """The gradients by ops that have gradients themselves, of activations that are computed again."""
    run: Run = ctx.run
    if any(held is not None and version_of(held) != v for held, v in zip(ctx.held, ctx.versions, strict=True)):
        fail("input and biases of the forward pass", "ones that were changed in between", kind=InitPerfRuntimeError)
    entering: list[Tensor] = [ctx.held[0] if x is None else x]
    for value, bias, bit, (N, _), pattern, relu in zip(
        values, ctx.held[1:], run.bits, run.shapes, run.patterns, run.relus, strict=True
    ):
        h = sparse_ops.sparse_linear(entering[-1], value, bias, bit, N, pattern.tensors)
        entering.append(h.relu() if relu else h)
    gradients: list[Tensor | None] = [None] * len(needs)
    for i in reversed(range(len(values))):
        if run.relus[i]:
            dy = torch.ops.aten.threshold_backward(dy, entering[i + 1], 0)
        needs_values, needs_bias = needs[1 + 2 * i : 3 + 2 * i]
        args = values[i], run.bits[i], run.patterns[i].tensors
        if needs_bias:
            gradients[2 + 2 * i] = dy.sum(0)
        if needs_values:
            gradients[1 + 2 * i] = sparse_ops.values_gradient(dy, entering[i], *args)
        if not any(needs[: 1 + 2 * i]):
            break
        dy = sparse_ops.input_gradient(dy, *args, run.shapes[i][1])
    else:
        gradients[0] = dy
    return gradients


_apply: Any = single_level_apply(_Chain)  # where no transform of torch.func is at work


def train(run: Run, x: Tensor, parameters: Parameters) -> Tensor:
    """What the layers make of a contiguous x (B, inputs), B > 0, of their dtype, for parameters that fit."""
    ops.CALLS["sparse_chain_training", "numba"] += 1
    y: Tensor = _apply(run, x, *parameters)
    return y
