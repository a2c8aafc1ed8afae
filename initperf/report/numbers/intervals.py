"""Means over trials and paired differences with their intervals: the statistics of every table."""

from __future__ import annotations

import math
from collections.abc import Iterable
from statistics import fmean, stdev
from typing import NamedTuple

CONFIDENCE = 0.95


class Spread(NamedTuple):
    """Mean, least and greatest over trials."""

    mean: float
    low: float
    high: float
    trials: int


class Difference(NamedTuple):
    """Mean of paired differences with its 95% interval (Student's t); the interval is NaN below two trials."""

    mean: float
    low: float
    high: float
    trials: int

    @property
    def sign(self) -> int:
        """1: above zero with 95% confidence, -1: below zero, 0: undecided."""
        return int(self.low > 0) - int(self.high < 0)


def t_cdf(t: float, freedom: int) -> float:
    """P(T <= t) of Student's t with whole degrees of freedom (Abramowitz & Stegun 26.7.3, 26.7.4)."""
    angle = math.atan(t / math.sqrt(freedom))
    odd = freedom % 2
    term, total = (math.cos(angle) if odd else 1.0), 0.0
    for k in range(1 + odd, freedom, 2):
        total += term
        term *= math.cos(angle) ** 2 * k / (k + 1)
    area = math.sin(angle) * total
    return 0.5 + ((angle + area) / math.pi if odd else area / 2)


def t_quantile(probability: float, freedom: int) -> float:
    """The t with P(T <= t) = probability, by bisection to the last bit; probability in [0.5, 1)."""
    low, high = 0.0, 1.0
    while t_cdf(high, freedom) < probability:
        high *= 2
    while low < (middle := (low + high) / 2) < high:
        low, high = (middle, high) if t_cdf(middle, freedom) < probability else (low, middle)
    return high


def spread(values: Iterable[float]) -> Spread:
    """Mean and range of at least one value."""
    values = list(values)
    return Spread(fmean(values), min(values), max(values), len(values))


def paired_difference(differences: Iterable[float]) -> Difference:
    """Mean and 95% interval of paired differences: mean +- t(0.975, n - 1) * s / sqrt(n)."""
    values = list(differences)
    mean, count = fmean(values), len(values)
    if count < 2:
        return Difference(mean, math.nan, math.nan, count)
    half = t_quantile((1 + CONFIDENCE) / 2, count - 1) * stdev(values) / math.sqrt(count)
    return Difference(mean, mean - half, mean + half, count)
