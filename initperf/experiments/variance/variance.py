"""Figure 7.4 of Prince, Understanding Deep Learning (after He et al. 2015): how variance grows or fades with depth.

A fully connected net without biases, f_1 = W_1 x, f_k = W_k a(f_(k-1)), y = w a(f_depth), loss sum of y^2 over the batch
(target 0), x standard normal, everything in float64. With W_k of variance s2 and ReLU, var f_1 = inputs s2 and every later
layer multiplies by width s2 / 2; backward, dl/df_(k-1) = a'(f_(k-1)) W_k^T dl/df_k multiplies by the same (equation 7.13).
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from initperf import init as initializers
from initperf import rng
from initperf.core.checks import check, check_seed
from initperf.core.extras import need
from initperf.core.files import make_folder, write_atomically
from initperf.experiments.variance.masked_weights import find_masks, kept_share, prune_weights
from initperf.experiments.variance.nets import (
    ACTIVATIONS,
    LABELS,
    SCHEMES,
    draw_weight,
    expected_variances,
    gaussian_means,
)
from initperf.experiments.variance.result import Line, VarianceResult
from initperf.variance.moments import moments

VARIANCES = (0.001, 0.01, 0.02, 0.1, 1.0)


def run_variance(
    out: str | Path | None = None,
    *,
    depth: int = 50,
    width: int = 100,
    inputs: int = 100,
    batch: int = 1000,
    variances: Sequence[float] = VARIANCES,
    init: str | Sequence[str] | None = "default",
    activation: str = "relu",
    density: float = 1.0,
    mask: str | Sequence[str] = "random",
    rescale: str | None | Sequence[str | None] = None,
    seeds: int = 5,
    seed: int = 0,
) -> VarianceResult:
    """Measure the variances of every layer for weights of each of `variances`, and for the named initializations.

    depth: hidden layers of `width` units; `batch` inputs of `inputs` dimensions; the means are over `seeds` nets.
    density, mask, rescale: prune every weight matrix first, see `find_masks` and `prune_weights`; several of each are all
    combined. Writes variance.csv and variance.png to `out`, unless it is None.
    """
    for name, value, least in (("depth", depth, 2), ("width", width, 1), ("inputs", inputs, 1), ("batch", batch, 2)):
        check(isinstance(value, int) and value >= least, f"{name} to be an int of at least {least}", value)
    check(isinstance(seeds, int) and seeds >= 1, "seeds, the number of nets, to be an int of at least 1", seeds)
    check_seed(seed)
    for s2 in variances:
        check(0 < s2 < math.inf, "every variance to be above 0 and finite", s2)
    names = [init] if isinstance(init, str) else list(init or ())
    for name in names:
        check(name in SCHEMES, f"init to be one of {', '.join(SCHEMES)}", repr(name))
    check(activation in ACTIVATIONS, f"activation to be one of {', '.join(ACTIVATIONS)}", repr(activation))
    check(bool(names or variances), "at least one variance or one init", "none")
    masks = [mask] if isinstance(mask, str) else list(mask)
    rescales = [rescale] if rescale is None or isinstance(rescale, str) else list(rescale)
    check(bool(masks and rescales), "at least one mask and one rescale", "none")
    kept = {(m, r): kept_share(density, m, r) for m in masks for r in rescales}
    if density == 1:
        kept = {(masks[0], None): 1.0}
    if out is not None:
        need("report")
        make_folder(out)

    config = dict(depth=depth, width=width, inputs=inputs, batch=batch, activation=activation, density=density)
    config |= dict(mask=masks, rescale=rescales, seeds=seeds, seed=seed)
    shapes = [(width, inputs), *[(width, width)] * (depth - 1), (1, width)]
    gain = 1 / math.sqrt(gaussian_means(activation, 1.0)[0])
    function = ACTIVATIONS[activation]
    lines = []
    choices: list[float | str] = [*variances, *names]
    for chosen in choices:
        if isinstance(chosen, str):
            label = LABELS.get(chosen, chosen)
            expected = [SCHEMES[chosen][0](i, o, gain) for o, i in shapes]
        else:
            label = f"{chosen:g} = 2 / {width}" if math.isclose(chosen, 2 / width) else f"{chosen:g}"
            expected = [chosen] * len(shapes)
        found: dict[tuple[str, str | None], list[tuple[Tensor, Tensor]]] = {key: [] for key in kept}
        squares = {key: torch.zeros(len(shapes), dtype=torch.float64) for key in kept}
        for net in range(seed, seed + seeds):
            x = initializers.sample_into(
                torch.empty(batch, inputs, dtype=torch.float64),
                rng.normal(0, 1),
                seed=net,
                stream=rng.stream_of("input"),
            )
            dense = [draw_weight(chosen, shape, k, net, gain) for k, shape in enumerate(shapes)]
            survivors = {m: find_masks(dense, density, m, seed=net, x=x, activation=function) for m in masks}
            for m, r in kept:
                weights = prune_weights(dense, survivors[m], r, density=density, x=x, activation=function)
                found[m, r].append(layer_variances(weights, x, activation))
                squares[m, r] += torch.stack([w.square().mean() for w in weights]) / seeds
        for (m, r), share in kept.items():
            left = squares[m, r].tolist() if share is None else [v * share for v in expected]
            ahead, back = (torch.stack(way) for way in zip(*found[m, r], strict=True))
            several = f", {m}, {'rescaled by ' + r if r else 'not rescaled'}" if len(kept) > 1 else ""
            lines.append(Line(label + several, ahead, back, *expected_variances(left, shapes, activation), m, r))
    result = VarianceResult(lines, config)
    if out is not None:
        save(result, out)
    return result


def save(result: VarianceResult, out: str | Path) -> tuple[Path, Path]:
    """Write variance.csv and variance.png to the folder `out`; each file is whole or absent."""
    from initperf.experiments.variance.figure import png

    folder, rows, text = make_folder(out), result.table(), io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    picture = png(result)
    return (
        write_atomically(folder / "variance.csv", text.getvalue()),
        write_atomically(folder / "variance.png", picture),
    )


def layer_variances(weights: Sequence[Tensor], x: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """Variance over the batch and units of the pre-activations f_k, and of dl/df_k, for every hidden layer."""
    layers, a = [], x
    with torch.enable_grad():
        for k, weight in enumerate(weights):
            f = functional.linear(a, weight).requires_grad_()
            layers.append(f)
            a = ACTIVATIONS[activation](f) if k + 1 < len(weights) else f
        hidden = layers[:-1]
        gradients = torch.autograd.grad(a.square().sum(), hidden)
    return moments(hidden, order=2).var, moments(gradients, order=2).var
