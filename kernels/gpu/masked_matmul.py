"""The three masked products on a GPU, with tensor cores: the mask is one bit a weight, spread over a tile by shifts.

Unstructured sparsity does not beat tensor cores in training shapes: what the mask saves is the memory traffic of a masked
copy of the weight, and, in dW, tiles without a survivor. A program of dW computes one live tile and writes nothing else.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .pattern import TILE
from .targets import cast, dot, tile

# (rows of dy or x a step, rows and columns of an output tile, warps, stages) of 16-bit, 32-bit and 64-bit values.
TILES = {
    "sm_80": {2: (32, 128, 64, 8, 3), 4: (32, 64, 64, 8, 2), 8: (16, 32, 32, 4, 2)},
    "sm_90": {2: (64, 128, 128, 8, 3), 4: (32, 64, 64, 8, 2), 8: (16, 32, 32, 4, 2)},
    "sm_100": {2: (64, 128, 128, 8, 3), 4: (32, 64, 64, 8, 2), 8: (16, 32, 32, 4, 2)},
    "gfx942": {2: (32, 128, 128, 8, 2), 4: (32, 64, 64, 8, 2), 8: (16, 32, 32, 4, 2)},
}


@triton.jit
def _dot(a, b, acc):
    if acc.dtype == tl.float64:
        return tl.dot(a, b, acc, input_precision="ieee", out_dtype=tl.float64)
    return dot(a, b, acc)


@triton.jit
def _rounded(x, dtype: tl.constexpr):
    if dtype == tl.float64:
        return x
    return cast(x, dtype)


@triton.jit
def _bits(bits_ptr, rows, columns, stride_bn, inside):
    """Whether each weight (row, column) survives."""
    words = tl.load(bits_ptr + rows.to(tl.int64) * stride_bn + (columns >> 5), mask=inside, other=0)
    return ((words >> (columns & 31)) & 1) != 0


@triton.jit
def _product_kernel(
    # inputs
    x_ptr,
    weight_ptr,
    bias_ptr,
    bits_ptr,
    # outputs
    y_ptr,
    # sizes: y (B, N) = x (B, K) times W^T
    B,
    N,
    K,
    # strides
    stride_xb,
    stride_xk,
    stride_wn,
    stride_wk,
    stride_bn,
    stride_yb,
    # tiles
    TRANSPOSED: tl.constexpr,
    BIAS: tl.constexpr,
    SUMS: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """y[b, n] = bias[n] + sum over k of x[b, k] W[n, k] M[n, k]. TRANSPOSED: the bits are of (k, n)."""
    b = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros((BLOCK_B, BLOCK_N), SUMS)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        x_at = x_ptr + b[:, None].to(tl.int64) * stride_xb + k[None, :] * stride_xk
        x = tl.load(x_at, mask=(b[:, None] < B) & (k[None, :] < K), other=0.0)
        inside = (k[:, None] < K) & (n[None, :] < N)
        w_at = weight_ptr + n[None, :].to(tl.int64) * stride_wn + k[:, None].to(tl.int64) * stride_wk
        if TRANSPOSED:
            alive = _bits(bits_ptr, k[:, None], n[None, :], stride_bn, inside)
        else:
            alive = _bits(bits_ptr, n[None, :], k[:, None], stride_bn, inside)
        w = tl.load(w_at, mask=inside & alive, other=0.0)
        acc = _dot(x, w, acc)
    if BIAS:
        acc += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(SUMS)[None, :]
    y_at = y_ptr + b[:, None].to(tl.int64) * stride_yb + n[None, :]
    tl.store(y_at, _rounded(acc, y_ptr.dtype.element_ty), mask=(b[:, None] < B) & (n[None, :] < N))


@triton.jit
def _weight_grad_kernel(
    # inputs
    dy_ptr,
    x_ptr,
    bits_ptr,
    tiles_ptr,
    # outputs
    out_ptr,
    # sizes
    B,
    N,
    K,
    # strides
    stride_dyb,
    stride_dyn,
    stride_xb,
    stride_xk,
    stride_bn,
    stride_on,
    # tiles
    SUMS: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """out[n, k] = sum over b of dy[b, n] x[b, k] where bit (n, k) is set, 0 elsewhere, in the live tile of this program."""
    live = tl.load(tiles_ptr + tl.program_id(0))
    n = (live >> 16) * TILE + tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    first = (live & 0xFFFF) * TILE + tl.program_id(2) * BLOCK_K
    k = first + tl.arange(0, BLOCK_K)
    acc = tl.zeros((BLOCK_N, BLOCK_K), SUMS)
    for start in range(0, B, BLOCK_B):
        b = start + tl.arange(0, BLOCK_B)
        dy_at = dy_ptr + b[:, None].to(tl.int64) * stride_dyb + n[None, :] * stride_dyn
        x_at = x_ptr + b[:, None].to(tl.int64) * stride_xb + k[None, :] * stride_xk
        dy = tl.load(dy_at, mask=(b[:, None] < B) & (n[None, :] < N), other=0.0)
        x = tl.load(x_at, mask=(b[:, None] < B) & (k[None, :] < K), other=0.0)
        acc = _dot(tl.trans(dy), x, acc)
    inside = (n[:, None] < N) & (k[None, :] < K)
    word = first // 32 + tl.arange(0, BLOCK_K // 32)  # one load a 32 weights, spread by shifts
    words_at = bits_ptr + n[:, None].to(tl.int64) * stride_bn + word[None, :]
    words = tl.load(words_at, mask=(n[:, None] < N) & (word[None, :] < stride_bn), other=0)
    alive = ((words[:, :, None] >> tl.arange(0, 32)[None, None, :]) & 1).reshape(BLOCK_N, BLOCK_K) != 0
    out_at = out_ptr + n[:, None].to(tl.int64) * stride_on + k[None, :]
    tl.store(out_at, _rounded(tl.where(alive, acc, 0.0), out_ptr.dtype.element_ty), mask=inside)


def _sums(dtype: torch.dtype) -> tl.dtype:
    return tl.float64 if dtype == torch.float64 else tl.float32


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, bits: Tensor, transposed: bool) -> Tensor:
    (B, K), N = x.shape, weight.shape[0]
    y = x.new_empty(B, N)
    if not y.numel():
        return y
    block_b, block_n, block_k, warps, stages = tile(TILES)[x.element_size()]
    grid = (triton.cdiv(B, block_b), triton.cdiv(N, block_n))
    _product_kernel[grid](
        *(x, weight, x if bias is None else bias, bits, y),
        *(B, N, K),
        *(*x.stride(), *weight.stride(), bits.shape[1], N),
        TRANSPOSED=transposed,
        BIAS=bias is not None,
        SUMS=_sums(x.dtype),
        BLOCK_B=block_b,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        num_warps=warps,
        num_stages=stages,
    )
    return y


def masked_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor, pattern: list[Tensor], premasked: bool
) -> Tensor:
    """See initperf/reference/masked_matmul.py."""
    return _product(x, weight, None if bias is None else bias.contiguous(), pattern[0], False)


def masked_grad_input(dy: Tensor, weight: Tensor, mask: Tensor, pattern: list[Tensor], premasked: bool) -> Tensor:
    """See initperf/reference/masked_matmul.py."""
    return _product(dy, weight.t(), None, pattern[0], True)


def masked_grad_weight(dy: Tensor, x: Tensor, mask: Tensor, pattern: list[Tensor]) -> Tensor:
    """See initperf/reference/masked_matmul.py."""
    (B, N), K = dy.shape, x.shape[1]
    bits, tiles = pattern
    out = x.new_zeros(N, K)
    if not B or not tiles.numel():
        return out
    block_b, block_n, block_k, warps, stages = tile(TILES)[x.element_size()]
    _weight_grad_kernel[tiles.numel(), TILE // block_n, TILE // block_k](
        *(dy, x, bits, tiles, out),
        *(B, N, K),
        *(*dy.stride(), *x.stride(), bits.shape[1], K),
        SUMS=_sums(x.dtype),
        TILE=TILE,
        BLOCK_B=block_b,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        num_warps=warps,
        num_stages=stages,
    )
    return out
