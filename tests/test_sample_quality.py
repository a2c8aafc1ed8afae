"""Slow: how good the numbers are. Moments, fit, tails, independence; figures are printed (pytest -m slow -s)."""

import math

import numpy as np
import pytest
import torch
from initperf.kernels.cpu.sample import sample_
from scipy import special, stats

from initperf import rng
from initperf.reference.sample import _log, sqrt

pytestmark = pytest.mark.slow
N = 10**7
SIGMAS = 5  # how far a statistic may be from its expectation, in its own standard deviations


def values(distribution, n=N, seed=2026, stream=0, offset=0, dtype=torch.float32):
    return sample_(torch.empty(n, dtype=dtype), *distribution, seed, stream, offset)


def within(name, got, expected, deviation):
    distance = (got - expected) / deviation
    print(f"{name}: {got:.9g}, expected {expected:.9g}, {distance:+.2f} standard deviations")
    assert abs(distance) < SIGMAS, name


def anderson_darling(sorted_cdf):
    """A^2 of a fully specified distribution, from the sorted probabilities; 3.857 is its 1% point, 6 beyond its 0.1% point."""
    n = len(sorted_cdf)
    i = np.arange(1, n + 1)
    return -n - np.mean((2 * i - 1) * (np.log(sorted_cdf) + np.log1p(-sorted_cdf[::-1])))


CASES = {
    "uniform": (rng.uniform(0.0, 1.0, torch.float32), stats.uniform()),
    "normal": (rng.normal(0.0, 1.0), stats.norm()),
    **{
        f"truncated [{a}, {b}]": (rng.trunc_normal(0.0, 1.0, a, b, torch.float32), stats.truncnorm(a, b))
        for a, b in [(-2, 2), (-3, 3), (0, math.inf), (-1, 9), (4, 5), (-8, -6), (1, 1.1), (15, math.inf)]
    },
}


@pytest.mark.parametrize("name", CASES)
def test_kolmogorov_smirnov_and_anderson_darling(name):
    distribution, exact = CASES[name]
    x = np.sort(values(distribution).double().numpy())
    cdf = exact.cdf(x)
    fit = stats.ks_1samp(x, exact.cdf, method="asymp")
    a2 = anderson_darling(np.clip(cdf, 2.0**-34, 1 - 2.0**-34))
    print(f"{name}: KS D = {fit.statistic:.3g}, p = {fit.pvalue:.3g}; Anderson-Darling {a2:.3f}")
    assert fit.pvalue > 1e-3
    assert a2 < 6


@pytest.mark.parametrize("name", ["uniform", "normal", "truncated [-2, 2]"])
def test_moments_to_the_sixth(name):
    distribution, exact = CASES[name]
    n = 10**8
    sums = np.zeros(7)
    for k in range(10):
        x = values(distribution, n // 10, seed=k + 1).double()
        power = torch.ones_like(x)
        for m in range(1, 7):
            power *= x
            sums[m] += power.sum().item()
    for m in range(1, 7):
        mean = exact.moment(m)
        within(f"{name}, moment {m}", sums[m] / n, mean, math.sqrt((exact.moment(2 * m) - mean**2) / n))


def test_tails_of_a_billion_normals():
    n, chunk = 10**9, 5 * 10**7
    edges = [3.0, 4.0, 5.0, 5.5, 6.0]
    counts = dict.fromkeys([*edges, *(-e for e in edges)], 0)
    extreme = 0.0
    for k in range(n // chunk):
        x = values(rng.normal(0.0, 1.0), chunk, offset=k * chunk)
        for edge in counts:
            counts[edge] += int((x > edge).sum() if edge > 0 else (x < edge).sum())
        extreme = max(extreme, x.abs().max().item())
    print("largest magnitude", extreme)
    assert 5.5 < extreme < 6.67
    for edge, count in counts.items():
        expected = n * special.ndtr(-abs(edge))
        if expected > 30:
            within(f"normals beyond {edge}", count, expected, math.sqrt(expected))
        else:
            p = stats.poisson.sf(count - 1, expected), stats.poisson.cdf(count, expected)
            print(f"normals beyond {edge}: {count}, expected {expected:.3g}, p = {min(p):.3g}")
            assert min(p) > 1e-4


def test_lanes_neighbours_streams_and_seeds_are_uncorrelated():
    d = rng.normal(0.0, 1.0)
    x = values(d, 1024 * 8192).double()
    lanes = x.view(-1, 4, 256).transpose(0, 1).reshape(4, -1)
    pairs = {f"lanes {i}, {j}": (lanes[i], lanes[j]) for i in range(4) for j in range(i)}
    pairs |= {
        f"neighbours {lag} apart": (x[:-lag], x[lag:]) for lag in (1, 2, 16, 255, 256, 257, 512, 1023, 1024, 4096)
    }
    n = 4 * 10**6
    first = values(d, n).double()
    others = {
        "stream 1": (2026, 1),
        "stream 2^32": (2026, 2**32),
        "seed + 1": (2027, 0),
        "seed + 2^32": (2026 + 2**32, 0),
    }
    pairs |= {name: (first, values(d, n, *which).double()) for name, which in others.items()}
    for name, (a, b) in pairs.items():
        for what, f in (
            ("", lambda t: t),
            (", squares", lambda t: t * t - 1),
            (", magnitudes", lambda t: t.abs() - math.sqrt(2 / math.pi)),
        ):
            u, v = f(a), f(b)
            r = ((u * v).mean() / (u.square().mean() * v.square().mean()).sqrt()).item()
            within(name + what, r, 0.0, 1 / math.sqrt(len(u)))


def test_squared_radius_of_every_float_a_word_can_become():
    """All 2^23 floats of the two octaves below 2^32, where s vanishes, and 2^16 of every other."""
    worst = 0.0
    for exponent in range(31, -1, -1):
        step = 1 if exponent >= 30 else 128
        for start in range(0, 2**23, 2**21):
            mantissa = torch.arange(start, start + 2**21, step, dtype=torch.int32)
            u = (mantissa + ((127 + exponent) << 23)).view(torch.float32)
            s = _log(u, 32)
            exact = -2 * (u.double() * 2.0**-32).log()
            assert (s >= 0).all()
            assert not s.isnan().any()
            error = (sqrt(s).double() - exact.sqrt()).abs() / exact.sqrt()
            worst = max(worst, error.max().item())
    print(f"largest relative error of the radius: {worst:.3g} = {worst * 2**24:.2f} x 2^-24")
    # half of 2.5e-8 (fit) and of about three roundings in s, and the rounding of the root
    assert worst < 2.25 * 2.0**-24
