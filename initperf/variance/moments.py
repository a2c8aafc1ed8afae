"""Moments of tensors: one pass and one launch for a whole list, of mixed shapes and dtypes, per tensor or per channel."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from math import prod

import torch

from initperf.core import ops
from initperf.core.checks import FLOATS, InitPerfRuntimeError, InitPerfTypeError, check_float_tensor, fail
from initperf.variance.memory_views import memory_views, reduced_dims

ops.register("moments", module="moments.moments")

SCALAR = torch.Size()
_MEAN, _VAR, _SKEW, _KURTOSIS, _MIN, _MAX, _ZEROS, _M2, _M3, _M4, _COUNT, _NONFINITE = range(12)


class Moments:
    """Moments of the finite values of tensors. Fields: count, nonfinite (int64); mean, var, skew, kurtosis, min, max, zeros (float64).

    On devices without float64 (MPS) they are float32: counts above 2^24 are rounded, and squares beyond its range are infinite.

    mean = sum x / n; var = sum (x - mean)^2 / (n - correction); skew = m3 / m2^1.5 and kurtosis = m4 / m2^2, where
    mk = sum (x - mean)^k / n (a normal distribution has 0 and 3); zeros is a fraction of the finite values.
    Where nothing is finite all of them are NaN; skew and kurtosis are NaN where all values are equal.
    A field has one entry a tensor, or a channel; `result[i]` is the part of tensor i, in the shape that is kept.
    """

    def __init__(self, rows: torch.Tensor, shapes: list[torch.Size], shape: torch.Size | None = None) -> None:
        """rows: float64 (12, channels), as the kernels write them. shapes: of the tensors. shape: of every field."""
        self._rows, self._shapes, self._shape = rows, shapes, shape

    def _field(self, row: int) -> torch.Tensor:
        field = self._rows[row]
        return field if self._shape is None else field.view(self._shape)

    mean = property(lambda self: self._field(_MEAN))
    var = property(lambda self: self._field(_VAR))
    skew = property(lambda self: self._field(_SKEW))
    kurtosis = property(lambda self: self._field(_KURTOSIS))
    min = property(lambda self: self._field(_MIN))
    max = property(lambda self: self._field(_MAX))
    zeros = property(lambda self: self._field(_ZEROS), doc="Fraction of the finite values that are 0 or -0.")
    count = property(lambda self: self._field(_COUNT).long(), doc="Finite values, int64.")
    nonfinite = property(
        lambda self: self._field(_NONFINITE).long(), doc="Values that are NaN or infinite, int64; left out of all else."
    )

    @property
    def std(self) -> torch.Tensor:
        """Square root of var."""
        return self.var.sqrt()

    def central(self, k: int) -> torch.Tensor:
        """E[(x - mean)^k], k = 0 to 4."""
        self._check_power(k)
        if k < 2:
            return self.mean * 0 + (1 - k)
        return self._field(_M2 + k - 2)

    def raw(self, k: int) -> torch.Tensor:
        """E[x^k], k = 0 to 4."""
        self._check_power(k)
        mean, m2, m3, m4 = (self._field(row) for row in (_MEAN, _M2, _M3, _M4))
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
        return Moments(self._rows[:, end - prod(shape) : end], [shape], shape)

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
    if device.type == "meta":
        fail("tensors with values", "tensors[0] on the meta device", kind=InitPerfRuntimeError)
    views, shapes, kept = [], [], []
    for i, x in enumerate(listed):
        if x.dtype not in FLOATS:
            check_float_tensor(x, f"tensors[{i}]")
        if x.device != device:
            fail(f"all tensors on one device ({device})", f"tensors[{i}] on {x.device}", kind=InitPerfRuntimeError)
        if x.layout is not torch.strided:
            fail(f"tensors[{i}] to be dense (layout torch.strided)", x.layout, kind=InitPerfRuntimeError)
        if x.is_neg():  # a lazy minus sign, which the memory does not show
            x = x.resolve_neg()
        if dim is None and x.is_contiguous():
            views.append(x)
            shapes.append((1, 1, x.numel(), 0, 0))
            kept.append(SCALAR)
        else:
            reduced = reduced_dims(x, dim)
            kept.append(torch.Size([n for d, n in enumerate(x.shape) if d not in reduced]))
            for memory, shape in memory_views(x, reduced):
                views.append(memory)
                shapes.append(shape)
    rows = ops.implementation("moments", device.type)(views, shapes, order, float(correction))
    return Moments(rows, kept, kept[0] if single else None)


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
