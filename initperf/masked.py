"""MaskedLinear: an nn.Linear that trains only its survivors."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor, nn

from initperf import choice, direct, masked_ops, ops
from initperf.checks import FLOATS, InitPerfRuntimeError, InitPerfTypeError, check_mask, fail
from initperf.masked_layer import MaskedLayer


class MaskedLinear(MaskedLayer, nn.Linear):
    """y = x (W o M)^T + b: nn.Linear with a persistent bool buffer `weight_mask` (out_features, in_features), True = survives.

    x: (..., in_features), float32, bfloat16, float16 or float64. mask None: all survive. Checkpoints of nn.Linear load, and
    the mask that is here is applied to them; to_linear() gives an nn.Linear back.
    """

    DENSE = nn.Linear
    ATTRIBUTES = ("in_features", "out_features")

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        mask: Tensor | None = None,
    ) -> None:
        if mask is not None:
            check_mask(mask, (out_features, in_features))
        if dtype is not None and dtype not in FLOATS:
            fail("dtype float32, bfloat16, float16 or float64", dtype)
        super().__init__(in_features, out_features, bias, device, dtype)
        self._adopt(mask)

    @classmethod
    def from_linear(cls, linear: nn.Linear, mask: Tensor | None = None) -> MaskedLinear:
        """A masked layer on the same Parameter objects as `linear`, so an optimizer made before keeps working; they are masked in place."""
        return cls.on(linear, mask)

    def to_linear(self) -> nn.Linear:
        """An nn.Linear with copies of the weight, zeros included, and the bias."""
        return cast(nn.Linear, self.to_dense())

    def forward(self, input: Tensor) -> Tensor:
        pattern = self._pattern if torch.compiler.is_compiling() else self._fresh_pattern()
        found, mask = self._parameters.get, cast(Tensor, self._buffers["weight_mask"])  # sooner than attributes
        weight: Tensor = self.weight if (kept := found("weight")) is None else kept
        bias: Tensor | None = self.bias if (kept := found("bias")) is None else kept
        check_input(input, self.in_features, weight.dtype)
        check_bias(bias, weight, self.out_features)
        shape = input.shape
        if pattern.density == 1.0:  # nothing to mask, in the gradient either
            return nn.functional.linear(input, weight, bias)
        flat = input if len(shape) == 2 else input.reshape(math.prod(shape[:-1]), self.in_features)
        if not torch.compiler.is_compiling() and direct.transformed():
            # torch.func's transforms (vmap, jvp, grad) and forward-mode derivatives know torch's own product
            return nn.functional.linear(input, weight.masked_fill(~mask, 0), bias)
        rows, columns, own = self.out_features, self.in_features, self._is_own(weight)
        if direct.composed(flat, rows * columns, masked_ops.MOST_COMPOSED if own else direct.TINY) and choice.all_dense(
            "masked", len(flat), (rows, columns), pattern.nnz, weight.dtype
        ):
            if own and weight.is_cpu and weight.is_contiguous() and masked_ops.runs_few(len(flat), mask, weight.dtype):
                y = masked_ops.few_linear(flat, weight, bias, mask)
                return y if len(shape) == 2 else y.reshape(*shape[:-1], rows)
            ops.CALLS["masked_linear", "mkl"] += 1
            weight = pattern.premasked(weight) if own else torch.where(mask, weight, 0)
            return nn.functional.linear(input, weight, bias)
        y = masked_ops.linear(flat, weight, bias, mask, pattern.tensors, own)
        return y if len(shape) == 2 else y.reshape(*shape[:-1], self.out_features)


def check_bias(bias: Tensor | None, weight: Tensor, out_features: int) -> None:
    """Of the weight's dtype, device and outputs, as kernels that are handed addresses rely on."""
    if bias is None or (bias.dtype == weight.dtype and bias.shape == (out_features,) and bias.device == weight.device):
        return
    fail(
        f"a bias of shape ({out_features},), {weight.dtype}, on {weight.device}",
        f"shape {tuple(bias.shape)}, {bias.dtype}, on {bias.device}",
        kind=InitPerfRuntimeError,
    )


def check_input(input: object, in_features: int, dtype: torch.dtype) -> None:
    """A tensor (..., in_features) of the weight's dtype; under autocast, of any."""
    if not isinstance(input, Tensor):
        fail("an input of type torch.Tensor", type(input).__name__, kind=InitPerfTypeError)
    shape = input.shape
    if not shape or shape[-1] != in_features:
        fail(
            f"an input whose last dimension is {in_features} (in_features)",
            f"shape {tuple(shape)}",
            kind=InitPerfRuntimeError,
        )
    if input.dtype != dtype and not torch.is_autocast_enabled(input.device.type):
        fail(f"an input of the weight's dtype {dtype}", input.dtype, kind=InitPerfRuntimeError)
