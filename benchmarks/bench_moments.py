"""moments against torch.var_mean, torch.sum (the bandwidth that can be had) and the loop of torch calls it replaces."""

import pytest
import torch

from initperf.variance.moments import moments

N = 1 << 24


def every_statistic(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """What moments gives, with torch's own reductions."""
    var, mean = torch.var_mean(x, correction=0)
    z = (x - mean) / var.sqrt()
    return mean, var, z.pow(3).mean(), z.pow(4).mean(), *x.aminmax(), (x == 0).float().mean(), x.isfinite().sum()


def close(got, want, scale: float = 1.0) -> None:
    torch.testing.assert_close(got.to(want.dtype), want, rtol=1e-3, atol=1e-3 * scale)


@pytest.mark.parametrize("order", [2, 4])
def test_one_large_tensor(versus, order):
    x = torch.randn(N)
    versus(
        lambda: moments(x, order=order),
        {"torch.var_mean": lambda: torch.var_mean(x), "torch.sum": lambda: x.sum()},
        check=lambda: close(moments(x, order=order, correction=1).var, x.var()),
        group="moments: 16 M float32",
        nbytes=4 * N,
        order=order,
        budget=3.0,
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(versus, dtype):
    x = torch.randn(N // 2).to(dtype)
    versus(
        lambda: moments(x),
        {"torch.var_mean": lambda: torch.var_mean(x), "torch.sum": lambda: x.sum()},
        check=lambda: close(moments(x, correction=1).var, x.double().var()),
        group="moments: 8 M of another dtype",
        nbytes=x.element_size() * x.numel(),
        dtype=str(dtype),
    )


@pytest.mark.parametrize(
    ("shape", "dim"), [((4096, 4096), 0), ((4096, 4096), 1), ((64, 128, 28, 28), (0, 2, 3)), ((256, 1024), 0)]
)
@pytest.mark.parametrize("order", [2, 4])
def test_channels(versus, shape, dim, order):
    x = torch.randn(shape)
    versus(
        lambda: moments(x, dim=dim, order=order),
        {"torch.var_mean": lambda: torch.var_mean(x, dim=dim), "torch.sum": lambda: x.sum(dim)},
        check=lambda: close(moments(x, dim=dim, order=order, correction=1).var, x.var(dim)),
        group=f"moments: {shape}, dim={dim}",
        nbytes=4 * x.numel(),
        order=order,
    )


def test_a_list_of_150_tensors(versus):
    sizes = [(768, 768), (768,), (3072, 768), (3072,), (64, 64, 3, 3)] * 30
    xs = [torch.randn(s).to([torch.float32, torch.bfloat16, torch.float64][i % 3]) for i, s in enumerate(sizes)]
    versus(
        lambda: moments(xs),
        {"torch loop": lambda: [every_statistic(x) for x in xs]},
        check=lambda: close(moments(xs).kurtosis, torch.stack([every_statistic(x.double())[3] for x in xs])),
        group="moments: 150 tensors of mixed sizes, all statistics",
        nbytes=sum(x.element_size() * x.numel() for x in xs),
    )


@pytest.mark.parametrize("n", [10, 1000, 100_000])
def test_small(versus, n):
    x = torch.randn(n)
    versus(
        lambda: moments(x),
        {"torch.var_mean": lambda: torch.var_mean(x), "torch, all": lambda: every_statistic(x)},
        check=lambda: close(moments(x, correction=1).var, x.var()),
        group="moments: small tensors",
        nbytes=4 * n,
        n=n,
    )
