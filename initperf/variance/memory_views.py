"""A tensor's memory as the moment kernels read it: (A, C, I), where A and I are reduced, C is kept, and I is contiguous."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch

from initperf.core.checks import InitPerfTypeError, fail

Shape = tuple[int, int, int, int, int]  # A, C, I, step of A, step of C, in elements
SHORT = 16  # runs of values shorter than this are copied together first
PARTS = 4096  # a tensor is read in at most so many parts, instead of copied

Dims = list[tuple[int, int]]  # (size, stride)


def reduced_dims(x: torch.Tensor, dim: int | Sequence[int] | None) -> set[int]:
    """The dimensions that torch.var would reduce, all at least 0. Raises on a `dim` that x does not have."""
    if dim is None:
        return set(range(x.dim()))
    reduced = set()
    for d in list(dim) if isinstance(dim, Sequence) else [dim]:
        if isinstance(d, bool) or not isinstance(d, int):
            fail("dim to be an int or a sequence of ints", type(d).__name__, kind=InitPerfTypeError)
        if not -max(x.dim(), 1) <= d < max(x.dim(), 1):
            fail(f"dim to be within the {x.dim()} dimensions of the tensor", d)
        if d % max(x.dim(), 1) in reduced:
            fail("every dimension at most once in dim", dim)
        reduced.add(d % max(x.dim(), 1))
    return reduced or set(range(x.dim()))


def memory_views(x: torch.Tensor, reduced: set[int]) -> list[tuple[torch.Tensor, Shape]]:
    """Views whose channels, one after another, are the kept elements; copied only where no such views exist or runs are short."""
    x = x.detach()
    if x.dim() == 0:
        return [(x, (1, 1, 1, 0, 0))]
    if x.numel() == 0:
        return [(x, _rows_of(x, reduced))]
    inner = [(x.shape[d], x.stride(d)) for d in sorted(reduced, key=x.stride) if x.shape[d] != 1]
    run = 1
    while inner and inner[0][1] == run:  # the reduced dimensions that together are one run of memory
        run *= inner.pop(0)[0]
    rows = _merged(inner[::-1])
    outer = [d for d in range(x.dim()) if d not in reduced and x.shape[d] != 1]
    if rows is not None:
        for split in range(
            len(outer) + 1
        ):  # the first kept dimensions are taken apart, the others have to be evenly spaced
            columns = _merged([(x.shape[d], x.stride(d)) for d in outer[split:]])
            parts = prod(x.shape[d] for d in outer[:split])
            if parts > PARTS:
                break
            if columns is not None and _is_readable(rows[0], *columns, run):
                shape = (rows[0], columns[0], run, rows[1], columns[1])
                return [(part, shape) for part in _taken_apart(x, outer[:split])]
    order = [d for d in range(x.dim()) if d not in reduced] + sorted(reduced)
    return [(x.permute(order).contiguous(), _rows_of(x, reduced))]


def _is_readable(a: int, c: int, step_c: int, run: int) -> bool:
    """Whether (A, C, I) is read well in place: long runs, or neighbouring columns."""
    return a == 1 or run >= SHORT or (run == 1 and step_c == 1 and c > 1)


def _rows_of(x: torch.Tensor, reduced: set[int]) -> Shape:
    """The shape of x, once the reduced dimensions are the last and it is contiguous."""
    n = prod(x.shape[d] for d in reduced)
    return 1, prod(n for d, n in enumerate(x.shape) if d not in reduced), n, 0, n


def _taken_apart(x: torch.Tensor, dims: Sequence[int]) -> list[torch.Tensor]:
    """The parts of x at every index of `dims`, in order."""
    parts = [x]
    for d in sorted(dims):
        parts = [piece for part in parts for piece in part.unbind(d - x.dim() + part.dim())]
    return parts


def _merged(dims: Dims) -> tuple[int, int] | None:
    """(size, stride) of dimensions, outermost first, as one; None if they are not evenly spaced."""
    if not dims:
        return 1, 0
    size, step = dims[-1]
    for n, stride in reversed(dims[:-1]):
        if stride != size * step:
            return None
        size *= n
    return size, step
