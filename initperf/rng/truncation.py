"""Host constants of truncated normals: which kind an interval needs, and its masses and series, in float64.

Only +, -, *, / and sqrt of IEEE-754, and exp and ln of `decimal`, which round correctly: the same on every platform.
"""

from __future__ import annotations

import math
from decimal import Context, Decimal

from initperf.kernels.contract import TRUNC_CENTER, TRUNC_FAR, TRUNC_NARROW, TRUNC_NORMAL, TRUNC_TAIL

_CENTER_REACH = 2.25  # CENTER holds up to here
_FAR = 13.0  # from here the series in the log of the tail mass converges; DISTANT holds up to 16
_NARROW = 0.4  # (beta - alpha) max(1, |alpha|, |beta|) below which the series in the word converges
_TERMS = 8
_DECIMAL = Context(prec=40)
_ROOT_TWO_PI = 2.5066282746310002

Constants = tuple[int, float, float, tuple[float, ...]]  # kind, scale, base, the kind's further params


def _exp(x: float) -> float:
    return float(_DECIMAL.exp(Decimal(x))) if x > -750 else 0.0


def _ln(x: float) -> float:
    return float(_DECIMAL.ln(Decimal(x)))


def _mills(x: float) -> float:
    """Upper tail over density, x >= 0: Laplace's continued fraction, below 2.5 the series of the rest."""
    if x >= 2.5:
        fraction = x
        for k in range(200, 0, -1):
            fraction = x + k / fraction
        return 1 / fraction
    return _ROOT_TWO_PI / 2 * _exp(x * x / 2) - _series_of_center(x)


def _series_of_center(x: float) -> float:
    """(Phi(x) - 1/2) over density: x + x^3/3 + x^5/15 + ..."""
    term = total = x
    k = 3
    while term and abs(term) > 1e-18 * abs(total):
        term *= x * x / k
        total += term
        k += 2
    return total


def _upper(x: float) -> float:
    """1 - Phi(x), x >= 0."""
    return 0.0 if math.isinf(x) else _exp(-x * x / 2) / _ROOT_TWO_PI * _mills(x)


def _tail_ratio(alpha: float, beta: float) -> float:
    """(1 - Phi(beta)) / (1 - Phi(alpha)), 0 <= alpha <= beta, with no underflow of either."""
    return 0.0 if math.isinf(beta) else _exp((alpha - beta) * (alpha + beta) / 2) * _mills(beta) / _mills(alpha)


def _product(a: list[float], b: list[float], k: int) -> float:
    """Coefficient k of the product of two power series."""
    return sum(a[i] * b[k - i] for i in range(k + 1))


def _narrow(alpha: float, beta: float) -> tuple[float, list[float]]:
    """Quantile minus the interval's middle m, as a series in x = u - 1/2: (constant, coefficients of x, x^2, ...).

    With f(s) = exp(-m s - s^2 / 2), the density around m, h = integral of f gives the quantile by d' = g = 1 / f(d),
    g' = (m + d) g^2; and h is linear in x.
    """
    m, half = (alpha + beta) / 2, (beta - alpha) / 2
    f = [1.0, -m]
    for k in range(1, 24):
        f.append(-(m * f[k] + f[k - 1]) / (k + 1))
    right = sum(c * half ** (k + 1) / (k + 1) for k, c in enumerate(f))
    left = sum(c * (-half) ** (k + 1) / (k + 1) for k, c in enumerate(f))
    d, g = [0.0], [1.0]
    for k in range(_TERMS + 4):
        squared = [_product(g, g, i) for i in range(k + 1)]
        d.append(g[k] / (k + 1))
        g.append((m * squared[k] + _product(d, squared, k)) / (k + 1))
    width, shift = right - left, (right + left) / 2
    series = [0.0]
    for c in reversed(d):  # Horner's rule on polynomials in x, h = width x + shift
        series = [
            (series[i] * shift if i < len(series) else 0.0) + (series[i - 1] * width if i else 0.0)
            for i in range(len(series) + 1)
        ]
        series[0] += c
    return series[0], series[1 : _TERMS + 1]


def _far(alpha: float) -> list[float]:
    """Quantile minus alpha as a series in s = -2 ln(q / q(alpha)), without its zero constant: d' = mills, mills' = (z mills - 1) d'."""
    d, mills = [0.0], [_mills(alpha)]
    for k in range(_TERMS):
        squared = [_product(mills, mills, i) for i in range(k + 1)]
        d.append(mills[k] / (k + 1))
        mills.append((alpha * squared[k] + _product(d, squared, k) - mills[k]) / (k + 1))
    return [c * 0.5**k for k, c in enumerate(d)][1:]


def constants(mean: float, std: float, a: float, b: float) -> Constants:
    """Kind, scale, base and further params for a < b, std > 0, of a normal truncated to [a, b]."""
    alpha, beta = (a - mean) / std, (b - mean) / std
    if (beta - alpha) * max(1.0, abs(alpha), abs(beta)) <= _NARROW:
        constant, series = _narrow(alpha, beta)
        return TRUNC_NARROW, std, a + (b - a) / 2 + std * constant, tuple(series)
    if max(-alpha, beta) <= _CENTER_REACH:
        masses = [math.copysign(0.5 - _upper(abs(x)), x) for x in (alpha, beta)]
        return TRUNC_CENTER, std, mean, ((masses[1] - masses[0]) * 2.0**-31, masses[1] + masses[0])
    if alpha < 0 < beta:
        left, right = _upper(-alpha), _upper(beta)
        step = (1 - left - right) * 2.0**-32
        return TRUNC_NORMAL, std, mean, (step, left, step, right, 0.0)
    if alpha < 0:  # mirrored, so that the tail is on the right
        kind, scale, base, rest = constants(-mean, std, -b, -a)
        return kind, -scale, -base, rest
    ratio = _tail_ratio(alpha, beta)
    step = (1 - ratio) * 2.0**-32
    if alpha >= _FAR:
        return TRUNC_FAR, std, a, (step, ratio, *_far(alpha))
    start = alpha * alpha - 2 * _ln(_mills(alpha) / _ROOT_TWO_PI)
    kind = TRUNC_NORMAL if start < 2.8 * 2.8 else TRUNC_TAIL
    return kind, std, mean, (0.0, 2.0, step, ratio, start)
