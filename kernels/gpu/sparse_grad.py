"""Gradient of a sparse weight at its survivors only: dvalues of (n, k) = sum over the batch of dy[b, n] x[b, k].

dy and x lie feature-major, (N, B) and (K, B). A program takes some survivors of one row n: it keeps dy[:, n] of a stretch of
the batch in registers, meets each survivor's x[:, k] in wide loads, and sums over the threads once, at the end. The survivors
of all programs come from a list made by counting. In 16 bits, and above a few percent of survivors in float32 with TF32,
the matrix product of masked_matmul is faster.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .sparse_matmul import feature_major
from .targets import cast, tile

# Survivors and stretch of the batch of one program (one warp), by bytes of a value: 16 bytes of a row of x a thread.
TILES = {
    "sm_80": {2: (8, 256), 4: (8, 128), 8: (8, 64)},
    "sm_90": {2: (8, 256), 4: (8, 128), 8: (8, 64)},
    "sm_100": {2: (8, 256), 4: (8, 128), 8: (8, 64)},
    "gfx942": {2: (8, 512), 4: (8, 256), 8: (8, 128)},
}


@triton.jit
def _sparse_grad(
    # inputs
    dyt_ptr,  # (N, ldy)
    xt_ptr,  # (K, ldx)
    start_ptr,  # (N + 1,)
    columns_ptr,  # (nnz,)
    row_ptr,  # (programs,)
    first_ptr,  # (programs,)
    # output
    grad_ptr,  # (nnz,)
    # sizes, strides: divided by 8, which tells Triton that 8 divides them
    B,
    B8,
    ldy8,
    ldx8,
    # tiles
    SURVIVORS: tl.constexpr,
    BB: tl.constexpr,
    EVEN: tl.constexpr,  # BB divides B
):
    dtype: tl.constexpr = grad_ptr.dtype.element_ty
    sums: tl.constexpr = tl.float64 if dtype == tl.float64 else tl.float32
    row = tl.load(row_ptr + tl.program_id(0))
    at = tl.load(first_ptr + tl.program_id(0)) + tl.arange(0, SURVIVORS)
    end = tl.load(start_ptr + row + 1)
    column = tl.load(columns_ptr + tl.minimum(at, end - 1)).to(tl.int32)  # the last one again, where there are no more
    rb = tl.arange(0, BB)
    dy_ptr = dyt_ptr + row.to(tl.int64) * (ldy8 * 8)
    x_ptr = xt_ptr + column.to(tl.int64)[:, None] * tl.cast(ldx8 * 8, tl.int64) + rb[None, :]
    acc = tl.zeros((SURVIVORS, BB), sums)
    for b in range(0, B, BB):
        if EVEN:
            dy = tl.load(dy_ptr + b + rb).to(sums)
            x = tl.load(x_ptr + b).to(sums)
        else:
            # whole vectors of 8, then nothing of what lies beyond the batch
            dy = tl.load(dy_ptr + b + rb, mask=b + rb < B8 * 8, other=0.0).to(sums)
            x = tl.load(x_ptr + b, mask=(b + rb < B8 * 8)[None, :], other=0.0).to(sums)
            dy = tl.where(b + rb < B, dy, 0.0)
            x = tl.where((b + rb < B)[None, :], x, 0.0)
        acc += dy[None, :] * x
    tl.store(grad_ptr + at, cast(tl.sum(acc, 1), dtype), mask=at < end)


def programs(start: Tensor, order: Tensor, survivors: int) -> tuple[Tensor, Tensor]:
    """(row, first survivor) of each program, heavy rows first, by counting."""
    counts = start.diff()[order.long()]
    chunks = (counts + survivors - 1) // survivors
    which = torch.arange(order.numel(), device=start.device).repeat_interleave(chunks)
    rank = torch.arange(which.numel(), device=start.device) - (chunks.cumsum(0) - chunks)[which]
    row = order[which]
    return row, (start[row.long()] + rank * survivors).to(torch.int32)


def sparse_grad(dy: Tensor, x: Tensor, start: Tensor, columns: Tensor, order: Tensor) -> Tensor:
    """dvalues (nnz,), survivor (n, k): the sum over the batch of dy[b, n] x[b, k], in float32 (float64 for float64).

    dy (B, N), x (B, K): one dtype, the result's. Indices as in sparse_matmul.
    """
    b = x.shape[0]
    grad = x.new_empty(columns.numel())
    if grad.numel() == 0 or b == 0:
        return grad.zero_()
    survivors, batch = tile(TILES)[x.element_size()]
    batch = max(8, min(batch, triton.next_power_of_2(b)))
    row, first = programs(start, order, survivors)
    dyt, xt = feature_major(dy), feature_major(x)
    _sparse_grad[(row.numel(),)](
        dyt,
        xt,
        start,
        columns,
        row,
        first,
        grad,
        b,
        triton.cdiv(b, 8),
        dyt.stride(0) // 8,
        xt.stride(0) // 8,
        SURVIVORS=survivors,
        BB=batch,
        EVEN=b % batch == 0,
        num_warps=1,
        enable_fp_fusion=True,
    )
    return grad
