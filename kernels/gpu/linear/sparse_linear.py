"""The three products on a compressed weight, on the kernels of kernels/gpu/sparse/rows.py and kernels/gpu/sparse/rows_grad.py, and its dense form."""

from __future__ import annotations

import torch
from torch import Tensor

from ..sparse import rows as sparse_matmul
from ..sparse import rows_grad
from ..sparse.index import pattern_tensors


def sparse_linear(
    x: Tensor, values: Tensor, bias: Tensor | None, bits: Tensor, rows: int, pattern: list[Tensor]
) -> Tensor:
    """See kernels/reference/linear/sparse_linear.py."""
    start, columns, order = pattern[:3]
    return sparse_matmul.sparse_matmul(x, values, start, columns, order, bias)


def sparse_grad_input(dy: Tensor, values: Tensor, bits: Tensor, columns: int, pattern: list[Tensor]) -> Tensor:
    """See kernels/reference/linear/sparse_linear.py."""
    start, rows, order, number = pattern[3:7]
    return sparse_matmul.sparse_matmul(dy, values, start, rows, order, perm=number)


def sparse_grad_values(dy: Tensor, x: Tensor, bits: Tensor, pattern: list[Tensor]) -> Tensor:
    """See kernels/reference/linear/sparse_linear.py. 16-bit tensors: on the matrix unit; float32 keeps its precision."""
    start, columns, order = pattern[:3]
    if x.element_size() > 2:
        return rows_grad.sparse_grad(dy, x, start, columns, order)[:, None]
    of_words, first, tiles = pattern[7:]
    return rows_grad.sparse_grad_tiles(dy, x, of_words, first, tiles, columns.numel())[:, None]


def sparse_tensors(mask: Tensor) -> list[Tensor]:
    """[start, columns, order] of the bool mask (N, K) by rows, the same of its transpose and number, then bits, first and tiles.

    number (nnz,) int32: of each survivor of the transpose, its row-major place. first (N, ceil(K / 32)) int32: survivors before
    each word of bits. bits, tiles: kernels/gpu/sparse/index.py. The others: sparse_matmul.sparse_matmul.
    """
    number = (mask.flatten().cumsum(0, dtype=torch.int32) - 1).view(mask.shape)
    bits, tiles = pattern_tensors(mask)
    n, k = mask.shape
    words = torch.nn.functional.pad(mask, (0, -k % 32)).view(n, -1, 32).sum(2, dtype=torch.int32).flatten()
    first = (words.cumsum(0, dtype=torch.int32) - words).view(n, -1)
    return [*_rows(mask), *_rows(mask.t()), number.t()[mask.t()], bits, first, tiles]


def _rows(mask: Tensor) -> list[Tensor]:
    counts = mask.sum(1, dtype=torch.int32)
    index = torch.uint16 if mask.shape[1] <= 1 << 16 else torch.int32
    return [
        torch.nn.functional.pad(counts.cumsum(0, dtype=torch.int32), (1, 0)),
        mask.nonzero()[:, 1].to(torch.int32).to(index),
        counts.argsort(descending=True, stable=True).to(torch.int32),
    ]


def expand(values: Tensor, bits: Tensor, rows: int, columns: int) -> Tensor:
    """The dense weight (rows, columns) of values (nnz, 1) at the set bits, 0 elsewhere."""
    return values.new_zeros(rows, columns).masked_scatter_(_mask(bits, rows, columns), values.detach())


def compress(dense: Tensor, bits: Tensor, nnz: int) -> Tensor:
    """values (nnz, 1) of a dense weight at the set bits."""
    return dense[_mask(bits, *dense.shape)][:, None]


def _mask(bits: Tensor, rows: int, columns: int) -> Tensor:
    every = torch.arange(8, dtype=torch.uint8, device=bits.device)
    return ((bits[:, None] >> every) & 1).flatten()[: rows * columns].bool().view(rows, columns)


def dense_linear(x: Tensor, values: Tensor, bias: Tensor | None, bits: Tensor, rows: int) -> Tensor:
    """sparse_linear as a dense product, of a weight that is filled for it."""
    return torch.nn.functional.linear(x, expand(values, bits, rows, x.shape[1]), bias)


def dense_grad_input(dy: Tensor, values: Tensor, bits: Tensor, columns: int) -> Tensor:
    """sparse_grad_input as a dense product."""
    return torch.mm(dy, expand(values, bits, dy.shape[1], columns))


def dense_grad_values(dy: Tensor, x: Tensor, bits: Tensor, nnz: int) -> Tensor:
    """sparse_grad_values as a dense product, of which the survivors are kept."""
    return compress(torch.mm(dy.t(), x), bits, nnz)
