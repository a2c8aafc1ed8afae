"""The three products on a compressed weight, values of the survivors in row-major order, and its dense form."""

from __future__ import annotations

import numpy as np
import torch
from numba import prange
from torch import Tensor

from . import dense
from .jit import jit, threads
from .memory import check_alike, gradient_memory
from .products import correlate, multiply
from .sparse_pattern import sparse_tensors as sparse_tensors
from .vector import expand_line, full_vectors, population

_OWNER = torch.empty(0)  # of the block that dense weights, needed for one product each, are made in
_WORDS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def sparse_linear(
    x: Tensor, values: Tensor, bias: Tensor | None, bits: Tensor, rows: int, pattern: list[Tensor]
) -> Tensor:
    """See initperf/reference/sparse_linear.py."""
    check_alike(x, values)
    units, columns, starts = pattern[:3]
    return multiply(x, (values.data_ptr(), starts.data_ptr(), values.numel(), 0), rows, bias, units, columns)


def sparse_grad_input(dy: Tensor, values: Tensor, bits: Tensor, columns: int, pattern: list[Tensor]) -> Tensor:
    """See initperf/reference/sparse_linear.py."""
    check_alike(dy, values)
    units, numbers, places = pattern[3:]
    return multiply(dy, (values.data_ptr(), places.data_ptr()), columns, None, units, numbers)


def sparse_grad_values(dy: Tensor, x: Tensor, bits: Tensor, pattern: list[Tensor]) -> Tensor:
    """See initperf/reference/sparse_linear.py."""
    units, columns, starts = pattern[:3]
    nnz = int(starts[-1])
    out = torch.empty((nnz, 1), dtype=x.dtype)
    if not len(dy) or not nnz:
        return out.zero_()
    correlate(dy, x, (out.data_ptr(), starts.data_ptr(), nnz, 0), units, columns)
    return out


@jit()
def _bytes_before(bits, first, last):
    """Set bits of bytes first..last."""
    count = np.int64(0)
    for i in range(first, last):
        count += _ONES[bits[i]]
    return count


_ONES = np.array([bin(b).count("1") for b in range(256)], np.uint8)


@jit()
def _expand(values, bits, dense, first, last, place):
    """dense[i] = the next value where bit i is set, else 0, for the weights of bytes first..last; `place`: of the first."""
    full_vectors()
    size = dense.itemsize
    source, target = np.int64(values.ctypes.data), np.int64(dense.ctypes.data)
    i = first
    while i + 2 <= last and 8 * i + 16 <= dense.size:
        mask = np.uint16(bits[i]) | np.uint16(bits[i + 1] << 8)
        expand_line(dense, source + place * size, target + 8 * i * size, np.uint16(mask))
        place += np.int64(population(np.uint64(mask)))
        i += 2
    while i < last:
        byte = bits[i]
        for b in range(min(8, dense.size - 8 * i)):
            if (byte >> b) & 1:
                dense[8 * i + b] = values[place]
                place += 1
            else:
                dense[8 * i + b] = 0
        i += 1


@jit()
def _compress(dense, bits, values, first, last, place):
    for i in range(first, last):
        byte = bits[i]
        for b in range(min(8, dense.size - 8 * i)):
            values[place] = dense[8 * i + b]
            place += (byte >> b) & 1
            if place == values.size:
                return


@jit(parallel=True)
def _expand_parallel(workers, values, bits, dense):
    before = np.empty(workers + 1, np.int64)
    for t in prange(workers):
        before[t + 1] = _bytes_before(bits, bits.size * t // workers, bits.size * (t + 1) // workers)
    before[0] = 0
    for t in range(workers):
        before[t + 1] += before[t]
    for t in prange(workers):
        _expand(values, bits, dense, bits.size * t // workers, bits.size * (t + 1) // workers, before[t])


@jit(parallel=True)
def _compress_parallel(workers, dense, bits, values):
    before = np.empty(workers + 1, np.int64)
    for t in prange(workers):
        before[t + 1] = _bytes_before(bits, bits.size * t // workers, bits.size * (t + 1) // workers)
    before[0] = 0
    for t in range(workers):
        before[t + 1] += before[t]
    for t in prange(workers):
        part = values[before[t] : before[t + 1]]
        if part.size:
            _compress(dense, bits, part, bits.size * t // workers, bits.size * (t + 1) // workers, 0)


def _flat(tensor: Tensor) -> np.ndarray:
    return tensor.detach().view(-1).view(_WORDS[tensor.element_size()]).numpy()


def expand(values: Tensor, bits: Tensor, rows: int, columns: int) -> Tensor:
    """The dense weight (rows, columns) of values (nnz, 1) at the set bits, 0 elsewhere; the values themselves if none is pruned."""
    if values.numel() == rows * columns:
        return values.detach().view(rows, columns)
    dense = gradient_memory(_OWNER, (rows, columns), values.dtype)
    if dense.numel():
        workers = threads() if dense.numel() >= 1 << 16 else 1
        _expand_parallel(workers, _flat(values), bits.numpy(), _flat(dense)) if workers > 1 else _expand(
            _flat(values), bits.numpy(), _flat(dense), 0, bits.numel(), 0
        )
    return dense


def compress(dense: Tensor, bits: Tensor, nnz: int) -> Tensor:
    """values (nnz, 1) of a dense weight at the set bits; the weight itself if none is pruned."""
    if nnz == dense.numel():
        return dense.reshape(nnz, 1)
    values = gradient_memory(bits, (nnz, 1), dtype=dense.dtype)
    if nnz:
        dense = dense.contiguous()
        workers = threads() if dense.numel() >= 1 << 16 else 1
        _compress_parallel(workers, _flat(dense), bits.numpy(), _flat(values)) if workers > 1 else _compress(
            _flat(dense), bits.numpy(), _flat(values), 0, bits.numel(), 0
        )
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
