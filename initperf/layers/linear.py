"""Linear layers that train only their survivors: MaskedLinear, an nn.Linear, and SparseLinear, whose pruned weights take
neither memory nor time."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor, nn

from initperf.core import ops, without_dispatch
from initperf.core.checks import FLOATS, InitPerfRuntimeError, InitPerfTypeError, check_mask, fail
from initperf.core.torch_private import transformed
from initperf.layers.base.masked import MaskedLayer
from initperf.layers.base.pattern import Way
from initperf.layers.base.sparse import SparseLayer
from initperf.layers.choice import table as choice
from initperf.layers.inference import ordered_copy
from initperf.layers.inference.ordered_copy import Kept
from initperf.layers.ops import masked_linear as masked_ops
from initperf.layers.ops import sparse_linear as sparse_ops


class MaskedLinear(MaskedLayer, nn.Linear):
    """y = x (W o M)^T + b: nn.Linear with a persistent bool buffer `weight_mask` (out_features, in_features), True = survives.

    x: (..., in_features), float32, bfloat16, float16 or float64. mask None: all survive. Checkpoints of nn.Linear load, and
    the mask that is here is applied to them; to_linear() gives an nn.Linear back.
    """

    DENSE = nn.Linear
    ATTRIBUTES = ("in_features", "out_features")

    _kept: Kept | None = None

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
        plain = without_dispatch.plain(input)
        compiling = not plain and torch.compiler.is_compiling()
        pattern = self._pattern if compiling else self._fresh_pattern()
        found = self._parameters.get  # sooner than attributes
        weight: Tensor = self.weight if (given := found("weight")) is None else given
        bias: Tensor | None = self.bias if (given := found("bias")) is None else given
        if plain and self._kept is not None and self._kept.copy is not None and torch.is_grad_enabled():
            self._kept.drop(ordered_copy.state_of(pattern, weight))
        if (
            plain
            and (way := pattern.way) is not None
            and (obeys := self._own) is not None
            and obeys() is weight
            and torch.is_grad_enabled()
            and _fits(way, input, weight, bias)
        ):  # as at the last call: sooner told
            return way[0](input, weight, bias, pattern)
        if not compiling and (
            weight.is_neg() or (bias is not None and bias.is_neg())
        ):  # a sign that kernels would not see
            weight, bias = weight.resolve_neg(), None if bias is None else bias.resolve_neg()
        mask: Any = self._buffers["weight_mask"]
        rows, columns = self.out_features, self.in_features
        check_input(input, columns, weight.dtype, weight.is_cpu)
        check_bias(bias, weight, rows)
        if not compiling and weight.shape != mask.shape:
            fail(f"a weight of shape {tuple(mask.shape)}", tuple(weight.shape), kind=InitPerfRuntimeError)
        shape = input.shape
        flat = input if len(shape) == 2 else input.reshape(math.prod(shape[:-1]), columns)
        if not (plain or compiling) and transformed():
            # torch.func's transforms (vmap, jvp, grad) and forward-mode derivatives know torch's own product
            return nn.functional.linear(input, weight.masked_fill(~mask, 0), bias)
        own = self._is_own(weight)
        if (
            plain
            and own
            and rows * columns >= ordered_copy.LEAST
            and not torch.is_grad_enabled()
            and (y := ordered_copy.linear(self, "masked", flat, bias, pattern, weight, weight.stride())) is not None
        ):
            return y if len(shape) == 2 else y.reshape(*shape[:-1], rows)
        runs_own = own and plain and masked_ops.runs_own(flat.shape[0], mask, weight)
        if pattern.density == 1.0 and not runs_own:  # nothing to mask, in the gradient either
            return nn.functional.linear(input, weight, bias)
        if (
            plain
            and flat.is_cpu
            and rows * columns <= (masked_ops.MOST_COMPOSED if own else without_dispatch.TINY)
            and torch.is_grad_enabled()
            and choice.all_dense("masked", flat.shape[0], (rows, columns), pattern.nnz, weight.dtype)
        ):
            if own:
                product = masked_ops.own_linear if runs_own else masked_ops.torch_linear
                if flat is input:
                    of_bias = None if bias is None else bias.shape
                    pattern.way = product, input.shape, input.dtype, of_bias, choice.setting()
                y = product(flat, weight, bias, pattern)
            else:
                ops.CALLS["masked_linear", "mkl"] += 1
                y = nn.functional.linear(flat, torch.where(mask, weight, 0), bias)
        else:
            op = masked_ops.linear if plain else masked_ops.masked_linear
            y = op(flat, weight, bias, mask, pattern.tensors, own)
        return y if len(shape) == 2 else y.reshape(*shape[:-1], rows)


def _fits(way: Way, input: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether operands are as they were when a layer with the same mask found out which product runs, on the CPU."""
    product, shape, dtype, of_bias, setting = way
    if product is masked_ops.torch_linear:  # which looks at dtypes and devices itself
        fits = input.shape == shape and input.dtype is dtype and (None if bias is None else bias.shape) == of_bias
        return fits and choice.setting() == setting
    return (
        input.shape == shape
        and input.dtype is dtype
        and weight.dtype is dtype
        and input.is_cpu
        and (
            of_bias is None
            if bias is None
            else bias.shape == of_bias and bias.dtype is dtype and bias.is_cpu and not bias.is_neg()
        )
        and choice.setting() == setting
    )


def check_bias(bias: Tensor | None, weight: Tensor, out_features: int) -> None:
    """Of the weight's dtype, device and outputs, as kernels that are handed addresses rely on."""
    if bias is None or (
        bias.dtype is weight.dtype
        and bias.shape == (out_features,)
        and ((bias.is_cpu and weight.is_cpu) or bias.device.type == weight.device.type)  # the first is sooner told
    ):
        return
    fail(
        f"a bias of shape ({out_features},), {weight.dtype}, on {weight.device}",
        f"shape {tuple(bias.shape)}, {bias.dtype}, on {bias.device}",
        kind=InitPerfRuntimeError,
    )


def check_input(input: object, in_features: int, dtype: torch.dtype, on_cpu: bool) -> None:
    """A tensor (..., in_features) of the weight's dtype, or under autocast of any, on the CPU if the weight is."""
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
    if input.is_cpu != on_cpu and not input.is_meta:
        fail("an input on the weight's device", input.device, kind=InitPerfRuntimeError)


class SparseLinear(SparseLayer):
    """y = x W^T + b, of which only the survivors are stored: `weight_values` (nnz, 1), with gradient and optimizer state of that shape.

    x: (..., in_features), float32, bfloat16, float16 or float64. mask: bool (out_features, in_features), True = survives;
    None: all. Checkpoints of nn.Linear, MaskedLinear and torch.nn.utils.prune load too. Elementwise optimizers (SGD, Adam and
    kin) only; see SparseLayer for changes of the mask.
    """

    DENSE = nn.Linear
    MASKED = MaskedLinear
    ATTRIBUTES = ("in_features", "out_features")

    in_features: int
    out_features: int
    _kept: Kept | None = None

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
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        nnz = in_features * out_features if mask is None else int(mask.count_nonzero())
        self.weight_values = nn.Parameter(torch.empty(nnz, 1, device=device, dtype=dtype))
        own = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        self.register_parameter("bias", own)
        self._adopt(mask)
        self.reset_parameters()

    @classmethod
    def from_linear(cls, linear: nn.Linear, mask: Tensor | None = None) -> SparseLinear:
        """A compressed copy of `linear`, which stays as it is. sparsify(..., sparse=True) keeps the Parameter objects instead."""
        return cls._from_dense_layer(linear, mask)

    @property
    def weight_shape(self) -> torch.Size:
        """(out_features, in_features)."""
        return torch.Size((self.out_features, self.in_features))

    def to_dense(self) -> nn.Linear:
        """An nn.Linear with copies of the survivors, zeros elsewhere, and the bias."""
        return cast(nn.Linear, super().to_dense())

    def forward(self, input: Tensor) -> Tensor:
        plain = without_dispatch.plain(input)
        compiling = not plain and torch.compiler.is_compiling()
        pattern: Any = self._pattern if compiling else self._fresh_pattern()
        own, bits = self._parameters.get, cast(Tensor, self._buffers["weight_mask_bits"])  # sooner than attributes
        values: Tensor = self.weight_values if (found := own("weight_values")) is None else found
        bias: Tensor | None = self.bias if (found := own("bias")) is None else found
        if not compiling and (
            values.is_neg() or (bias is not None and bias.is_neg())
        ):  # a sign that kernels would not see
            values, bias = values.resolve_neg(), None if bias is None else bias.resolve_neg()
        check_input(input, self.in_features, values.dtype, values.is_cpu)
        check_bias(bias, values, self.out_features)
        if not compiling and values.shape[0] != pattern.nnz and not values.is_meta:
            fail(f"weight_values of the mask's {pattern.nnz} survivors", len(values), kind=InitPerfRuntimeError)
        shape = input.shape
        rows, columns = self.out_features, self.in_features
        if not (plain or compiling) and transformed():
            # torch.func's transforms (vmap, jvp, grad) and forward-mode derivatives know torch's own product
            weight = _expanded(values, self.weight_mask.flatten().nonzero().squeeze(1), rows, columns)
            return nn.functional.linear(input, weight, bias)
        flat = input if len(shape) == 2 else input.reshape(math.prod(shape[:-1]), columns)
        if plain and torch.is_grad_enabled():
            self.leave_inference(values)
        elif plain and rows * columns >= ordered_copy.LEAST and pattern.tensors:
            more = pattern.tensors[2].data_ptr(), pattern.nnz, 0
            if (y := ordered_copy.linear(self, "sparse", flat, bias, pattern, values, more)) is not None:
                return y if len(shape) == 2 else y.reshape(*shape[:-1], rows)
        if (
            plain
            and torch.is_grad_enabled()
            and rows * columns <= without_dispatch.TINY
            and flat.is_cpu
            and sparse_ops.own(flat) is None
            and choice.all_dense("sparse", len(flat), (rows, columns), pattern.nnz, values.dtype)
        ):
            ops.CALLS["sparse_linear", "mkl"] += 1
            return nn.functional.linear(input, _expanded(values, pattern.places, rows, columns), bias)
        op = sparse_ops.linear if plain else sparse_ops.sparse_linear
        y = op(flat, values, bias, bits, rows, pattern.tensors)
        return y if len(shape) == 2 else y.reshape(*shape[:-1], rows)

    def leave_inference(self, values: Tensor) -> None:
        """Give back what inference keeps (initperf/layers/inference/ordered_copy.py), before a step of training with these values."""
        if self._kept is not None and self._kept.copy is not None:
            self._kept.drop(ordered_copy.state_of(self._pattern, values))

    def extra_repr(self) -> str:
        sizes = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        return f"{sizes}, {super().extra_repr()}"


def _expanded(values: Tensor, places: Tensor, rows: int, columns: int) -> Tensor:
    """The dense weight of values (nnz, 1) at positions `places`, by an op of torch whose gradient is the values'."""
    return values.new_zeros(rows * columns).scatter(0, places, values.flatten()).view(rows, columns)
