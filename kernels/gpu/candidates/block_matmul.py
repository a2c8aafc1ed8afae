"""Products with a block-sparse weight on tensor cores: y = x W^T + bias, the gradient of x, and that of the blocks.

W (N, K) keeps blocks of BLOCK x BLOCK (16 to 128), values (blocks, BLOCK, BLOCK) by rows of blocks; at an edge that BLOCK does
not divide they hold zeros. A program of the products takes one row of blocks and walks its list as one long inner dimension:
several small blocks a step. A program of the gradient takes some blocks of one row. Lists are made by counting; the inner
loops have no branch, and rows of x beyond the batch are those of its last row again, never stored.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ..sparse.rows_grad import programs
from ..targets import cast, dot, precision, rows_of_8, tile

BLOCKS = (16, 32, 64, 128)


class Tile(NamedTuple):
    """Batch and inner dimension of a step of the products; of the gradient: columns of a program, batch of a step."""

    batch: int
    inner: int
    warps: int
    stages: int


# (products, gradient), by block; 16 bits. float32 takes half the inner dimension and, without a matrix unit, whose arithmetic
# is so long that it hides the loads of one step, two stages.
_Tiles = dict[int, tuple[Tile, Tile]]
_HOPPER: _Tiles = {
    16: (Tile(256, 64, 4, 3), Tile(128, 64, 4, 3)),
    32: (Tile(256, 64, 4, 3), Tile(128, 64, 4, 3)),
    64: (Tile(128, 64, 4, 4), Tile(128, 64, 4, 4)),
    128: (Tile(128, 64, 8, 3), Tile(128, 64, 8, 3)),
}
_AMPERE: _Tiles = {
    16: (Tile(128, 64, 4, 3), Tile(128, 32, 4, 3)),
    32: (Tile(128, 64, 4, 3), Tile(128, 32, 4, 3)),
    64: (Tile(128, 32, 4, 4), Tile(128, 32, 4, 3)),
    128: (Tile(128, 32, 8, 3), Tile(128, 32, 8, 3)),
}
_CDNA: _Tiles = {block: (a._replace(stages=2), b._replace(stages=2)) for block, (a, b) in _AMPERE.items()}
TILES = {"sm_80": _AMPERE, "sm_90": _HOPPER, "sm_100": _HOPPER, "gfx942": _CDNA}


@triton.jit
def _block_matmul(
    # inputs
    x_ptr,  # (B, K)
    values_ptr,  # (blocks, BLOCK, BLOCK)
    start_ptr,  # (rows of blocks + 1,)
    columns_ptr,  # (blocks,): column of blocks
    perm_ptr,  # (blocks,) or None: which of the values
    order_ptr,  # (rows of blocks,)
    bias_ptr,  # (N,) or None
    # output
    y_ptr,  # (B, N)
    # sizes, strides: those ending in 8 divided by 8, which tells Triton that 8 divides the whole; N and stride_yb by UNIT
    B,
    K8,
    N,
    stride_xb8,
    stride_yb,
    # scalars, tiles
    TRANSPOSED: tl.constexpr,  # x meets the rows of each block, not its columns
    PRECISION: tl.constexpr,
    UNIT: tl.constexpr,
    EVEN_K: tl.constexpr,  # BLOCK divides K
    BLOCK: tl.constexpr,
    BATCH: tl.constexpr,
    INNER: tl.constexpr,
):
    PART: tl.constexpr = min(BLOCK, INNER)  # of a block, a step
    MANY: tl.constexpr = INNER // PART  # blocks a step
    PARTS: tl.constexpr = BLOCK // PART  # steps a block
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    row = tl.load(order_ptr + tl.program_id(1))
    begin, end = tl.load(start_ptr + row), tl.load(start_ptr + row + 1)
    rb = tl.program_id(0) * BATCH + tl.arange(0, BATCH)
    ro, ri, rg = tl.arange(0, BLOCK), tl.arange(0, PART), tl.arange(0, MANY)
    x_row_ptr = x_ptr + tl.minimum(rb, B - 1).to(tl.int64) * stride_xb8 * 8
    acc = tl.zeros((BATCH, BLOCK), tl.float32)
    for step in range(tl.cdiv(end - begin, MANY) * PARTS):
        at = begin + step // PARTS * MANY + rg
        part = step % PARTS * PART
        on = at < end
        column = tl.load(columns_ptr + at, mask=on, other=0)
        which = at if perm_ptr is None else tl.load(perm_ptr + at, mask=on, other=0)
        inner = column[:, None] * BLOCK + part + ri[None, :]
        keep = on[:, None]
        if not EVEN_K:
            keep = keep & (inner < K8 * 8)
        x = tl.load(x_row_ptr[:, None, None] + inner[None, :, :], mask=keep[None, :, :], other=0.0)
        first = which.to(tl.int64) * (BLOCK * BLOCK)
        if TRANSPOSED:
            w_at = first[:, None, None] + (part + ri)[None, :, None] * BLOCK + ro[None, None, :]
            w = tl.load(values_ptr + w_at, mask=on[:, None, None], other=0.0).reshape(INNER, BLOCK)
        else:
            w_at = first[None, :, None] + ro[:, None, None] * BLOCK + (part + ri)[None, None, :]
            w = tl.load(values_ptr + w_at, mask=on[None, :, None], other=0.0).reshape(BLOCK, INNER).trans(1, 0)
        acc = dot(x.reshape(BATCH, INNER), w, acc, PRECISION)
    rn = row * BLOCK + ro
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + rn, mask=rn < N * UNIT, other=0.0).to(tl.float32)[None, :]
    y_row_ptr = y_ptr + rb.to(tl.int64) * stride_yb * UNIT
    tl.store(y_row_ptr[:, None] + rn[None, :], cast(acc, dtype), mask=(rb < B)[:, None] & (rn < N * UNIT)[None, :])


@triton.jit
def _block_grad(
    # inputs
    dy_ptr,  # (B, N)
    x_ptr,  # (B, K)
    start_ptr,  # (rows of blocks + 1,)
    columns_ptr,  # (blocks,)
    row_ptr,  # (programs,)
    first_ptr,  # (programs,)
    # output
    grad_ptr,  # (blocks, BLOCK, BLOCK)
    # sizes, strides: divided by 8
    B,
    N8,
    K8,
    stride_db8,
    stride_xb8,
    # scalars, tiles
    PRECISION: tl.constexpr,
    EVEN_B: tl.constexpr,  # BATCH divides B
    EVEN: tl.constexpr,  # BLOCK divides N and K
    BLOCK: tl.constexpr,
    BATCH: tl.constexpr,
    MANY: tl.constexpr,  # blocks of one row
):
    dtype: tl.constexpr = grad_ptr.dtype.element_ty
    row = tl.load(row_ptr + tl.program_id(0))
    at = tl.load(first_ptr + tl.program_id(0)) + tl.arange(0, MANY)
    end = tl.load(start_ptr + row + 1)
    column = tl.load(columns_ptr + tl.minimum(at, end - 1))  # the last one again, where there are no more
    rb, ri = tl.arange(0, BATCH), tl.arange(0, BLOCK)
    rn, rk = row * BLOCK + ri, column[:, None] * BLOCK + ri[None, :]
    on_n, on_k = (rn < N8 * 8)[None, :], (rk < K8 * 8)[None, :, :]
    dy_tile_ptr = dy_ptr + rb.to(tl.int64)[:, None] * stride_db8 * 8 + rn[None, :]
    x_tile_ptr = x_ptr + rb.to(tl.int64)[:, None, None] * stride_xb8 * 8 + rk[None, :, :]
    acc = tl.zeros((MANY * BLOCK, BLOCK), tl.float32)
    for b in range(0, B, BATCH):
        if EVEN and EVEN_B:
            dy, x = tl.load(dy_tile_ptr), tl.load(x_tile_ptr)
        else:
            on_b = b + rb < B
            dy = tl.load(dy_tile_ptr, mask=on_b[:, None] & on_n, other=0.0)
            x = tl.load(x_tile_ptr, mask=on_b[:, None, None] & on_k, other=0.0)
        acc = dot(x.reshape(BATCH, MANY * BLOCK).trans(1, 0), dy, acc, PRECISION)
        dy_tile_ptr += tl.full((), BATCH * 8, tl.int64) * stride_db8
        x_tile_ptr += tl.full((), BATCH * 8, tl.int64) * stride_xb8
    grad = cast(acc.reshape(MANY, BLOCK, BLOCK), dtype)  # block, k, n
    out_ptr = (
        grad_ptr + at.to(tl.int64)[:, None, None] * (BLOCK * BLOCK) + ri[None, :, None] + ri[None, None, :] * BLOCK
    )
    tl.store(out_ptr, grad, mask=(at < end)[:, None, None])


def _stages(tiles: Tile, x: Tensor) -> int:
    return min(tiles.stages, 2) if x.element_size() == 4 and precision(x.dtype) == "ieee" else tiles.stages


def block_matmul(
    x: Tensor,
    values: Tensor,
    start: Tensor,
    columns: Tensor,
    order: Tensor,
    outputs: int,
    bias: Tensor | None = None,
    perm: Tensor | None = None,
) -> Tensor:
    """y (B, outputs) = x W^T + bias, sums in float32; with perm dx = dy W from the mask of blocks transposed.

    x (B, K), values (blocks, BLOCK, BLOCK), bias: float32, bfloat16 or float16, one dtype. The rows of blocks as those of
    sparse_matmul: start, columns, order int32; perm int32.
    """
    block = values.shape[-1]
    y = x.new_empty(x.shape[0], outputs)
    if not y.numel():
        return y
    x = rows_of_8(x)
    tiles = tile(TILES)[block][0]
    unit = 8 if outputs % 8 == 0 else 1
    _block_matmul[(triton.cdiv(x.shape[0], tiles.batch), order.numel())](
        *(x, values.contiguous(), start, columns, perm, order, bias, y),
        *(x.shape[0], x.shape[1] // 8, outputs // unit, x.stride(0) // 8, y.stride(0) // unit),
        TRANSPOSED=perm is not None,
        PRECISION=precision(x.dtype),
        UNIT=unit,
        EVEN_K=x.shape[1] % block == 0,
        BLOCK=block,
        BATCH=max(16, min(tiles.batch, triton.next_power_of_2(x.shape[0]))),
        INNER=tiles.inner * 2 // x.element_size(),
        num_warps=tiles.warps,
        num_stages=_stages(tiles, x),
        enable_fp_fusion=True,
    )
    return y


def block_grad(dy: Tensor, x: Tensor, start: Tensor, columns: Tensor, order: Tensor, block: int) -> Tensor:
    """dvalues (blocks, BLOCK, BLOCK): of each kept block dy[:, its rows]^T x[:, its columns], sums in float32."""
    b = x.shape[0]
    grad = x.new_empty(columns.numel(), block, block)
    if not grad.numel() or b == 0:
        return grad.zero_()
    dy, x = rows_of_8(dy), rows_of_8(x)
    tiles = tile(TILES)[block][1]
    many = max(1, tiles.batch // block)
    row, first = programs(start, order, many)
    _block_grad[(row.numel(),)](
        *(dy, x, start, columns, row, first, grad),
        *(b, dy.shape[1] // 8, x.shape[1] // 8, dy.stride(0) // 8, x.stride(0) // 8),
        PRECISION=precision(x.dtype),
        EVEN_B=b % (tiles.inner * 2 // x.element_size()) == 0,
        EVEN=dy.shape[1] % block == 0 and x.shape[1] % block == 0,
        BLOCK=block,
        BATCH=tiles.inner * 2 // x.element_size(),
        MANY=many,
        num_warps=tiles.warps,
        num_stages=_stages(tiles, x),
        enable_fp_fusion=True,
    )
    return grad
