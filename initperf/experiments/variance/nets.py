"""The nets of `initperf variance`: activations, how weights are drawn, and the analytic variances of wide layers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from initperf import init as initializers
from initperf import rng

LEAK = 0.01

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": functional.relu,
    "leaky_relu": partial(functional.leaky_relu, negative_slope=LEAK),
    "tanh": torch.tanh,
    "gelu": functional.gelu,
    "selu": functional.selu,
    "linear": lambda x: x,
}
# name: (variance of a weight from fan-in, fan-out, gain; what fills it)
SCHEMES: dict[str, tuple[Callable[[int, int, float], float], Callable[..., Any]]] = {
    "default": (lambda i, o, g: 1 / (3 * i), lambda w, g, **k: initializers.kaiming_uniform_(w, a=math.sqrt(5), **k)),
    "kaiming_normal": (lambda i, o, g: g * g / i, lambda w, g, **k: _normal(w, g / math.sqrt(w.shape[1]), **k)),
    "kaiming_uniform": (lambda i, o, g: g * g / i, lambda w, g, **k: _uniform(w, g * math.sqrt(3 / w.shape[1]), **k)),
    "xavier_normal": (lambda i, o, g: g * g * 2 / (i + o), lambda w, g, **k: initializers.xavier_normal_(w, g, **k)),
    "xavier_uniform": (lambda i, o, g: g * g * 2 / (i + o), lambda w, g, **k: initializers.xavier_uniform_(w, g, **k)),
    "lecun_normal": (lambda i, o, g: 1 / i, lambda w, g, **k: _normal(w, 1 / math.sqrt(w.shape[1]), **k)),
}
LABELS = {"default": "PyTorch's default"}


def _normal(w: Tensor, std: float, generator: torch.Generator) -> Tensor:
    return initializers.normal_(w, 0.0, std, generator=generator)


def _uniform(w: Tensor, bound: float, generator: torch.Generator) -> Tensor:
    return initializers.uniform_(w, -bound, bound, generator=generator)


def draw_weight(chosen: float | str, shape: tuple[int, int], k: int, seed: int, gain: float) -> Tensor:
    """Weight number k of a net, of the variance `chosen`, or filled by the scheme of that name."""
    weight = torch.empty(shape, dtype=torch.float64)
    stream = rng.stream_of(f"layers.{k}.weight")
    if isinstance(chosen, str):
        generator = torch.Generator().manual_seed((stream ^ seed) >> 1)
        return SCHEMES[chosen][1](weight, gain, generator=generator)
    return initializers.sample_into(weight, rng.normal(0, math.sqrt(chosen)), seed=seed, stream=stream)


def expected_variances(
    variances: Sequence[float], shapes: Sequence[tuple[int, int]], activation: str
) -> tuple[list[float], list[float]]:
    """The analytic variances of f_k and dl/df_k for wide layers whose weights have `variances`.

    Forward, var f_k = fan-in s2_k E[a(f_(k-1))^2]; backward, var dl/df_k = fan-out s2_(k+1) E[a'(f_k)^2] var dl/df_(k+1),
    from dl/dy = 2 y. The expectations are over a normal f: for ReLU var f / 2 and 1 / 2.
    """
    forward, slopes, square = [], [], 1.0
    for s2, (_, fan_in) in zip(variances, shapes, strict=True):
        forward.append(fan_in * s2 * square)
        square, slope = gaussian_means(activation, forward[-1])
        slopes.append(slope)
    back, backward = 4 * forward[-1], []
    for k in range(len(shapes) - 1, 0, -1):
        back *= shapes[k][0] * variances[k] * slopes[k - 1]
        backward.append(back)
    return forward[:-1], backward[::-1]


@cache
def gaussian_means(activation: str, variance: float) -> tuple[float, float]:
    """E[a(z)^2] and E[a'(z)^2] for normal z of `variance`, by the trapezoidal rule with a node at the kink, 0."""
    if activation in ("relu", "leaky_relu", "linear"):
        low = {"relu": 0.0, "leaky_relu": LEAK, "linear": 1.0}[activation]
        share = (1 + low * low) / 2
        return share * variance, share
    t = torch.linspace(-10, 10, 20001, dtype=torch.float64)
    z = (t * math.sqrt(variance)).requires_grad_()
    with torch.enable_grad():
        a = ACTIVATIONS[activation](z)
        (slope,) = torch.autograd.grad(a.sum(), z)
    weight = torch.exp(-t * t / 2)
    weight /= weight.sum()
    return float((weight * a.detach() ** 2).sum()), float((weight * slope**2).sum())
