"""The eight identities from which He's and Glorot's variances are derived, as properties of the kernels.

Samples come from the sampling kernels and statistics from the moment kernels; the exact identities are asked of all three
implementations. papers.md has the list; f, g are random variables, h hidden units, f' = W h the next pre-activations.
"""

import math
from importlib import import_module

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from initperf import init, rng
from initperf.variance.moments import Moments, moments

N = 1 << 16
WITHIN = 6 / math.sqrt(N)  # six standard errors of a mean of unit variance

BACKENDS = {
    "kernels.cpu": "initperf.kernels.cpu.moments.moments",
    "kernels.gpu": "initperf.kernels.gpu.moments.moments",
    "reference": "initperf.kernels.reference.moments.moments",
}
seeds = st.integers(0, 2**32)
numbers = st.floats(-100, 100)
sizes = st.integers(2, 3000)
dtypes = st.sampled_from([torch.float64, torch.float32])


def normals(n: int, seed: int, std: float = 1.0, stream: int = 0) -> torch.Tensor:
    return init.sample_into(torch.empty(n, dtype=torch.float64), rng.normal(0, std), seed=seed, stream=stream)


def stats_of(backend: str, x: torch.Tensor) -> Moments:
    if backend == "kernels.gpu":
        pytest.importorskip("triton")
        x = x.cuda() if torch.cuda.is_available() else x
    module = import_module(BACKENDS[backend])
    return Moments(module.moments([x], [(1, 1, x.numel(), 0, 0)], 4, 0.0).cpu(), [torch.Size()], torch.Size())


def unit(dtype: torch.dtype, backend: str) -> float:
    """What a rounding costs: of the values, and on a GPU of float32 sums."""
    return torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps


@pytest.mark.parametrize("backend", BACKENDS)
@settings(deadline=None, max_examples=20)
@given(k=numbers, n=sizes, dtype=dtypes)
def test_1_the_mean_of_a_constant_is_the_constant(backend, k, n, dtype):
    x = torch.full((n,), k, dtype=dtype)
    got = stats_of(backend, x)
    assert got.mean == x[0].double()
    assert got.var == 0


@pytest.mark.parametrize("backend", BACKENDS)
@settings(deadline=None, max_examples=20)
@given(seed=seeds, k=numbers, n=sizes, dtype=dtypes)
def test_2_a_factor_leaves_the_mean_and_the_variance_squared(backend, seed, k, n, dtype):
    g = normals(n, seed).to(dtype)
    one, many, eps = stats_of(backend, g), stats_of(backend, k * g), unit(dtype, backend)
    tiny, top = torch.finfo(dtype).tiny, g.abs().max()  # products below tiny lose digits; every other is off by eps / 2
    assert abs(many.mean - k * one.mean) <= 8 * eps * abs(k) * top + tiny
    assert abs(many.var - k * k * one.var) <= 16 * eps * k * k * top * top + tiny


@pytest.mark.parametrize("backend", BACKENDS)
@settings(deadline=None, max_examples=20)
@given(seed=seeds, n=sizes, dtype=dtypes)
def test_3_the_mean_of_a_sum_is_the_sum_of_means(backend, seed, n, dtype):
    f, g = normals(n, seed).to(dtype), normals(n, seed, stream=1).exp().to(dtype)
    size = f.abs().max() + g.abs().max()
    parts = stats_of(backend, f).mean + stats_of(backend, g).mean
    assert abs(stats_of(backend, f + g).mean - parts) <= 8 * unit(dtype, backend) * size


@settings(deadline=None, max_examples=15)
@given(seed=seeds, a=st.floats(-3, 3), b=st.floats(-3, 3))
def test_4_the_mean_of_a_product_of_independents_is_the_product_of_means(seed, a, b):
    f, g = normals(N, seed) + a, normals(N, seed, stream=1) + b
    error = moments(f * g).mean - moments(f).mean * moments(g).mean
    assert abs(error) < WITHIN  # the covariance of two independent unit normals
    dependent = moments(f * f).mean - moments(f).mean ** 2
    assert abs(dependent) > WITHIN


@pytest.mark.parametrize("backend", BACKENDS)
@settings(deadline=None, max_examples=20)
@given(seed=seeds, shift=st.floats(-5, 5), n=sizes)
def test_5_the_variance_is_the_mean_square_less_the_squared_mean(backend, seed, shift, n):
    x = normals(n, seed) + shift
    got = stats_of(backend, x)
    want = stats_of(backend, x * x).mean - got.mean**2
    assert abs(got.var - want) <= 1e-13 * (1 + shift * shift) * n**0.5
    assert math.isclose(got.raw(2), stats_of(backend, x * x).mean, rel_tol=1e-12)


@settings(deadline=None, max_examples=15)
@given(seed=seeds, s2=st.floats(0.001, 1.0), inputs=st.integers(20, 200))
def test_6_and_7_zero_mean_weights_give_zero_mean_pre_activations_of_variance_s2_times_the_sum_of_squares(
    seed, s2, inputs
):
    outputs = 2000
    h = normals(inputs, seed).relu()
    weight = normals(outputs * inputs, seed, math.sqrt(s2), stream=1).view(outputs, inputs)
    got, want = moments(weight @ h, correction=1), s2 * float((h * h).sum())
    assert abs(got.mean) <= 6 * math.sqrt(want / outputs)
    assert got.var == pytest.approx(want, rel=6 * math.sqrt(2 / outputs))


@settings(deadline=None, max_examples=15)
@given(seed=seeds, std=st.floats(0.1, 10))
def test_8_the_mean_square_after_relu_is_half_the_variance(seed, std):
    f = normals(N, seed, std)
    # the variance of relu(f)^2 is (3 / 2 - 1 / 4) std^4, five times the square of its mean
    assert moments(f.relu()).raw(2) == pytest.approx(std**2 / 2, rel=WITHIN * math.sqrt(5))


@settings(deadline=None, max_examples=8)
@given(seed=seeds, fan_out=st.integers(200, 500), fan_in=st.integers(200, 700))
def test_the_backward_mirror_weights_of_two_by_fan_out_keep_the_variance_of_gradients(seed, fan_out, fan_in):
    rows = 50
    weight = normals(fan_out * fan_in, seed, math.sqrt(2 / fan_out)).view(fan_out, fan_in)
    f = normals(rows * fan_in, seed, stream=1).view(rows, fan_in)
    upstream = normals(rows * fan_out, seed, stream=2).view(rows, fan_out)
    gradient = (f > 0) * (upstream @ weight)
    assert moments(gradient).var == pytest.approx(1.0, rel=6 * math.sqrt(5 / (rows * min(fan_out, fan_in))))
