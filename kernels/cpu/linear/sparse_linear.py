"""The three products on a compressed weight, values of the survivors in row-major order, and its dense form."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..core.jit import jit, threads
from ..core.memory import check_alike, gradient_memory
from ..core.scalars import expand_line, full_vectors, population
from ..core.shares import ME, among, on_threads, part_of
from ..core.target import has_avx512
from ..dense import products as dense
from ..dense.many_rows_ir import long_at
from ..sparse.compressed_index import sparse_tensors as sparse_tensors
from ..sparse.many_rows import correlate, multiply

_WIDE = has_avx512()  # elsewhere LLVM writes 16 branches for a line
_OWNER = torch.empty(0)  # of the block that dense weights, needed for one product each, are made in
_WORDS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def sparse_linear(
    x: Tensor, values: Tensor, bias: Tensor | None, bits: Tensor, rows: int, pattern: list[Tensor]
) -> Tensor:
    """See kernels/reference/linear/sparse_linear.py."""
    check_alike(x, values)
    units, columns, starts = pattern[:3]
    return multiply(x, (values.data_ptr(), starts.data_ptr(), values.numel(), 0), rows, bias, units, columns)


def sparse_grad_input(dy: Tensor, values: Tensor, bits: Tensor, columns: int, pattern: list[Tensor]) -> Tensor:
    """See kernels/reference/linear/sparse_linear.py."""
    check_alike(dy, values)
    units, numbers, places = pattern[3:]
    return multiply(dy, (values.data_ptr(), places.data_ptr()), columns, None, units, numbers)


def sparse_grad_values(dy: Tensor, x: Tensor, bits: Tensor, pattern: list[Tensor]) -> Tensor:
    """See kernels/reference/linear/sparse_linear.py."""
    units, columns, starts = pattern[:3]
    nnz = int(starts[-1])
    out = torch.empty((nnz, 1), dtype=x.dtype)
    if not len(dy) or not nnz:
        return out.zero_()
    correlate(dy, x, (out.data_ptr(), starts.data_ptr(), nnz, 0), units, columns)
    return out


@jit()
def _survivors_before(bits, last):
    """Set bits of bytes 0..last."""
    count, byte, start = np.int64(0), np.int64(0), np.int64(bits.ctypes.data)
    while byte + 8 <= last:
        count += np.int64(population(long_at(start + byte)))
        byte += 8
    for i in range(byte, last):
        count += np.int64(population(np.uint64(bits[i])))
    return count


@jit()
def _expand(share, values, bits, dense):
    """dense[i] = the next value where bit i is set, else 0, for the weights of a share of the bytes."""
    full_vectors()
    if share[ME] < 0:
        on_threads(share)
        return
    first, last = part_of(share, bits.size)
    place = _survivors_before(bits, first)
    size = dense.itemsize
    source, target = np.int64(values.ctypes.data), np.int64(dense.ctypes.data)
    i = first
    while _WIDE and i + 2 <= last and 8 * i + 16 <= dense.size:
        mask = np.uint16(bits[i]) | np.uint16(bits[i + 1] << 8)
        expand_line(dense, source + place * size, target + 8 * i * size, np.uint16(mask))
        place += np.int64(population(np.uint64(mask)))
        i += 2
    one, most = dense.dtype.type(1), values.size - 1
    while i < last:
        byte = bits[i]
        for b in range(min(8, dense.size - 8 * i)):  # with no branch: no processor foresees a random mask
            survives = (byte >> b) & 1
            dense[8 * i + b] = values[min(place, most)] * (one * survives) if most >= 0 else 0
            place += survives
        i += 1


@jit()
def _compress(share, dense, bits, values):
    """The reverse of `_expand`."""
    if share[ME] < 0:
        on_threads(share)
        return
    first, last = part_of(share, bits.size)
    place, end = _survivors_before(bits, first), min(_survivors_before(bits, last), values.size)
    if place >= end:
        return
    for i in range(first, last):
        byte = bits[i]
        for b in range(min(8, dense.size - 8 * i)):
            values[place] = dense[8 * i + b]
            place += (byte >> b) & 1
            if place == end:  # whatever is written there is another worker's
                return


def _flat(tensor: Tensor) -> np.ndarray:
    return tensor.detach().view(-1).view(_WORDS[tensor.element_size()]).numpy()


def expand(values: Tensor, bits: Tensor, rows: int, columns: int) -> Tensor:
    """The dense weight (rows, columns) of values (nnz, 1) at the set bits, 0 elsewhere; the values themselves if none is pruned."""
    if values.numel() == rows * columns:
        return values.detach().view(rows, columns)
    dense = gradient_memory(_OWNER, (rows, columns), values.dtype)
    if dense.numel():
        workers = threads() if dense.numel() >= 1 << 16 else 1
        _expand(among(workers), _flat(values), bits.numpy(), _flat(dense))
    return dense


def compress(dense: Tensor, bits: Tensor, nnz: int) -> Tensor:
    """values (nnz, 1) of a dense weight at the set bits; the weight itself if none is pruned."""
    if nnz == dense.numel():
        return dense.reshape(nnz, 1)
    values = gradient_memory(bits, (nnz, 1), dtype=dense.dtype)
    if nnz:
        dense = dense.contiguous()
        workers = threads() if dense.numel() >= 1 << 16 else 1
        _compress(among(workers), _flat(dense), bits.numpy(), _flat(values))
    return values


def dense_linear(x: Tensor, values: Tensor, bias: Tensor | None, bits: Tensor, rows: int) -> Tensor:
    """sparse_linear as a dense product: ours reads the compressed weight; torch's reads one that is filled for it."""
    if dense.expands(x.dtype):
        return dense.forward(x, values, bias, rows, bits)
    return torch.nn.functional.linear(x, expand(values, bits, rows, x.shape[1]), bias)


def dense_grad_input(dy: Tensor, values: Tensor, bits: Tensor, columns: int) -> Tensor:
    """sparse_grad_input as a dense product."""
    if dense.expands(dy.dtype):
        return dense.grad_input(dy, values, columns, bits)
    return torch.mm(dy, expand(values, bits, dy.shape[1], columns))


def dense_grad_values(dy: Tensor, x: Tensor, bits: Tensor, nnz: int) -> Tensor:
    """sparse_grad_values as a dense product, of which the survivors are kept."""
    if dense.expands(x.dtype):
        return dense.grad_values(dy, x, bits, nnz)
    return compress(torch.mm(dy.t(), x), bits, nnz)
