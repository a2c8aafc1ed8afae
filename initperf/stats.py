"""Moments of tensors: one pass and one launch for a whole list, of mixed shapes and dtypes, per tensor or per channel."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from math import prod

import torch

from . import ops
from .checks import FLOATS, InitPerfRuntimeError, InitPerfTypeError, check, check_float_tensor, fail

ops.register("moments", module="moments")

Shape = tuple[int, int, int, int, int]  # A, C, I, step of A, step of C: reduced, kept, reduced and contiguous
SHORT = 64  # runs of values shorter than this are copied together first

_VALUES = ("mean", "var", "skew", "kurtosis", "min", "max", "zeros", "m2", "m3", "m4")


class Moments:
    """Moments of the finite values of tensors. Fields: count, nonfinite (int64); mean, var, skew, kurtosis, min, max, zeros (float64).

    mean = sum x / n; var = sum (x - mean)^2 / (n - correction); skew = m3 / m2^1.5 and kurtosis = m4 / m2^2, where
    mk = sum (x - mean)^k / n (a normal distribution has 0 and 3); zeros is a fraction of the finite values.
    Where nothing is finite all of them are NaN; skew and kurtosis are NaN where all values are equal.
    A field has one entry a tensor, or a channel; `result[i]` is the part of tensor i, in the shape that is kept.
    """

    def __init__(self, counts: torch.Tensor, values: torch.Tensor, shapes: list[torch.Size]) -> None:
        self._counts, self._values, self._shapes = counts, values, shapes

    count = property(lambda self: self._counts[0], doc="Finite values, int64.")
    nonfinite = property(
        lambda self: self._counts[1], doc="Values that are NaN or infinite, int64; left out of all else."
    )
    mean = property(lambda self: self._values[0])
    var = property(lambda self: self._values[1])
    skew = property(lambda self: self._values[2])
    kurtosis = property(lambda self: self._values[3])
    min = property(lambda self: self._values[4])
    max = property(lambda self: self._values[5])
    zeros = property(lambda self: self._values[6], doc="Fraction of the finite values that are 0 or -0.")

    @property
    def std(self) -> torch.Tensor:
        """Square root of var."""
        return self.var.sqrt()

    def central(self, k: int) -> torch.Tensor:
        """E[(x - mean)^k], k = 0 to 4."""
        self._check_power(k)
        if k < 2:
            return self.mean * 0 + (1 - k)
        return self._values[5 + k]

    def raw(self, k: int) -> torch.Tensor:
        """E[x^k], k = 0 to 4."""
        self._check_power(k)
        mean, m2, m3, m4 = self.mean, *self._values[7:]
        if k == 0:
            return mean * 0 + 1
        if k == 1:
            return mean
        if k == 2:
            return mean**2 + m2
        if k == 3:
            return mean**3 + 3 * mean * m2 + m3
        return mean**4 + 6 * mean**2 * m2 + 4 * mean * m3 + m4

    def __len__(self) -> int:
        return len(self._shapes)

    def __getitem__(self, i: int) -> Moments:
        ends = list(accumulate(prod(shape) for shape in self._shapes))
        if not -len(ends) <= i < len(ends):
            raise IndexError(f"Expected an index below {len(ends)}, the number of tensors. Got {i}.")
        shape, end = self._shapes[i], ends[i]
        part = slice(end - prod(shape), end)
        return Moments(self._counts[:, part].view(2, *shape), self._values[:, part].view(-1, *shape), [shape])

    def __repr__(self) -> str:
        fields = ("count", "mean", "var", "skew", "kurtosis", "min", "max", "zeros", "nonfinite")
        return "Moments(" + ", ".join(f"{name}={getattr(self, name).tolist()}" for name in fields) + ")"

    @staticmethod
    def _check_power(k: int) -> None:
        if k not in (0, 1, 2, 3, 4):
            fail("a power k of 0, 1, 2, 3 or 4", k)


def moments(
    tensors: torch.Tensor | Iterable[torch.Tensor],
    *,
    dim: int | Sequence[int] | None = None,
    correction: float = 0,
    order: int = 4,
) -> Moments:
    """count, mean, var, skew, kurtosis, min, max, zeros and nonfinite of every tensor, in one pass and one launch.

    tensors: one, or a list of any shapes and of float32, bfloat16, float16, float64, on one device. dim: as torch.var's,
    the dimensions that are reduced; None is all of them. order=2 leaves out skew, kurtosis, and central and raw moments
    above 2 (they are NaN), for speed. Fields have one entry a tensor of a list, or are shaped as torch.var's result for
    one tensor; with a list and dim, all kept channels follow one another, and `result[i]` has those of tensor i.
    Sums are in float64 and about a shift (on GPUs: in float32 about each block's mean, float64 between blocks and for
    float64), in an order that does not depend on the number of threads. Nothing waits for the device.
    """
    single = isinstance(tensors, torch.Tensor)
    listed = [tensors] if isinstance(tensors, torch.Tensor) else _listed(tensors)
    if order not in (2, 4):
        fail("order to be 2 or 4", order)
    if not isinstance(correction, (int, float)):
        fail("correction to be a number", type(correction).__name__, kind=InitPerfTypeError)
    device = listed[0].device
    for i, x in enumerate(listed):
        if x.dtype not in FLOATS:
            check_float_tensor(x, f"tensors[{i}]")
        if x.device != device:
            fail(f"all tensors on one device ({device})", f"tensors[{i}] on {x.device}", kind=InitPerfRuntimeError)
        if x.layout != torch.strided:
            fail(f"tensors[{i}] to be dense (layout torch.strided)", x.layout, kind=InitPerfRuntimeError)

    seen, shapes, kept = [], [], []
    for x in listed:
        if dim is None and x.is_contiguous():
            seen.append(x)
            shapes.append((1, 1, x.numel(), 0, 0))
            kept.append(torch.Size())
            continue
        memory, shape, keep = _view(x, dim)
        seen.append(memory)
        shapes.append(shape)
        kept.append(keep)
    counts, values = ops.implementation("moments", device.type)(seen, shapes, order, float(correction))
    result = Moments(counts, values, kept)
    return result[0] if single else result


def _listed(tensors: object) -> list[torch.Tensor]:
    if not isinstance(tensors, Iterable) or isinstance(tensors, (str, bytes, Mapping)):
        kind = InitPerfTypeError
        fail("tensors to be a tensor, or a list of at least one tensor", type(tensors).__name__, kind=kind)
    tensors = list(tensors)
    if not tensors:
        fail("tensors to be a tensor, or a list of at least one tensor", "none")
    for i, x in enumerate(tensors):
        if not isinstance(x, torch.Tensor):
            fail(f"tensors[{i}] to be a torch.Tensor", type(x).__name__, kind=InitPerfTypeError)
    return tensors


def _view(x: torch.Tensor, dim: int | Sequence[int] | None) -> tuple[torch.Tensor, Shape, torch.Size]:
    """x's memory as (A, C, I), I contiguous, and the kept shape; copied only where no such view exists or runs are short."""
    x = x.detach()
    if dim is None:
        reduced = set(range(x.dim()))
    else:
        given = list(dim) if isinstance(dim, Sequence) else [dim]
        for d in given:
            if isinstance(d, bool) or not isinstance(d, int):
                fail("dim to be an int or a sequence of ints", type(d).__name__, kind=InitPerfTypeError)
            check(
                -max(x.dim(), 1) <= d < max(x.dim(), 1), f"dim to be within the {x.dim()} dimensions of the tensor", d
            )
        reduced = {d % max(x.dim(), 1) for d in given} or set(range(x.dim()))
    keep = torch.Size(n for d, n in enumerate(x.shape) if d not in reduced)

    inner = (
        [(x.shape[d], x.stride(d)) for d in sorted(reduced, key=lambda d: x.stride(d)) if x.shape[d] != 1]
        if x.dim()
        else []
    )
    outer = [(n, x.stride(d)) for d, n in enumerate(x.shape) if d not in reduced and n != 1]
    run = 1
    while inner and inner[0][1] == run:  # the reduced dimensions that together are one run of memory
        run *= inner.pop(0)[0]
    rows, columns = _merged(sorted(inner, key=lambda p: -p[1])), _merged(outer)
    if x.numel() and rows is not None and columns is not None:
        (a, step_a), (c, step_c) = rows, columns
        if a == 1 or run >= SHORT or (run == 1 and (c == 1 or step_c == 1) and c > 1):
            return x, (a, c, run, step_a, step_c), keep
    order = [d for d in range(x.dim()) if d not in reduced] + sorted(reduced)
    c = prod(keep)
    n = prod(x.shape[d] for d in reduced) if x.dim() else 1
    copy = x.permute(order).contiguous() if x.dim() else x
    return copy, (1, c, n, 0, n), keep


def _merged(dims: list[tuple[int, int]]) -> tuple[int, int] | None:
    """(size, stride) of dimensions, outermost first, as one; None if they are not evenly spaced."""
    if not dims:
        return 1, 0
    size, step = dims[-1]
    for n, stride in reversed(dims[:-1]):
        if stride != size * step:
            return None
        size *= n
    return size, step
