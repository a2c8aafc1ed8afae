"""Products with a weight in compressed rows, and its gradient at the survivors: the definition.

A mask (N, K) in rows: start (N + 1,) int32, columns (nnz,) uint16 (int32 for K > 65536), ascending within a row, and
order (N,) int32, the rows by falling number of survivors, ties by row. Values (nnz,) or (nnz, 1) are in the same order.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Rows(NamedTuple):
    start: Tensor
    columns: Tensor
    order: Tensor


def rows(mask: Tensor) -> Rows:
    """The survivors of the bool mask (N, K) by rows."""
    counts = mask.sum(1)
    index = torch.uint16 if mask.shape[1] <= 1 << 16 else torch.int32
    return Rows(
        torch.nn.functional.pad(counts.cumsum(0), (1, 0)).to(torch.int32),
        mask.nonzero()[:, 1].to(torch.int32).to(index),
        counts.argsort(descending=True, stable=True).to(torch.int32),
    )


def transposed(mask: Tensor) -> tuple[Rows, Tensor]:
    """The survivors by columns, which are the rows of the mask transposed, and perm (nnz,) int32: survivor i there is perm[i] here."""
    number = torch.zeros(mask.shape, dtype=torch.int32, device=mask.device)
    number[mask] = torch.arange(int(mask.sum()), dtype=torch.int32, device=mask.device)
    return rows(mask.t()), number.t()[mask.t()]


def _row_of_each(start: Tensor) -> Tensor:
    counts = start.diff().long()
    return torch.arange(counts.numel(), device=start.device).repeat_interleave(counts)


def sparse_matmul(
    x: Tensor,
    values: Tensor,
    start: Tensor,
    columns: Tensor,
    order: Tensor,
    bias: Tensor | None = None,
    perm: Tensor | None = None,
) -> Tensor:
    """y (B, N) = x (B, K) W^T + bias, sums in float32 (float64 for float64), rounded once to x's dtype.

    Survivor i has values[perm[i]], or values[i] without perm. (For the gradient of x: dy, and the mask transposed.)
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    values = values.flatten().to(wide)
    weight = x.new_zeros(order.numel(), x.shape[1], dtype=wide)
    weight[_row_of_each(start), columns.long()] = values if perm is None else values[perm.long()]
    y = x.to(wide) @ weight.t()
    return (y if bias is None else y + bias.to(wide)).to(x.dtype)


def sparse_grad(dy: Tensor, x: Tensor, start: Tensor, columns: Tensor, order: Tensor) -> Tensor:
    """dvalues (nnz,): of survivor (n, k) the sum over the batch of dy[b, n] x[b, k], in float32 (float64 for float64)."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return (dy.to(wide).t() @ x.to(wide))[_row_of_each(start), columns.long()].to(x.dtype)


def word_starts(mask: Tensor) -> Tensor:
    """first (N, ceil(K / 32)) int32: the survivors of the bool mask (N, K) before each word of 32 bits, in rows."""
    n, k = mask.shape
    words = torch.nn.functional.pad(mask, (0, -k % 32)).view(n, -1, 32).sum(2).flatten()
    return (words.cumsum(0) - words).to(torch.int32).view(n, -1)


def sparse_grad_tiles(dy: Tensor, x: Tensor, bits: Tensor, first: Tensor, tiles: Tensor, survivors: int) -> Tensor:
    """The same as sparse_grad, from the mask as bits (N, ceil(K / 32)) int32: bit j of word w is weight 32 w + j."""
    wide = torch.promote_types(x.dtype, torch.float32)
    mask = (bits[:, :, None] >> torch.arange(32, dtype=torch.int32, device=bits.device)) & 1
    return (dy.to(wide).t() @ x.to(wide))[mask.flatten(1)[:, : x.shape[1]].bool()].to(x.dtype)
