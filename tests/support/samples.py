"""One distribution of every kind of the sampling contract, and bits compared."""

from __future__ import annotations

import math

import torch

from initperf import rng
from tolerance import bits

INF = math.inf
FLOATS = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
TRUNCATIONS = {  # one or more intervals of every kind, in std from the mean
    rng.TRUNC_CENTER: [(-2, 2), (-1, 2.2), (0.5, 2)],
    rng.TRUNC_NORMAL: [(-3, 3), (0, INF), (-1, 9), (-INF, 0.5), (1, 5), (2, 9)],
    rng.TRUNC_TAIL: [(4, 5), (2.2, INF), (-INF, -8), (-6, -5), (12, 13)],
    rng.TRUNC_FAR: [(20, 21), (1000, INF), (-15, -14), (13, INF)],
    rng.TRUNC_NARROW: [(1, 1.01), (-0.1, 0.2), (20, 20.01), (-7, -6.99999)],
}


def distributions(dtype):
    """One of every kind, with a scale and a mean that round."""
    if dtype == torch.int32:
        return [rng.Distribution(rng.BITS, (0.0, 0.0, -INF, INF))]
    wide = [rng.uniform(-0.3, 1.7, dtype), rng.normal(0.1, 0.7)]
    return wide + [
        rng.trunc_normal(0.1, 0.7, 0.1 + 0.7 * a, 0.1 + 0.7 * b, dtype)
        for a, b in (intervals[0] for intervals in TRUNCATIONS.values())
    ]


def assert_same_bits(a, b):
    different = (bits(a) != bits(b)).nonzero()
    assert not len(different), f"{len(different)} of {a.numel()} differ, first at {different[0].item()}"
