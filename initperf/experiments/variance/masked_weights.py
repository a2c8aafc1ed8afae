"""Weights of a pruned net, with and without rescaling: the sparse half of `initperf variance`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from initperf import init as initializers
from initperf import prune, rng
from initperf.core.checks import check
from initperf.variance.moments import moments

MASKS = ("random", "magnitude", "rewound")
RESCALES = ("layer", "unit", "squares", "measured")
STEPS = 100  # of training before a rewound mask is chosen
STEP = 0.02  # of a matrix's norm: how far the first step moves it; later ones less, the last not at all
TRAINED = 100  # inputs, the first of those measured, that a step sees
TEACHER = 32  # hidden units

Activation = Callable[[Tensor], Tensor]


def kept_share(density: float, mask: str, rescale: str | None) -> float | None:
    """The share of sum w^2 that survives pruning and rescaling, for normal weights; None where training decides it."""
    check(0 < density <= 1, "density, the surviving fraction, to be above 0 and at most 1", density)
    check(mask in MASKS, f"mask to be one of {', '.join(MASKS)}", repr(mask))
    check(rescale is None or rescale in RESCALES, f"rescale to be None or one of {', '.join(RESCALES)}", repr(rescale))
    if density == 1 or rescale in ("squares", "measured"):
        return 1.0
    if mask == "rewound":
        return None
    kept = density
    if mask == "magnitude":  # the part of a normal's variance beyond its quantile t: density + 2 t phi(t)
        normal = torch.distributions.Normal(0.0, 1.0)
        t = float(normal.icdf(torch.tensor(1 - density / 2, dtype=torch.float64)))
        kept += 2 * t * math.exp(-t * t / 2) / math.sqrt(2 * math.pi)
    return kept / density if rescale else kept


def find_masks(
    weights: Sequence[Tensor], density: float, mask: str, *, seed: int, x: Tensor, activation: Activation
) -> list[Tensor]:
    """Which share `density` of each weight survives.

    mask: "random"; "magnitude", the largest of `weights`; "rewound", the largest after a short training on the first of x
    (Frankle & Carbin 2019, one round), to be put on the weights before it.
    """
    if density == 1:
        return [torch.ones_like(w, dtype=torch.bool) for w in weights]
    if mask == "rewound":
        weights, _ = train_briefly(weights, x[:TRAINED], activation, seed=seed)
    named = {str(k): w for k, w in enumerate(weights)}
    found = prune.random(named, 1 - density, seed=seed) if mask == "random" else prune.magnitude(named, 1 - density)
    return [found[str(k)] for k in range(len(weights))]


def train_briefly(
    weights: Sequence[Tensor], x: Tensor, activation: Activation, *, seed: int, steps: int = STEPS
) -> tuple[list[Tensor], list[float]]:
    """Trained copies of `weights`, and the loss before each step: the mean square distance from a random teacher of one layer.

    Every step moves each matrix by a share of its norm against its gradient, so that nets learn whose gradients vanish or
    explode (the layerwise rate of You et al. 2017, LARS, without momentum).
    """
    teacher, last = (
        initializers.sample_into(
            torch.empty(shape, dtype=x.dtype), rng.normal(0, 1), seed=seed, stream=rng.stream_of(name)
        )
        for name, shape in (("teacher.0.weight", (TEACHER, x.shape[1])), ("teacher.1.weight", (1, TEACHER)))
    )
    target = functional.linear(functional.linear(x, teacher).relu(), last)
    target = (target - target.mean()) / target.std()
    trained, losses = [w.clone().requires_grad_() for w in weights], []
    for step in range(steps):
        with torch.enable_grad():
            a = x
            for weight in trained[:-1]:
                a = activation(functional.linear(a, weight))
            loss = functional.mse_loss(functional.linear(a, trained[-1]), target)
            gradients = torch.autograd.grad(loss, trained)
        losses.append(float(loss.detach()))
        with torch.no_grad():
            for weight, gradient in zip(trained, gradients, strict=True):
                size = gradient.abs().max()
                if size > 0:  # its square may leave float64
                    direction = gradient / size
                    weight -= STEP * (1 - step / steps) * weight.norm() * direction / direction.norm()
    return [w.detach() for w in trained], losses


def prune_weights(
    weights: Sequence[Tensor],
    masks: Sequence[Tensor],
    rescale: str | None,
    *,
    density: float,
    x: Tensor,
    activation: Activation,
) -> list[Tensor]:
    """Copies of `weights` with the survivors of `masks` left, rescaled.

    rescale: "layer" multiplies by 1 / sqrt(density); "unit" each unit by sqrt(fan-in / its survivors); "squares" each
    layer so that sum w^2 is what it was; "measured" each layer, front to back, so that its pre-activations for input x
    have the variance that they have in the dense net.
    """
    pruned, dense, sparse = [], x, x
    for weight, m in zip(weights, masks, strict=True):
        w = weight * m
        if rescale == "layer":
            w /= math.sqrt(density)
        elif rescale == "unit":
            w *= (m.shape[1] / m.sum(1, keepdim=True).clamp(min=1)).sqrt()
        elif rescale == "squares":
            w *= weight.norm() / w.norm()
        elif rescale == "measured":
            dense, sparse = functional.linear(dense, weight), functional.linear(sparse, w)
            scale = (moments([dense, sparse], order=2).var).sqrt()
            w, sparse = w * (scale[0] / scale[1]), sparse * (scale[0] / scale[1])
            dense, sparse = activation(dense), activation(sparse)
        pruned.append(w)
    return pruned
