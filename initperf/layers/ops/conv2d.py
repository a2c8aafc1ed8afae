"""A masked convolution and its two gradients as torch ops, closed under backward; each runs sparse or dense, by conv_pays.

    initperf::masked_conv2d              y  = x * (W o M) + b
    initperf::masked_conv2d_grad_input   dx
    initperf::masked_conv2d_grad_weight  dW, at survivors only

Shapes and arguments: kernels/reference/conv/conv2d.py. The weight is stored dense or as its survivors' values alone.
"""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import Tensor

from initperf.core import ops, without_dispatch
from initperf.core.bits import pack_bits
from initperf.kernels.reference.conv import conv2d as reference
from initperf.kernels.reference.conv.conv2d import Ints
from initperf.layers.base.pattern import Pattern
from initperf.layers.choice import table as choice
from initperf.layers.choice.table import MOST

ops.register("conv_pattern_tensors", "conv.conv2d")

_DENSE = {"cpu": "onednn", "cuda": "cudnn"}
_LANES = 16  # images that the sparse kernel computes at once

# Break-even densities of the sparse kernel against oneDNN, float32, full lanes, 3 x 3 on 8 x 8 to 32 x 32 pixels. Measured on
# 2 threads of a Zen 5 with AVX-512: 0.6, 0.6 and 0.5, by batch about proportional to the lanes filled; a quarter is held
# back for other machines.
BREAK_EVEN = {"masked_conv2d": 0.45, "masked_conv2d_grad_input": 0.45, "masked_conv2d_grad_weight": 0.38}


class ConvPattern(Pattern):
    """What a mask (N, C / groups, height, width) means to the kernels of convolutions.

    source: the mask, or its packed bits where only values are stored. survivors: what the ops take: the mask, or then the
    survivors' positions in the flat weight, int32.
    """

    masked = ("masked_conv2d_grad_weight", "onednn")

    def __init__(self, source: Tensor, mask: Tensor, groups: int) -> None:
        compressed = source is not mask
        if not compressed:
            self.mask = mask
        super().__init__(source, source.clone() if compressed else pack_bits(source))
        self.nnz = 0 if mask.is_meta else int(torch.count_nonzero(mask))
        self.density = self.nnz / mask.numel() if mask.numel() else 1.0
        self.survivors = mask.flatten().nonzero().flatten().to(torch.int32) if compressed else mask
        self.tensors = []
        if mask.device.type == "cpu" and 0 < self.density < MOST and mask.numel() < 2**31:
            self.tensors = ops.implementation("conv_pattern_tensors", "cpu")(mask, groups, compressed)

    def _packed(self, source: Tensor) -> Tensor:
        return pack_bits(source) if source.dtype == torch.bool else source


def conv_pays(
    kind: str, batch: int, out: Ints, shape: Ints, nnz: int, dtype: torch.dtype, device: str, stride: Ints
) -> bool:
    """Whether the sparse kernel runs for `kind` (of BREAK_EVEN), or the dense convolution.

    out: height and width of y, for the input gradient of x; shape: of the dense weight; nnz: survivors.
    """
    if device != "cpu" or dtype != torch.float32 or not batch or min(out) < 1 or not nnz:
        return False
    if stride[1] > 2 or (kind == "masked_conv2d_grad_input" and tuple(stride) != (1, 1)):
        return False
    if choice._mode != "auto":
        return choice._mode == "sparse"
    tile = next(v for v in (8, 4, 2, 1) if v <= out[1])
    filled = batch / (-(-batch // _LANES) * _LANES) * out[1] / (-(-out[1] // tile) * tile) * min(1.0, (tile + 2) / 8)
    return nnz < BREAK_EVEN[kind] * filled * prod(shape)


def _run(name: str, batch: int, out: Ints, pattern: list[Tensor], shape: Ints, stride: Ints, *args: Any) -> Tensor:
    if not _is_dense(name, batch, out, pattern, shape, stride, args[0]):
        return ops.implementation(name, args[0].device.type)(*args)
    ops.CALLS[name, _DENSE[args[0].device.type]] += 1
    return getattr(reference, name)(*args)


def _is_dense(name: str, batch: int, out: Ints, pattern: list[Tensor], shape: Ints, stride: Ints, like: Tensor) -> bool:
    """Whether torch's own convolution runs, and is counted as that."""
    if like.device.type not in _DENSE or ops.backend_of(name, "cpu") == "reference":
        return False
    nnz = pattern[1].numel() if pattern else 0
    return not (pattern and conv_pays(name, batch, out, shape, nnz, like.dtype, like.device.type, stride))


def conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None, survivors: Tensor, pattern: ConvPattern, *rest: Any
) -> Tensor:
    """The op masked_conv2d, without a dispatch to Python where nothing could tell the difference."""
    index = pattern.tensors
    if not without_dispatch.plain(x):
        return masked_conv2d(x, weight, bias, survivors, index, *rest)
    if not torch.is_grad_enabled() or not (
        x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    ):
        return _masked_conv2d(x, weight, bias, survivors, index, *rest)
    shape, stride, padding, dilation, groups, premasked = rest
    if premasked and x.is_cpu:
        out = _out_size(x.shape[2:], shape, stride, padding, dilation)
        sizes = {"masked_conv2d": out, "masked_conv2d_grad_input": x.shape[2:], "masked_conv2d_grad_weight": out}
        if all(_is_dense(kind, len(x), size, index, shape, stride, x) for kind, size in sizes.items()):
            ops.CALLS["masked_conv2d", _DENSE["cpu"]] += 1
            return torch.conv2d(x, pattern.premasked(weight), bias, stride, padding, dilation, groups)
    return _Conv2d.apply(x, weight, bias, survivors, index, *rest)


def _out_size(size: Ints, shape: Ints, stride: Ints, padding: Ints, dilation: Ints) -> list[int]:
    return [
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, k, s, p, d in zip(size, shape[2:], stride, padding, dilation, strict=True)
    ]


def _masked_conv2d(x, weight, bias, survivors, pattern, shape, stride, padding, dilation, groups, premasked):
    geometry = (shape, stride, padding, dilation, groups)
    out = _out_size(x.shape[2:], shape, stride, padding, dilation)
    args = (x, weight, bias, survivors, pattern, *geometry, premasked)
    return _run("masked_conv2d", len(x), out, pattern, shape, stride, *args)


def _grad_input(dy, weight, survivors, pattern, shape, size, stride, padding, dilation, groups, premasked):
    args = (dy, weight, survivors, pattern, shape, size, stride, padding, dilation, groups, premasked)
    return _run("masked_conv2d_grad_input", len(dy), size, pattern, shape, stride, *args)


def _grad_weight(dy, x, survivors, pattern, shape, stride, padding, dilation, groups):
    name, geometry = "masked_conv2d_grad_weight", (stride, padding, dilation, groups)
    if _is_dense(name, len(dy), dy.shape[2:], pattern, shape, stride, dy):
        ops.CALLS[name, _DENSE[dy.device.type]] += 1
        return _stored(reference.dense_grad_weight(dy, x, shape, *geometry), survivors)
    return ops.implementation(name, dy.device.type)(dy, x, survivors, pattern, shape, *geometry)


_GEOMETRY = "SymInt[] shape, int[] stride, int[] padding, int[] dilation, int groups"
masked_conv2d = ops.define(
    f"masked_conv2d(Tensor x, Tensor weight, Tensor? bias, Tensor survivors, Tensor[] pattern, {_GEOMETRY}, bool premasked)"
    " -> Tensor",
    module="conv.conv2d",
    run=_masked_conv2d,
    fake=lambda x, weight, bias, survivors, pattern, shape, stride, padding, dilation, groups, premasked: x.new_empty(
        x.shape[0], shape[0], *_out_size(x.shape[2:], shape, stride, padding, dilation)
    ),
)
masked_conv2d_grad_input = ops.define(
    "masked_conv2d_grad_input(Tensor dy, Tensor weight, Tensor survivors, Tensor[] pattern, "
    f"{_GEOMETRY.replace('shape', 'shape, SymInt[] size', 1)}, bool premasked) -> Tensor",
    module="conv.conv2d",
    run=_grad_input,
    fake=lambda dy, weight, survivors, pattern, shape, size, stride, padding, dilation, groups, premasked: dy.new_empty(
        dy.shape[0], shape[1] * groups, *size
    ),
)
masked_conv2d_grad_weight = ops.define(
    f"masked_conv2d_grad_weight(Tensor dy, Tensor x, Tensor survivors, Tensor[] pattern, {_GEOMETRY}) -> Tensor",
    module="conv.conv2d",
    run=_grad_weight,
    fake=lambda dy, x, survivors, pattern, shape, stride, padding, dilation, groups: (
        x.new_empty(shape) if survivors.dtype == torch.bool else x.new_empty(survivors.shape[0], 1)
    ),
)


def _both_dense(dy: Tensor, x: Tensor, pattern: list[Tensor], shape: Ints, stride: Ints) -> bool:
    """Whether both gradients are torch's own, and nothing but autograd could tell that they come from one call."""
    return (
        not torch.is_grad_enabled()
        and without_dispatch.plain(dy)
        and _is_dense("masked_conv2d_grad_input", len(dy), x.shape[2:], pattern, shape, stride, dy)
        and _is_dense("masked_conv2d_grad_weight", len(dy), dy.shape[2:], pattern, shape, stride, dy)
    )


def _dense_backward(dy, x, weight, survivors, shape, geometry, premasked, needs_bias):
    """Gradients of x, weight and bias by one call instead of three."""
    dense = reference.dense_weight(weight, survivors, shape, premasked)
    *spatial, groups = geometry
    rest = (*map(list, spatial), False, [0, 0], groups, [True, True, needs_bias])
    dx, dw, db = torch.ops.aten.convolution_backward(dy, x, dense, [shape[0]] if needs_bias else None, *rest)
    for name in ("masked_conv2d_grad_input", "masked_conv2d_grad_weight"):
        ops.CALLS[name, _DENSE[dy.device.type]] += 1
    return dx, _stored(dw, survivors), db


def _stored(dw: Tensor, survivors: Tensor) -> Tensor:
    """reference.stored; a mask on the CPU by our kernel."""
    if survivors.dtype != torch.bool or not dw.is_cpu or not dw.is_contiguous():
        return reference.stored(dw, survivors)
    from initperf.kernels.cpu.masks.zero_pruned import zero_pruned

    return zero_pruned(dw, survivors)


class _Conv2d(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, survivors, pattern, *rest):
        ctx.save_for_backward(x, weight, survivors, *pattern)
        ctx.rest, ctx.shapes = rest, (x.shape, weight.shape)
        return without_dispatch.below(masked_conv2d, _masked_conv2d, x, weight, bias, survivors, pattern, *rest)

    @staticmethod
    def backward(ctx, dy):
        x, weight, survivors, *pattern = ctx.saved_tensors
        without_dispatch.check_saved(ctx.shapes, x, weight)
        shape, *geometry, premasked = ctx.rest
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        dx = dw = None
        if all(ctx.needs_input_grad[:2]) and _both_dense(dy, x, pattern, shape, geometry[0]):
            grads = _dense_backward(dy, x, weight, survivors, shape, geometry, premasked, needs_bias)
            return *grads, *(None,) * (2 + len(ctx.rest))
        if needs_x:
            args = (dy, weight, survivors, pattern, shape, x.shape[2:], *geometry, premasked)
            dx = without_dispatch.backward(masked_conv2d_grad_input, _grad_input, *args)
        if needs_weight:
            dw = without_dispatch.backward(
                masked_conv2d_grad_weight, _grad_weight, dy, x, survivors, pattern, shape, *geometry
            )
        return dx, dw, dy.sum((0, 2, 3)) if needs_bias else None, *(None,) * (2 + len(ctx.rest))


class _GradInput(torch.autograd.Function):
    @staticmethod
    def forward(ctx, dy, weight, survivors, pattern, shape, size, *rest):
        ctx.save_for_backward(dy, weight, survivors, *pattern)
        ctx.rest = (shape, *rest)
        args = (dy, weight, survivors, pattern, shape, size, *rest)
        return without_dispatch.below(masked_conv2d_grad_input, _grad_input, *args)

    @staticmethod
    def backward(ctx, g):
        dy, weight, survivors, *pattern = ctx.saved_tensors
        needs_dy, needs_weight = ctx.needs_input_grad[:2]
        ddy = masked_conv2d(g, weight, None, survivors, pattern, *ctx.rest) if needs_dy else None
        dw = masked_conv2d_grad_weight(dy, g, survivors, pattern, *ctx.rest[:-1]) if needs_weight else None
        return ddy, dw, *(None,) * (3 + len(ctx.rest))


class _GradWeight(torch.autograd.Function):
    @staticmethod
    def forward(ctx, dy, x, survivors, pattern, *rest):
        ctx.save_for_backward(dy, x, survivors, *pattern)
        ctx.rest = rest
        return without_dispatch.below(masked_conv2d_grad_weight, _grad_weight, dy, x, survivors, pattern, *rest)

    @staticmethod
    def backward(ctx, g):  # g is any tensor of the weight's storage: not masked
        dy, x, survivors, *pattern = ctx.saved_tensors
        needs_dy, needs_x = ctx.needs_input_grad[:2]
        shape, *geometry = ctx.rest
        ddy = masked_conv2d(x, g, None, survivors, pattern, *ctx.rest, False) if needs_dy else None
        args = (dy, g, survivors, pattern, shape, x.shape[2:], *geometry, False)
        dx = masked_conv2d_grad_input(*args) if needs_x else None
        return ddy, dx, *(None,) * (2 + len(ctx.rest))


ops.differentiate("masked_conv2d", _Conv2d.apply)
ops.differentiate("masked_conv2d_grad_input", _GradInput.apply)
ops.differentiate("masked_conv2d_grad_weight", _GradWeight.apply)
for _op in (masked_conv2d, masked_conv2d_grad_input, masked_conv2d_grad_weight):
    ops.autocast(_op)
