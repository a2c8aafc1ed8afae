"""MaskedConv2d and SparseConv2d: an nn.Conv2d that trains only its survivors, with a dense weight or with compressed storage."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from initperf.core.checks import FLOATS, InitPerfRuntimeError, InitPerfTypeError, check_mask, check_mask_has_data, fail
from initperf.core.torch_private import transformed
from initperf.layers.base.masked import MaskedLayer
from initperf.layers.base.sparse import SparseLayer
from initperf.layers.ops import conv2d as conv_ops
from initperf.layers.ops.conv2d import ConvPattern

_ATTRIBUTES = (
    *("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "transposed", "output_padding"),
    *("groups", "padding_mode", "_reversed_padding_repeated_twice"),
)


class MaskedConv2d(MaskedLayer, nn.Conv2d):
    """y = x * (W o M) + b: nn.Conv2d with a persistent bool buffer `weight_mask` of the weight's shape, True = survives.

    x: (B, C, H, W) or (C, H, W), float32, bfloat16, float16 or float64. mask None: all survive. Every argument of nn.Conv2d.
    Checkpoints of nn.Conv2d load, and the mask that is here is applied to them; to_conv() gives an nn.Conv2d back.
    On the CPU, float32, stride 1 (and 2, but for dx) run sparse where that is faster (conv_ops.conv_pays); the rest, and a
    GPU (cuDNN), runs dense on the pre-masked weight.
    """

    DENSE = nn.Conv2d
    ATTRIBUTES = _ATTRIBUTES

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: str | int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        mask: Tensor | None = None,
    ) -> None:
        if mask is not None:
            check_mask(mask, _weight_shape(in_channels, out_channels, kernel_size, groups))
        if dtype is not None and dtype not in FLOATS:
            fail("dtype float32, bfloat16, float16 or float64", dtype)
        args: Any = (kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype)
        super().__init__(in_channels, out_channels, *args)
        self._adopt(mask)

    @classmethod
    def from_conv(cls, conv: nn.Conv2d, mask: Tensor | None = None) -> MaskedConv2d:
        """A masked layer on the same Parameter objects as `conv`, so an optimizer made before keeps working; they are masked in place."""
        return cls.on(conv, mask)

    def to_conv(self) -> nn.Conv2d:
        """An nn.Conv2d with copies of the weight, zeros included, and the bias."""
        return cast(nn.Conv2d, self.to_dense())

    def _new_pattern(self) -> ConvPattern:
        return ConvPattern(self.weight_mask, self.weight_mask, self.groups)

    def forward(self, input: Tensor) -> Tensor:
        pattern = cast(ConvPattern, self._pattern if torch.compiler.is_compiling() else self._fresh_pattern())
        weight = self.weight
        check_images(self, input, weight.dtype)
        if not torch.compiler.is_compiling() and transformed():
            # torch.func's transforms (vmap, jvp, grad) and forward-mode derivatives know torch's own convolution
            return self._conv_forward(input, weight.masked_fill(~self.weight_mask, 0), self.bias)
        # Only the layer's own Parameter is known to obey the mask; a parametrized or functional weight may be anything.
        return convolved(self, input, weight, self.weight_mask, pattern, self._is_own(weight))


class SparseConv2d(SparseLayer):
    """y = x * W + b, of which only the survivors are stored: `weight_values` (nnz, 1), with gradient and optimizer state of that shape.

    Arguments and inputs: MaskedConv2d. mask: bool, of the dense weight's shape, True = survives; None: all. Checkpoints of
    nn.Conv2d, MaskedConv2d and torch.nn.utils.prune load too. Elementwise optimizers (SGD, Adam and kin) only; see
    SparseLayer for changes of the mask. Where the sparse kernel does not run, as on a GPU, every call fills a dense weight.
    """

    DENSE = nn.Conv2d
    MASKED = MaskedConv2d
    ATTRIBUTES = _ATTRIBUTES

    in_channels: int
    out_channels: int
    kernel_size: tuple[int, int]
    groups: int

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: str | int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        mask: Tensor | None = None,
    ) -> None:
        if dtype is not None and dtype not in FLOATS:
            fail("dtype float32, bfloat16, float16 or float64", dtype)
        args: Any = (kernel_size, stride, padding, dilation, groups, bias, padding_mode, "meta")
        shell = nn.Conv2d(in_channels, out_channels, *args)
        if mask is not None:
            check_mask(mask, shell.weight.shape)
            check_mask_has_data(mask, shell.weight)
        super().__init__()
        for name in _ATTRIBUTES:
            setattr(self, name, getattr(shell, name))
        nnz = shell.weight.numel() if mask is None else int(mask.count_nonzero())
        self.weight_values = nn.Parameter(torch.empty(nnz, 1, device=device, dtype=dtype))
        own = nn.Parameter(torch.empty(out_channels, device=device, dtype=dtype)) if bias else None
        self.register_parameter("bias", own)
        self._adopt(mask)
        self.reset_parameters()

    @classmethod
    def from_conv(cls, conv: nn.Conv2d, mask: Tensor | None = None) -> SparseConv2d:
        """A compressed copy of `conv`, which stays as it is. sparsify(..., sparse=True) keeps the Parameter objects instead."""
        return cls._from_dense_layer(conv, mask)

    def to_conv(self) -> nn.Conv2d:
        """An nn.Conv2d with copies of the survivors, zeros elsewhere, and the bias."""
        return cast(nn.Conv2d, self.to_dense())

    @property
    def weight_shape(self) -> torch.Size:
        """(out_channels, in_channels / groups, height, width)."""
        return torch.Size((self.out_channels, self.in_channels // self.groups, *self.kernel_size))

    def _new_pattern(self) -> ConvPattern:
        return ConvPattern(self.weight_mask_bits, self.weight_mask, self.groups)

    def forward(self, input: Tensor) -> Tensor:
        pattern = cast(ConvPattern, self._pattern if torch.compiler.is_compiling() else self._fresh_pattern())
        values = self.weight_values
        check_images(self, input, values.dtype)
        if not torch.compiler.is_compiling() and transformed():
            # torch.func's transforms (vmap, jvp, grad) and forward-mode derivatives know torch's own convolution
            places = pattern.survivors.long()
            flat = torch.zeros(self.weight_shape.numel(), dtype=values.dtype, device=values.device)
            weight = flat.scatter(0, places, values.flatten()).view(self.weight_shape)
            return nn.Conv2d._conv_forward(cast(nn.Conv2d, self), input, weight, self.bias)
        return convolved(self, input, values, pattern.survivors, pattern, False)

    def extra_repr(self) -> str:
        return f"{nn.Conv2d.extra_repr(cast(nn.Conv2d, self))}, {super().extra_repr()}"


def _weight_shape(
    in_channels: int, out_channels: int, kernel_size: int | tuple[int, int], groups: int
) -> tuple[int, int, int, int]:
    height, width = (kernel_size, kernel_size) if isinstance(kernel_size, int) else kernel_size
    return out_channels, in_channels // max(groups, 1), height, width


def check_images(layer: Any, input: object, dtype: torch.dtype) -> None:
    """A tensor (B, C, H, W) or (C, H, W) of the weight's dtype; under autocast, of any."""
    if not isinstance(input, Tensor):
        fail("an input of type torch.Tensor", type(input).__name__, kind=InitPerfTypeError)
    if input.dim() not in (3, 4) or input.shape[-3] != layer.in_channels:
        fail(
            f"an input (batch, {layer.in_channels}, height, width) or ({layer.in_channels}, height, width)",
            f"shape {tuple(input.shape)}",
            kind=InitPerfRuntimeError,
        )
    if input.dtype != dtype and not torch.is_autocast_enabled(input.device.type):
        fail(f"an input of the weight's dtype {dtype}", input.dtype, kind=InitPerfRuntimeError)


def convolved(
    layer: Any, input: Tensor, weight: Tensor, survivors: Tensor, pattern: ConvPattern, premasked: bool
) -> Tensor:
    """The convolution of `layer`, of the class and with the attributes of nn.Conv2d, with `weight` as the ops take it."""
    x = input if input.dim() == 4 else input.unsqueeze(0)
    kernel, dilation = layer.kernel_size, layer.dilation
    if layer.padding_mode != "zeros":
        x = nn.functional.pad(x, layer._reversed_padding_repeated_twice, layer.padding_mode)
        padding = (0, 0)
    elif layer.padding == "same":
        total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        padding = (total[0] // 2, total[1] // 2)
        if total[0] % 2 or total[1] % 2:  # one more at the end, as torch does
            x = nn.functional.pad(x, (0, total[1] % 2, 0, total[0] % 2))
    else:
        padding = (0, 0) if layer.padding == "valid" else layer.padding
    for size, p, d, k in zip(x.shape[2:], padding, dilation, kernel, strict=True):
        if size + 2 * p < d * (k - 1) + 1:
            fail(
                f"an input, with padding, of at least {d * (k - 1) + 1} pixels (the kernel's reach)",
                f"{size + 2 * p} in shape {tuple(input.shape)}",
                kind=InitPerfRuntimeError,
            )
    shape = (layer.out_channels, layer.in_channels // layer.groups, *kernel)
    geometry = (shape, layer.stride, padding, dilation, layer.groups)
    y = conv_ops.conv2d(x, weight, layer.bias, survivors, pattern, *geometry, premasked)
    return y if input.dim() == 4 else y.squeeze(0)
