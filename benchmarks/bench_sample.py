"""Sampling against torch's own in-place samplers. Our side draws its seed from the generator in every call, as torch does."""

import math

import pytest
import torch
from scipy import stats

from initperf import ops, rng

ops.register("sample_", "sampling.sample")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LARGE = (4096, 4096)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def sampler(out, distribution):
    """What a call of the functional API costs below its argument checks: constants (kept by their arguments), seed, kernel."""
    sample_ = ops.implementation("sample_", out.device.type)
    return lambda: sample_(out, *distribution(), rng.draw_seed(), 0)


def follows(out, call, cdf, dtype):
    """A check that the values fit the distribution: Kolmogorov-Smirnov on the first 20,000, where rounding allows."""

    def check():
        call()
        values = out.flatten()[:20_000].double().cpu().numpy()
        assert abs(values).max() > 0
        if dtype == torch.float32 and len(values) > 50:
            assert stats.kstest(values, cdf).pvalue > 1e-5

    return check


def compare(versus, name, shape, dtype, distribution, theirs, cdf):
    out = torch.empty(shape, dtype=dtype, device=DEVICE)
    ours = sampler(out, distribution)
    n = math.prod(shape)
    versus(
        ours,
        lambda: theirs(out),
        check=follows(out, ours, cdf, dtype),
        group=f"sample {name} {'x'.join(map(str, shape))}",
        device=DEVICE,
        values=n,
        nbytes=n * out.element_size(),
        dtype=str(dtype),
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_sample_uniform(versus, dtype):
    compare(
        versus,
        "uniform",
        LARGE,
        dtype,
        lambda: rng.uniform(-0.5, 0.5, dtype),
        lambda out: out.uniform_(-0.5, 0.5),
        stats.uniform(-0.5, 1).cdf,
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_sample_normal(versus, dtype):
    compare(
        versus,
        "normal",
        LARGE,
        dtype,
        lambda: rng.normal(0, 0.02),
        lambda out: out.normal_(0, 0.02),
        stats.norm(0, 0.02).cdf,
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("std", "a", "b"), [(1.0, -2.0, 2.0), (0.02, -2.0, 2.0), (1.0, -3.0, 3.0), (1.0, 0.0, math.inf), (1.0, 4.0, 5.0)]
)
def test_sample_trunc_normal(versus, dtype, std, a, b):
    if math.isinf(b):
        theirs = lambda out: out.normal_(0, std).abs_()  # noqa: E731 - torch's own needs finite bounds here
    else:
        theirs = lambda out: torch.nn.init.trunc_normal_(out, 0.0, std, a, b)  # noqa: E731
    compare(
        versus,
        f"trunc_normal std {std} [{a}, {b}]",
        (1024, 1024),
        dtype,
        lambda: rng.trunc_normal(0.0, std, a, b, dtype),
        theirs,
        stats.truncnorm(a / std, b / std, scale=std).cdf,
    )


def test_sample_trunc_normal_large(versus):
    compare(
        versus,
        "trunc_normal",
        LARGE,
        torch.float32,
        lambda: rng.trunc_normal(0.0, 1.0, -2.0, 2.0, torch.float32),
        torch.nn.init.trunc_normal_,
        stats.truncnorm(-2, 2).cdf,
    )


@pytest.mark.parametrize("n", [20, 100, 1000, 3000, 10_000, 30_000, 100_000, 1_000_000])
def test_sample_normal_by_size(versus, n):
    compare(versus, "normal", (n,), torch.float32, lambda: rng.normal(0, 1), lambda out: out.normal_(), stats.norm.cdf)


@pytest.mark.parametrize("n", [20, 1000, 10_000, 100_000])
def test_sample_uniform_by_size(versus, n):
    compare(
        versus,
        "uniform",
        (n,),
        torch.float32,
        lambda: rng.uniform(0, 1, torch.float32),
        lambda out: out.uniform_(),
        stats.uniform.cdf,
    )
