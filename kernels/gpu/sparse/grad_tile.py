"""One tile of dy^T x on the matrix unit: the inner loop of both gradients of a weight, dense with zeros and at the survivors.

Sizes and strides arrive divided by 8, which tells Triton that 8 divides them: every load is 128 bits wide, whatever the size,
since `rows_of_8` rounds rows up.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ..targets import dot, precision, tile


class Tile(NamedTuple):
    """Batch of a step, rows and columns of a tile."""

    batch: int
    rows: int
    columns: int
    warps: int
    stages: int


# By bytes of a value; float32 in TF32 by itself: from sm_90 on the matrix unit wants its tiles transposed, which several stages
# would do with loads of 32 bits.
_HOPPER = {
    2: Tile(64, 128, 128, 8, 3),
    4: Tile(32, 128, 128, 8, 3),
    8: Tile(16, 32, 32, 4, 2),
    "tf32": Tile(64, 128, 128, 8, 1),
}
_AMPERE = {
    2: Tile(32, 128, 128, 8, 3),
    4: Tile(16, 128, 128, 8, 3),
    8: Tile(16, 32, 32, 4, 2),
    "tf32": Tile(16, 128, 128, 8, 3),
}
_CDNA = {key: t._replace(stages=2) for key, t in _AMPERE.items()}
TILES = {"sm_80": _AMPERE, "sm_90": _HOPPER, "sm_100": _HOPPER, "gfx942": _CDNA}


def tile_of(dtype: torch.dtype) -> Tile:
    """The current device's tile for values of `dtype`."""
    return tile(TILES)["tf32" if precision(dtype) == "tf32" else dtype.itemsize]


def sums(dtype: torch.dtype) -> tl.dtype:
    """What sums of `dtype` are kept in."""
    return tl.float64 if dtype == torch.float64 else tl.float32


@triton.jit
def tile_product(
    dy_ptr, x_ptr, first_n, first_k, B, N8, K8, stride_db8, stride_xb8,
    SUMS: tl.constexpr, PRECISION: tl.constexpr, EVEN: tl.constexpr,
    BATCH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """dy[:, first_n : first_n + ROWS]^T x[:, first_k : first_k + COLUMNS]; dy (B, N), x (B, K). EVEN: nothing to mask."""
    rb, rn, rk = tl.arange(0, BATCH), first_n + tl.arange(0, ROWS), first_k + tl.arange(0, COLUMNS)
    dy_tile_ptr = dy_ptr + rb.to(tl.int64)[:, None] * stride_db8 * 8 + rn[None, :]
    x_tile_ptr = x_ptr + rb.to(tl.int64)[:, None] * stride_xb8 * 8 + rk[None, :]
    acc = tl.zeros((ROWS, COLUMNS), SUMS)
    for b in range(0, B, BATCH):
        if EVEN:
            dy, x = tl.load(dy_tile_ptr), tl.load(x_tile_ptr)
        else:
            on_b = (b + rb < B)[:, None]
            dy = tl.load(dy_tile_ptr, mask=on_b & (rn < N8 * 8)[None, :], other=0.0)
            x = tl.load(x_tile_ptr, mask=on_b & (rk < K8 * 8)[None, :], other=0.0)
        acc = dot(dy.trans(1, 0), x, acc, PRECISION)
        dy_tile_ptr += tl.full((), BATCH * 8, tl.int64) * stride_db8
        x_tile_ptr += tl.full((), BATCH * 8, tl.int64) * stride_xb8
    return acc
