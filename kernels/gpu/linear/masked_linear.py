"""The masked products on a GPU: torch's own for y and dx, and a gradient of the weight that computes live tiles only.

In training shapes no sparse kernel beats the matrix unit at unstructured masks, and one that masks the weight on its way there
loses to torch's dense product: so y and dx are that product, with the weight that a masked layer keeps zero where pruned.
What the mask saves is in dW: no pass that masks it, and no work in tiles without a survivor. The mask costs the inner loop
nothing: its bits, one word a load for 32 weights, are spread over the finished tile by shifts.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..sparse.grad_tile import sums, tile_of, tile_product
from ..sparse.index import TILE
from ..targets import cast, precision, rows_of_8


@triton.jit
def _masked_grad_weight(
    # inputs
    dy_ptr,  # (B, N)
    x_ptr,  # (B, K)
    bits_ptr,  # (N, words)
    tiles_ptr,  # (programs,): row of tiles << 16 | column of tiles
    # output
    grad_ptr,  # (N, K)
    # sizes, strides: divided by 8 but for B, N and words; K and stride_gn by UNIT
    B,
    N,
    K,
    words,
    N8,
    K8,
    stride_db8,
    stride_xb8,
    stride_gn,
    # scalars, tiles
    ADD: tl.constexpr,
    SUMS: tl.constexpr,
    PRECISION: tl.constexpr,
    EVEN: tl.constexpr,
    UNIT: tl.constexpr,
    SIDE: tl.constexpr,  # of a tile of the list
    BATCH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """grad[n, k] = (ADD: +) sum over b of dy[b, n] x[b, k] where bit (n, k) is set, (ADD: +) 0 elsewhere, in one live tile."""
    live = tl.load(tiles_ptr + tl.program_id(0))
    first_n = (live >> 16) * SIDE + tl.program_id(1) * ROWS
    first_k = (live & 0xFFFF) * SIDE + tl.program_id(2) * COLUMNS
    acc = tile_product(
        dy_ptr, x_ptr, first_n, first_k, B, N8, K8, stride_db8, stride_xb8, SUMS, PRECISION, EVEN, BATCH, ROWS, COLUMNS
    )
    rn, rk = first_n + tl.arange(0, ROWS), first_k + tl.arange(0, COLUMNS)
    at = first_k // 32 + tl.arange(0, COLUMNS // 32)
    word_ptr = bits_ptr + rn.to(tl.int64)[:, None] * words + at[None, :]
    word = tl.load(word_ptr, mask=(rn < N)[:, None] & (at < words)[None, :], other=0)
    alive = ((word[:, :, None] >> tl.arange(0, 32)[None, None, :]) & 1).reshape(ROWS, COLUMNS) != 0
    grad = tl.where(alive, acc, 0.0)
    out_ptr = grad_ptr + rn.to(tl.int64)[:, None] * stride_gn * UNIT + rk[None, :]
    inside = (rn < N)[:, None] & (rk < K * UNIT)[None, :]
    if ADD:
        grad += tl.load(out_ptr, mask=inside, other=0.0).to(SUMS)
    tl.store(out_ptr, cast(grad, grad_ptr.dtype.element_ty), mask=inside)


def masked_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor, pattern: list[Tensor], premasked: bool
) -> Tensor:
    """See kernels/reference/linear/masked_linear.py."""
    return torch.nn.functional.linear(x, weight if premasked else torch.where(mask, weight, 0), bias)


def masked_grad_input(dy: Tensor, weight: Tensor, mask: Tensor, pattern: list[Tensor], premasked: bool) -> Tensor:
    """See kernels/reference/linear/masked_linear.py."""
    return torch.mm(dy, weight if premasked else torch.where(mask, weight, 0))


def masked_grad_weight(
    dy: Tensor, x: Tensor, mask: Tensor, pattern: list[Tensor], *, into: Tensor | None = None
) -> Tensor:
    """See kernels/reference/linear/masked_linear.py; float32 in TF32 where torch allows that.

    into: a gradient (N, K), contiguous, to which dW is added and which is returned: in tiles without a survivor nothing happens.
    """
    (B, N), K = dy.shape, x.shape[1]
    bits, tiles = pattern
    if into is not None and not (into.shape == (N, K) and into.dtype == x.dtype and into.is_contiguous()):
        raise ValueError(
            f"Expected into to be contiguous, of shape {(N, K)} and {x.dtype}. "
            f"Got shape {tuple(into.shape)}, strides {into.stride()} and {into.dtype}."
        )
    grad = x.new_zeros(N, K) if into is None else into
    if not B or not tiles.numel():
        return grad
    dy, x = rows_of_8(dy), rows_of_8(x)
    batch, rows, columns, warps, stages = tile_of(x.dtype)
    unit = 8 if K % 8 == 0 and grad.data_ptr() % 16 == 0 else 1
    _masked_grad_weight[tiles.numel(), TILE // rows, TILE // columns](
        *(dy, x, bits, tiles, grad),
        *(B, N, K // unit, bits.shape[1]),
        *(dy.shape[1] // 8, x.shape[1] // 8, dy.stride(0) // 8, x.stride(0) // 8, K // unit),
        ADD=into is not None,
        SUMS=sums(x.dtype),
        PRECISION=precision(x.dtype),
        EVEN=B % batch == 0 and N % TILE == 0 and K % TILE == 0,
        UNIT=unit,
        SIDE=TILE,
        BATCH=batch,
        ROWS=rows,
        COLUMNS=columns,
        num_warps=warps,
        num_stages=stages,
        enable_fp_fusion=True,
    )
    return grad
