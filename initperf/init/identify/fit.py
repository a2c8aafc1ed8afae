"""Whether a distribution can have made a tensor: tests with fixed limits, and the likelihood among those that can.

The limits follow from each statistic's distribution under the hypothesis alone, no model was used to set them; a true
scheme fails one of them about once in 10,000 tensors: 5 standard errors for mean and variance, 6 for cubed-root chi squares
(their tails are only nearly normal), 2.35 / sqrt(n) for Kolmogorov-Smirnov (exp(-2 * 2.35^2) = 1.6e-5), and a probability
of 1e-5 for the largest value.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from initperf.init.schemes import Init
from initperf.variance.moments import Moments

STANDARD_ERRORS = 5.0
CHI_LIMIT = 6.0
KS_LIMIT = 2.35
TAIL_PROBABILITY = 1e-5
EDGE_LIMIT = 6.0  # of the largest singular value, in units of its fluctuation
SAMPLED = 1 << 17  # values that the Kolmogorov-Smirnov test looks at
MATRIX = 1 << 24  # entries of a matrix whose largest singular value is sought


class Facts(NamedTuple):
    """What all tests share: measured once a tensor, without its rows of zeros."""

    n: int
    mean: float
    variance: float
    low: float
    high: float
    values: Tensor  # sorted float64, at most SAMPLED of them, ties spread over their rounding cells
    rounding: float  # eps of the tensor's dtype
    matrix: Tensor | None  # float32, at least 8 x 8


def without_zeros(tensor: Tensor, zeros: float) -> tuple[Tensor, str]:
    """The tensor without rows of zeros (a padding row), or, where zeros lie scattered (a mask), its other values."""
    if zeros == 0:
        return tensor, ""
    if tensor.dim() >= 2:
        alive = tensor.reshape(tensor.shape[0], -1).ne(0).any(1)
        if not alive.all():
            rest = tensor[alive]
            if float((rest == 0).double().mean()) < 1e-3:
                return rest, f"; {int((~alive).sum())} rows are zero"
    if zeros > 1e-3:
        return tensor[tensor != 0], f"; {zeros:.1%} are zero (pruned?)"
    return tensor, ""


def without_clamped(tensor: Tensor, found: Moments) -> tuple[Tensor, str]:
    """The tensor without the few values that torch's and timm's trunc_normal_ put on a bound, +-2 if not given, far outside.

    They draw float32 u from [-1, 1) and take erfinv(u): -1, one value in 2^24, gives -inf, which they clamp to the bound.
    """
    low, high, std = float(found.min), float(found.max), float(found.std)
    on_bound = [bound for bound, end in ((-2.0, low), (2.0, high)) if end == bound and std < 0.1]
    if not on_bound:
        return tensor, ""
    clamped = torch.stack([tensor == bound for bound in on_bound]).any(0)
    count = int(clamped.sum())
    if count > 5 + (tensor.numel() >> 20):
        return tensor, ""
    return tensor[
        ~clamped
    ], f"; {count} at {' and '.join(f'{b:g}' for b in on_bound)}, where torch's trunc_normal_ clamps"


def facts_of(tensor: Tensor, found: Moments, dtype: torch.dtype) -> Facts:
    flat = tensor.reshape(-1)
    step = max(1, len(flat) // SAMPLED)
    some = flat[::step][:SAMPLED].double()
    eps = torch.finfo(dtype).eps
    cell = torch.exp2(torch.floor(torch.log2(some.abs().clamp(min=torch.finfo(dtype).tiny)))) * eps
    spread = (torch.arange(len(some), dtype=torch.float64, device=some.device) * 0.6180339887498949) % 1 - 0.5
    matrix = None
    if tensor.dim() >= 2:
        seen = tensor.reshape(tensor.shape[0], -1)
        seen = seen[: max(8, MATRIX // seen.shape[1])].float()
        matrix = seen if min(seen.shape) >= 8 else None
    mean, variance, low, high = (float(x) for x in (found.mean, found.var, found.min, found.max))
    return Facts(len(flat), mean, variance, low, high, (some + cell * spread).sort().values, eps, matrix)


def log_likelihood(init: Init, facts: Facts) -> float:
    """Of all n values, from their mean and variance; the range is taken to be possible."""
    if init.function == "uniform":
        return -facts.n * math.log(init.args[1] - init.args[0])
    mean, std = init.args[:2]
    total = -facts.n * (
        math.log(std * math.sqrt(2 * math.pi)) + (facts.variance + (facts.mean - mean) ** 2) / (2 * std**2)
    )
    if init.function == "trunc_normal":
        a, b = ((c - mean) / (std * math.sqrt(2)) for c in init.args[2:])
        total -= facts.n * math.log((math.erf(b) - math.erf(a)) / 2)
    return total


def _cdf(init: Init, x: Tensor) -> Tensor:
    if init.function == "uniform":
        lo, hi = init.args
        return ((x - lo) / (hi - lo)).clamp(0, 1)
    mean, std = init.args[:2]
    below = torch.special.ndtr((x - mean) / std)
    if init.function == "normal":
        return below
    alpha, beta = (
        torch.special.ndtr(torch.tensor((c - mean) / std, dtype=torch.float64, device=x.device)) for c in init.args[2:]
    )
    return ((below - alpha) / (beta - alpha)).clamp(0, 1)


def distance(init: Init, values: Tensor) -> float:
    """Kolmogorov-Smirnov distance of sorted values, times sqrt(their number)."""
    n = len(values)
    expected = _cdf(init, values)
    steps = torch.arange(n + 1, dtype=torch.float64, device=values.device) / n
    return float(torch.maximum(steps[1:] - expected, expected - steps[:-1]).max()) * math.sqrt(n)


def rejected(init: Init, facts: Facts) -> str | None:
    """Why this distribution cannot have made the tensor, in words; None if it can."""
    n = facts.n
    mean, variance = init.moments((n,))
    error = math.sqrt(variance / n)
    if not abs(facts.mean - mean) <= STANDARD_ERRORS * error + facts.rounding * abs(mean):
        return f"mean {facts.mean:.4g}, expected {mean:.4g} within {STANDARD_ERRORS * error:.2g}"
    peak = {"uniform": 1.8, "normal": 3.0}.get(init.function, 3.0)
    spread = STANDARD_ERRORS * math.sqrt((peak - 1) / n) + facts.rounding**2
    if not abs(facts.variance / variance - 1) <= spread:
        ratio = math.sqrt(facts.variance / variance)
        return f"std {math.sqrt(facts.variance):.4g}, expected {math.sqrt(variance):.4g} ({ratio:.3f} times)"
    if init.function in ("uniform", "trunc_normal"):
        low, high = init.args[-2:]
        slack = facts.rounding * max(abs(low), abs(high))
        if facts.low < low - slack or facts.high > high + slack:
            return f"range [{facts.low:.4g}, {facts.high:.4g}], expected within [{low:.4g}, {high:.4g}]"
    else:
        farthest = max(abs(facts.low - mean), abs(facts.high - mean)) / math.sqrt(variance)
        if n * math.erfc(farthest / math.sqrt(2)) < TAIL_PROBABILITY:
            return f"a value {farthest:.1f} std from the mean, in {n} values"
    found = distance(init, facts.values)
    if found > KS_LIMIT:
        return f"shape: Kolmogorov-Smirnov distance {found:.1f} / sqrt n, at most {KS_LIMIT}"
    return structure(facts.matrix, mean, math.sqrt(variance)) if facts.matrix is not None else None


def structure(matrix: Tensor, mean: float, std: float) -> str | None:
    """Signs of training that the single values do not show: rows or columns that move together, a direction that stands out."""
    for dim, what in ((1, "rows"), (0, "columns")):
        means = (matrix.mean(dim).double() - mean) * math.sqrt(matrix.shape[dim]) / std
        k = len(means)
        z = ((float(means.square().sum()) / k) ** (1 / 3) - (1 - 2 / (9 * k))) / math.sqrt(2 / (9 * k))
        if abs(z) > CHI_LIMIT:
            return f"means of {what} vary {'more' if z > 0 else 'less'} than independent values do"
    m, n = matrix.shape
    edge = math.sqrt(m) + math.sqrt(n)  # of independent values of variance 1; it fluctuates by Tracy and Widom's law
    width = 0.5 * (1 / math.sqrt(m) + 1 / math.sqrt(n)) ** (1 / 3)
    top = _largest_singular_value((matrix - mean) / std)
    if top > edge + EDGE_LIMIT * width:
        return f"largest singular value {top:.1f}, for independent values {edge:.1f}"
    return None


def _largest_singular_value(matrix: Tensor) -> float:
    """From below, by 20 steps of power iteration."""
    x = torch.cos(torch.arange(matrix.shape[1], dtype=torch.float32, device=matrix.device))
    norm = 0.0
    for _ in range(20):
        y = matrix @ (x / x.norm())
        norm = float(y.norm())
        x = matrix.t() @ y
        if norm == 0:
            break
    return norm
