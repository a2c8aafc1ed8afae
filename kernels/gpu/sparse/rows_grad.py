"""Gradient of a sparse weight at its survivors only: dvalues of (n, k) = sum over the batch of dy[b, n] x[b, k].

dy and x lie feature-major, (N, B) and (K, B). A program takes some survivors of one row n: it keeps dy[:, n] of a stretch of
the batch in registers, meets each survivor's x[:, k] in wide loads, and sums over the threads once, at the end. The survivors
of all programs come from a list made by counting. In 16 bits the matrix unit is faster at almost any density: there a program
computes a whole tile that has survivors, and writes those straight to their places, which it counts in the bits of the mask.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..targets import cast, precision, rows_of_8, tile
from .grad_tile import tile_of, tile_product
from .index import TILE
from .rows import feature_major

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


@triton.jit
def _bits_set(word):
    """Number of ones in each int32."""
    word = word - ((word >> 1) & 0x55555555)
    word = (word & 0x33333333) + ((word >> 2) & 0x33333333)
    word = (word + (word >> 4)) & 0x0F0F0F0F
    return ((word * 0x01010101) >> 24) & 0xFF


@triton.jit
def _sparse_grad_tiles(
    # inputs
    dy_ptr,  # (B, N)
    x_ptr,  # (B, K)
    bits_ptr,  # (N, words)
    first_ptr,  # (N, words): survivors before each word
    tiles_ptr,  # (programs,): row of tiles << 16 | column of tiles
    # output
    grad_ptr,  # (nnz,)
    # sizes, strides: divided by 8 but for B and words
    B,
    N,
    words,
    N8,
    K8,
    stride_db8,
    stride_xb8,
    # scalars, tiles
    PRECISION: tl.constexpr,
    EVEN: tl.constexpr,  # BATCH divides B, SIDE divides N and K
    SIDE: tl.constexpr,
    BATCH: tl.constexpr,
):
    live = tl.load(tiles_ptr + tl.program_id(0))
    first_n, first_k = (live >> 16) * SIDE, (live & 0xFFFF) * SIDE
    acc = tile_product(
        dy_ptr,
        x_ptr,
        first_n,
        first_k,
        B,
        N8,
        K8,
        stride_db8,
        stride_xb8,
        tl.float32,
        PRECISION,
        EVEN,
        BATCH,
        SIDE,
        SIDE,
    )
    rn = first_n + tl.arange(0, SIDE)
    at = first_k // 32 + tl.arange(0, SIDE // 32)
    inside = (rn < N)[:, None] & (at < words)[None, :]
    word_at = rn.to(tl.int64)[:, None] * words + at[None, :]
    word = tl.load(bits_ptr + word_at, mask=inside, other=0)[:, :, None]
    first = tl.load(first_ptr + word_at, mask=inside, other=0)[:, :, None]
    bit = tl.arange(0, 32)[None, None, :]
    place = first + _bits_set(word & ((1 << bit) - 1))
    grad = cast(acc.reshape(SIDE, SIDE // 32, 32), grad_ptr.dtype.element_ty)
    tl.store(grad_ptr + place, grad, mask=((word >> bit) & 1) != 0)


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


def sparse_grad_tiles(dy: Tensor, x: Tensor, bits: Tensor, first: Tensor, tiles: Tensor, survivors: int) -> Tensor:
    """The same as sparse_grad, on the matrix unit; float32 in TF32 where torch allows that.

    bits (N, ceil(K / 32)) int32 and tiles int32: as pattern.pattern_tensors makes them. first: int32 like bits, the number of
    survivors before each word, in rows. float32, bfloat16 or float16, one dtype.
    """
    b = x.shape[0]
    grad = x.new_empty(survivors)
    if survivors == 0 or b == 0:
        return grad.zero_()
    n, k = dy.shape[1], x.shape[1]
    dy, x = rows_of_8(dy), rows_of_8(x)
    batch, _, _, warps, stages = tile_of(x.dtype)
    _sparse_grad_tiles[(tiles.numel(),)](
        *(dy, x, bits, first, tiles, grad),
        *(b, n, bits.shape[1], dy.shape[1] // 8, x.shape[1] // 8, dy.stride(0) // 8, x.stride(0) // 8),
        PRECISION=precision(x.dtype),
        EVEN=b % batch == 0 and n % TILE == 0 and k % TILE == 0,
        SIDE=TILE,
        BATCH=batch,
        num_warps=warps,
        num_stages=stages,
        enable_fp_fusion=True,
    )
    return grad
