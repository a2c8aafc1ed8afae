"""Slow: how good the numbers are. Moments, fit, tails, independence; figures are printed (pytest -m slow -s)."""

import math

import numpy as np
import pytest
import torch
from scipy import special, stats

from initperf import rng
from initperf.kernels.cpu.sampling.sample import sample_
from initperf.kernels.reference.sampling.sample import _log, sqrt

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


def check_kolmogorov(x, exact):
    fit = stats.ks_1samp(x.double().numpy(), exact.cdf, method="asymp")
    print(f"KS D = {fit.statistic:.3g}, p = {fit.pvalue:.3g}")
    assert fit.pvalue > 1e-3, "Kolmogorov-Smirnov"


def check_anderson(x, exact):
    cdf = exact.cdf(np.sort(x.double().numpy()))
    a2 = anderson_darling(np.clip(cdf, 2.0**-34, 1 - 2.0**-34))
    print(f"Anderson-Darling {a2:.3f}")
    assert a2 < 6, "Anderson-Darling"


def check_moments(batches, exact):
    """The first six, over all batches."""
    n, sums = 0, np.zeros(7)
    for batch in batches:
        x = batch.double()
        n += len(x)
        power = torch.ones_like(x)
        for m in range(1, 7):
            power *= x
            sums[m] += power.sum().item()
    for m in range(1, 7):
        mean = exact.moment(m)
        within(f"moment {m}", sums[m] / n, mean, math.sqrt((exact.moment(2 * m) - mean**2) / n))


def check_tails(batches):
    """Counts of standard normals beyond 3 to 6, on either side."""
    n, edges = 0, [3.0, 4.0, 5.0, 5.5, 6.0]
    counts = dict.fromkeys([*edges, *(-e for e in edges)], 0)
    for x in batches:
        n += len(x)
        for edge in counts:
            counts[edge] += int((x > edge).sum() if edge > 0 else (x < edge).sum())
    for edge, count in counts.items():
        expected = n * special.ndtr(-abs(edge))
        if expected > 30:
            within(f"normals beyond {edge}", count, expected, math.sqrt(expected))
        else:
            p = stats.poisson.sf(count - 1, expected), stats.poisson.cdf(count, expected)
            print(f"normals beyond {edge}: {count}, expected {expected:.3g}, p = {min(p):.3g}")
            assert min(p) > 1e-4, f"normals beyond {edge}"


def check_correlations(pairs):
    """Of values, squares and magnitudes of standard normals, for each named pair."""
    for name, (a, b) in pairs.items():
        for what, f in (
            ("", lambda t: t),
            (", squares", lambda t: t * t - 1),
            (", magnitudes", lambda t: t.abs() - math.sqrt(2 / math.pi)),
        ):
            u, v = f(a), f(b)
            r = ((u * v).mean() / (u.square().mean() * v.square().mean()).sqrt()).item()
            within(name + what, r, 0.0, 1 / math.sqrt(len(u)))


def pairs_within(x):
    """Lanes of a row of 1024 against each other, and neighbours at distances that the layout makes special."""
    lanes = x.view(-1, 4, 256).transpose(0, 1).reshape(4, -1)
    pairs = {f"lanes {i}, {j}": (lanes[i], lanes[j]) for i in range(4) for j in range(i)}
    return pairs | {
        f"neighbours {lag} apart": (x[:-lag], x[lag:])
        for lag in (1, 2, 3, 4, 8, 16, 255, 256, 257, 512, 768, 1023, 1024, 4096)
    }


@pytest.mark.parametrize("name", CASES)
def test_kolmogorov_smirnov_and_anderson_darling(name):
    distribution, exact = CASES[name]
    x = values(distribution)
    check_kolmogorov(x, exact)
    check_anderson(x, exact)


@pytest.mark.parametrize("name", ["uniform", "normal", "truncated [-2, 2]", "truncated [4, 5]", "truncated [0, inf]"])
def test_moments_to_the_sixth(name):
    distribution, exact = CASES[name]
    check_moments((values(distribution, N, seed=k + 1) for k in range(10)), exact)


def test_tails_of_a_billion_normals():
    n, chunk = 10**9, 5 * 10**7
    extreme = 0.0

    def batches():
        nonlocal extreme
        for k in range(n // chunk):
            x = values(rng.normal(0.0, 1.0), chunk, offset=k * chunk)
            extreme = max(extreme, x.abs().max().item())
            yield x

    check_tails(batches())
    print("largest magnitude", extreme)
    assert 5.5 < extreme < 6.67


def test_lanes_neighbours_streams_and_seeds_are_uncorrelated():
    d = rng.normal(0.0, 1.0)
    check_correlations(pairs_within(values(d, 1024 * 8192).double()))
    n = 4 * 10**6
    first = values(d, n).double()
    others = {
        "stream 1": (2026, 1),
        "stream 2^32": (2026, 2**32),
        "stream 2^63": (2026, 2**63),
        "seed + 1": (2027, 0),
        "seed + 2^32": (2026 + 2**32, 0),
        "seed with its halves swapped": (2026 << 32, 0),
        "seed and stream swapped": (0, 2026),
    }
    check_correlations({name: (first, values(d, n, *which).double()) for name, which in others.items()})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_narrow_values_are_the_rounded_wide_ones(dtype):
    """So what holds for float32 holds for these, up to the rounding."""
    for name in ("uniform", "normal", "truncated [-2, 2]"):
        wide = values(CASES[name][0], 10**6)
        narrow = values(CASES[name][0], 10**6, dtype=dtype)
        bound = torch.finfo(dtype).eps / 2 * wide.abs() + torch.finfo(dtype).tiny * torch.finfo(dtype).eps
        inside = (narrow.float() - wide).abs() <= bound
        assert inside.double().mean() > (1 - 2.0 * torch.finfo(dtype).eps if name == "uniform" else 0.9999999), name


HARD = [
    (4, 5),
    (-5, -4),
    (4, math.inf),
    (-math.inf, -6),
    (8, 8.5),
    (1, 1 + 1e-4),
    (-1e-3, 1e-3),
    (0, 1e-5),
    (20, math.inf),
]


@pytest.mark.parametrize(("a", "b"), HARD)
def test_quantiles_of_truncated_normals_at_hard_bounds(a, b):
    """Every tested quantile of 10^7 values is within its sampling error, 5 standard deviations, and 4 roundings, of the exact one; all are in [a, b]."""
    x = values(rng.trunc_normal(0.0, 1.0, a, b, torch.float32)).sort().values.double().numpy()
    assert a <= x[0]
    assert x[-1] <= b
    check_quantiles(x, a, b)


def check_quantiles(x, a, b):
    """By the probability of each order statistic, which is Beta distributed, and by the distance in value."""
    exact = stats.truncnorm(a, b)
    n = len(x)
    at = np.unique(np.concatenate([np.geomspace(10, n / 2, 60), n - np.geomspace(10, n / 2, 60)]).astype(int))
    p = at / n
    spread = SIGMAS * np.sqrt(p * (1 - p) / n)
    # in logs of the nearer tail, where scipy is exact far out
    low = exact.ppf(np.clip(p - spread - 1 / n, 0, 1))
    high = exact.ppf(np.clip(p + spread + 1 / n, 0, 1))
    rounding = 4 * np.spacing(np.abs(x[at]).astype(np.float32)).astype(float)
    over = np.maximum(low - rounding - x[at], x[at] - high - rounding)
    print(f"[{a}, {b}]: worst quantile {over.max():.3g} beyond its band")
    assert over.max() <= 0


def swapped_lanes(x):
    """Lane 1 repeats lane 0."""
    rows = x.view(-1, 4, 256).clone()
    rows[:, 1] = rows[:, 0]
    return rows.flatten()


def test_every_statistic_finds_the_fault_planted_for_it():
    """A statistic that could not fail would prove nothing: smallest faults that each must see."""
    normal, exact = CASES["normal"]
    x = values(normal)
    for fault, check in {
        "scale 1.005": lambda: check_kolmogorov(x * 1.005, exact),
        "shift 0.003": lambda: check_kolmogorov(x + 0.003, exact),
        "scale 1.005, by its tails": lambda: check_anderson(x * 1.005, exact),
        "no values beyond 3": lambda: check_anderson(x.clamp(-3, 3), exact),
        "one value in 400 is 0": lambda: check_kolmogorov(torch.where(torch.arange(N) % 400 == 0, 0.0, x), exact),
        "second moment, 1.002": lambda: check_moments([x * 1.002], exact),
        "third moment, skew": lambda: check_moments([x + 0.002 * (x * x - 1)], exact),
        "fourth and sixth moments, cut at 4": lambda: check_moments([x[x.abs() < 4]], exact),
        "tail dropped beyond 5": lambda: check_tails(v[v.abs() < 5] for v in tails()),
        "tail twice as heavy beyond 5": lambda: check_tails(torch.cat([v, v[v.abs() > 5]]) for v in tails()),
        "one side's tail": lambda: check_tails(v[v < 5] for v in tails()),
        "a lane repeated": lambda: check_correlations(pairs_within(swapped_lanes(x[: 1024 * 8192]).double())),
        "neighbours mixed": lambda: check_correlations(pairs_within(mixed(x[: 1024 * 8192]).double())),
        "magnitudes of lanes alike": lambda: check_correlations(pairs_within(alike(x[: 1024 * 8192]).double())),
        "the same stream twice": lambda: check_correlations({"streams": (x.double(), x.double())}),
        "a quantile off by 1%": lambda: check_quantiles(
            np.sort(stretched(values(CASES["truncated [4, 5]"][0])).double().numpy()), 4, 5
        ),
    }.items():
        assert not passes(check), fault


def passes(check):
    try:
        check()
    except AssertionError as seen:
        print(f"seen: {str(seen).splitlines()[0]}")
        return False
    return True


def tails():
    """2 * 10^8 normals in pieces; 57 of them are expected beyond 5 on either side."""
    for k in range(8):
        yield values(rng.normal(0.0, 1.0), 25 * 10**6, offset=k * 25 * 10**6)


def mixed(x):
    """Neighbours with a correlation of 0.004, and still of variance 1."""
    return (x + 0.004 * x.roll(1)) / math.sqrt(1 + 0.004**2)


def alike(x):
    """Lane 1 has the magnitudes of lane 0, and signs of its own: no correlation but of magnitudes."""
    rows = x.view(-1, 4, 256).clone()
    rows[:, 1] = rows[:, 0].abs() * rows[:, 1].sign()
    return rows.flatten()


def stretched(x):
    """Values of [4, 5] moved 1% further from 4."""
    return (4 + (x - 4) * 1.01).clamp(max=5)


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
