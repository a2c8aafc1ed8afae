"""Weights of a pruned net, with and without rescaling: the sparse half of `initperf variance`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from initperf import prune
from initperf.checks import check
from initperf.stats import moments

MASKS = ("random", "magnitude")
RESCALES = ("layer", "unit", "squares", "measured")


def kept_share(density: float, mask: str, rescale: str | None) -> float:
    """The share of sum w^2 that survives pruning and rescaling, for normal weights."""
    check(0 < density <= 1, "density, the surviving fraction, to be above 0 and at most 1", density)
    check(mask in MASKS, f"mask to be one of {', '.join(MASKS)}", repr(mask))
    check(rescale is None or rescale in RESCALES, f"rescale to be None or one of {', '.join(RESCALES)}", repr(rescale))
    if density == 1 or rescale in ("squares", "measured"):
        return 1.0
    kept = density
    if mask == "magnitude":  # the part of a normal's variance beyond its quantile t: density + 2 t phi(t)
        normal = torch.distributions.Normal(0.0, 1.0)
        t = float(normal.icdf(torch.tensor(1 - density / 2, dtype=torch.float64)))
        kept += 2 * t * math.exp(-t * t / 2) / math.sqrt(2 * math.pi)
    return kept / density if rescale else kept


def prune_weights(
    weights: Sequence[Tensor],
    density: float,
    mask: str,
    rescale: str | None,
    *,
    seed: int,
    x: Tensor,
    activation: Callable[[Tensor], Tensor],
) -> list[Tensor]:
    """Copies of `weights` with a share `density` of each left, chosen at random or by magnitude, and rescaled.

    rescale: "layer" multiplies by 1 / sqrt(density); "unit" each unit by sqrt(fan-in / its survivors); "squares" each
    layer so that sum w^2 is what it was; "measured" each layer, front to back, so that its pre-activations for input x
    have the variance that they have in the dense net.
    """
    named = {str(k): w for k, w in enumerate(weights)}
    masks = prune.magnitude(named, 1 - density) if mask == "magnitude" else prune.random(named, 1 - density, seed=seed)
    pruned, dense, sparse = [], x, x
    for k, weight in enumerate(weights):
        m = masks[str(k)]
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
