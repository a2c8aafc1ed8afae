"""Products with a block-sparse weight: the definition.

W (N, K) keeps blocks of BLOCK x BLOCK, values (blocks, BLOCK, BLOCK) by rows of blocks; start, columns and order are those of
sparse_matmul.rows for the mask of blocks (ceil(N / BLOCK), ceil(K / BLOCK)), columns int32. At an edge that BLOCK does not
divide, what lies outside W is zero.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..sparse import rows as sparse_matmul


def block_rows(mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """start, columns, order of a mask of blocks."""
    start, columns, order = sparse_matmul.rows(mask)
    return start, columns.to(torch.int32), order


def block_columns(mask: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """start, columns, order of the mask of blocks transposed, and perm: which block of the values each is."""
    (start, columns, order), perm = sparse_matmul.transposed(mask)
    return start, columns.to(torch.int32), order, perm


def pack_blocks(weight: Tensor, mask: Tensor, block: int) -> Tensor:
    """values of the kept blocks of weight (N, K)."""
    n, k = weight.shape
    rows, columns = mask.shape
    padded = torch.nn.functional.pad(weight, (0, columns * block - k, 0, rows * block - n))
    return padded.view(rows, block, columns, block).transpose(1, 2)[mask]


def unpack_blocks(values: Tensor, start: Tensor, columns: Tensor, outputs: int, inputs: int) -> Tensor:
    """The dense weight (outputs, inputs)."""
    block = values.shape[-1]
    rows = start.numel() - 1
    row = torch.arange(rows, device=start.device).repeat_interleave(start.diff().long())
    whole = values.new_zeros(rows, -(-inputs // block), block, block)
    whole[row, columns.long()] = values
    return whole.transpose(1, 2).reshape(rows * block, -1)[:outputs, :inputs]


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
    """y (B, outputs) = x W^T + bias, sums in float32, rounded once; with perm dx = dy W from the mask of blocks transposed."""
    wide = torch.promote_types(x.dtype, torch.float32)
    values = values.to(wide) if perm is None else values.to(wide)[perm.long()].transpose(1, 2)
    y = x.to(wide) @ unpack_blocks(values, start, columns, outputs, x.shape[1]).t()
    return (y if bias is None else y + bias.to(wide)).to(x.dtype)


def block_grad(dy: Tensor, x: Tensor, start: Tensor, columns: Tensor, order: Tensor, block: int) -> Tensor:
    """dvalues (blocks, BLOCK, BLOCK): of each kept block dy[:, its rows]^T x[:, its columns], sums in float32; 0 outside W."""
    wide = torch.promote_types(x.dtype, torch.float32)
    rows = start.numel() - 1
    mask = torch.zeros(rows, -(-x.shape[1] // block), dtype=torch.bool, device=x.device)
    mask[torch.arange(rows, device=x.device).repeat_interleave(start.diff().long()), columns.long()] = True
    return pack_blocks(dy.to(wide).t() @ x.to(wide), mask, block).to(x.dtype)
