"""Known initialization schemes as hypotheses about one tensor, and the tests that they must pass.

Limits are fixed, from each statistic's distribution under the hypothesis, so that a true scheme fails one of them about
once in 10,000 tensors: 5 standard errors for mean and variance, 6 for cubed-root chi squares (their tails are only nearly
normal), 2.35 / sqrt(n) for Kolmogorov-Smirnov (exp(-2 * 2.35^2) = 1.6e-5), and a probability of 1e-5 for the largest value.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from initperf.schemes import Init

STANDARD_ERRORS = 5.0
CHI_LIMIT = 6.0
KS_LIMIT = 2.35
TAIL_PROBABILITY = 1e-5
EDGE_LIMIT = 6.0  # of the largest singular value, in units of its fluctuation
SAMPLED = 1 << 17  # values that the Kolmogorov-Smirnov test looks at
MATRIX = 1 << 24  # entries of a matrix whose largest singular value is sought
_CUT_STD = 0.8796256610342398  # standard deviation of N(0, 1) cut at -2 and 2


class Candidate(NamedTuple):
    """A scheme's name, and the distribution it means for this tensor."""

    scheme: str
    init: Init


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


def _uniform(scheme: str, bound: float) -> Candidate:
    return Candidate(scheme, Init("uniform", (-bound, bound)))


def _normal(scheme: str, std: float) -> Candidate:
    return Candidate(scheme, Init("normal", (0.0, std)))


def _cut(scheme: str, std: float) -> Candidate:
    """Cut at two standard deviations, `std` being that of the uncut normal."""
    return Candidate(scheme, Init("trunc_normal", (0.0, std, -2 * std, 2 * std)))


_STDS = (0.02, 0.01, 1.0, 0.05, 0.1, 0.001, 0.002, 0.005, 0.006, 0.03, 0.04, 0.2, 0.5, 1e-6)
_GAINS = {"1/sqrt 2": math.sqrt(0.5), "5/3": 5 / 3, "sqrt 2": math.sqrt(2.0)}


def candidates(shape: Sequence[int], fan: int | None, depth: int) -> Iterator[Candidate]:
    """Schemes for a tensor of this shape, the likelier first. fan: fan-in of the weight that a vector belongs to; depth: layers of the model."""
    if len(shape) >= 2:
        yield from _for_weights(shape)
    if fan:
        yield _uniform("torch default (1/sqrt fan_in)", 1 / math.sqrt(fan))
    for std in _STDS:
        yield _normal(f"normal({std:g})", std)
        yield _cut(f"trunc_normal({std:g}, cut at 2 std)", std)
    for std in (0.02, 0.01):
        for k in (2 * depth, depth):
            if k > 1:
                yield _normal(f"normal({std:g} / sqrt({k})), residual projection", std / math.sqrt(k))
    yield Candidate("uniform(0, 1)", Init("uniform", (0.0, 1.0)))
    for bound in (0.1, 0.05, 0.08, 0.01, 0.02, 1.0):
        yield _uniform(f"uniform({bound:g})", bound)
    if len(shape) >= 2:
        for text, gain in _GAINS.items():
            std = gain * _glorot(shape)
            yield _normal(f"xavier_normal, gain {text}", std)
            yield _uniform(f"xavier_uniform, gain {text}", math.sqrt(3) * std)
    for size in dict.fromkeys(shape):
        if size > 1:
            yield _normal(f"normal(1/sqrt {size})", size**-0.5)
            yield _uniform(f"uniform(1/sqrt {size})", size**-0.5)
            yield _normal(f"normal(1/sqrt {2 * size})", (2 * size) ** -0.5)
            for head in (64, 128):
                yield _normal(f"normal(1/sqrt({size} * {head})), T5's queries", (size * head) ** -0.5)
            if depth > 1:
                yield _normal(f"normal(1/sqrt({size} * {2 * depth})), CLIP's projections", (2 * depth * size) ** -0.5)
    if len(shape) == 2:
        for gates in (3, 4):
            if shape[0] % gates == 0:
                yield _uniform(f"torch default (1/sqrt hidden, {gates} gates)", (shape[0] // gates) ** -0.5)


def _glorot(shape: Sequence[int]) -> float:
    return math.sqrt(2 / ((shape[0] + shape[1]) * math.prod(shape[2:])))


def _for_weights(shape: Sequence[int]) -> Iterator[Candidate]:
    field = math.prod(shape[2:])
    fan_in, fan_out = shape[1] * field, shape[0] * field
    yield _uniform("torch default (kaiming_uniform, a=sqrt 5)", 1 / math.sqrt(fan_in))
    for mode, fan in (("", fan_in), (", fan_out", fan_out)):
        yield _normal(f"kaiming_normal{mode}", math.sqrt(2 / fan))
        yield _uniform(f"kaiming_uniform{mode}", math.sqrt(6 / fan))
    yield _normal("xavier_normal", _glorot(shape))
    yield _uniform("xavier_uniform", math.sqrt(3) * _glorot(shape))
    for mode, fan in (("", fan_in), (", fan_out", fan_out)):
        yield _normal(f"lecun_normal{mode}", fan**-0.5)
        yield _uniform(f"lecun_uniform{mode}", math.sqrt(3 / fan))
        yield _cut(f"lecun_normal{mode}, cut at 2 std", fan**-0.5 / _CUT_STD)
        yield _cut(f"kaiming_normal{mode}, cut at 2 std", math.sqrt(2 / fan) / _CUT_STD)
    yield _cut("xavier_normal, cut at 2 std", _glorot(shape) / _CUT_STD)
    if len(shape) > 2 and shape[1] == 1:
        yield _normal("kaiming_normal, fan_out of a group", math.sqrt(2 / field))
    if len(shape) == 2 and shape[0] % 3 == 0:
        yield _uniform("xavier_uniform, of three stacked", math.sqrt(6 / (shape[1] + shape[0] // 3)))


def _cdf(init: Init, x: Tensor) -> Tensor:
    if init.function == "uniform":
        lo, hi = init.args
        return ((x - lo) / (hi - lo)).clamp(0, 1)
    mean, std = init.args[:2]
    below = torch.special.ndtr((x - mean) / std)
    if init.function == "normal":
        return below
    alpha, beta = (torch.special.ndtr(torch.tensor((c - mean) / std, dtype=torch.float64)) for c in init.args[2:])
    return ((below - alpha) / (beta - alpha)).clamp(0, 1)


def distance(init: Init, values: Tensor) -> float:
    """Kolmogorov-Smirnov distance of sorted values, times sqrt(their number)."""
    n = len(values)
    expected = _cdf(init, values)
    steps = torch.arange(n + 1, dtype=torch.float64) / n
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
    x = torch.cos(torch.arange(matrix.shape[1], dtype=torch.float32))
    norm = 0.0
    for _ in range(20):
        y = matrix @ (x / x.norm())
        norm = float(y.norm())
        x = matrix.t() @ y
        if norm == 0:
            break
    return norm
