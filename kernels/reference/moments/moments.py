"""Moments by their definition, in float64, or in float32 on devices that have none."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..precision import widest

Shape = tuple[int, int, int, int, int]  # A, C, I, step of A, step of C, in elements


def moments(tensors: Sequence[torch.Tensor], shapes: Sequence[Shape], order: int, correction: float) -> torch.Tensor:
    """The moments of every channel of every tensor; a tensor is seen as (A, C, I), where A and I are reduced, C is kept.

    tensors: float32, bfloat16, float16 or float64, on one device, each with the memory that its shape names.
    shapes: A, C, I, step of A, step of C, in elements; the step of I is 1. order: 4, or 2 (NaN for what needs more).
    Returns float64 (float32 where the device has none) (12, channels): mean, var with `correction`, skew, kurtosis, min, max, fraction of zeros, and the
    central moments 2, 3 and 4, of the finite values; how many are finite, how many are not.
    """
    return torch.cat([_channels(x, shape, order, correction) for x, shape in zip(tensors, shapes, strict=True)], 1)


def _channels(x: torch.Tensor, shape: Shape, order: int, correction: float) -> torch.Tensor:
    a, c, i, step_a, step_c = shape
    x = torch.as_strided(x, (a, c, i), (step_a, step_c, 1)).detach().transpose(0, 1).reshape(c, a * i)
    x = x.to(widest(x.device.type))
    finite = x.isfinite()
    count = finite.sum(1).to(x.dtype)
    x = x.where(finite, 0)
    # Powers of values above 1e77 or below 1e-77 leave float64: the moments are those of x / size, scaled back.
    least = 1e-290 if x.dtype is torch.float64 else 1e-37
    size = torch.exp2(x.abs().amax(1, keepdim=True).clamp(least).log2().ceil()) if a * i else x.new_ones(c, 1)
    z = x / size
    origin = z.sum(1, keepdim=True) / count[:, None]
    d = (z - origin).where(finite, 0)
    rest = d.sum(1, keepdim=True) / count[:, None]  # the rounding of the first sum
    origin, d = origin + rest, (d - rest).where(finite, 0)
    m2, m3, m4 = (d.pow(k).sum(1) / count for k in (2, 3, 4))
    none, scale = count == 0, size[:, 0]
    if a * i:
        low, high = (x.where(finite, torch.inf).amin(1), x.where(finite, -torch.inf).amax(1))
        flat = low == high
        m2, m3, m4 = (m.where(~flat, 0) for m in (m2, m3, m4))
        mean = (origin[:, 0] * scale).where(~flat, low)
    else:
        low, high, mean = (x.new_full((c,), torch.nan) for _ in range(3))
    zeros = ((x == 0) & finite).sum(1) / count
    skew, kurtosis = m3 / m2.sqrt().pow(3), m4 / m2.square()
    m2 = m2 * scale * scale
    var = m2 * (count / (count - correction).clamp(min=0))
    rows = [mean, var, skew, kurtosis, low, high, zeros, m2, m3 * scale.pow(3), m4 * scale.pow(4)]
    values = torch.stack(rows).masked_fill(none, torch.nan)
    if order == 2:
        values[[2, 3, 8, 9]] = torch.nan
    return torch.cat([values, torch.stack([count, a * i - count])])
