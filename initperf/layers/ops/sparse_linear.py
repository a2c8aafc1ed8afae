"""The three products of a compressed weight as torch ops, closed under backward: each one's gradients are the other two.

    initperf::sparse_linear        y       = x W^T + b
    initperf::sparse_grad_input    dx      = dy W
    initperf::sparse_grad_values   dvalues = dy^T x at the survivors

Shapes and arguments: kernels/reference/linear/sparse_linear.py. As in initperf/layers/ops/masked_linear.py, autograd is written by hand.
"""

from __future__ import annotations

from functools import cache
from types import ModuleType
from typing import Any, cast

import torch
from torch import Tensor

from initperf.core import ops, without_dispatch
from initperf.core.torch_private import single_level_apply
from initperf.layers.choice import table as choice

_DENSE = {"cpu": "mkl", "cuda": "cublas"}
OWN = "numba-dense"  # as what our own dense products are counted


def linear(x: Tensor, values: Tensor, bias: Tensor | None, bits: Tensor, rows: int, pattern: list[Tensor]) -> Tensor:
    """The op sparse_linear for a plain x: without the dispatcher, since nothing could tell the difference."""
    if torch.is_grad_enabled() and (
        x.requires_grad or values.requires_grad or (bias is not None and bias.requires_grad)
    ):
        if own(x) is not None and choice.all_dense("sparse", x.shape[0], (rows, x.shape[1]), values.shape[0], x.dtype):
            return _apply_own(x, values, bias, bits, rows, pattern)
        return _apply(x, values, bias, bits, rows, pattern)
    return _sparse_linear(x, values, bias, bits, rows, pattern)


@cache
def _kernels(device: str) -> ModuleType | None:
    """The module with the dense products of a device; None where the reference runs anyway, and is counted as that."""
    backend = ops.backend_of("sparse_linear", device)
    if backend == "numba":
        from initperf.kernels.cpu.linear import sparse_linear as cpu

        return cpu
    if backend == "triton":
        from initperf.kernels.gpu.linear import sparse_linear as gpu

        return gpu
    return None


def own(like: Tensor) -> ModuleType | None:
    """The module of our own dense products, if they run for tensors like this one: on the CPU, and if it has AVX-512."""
    return _own_dense() if like.is_cpu and like.dtype is torch.float32 else None


@cache
def _own_dense() -> ModuleType | None:
    kernels = _kernels("cpu")
    return kernels.dense if kernels is not None and kernels.dense.expands(torch.float32) else None


def _dense(
    name: str, rows: int, shape: tuple[int, int], nnz: int, like: Tensor, pattern: list[Tensor]
) -> ModuleType | None:
    """The module of the dense products, where one of those runs; it is counted."""
    device = "cpu" if like.is_cpu else like.device.type  # the first is sooner told
    kernels = _kernels(device)
    if kernels is None or (pattern and choice.sparse_pays(name, rows, shape, nnz, like.dtype, device)):
        return None
    ops.CALLS[name, _DENSE[device] if own(like) is None else OWN] += 1
    return kernels


def _sparse_linear(
    x: Tensor, values: Tensor, bias: Tensor | None, bits: Tensor, rows: int, pattern: list[Tensor]
) -> Tensor:
    values = values.contiguous()
    dense = _dense("sparse_linear", x.shape[0], (rows, x.shape[1]), values.shape[0], x, pattern)
    if dense is not None:
        return dense.dense_linear(x, values, bias, bits, rows)
    return ops.implementation("sparse_linear", x.device.type)(x, values, bias, bits, rows, pattern)


def _sparse_grad_input(dy: Tensor, values: Tensor, bits: Tensor, columns: int, pattern: list[Tensor]) -> Tensor:
    values = values.contiguous()
    dense = _dense("sparse_grad_input", dy.shape[0], (dy.shape[1], columns), values.shape[0], dy, pattern)
    if dense is not None:
        return dense.dense_grad_input(dy, values, bits, columns)
    return ops.implementation("sparse_grad_input", dy.device.type)(dy, values, bits, columns, pattern)


def _sparse_grad_values(dy: Tensor, x: Tensor, bits: Tensor, nnz: int, pattern: list[Tensor]) -> Tensor:
    dense = _dense("sparse_grad_values", dy.shape[0], (dy.shape[1], x.shape[1]), nnz, x, pattern)
    if dense is not None:
        return dense.dense_grad_values(dy, x, bits, nnz)
    return ops.implementation("sparse_grad_values", x.device.type)(dy, x, bits, pattern)


def _reference_grad_values(dy: Tensor, x: Tensor, bits: Tensor, nnz: int, pattern: list[Tensor]) -> Tensor:
    return ops.reference(sparse_grad_values)(dy, x, bits, pattern)


sparse_linear = ops.define(
    "sparse_linear(Tensor x, Tensor values, Tensor? bias, Tensor bits, int rows, Tensor[] pattern) -> Tensor",
    module="linear.sparse_linear",
    run=_sparse_linear,
    fake=lambda x, values, bias, bits, rows, pattern: x.new_empty(x.shape[0], rows),
)
sparse_grad_input = ops.define(
    "sparse_grad_input(Tensor dy, Tensor values, Tensor bits, int columns, Tensor[] pattern) -> Tensor",
    module="linear.sparse_linear",
    run=_sparse_grad_input,
    fake=lambda dy, values, bits, columns, pattern: dy.new_empty(dy.shape[0], columns),
)
sparse_grad_values = ops.define(
    "sparse_grad_values(Tensor dy, Tensor x, Tensor bits, int nnz, Tensor[] pattern) -> Tensor",
    module="linear.sparse_linear",
    run=_sparse_grad_values,
    fake=lambda dy, x, bits, nnz, pattern: x.new_empty(nnz, 1),
)


def input_gradient(dy: Tensor, values: Tensor, bits: Tensor, pattern: list[Tensor], columns: int) -> Tensor:
    """dx, as a backward pass computes it: with gradients of its own under create_graph, and of many dy at once."""
    return without_dispatch.backward(sparse_grad_input, _sparse_grad_input, dy, values, bits, columns, pattern)


def values_gradient(dy: Tensor, x: Tensor, values: Tensor, bits: Tensor, pattern: list[Tensor]) -> Tensor:
    """The gradient of the values, likewise."""
    args = dy, x, bits, values.shape[0], pattern
    return without_dispatch.backward(sparse_grad_values, _sparse_grad_values, *args, reference=_reference_grad_values)


class _Linear(torch.autograd.Function):
    """The pattern is a list, which autograd passes on unseen: six tensors less to wrap in every call."""

    @staticmethod
    def forward(ctx, x, values, bias, bits, rows, pattern):
        ctx.save_for_backward(x, values, bits)
        ctx.pattern, ctx.shapes = pattern, (x.shape, values.shape)
        return without_dispatch.below(sparse_linear, _sparse_linear, x, values, bias, bits, rows, pattern)

    @staticmethod
    def backward(ctx, dy):
        x, values, bits = ctx.saved_tensors
        without_dispatch.check_saved(ctx.shapes, x, values)
        pattern = ctx.pattern
        needs_x, needs_values, needs_bias = ctx.needs_input_grad[:3]
        db = dy.sum(0) if needs_bias else None
        if without_dispatch.writable(dy):  # asked once for both products
            dx = _sparse_grad_input(dy, values, bits, x.shape[1], pattern) if needs_x else None
            dv = _sparse_grad_values(dy, x, bits, values.shape[0], pattern) if needs_values else None
            return dx, dv, db, None, None, None
        dx = input_gradient(dy, values, bits, pattern, x.shape[1]) if needs_x else None
        dv = values_gradient(dy, x, values, bits, pattern) if needs_values else None
        return dx, dv, db, None, None, None


class _OwnLinear(torch.autograd.Function):
    """_Linear where all three products are our own dense ones, which take a few microseconds: less to look up in every step."""

    @staticmethod
    def forward(ctx, x, values, bias, bits, rows, pattern):
        ctx.save_for_backward(x, values, bits)
        ctx.pattern, ctx.shapes = pattern, (x.shape, values.shape)
        ops.CALLS["sparse_linear", OWN] += 1
        return cast(ModuleType, own(x)).forward(x, values.contiguous(), bias, rows, bits)

    @staticmethod
    def backward(ctx, dy):
        x, values, bits = ctx.saved_tensors
        without_dispatch.check_saved(ctx.shapes, x, values)
        if not (without_dispatch.writable(dy) and values.dtype is x.dtype is dy.dtype):
            return _Linear.backward(ctx, dy)
        needs_x, needs_values, needs_bias, *_ = ctx.needs_input_grad
        ops.CALLS["sparse_grad_input", OWN] += needs_x
        ops.CALLS["sparse_grad_values", OWN] += needs_values
        needs = needs_x, needs_values, needs_bias
        return *cast(ModuleType, own(x)).gradients(dy, x, values.contiguous(), None, bits, needs), None, None, None


_apply: Any = single_level_apply(_Linear)  # where no transform of torch.func is at work
_apply_own: Any = single_level_apply(_OwnLinear)


class _GradInput(torch.autograd.Function):
    @staticmethod
    def forward(ctx, dy, values, bits, columns, *pattern):
        ctx.save_for_backward(dy, values, bits, *pattern)
        return without_dispatch.below(sparse_grad_input, _sparse_grad_input, dy, values, bits, columns, pattern)

    @staticmethod
    def backward(ctx, g):
        dy, values, bits, *pattern = ctx.saved_tensors
        needs_dy, needs_values = ctx.needs_input_grad[:2]
        ddy = sparse_linear(g, values, None, bits, dy.shape[1], pattern) if needs_dy else None
        dv = sparse_grad_values(dy, g, bits, values.shape[0], pattern) if needs_values else None
        return ddy, dv, *(None,) * (2 + len(pattern))


class _GradValues(torch.autograd.Function):
    @staticmethod
    def forward(ctx, dy, x, bits, nnz, *pattern):
        ctx.save_for_backward(dy, x, bits, *pattern)
        return without_dispatch.below(sparse_grad_values, _sparse_grad_values, dy, x, bits, nnz, pattern)

    @staticmethod
    def backward(ctx, g):
        dy, x, bits, *pattern = ctx.saved_tensors
        needs_dy, needs_x = ctx.needs_input_grad[:2]
        ddy = sparse_linear(x, g, None, bits, dy.shape[1], pattern) if needs_dy else None
        dx = sparse_grad_input(dy, g, bits, x.shape[1], pattern) if needs_x else None
        return ddy, dx, *(None,) * (2 + len(pattern))


ops.differentiate(
    "sparse_linear",
    lambda x, values, bias, bits, rows, pattern: _Linear.apply(x, values, bias, bits, rows, pattern),
)
ops.differentiate(
    "sparse_grad_input",
    lambda dy, values, bits, columns, pattern: _GradInput.apply(dy, values, bits, columns, *pattern),
)
ops.differentiate("sparse_grad_values", lambda dy, x, bits, nnz, pattern: _GradValues.apply(dy, x, bits, nnz, *pattern))
for _op in (sparse_linear, sparse_grad_input, sparse_grad_values):
    ops.autocast(_op)
