"""Pruning before training: SNIP, GraSP and SynFlow, the one-shot baselines of lottery tickets.

Every score has the signature score(model, batches, loss) -> {weight: score}, the least are pruned; loss(model, batch) is a
scalar. A function of one's own serves as well. The model is copied: neither it nor its gradients are touched.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from initperf import prune
from initperf.core.checks import check, fail
from initperf.kernels.reference.precision import widest
from initperf.tickets.prunable import prunable
from initperf.tickets.ticket import named_parameters

Loss = Callable[[nn.Module, Any], Tensor]
Score = Callable[[nn.Module, Iterable[Any], "Loss | None"], Mapping[str, Tensor]]
SYNFLOW_ROUNDS = 100  # Tanaka et al. 2020: in one step it empties whole layers


def snip(model: nn.Module, batches: Iterable[Any], loss: Loss | None) -> dict[str, Tensor]:
    """|g w|, g: gradient of the loss over all batches (Lee, Ajanthan & Torr 2019)."""
    weights, gradients = _gradients(copy.deepcopy(model), batches, _needed(loss, "snip"))
    return {n: (g * weights[n].detach()).abs() for n, g in gradients.items()}


def grasp(model: nn.Module, batches: Iterable[Any], loss: Loss | None) -> dict[str, Tensor]:
    """w Hg, H: Hessian of the loss, g: its gradient, over all batches (Wang, Zhang & Grosse 2020, who prune the largest of -w Hg)."""
    loss, batches, model = _needed(loss, "grasp"), list(batches), copy.deepcopy(model)
    weights, total = _gradients(model, batches, loss)
    found = {n: torch.zeros_like(w) for n, w in weights.items()}
    for batch in batches:
        gradients = torch.autograd.grad(loss(model, batch), list(weights.values()), create_graph=True)
        product = sum((g * t).sum() for g, t in zip(gradients, total.values(), strict=True))
        for name, hg in zip(weights, torch.autograd.grad(product, list(weights.values())), strict=True):  # type: ignore[arg-type]
            found[name] += hg * weights[name].detach()
    return found


def synflow(model: nn.Module, batches: Iterable[Any], loss: Loss | None = None) -> dict[str, Tensor]:
    """|w dR/dw|, R: the outputs' sum for an input of ones and all parameters replaced by their magnitudes (Tanaka et al. 2020).

    Needs no data: of the batches, only the shape of the first one's first input is used. In float64, where R does not overflow.
    """
    home = next(model.parameters()).device
    device = home if widest(home.type) is torch.float64 else torch.device("cpu")
    model = copy.deepcopy(model).to(device).double().eval()
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():
                tensor.abs_()
    first: Any = next(iter(batches), None)
    x = first[0] if isinstance(first, (tuple, list)) else first
    if not isinstance(x, Tensor):
        fail("batches of tensors, or of tuples that begin with one", type(x).__name__)
    weights = _weights(model)
    ones = torch.ones((1, *x.shape[1:]), dtype=torch.float64, device=device)
    gradients = torch.autograd.grad(model(ones).sum(), list(weights.values()))
    found = {n: (g * w.detach()).abs() for (n, w), g in zip(weights.items(), gradients, strict=True)}
    whole = sum(float(s.sum()) for s in found.values()) or 1.0  # scores are compared as float32
    return {n: (s / whole).to(widest(home.type)).to(home) for n, s in found.items()}


SCORES: dict[str, Score] = {"snip": snip, "grasp": grasp, "synflow": synflow}


def prune_at_start(
    score: str | Score,
    model: nn.Module,
    fraction: prune.Fraction,
    *,
    batches: Iterable[Any],
    loss: Loss | None = None,
    rounds: int = 1,
    scope: str = "global",
) -> dict[str, Tensor]:
    """Masks for the untrained `model` with as many survivors as `rounds` rounds of pruning `fraction` leave.

    score: "snip", "grasp", "synflow" (in 100 steps, scored anew in each), or a function (model, batches, loss) -> {weight:
    score}. fraction, scope: see initperf.prune.magnitude; the papers' scope is "global". batches: for a loss(model, batch).
    """
    chosen = SCORES.get(score) if isinstance(score, str) else score
    if chosen is None:
        fail(f"a score of {', '.join(SCORES)}, or a function", repr(score))
    batches = list(batches)
    check(len(batches) > 0, "at least one batch", 0)
    names = list(prune.fractions_by_name(list(prunable(model)), fraction))
    given = fraction if isinstance(fraction, Mapping) else {"*": fraction}
    scores = _scores(chosen, model, batches, loss, names)
    if chosen is synflow:
        model = copy.deepcopy(model)
        step = {glob: 1 - (1 - f) ** (rounds / SYNFLOW_ROUNDS) for glob, f in given.items()}
        masks = None
        for _ in range(SYNFLOW_ROUNDS - 1):
            masks = prune.by_score(scores, step, masks=masks, scope=scope)
            with torch.no_grad():
                for name, weight in _weights(model).items():
                    if name in masks:
                        weight.masked_fill_(~masks[name], 0)
            scores = _scores(chosen, model, batches, loss, names)
            scores = {n: s.masked_fill(~masks[n], -torch.inf) for n, s in scores.items()}  # these first
    masks = None
    for _ in range(rounds):  # round by round, for the exact counts
        masks = prune.by_score(scores, given, masks=masks, scope=scope)
    return masks if masks is not None else {n: torch.ones_like(s, dtype=torch.bool) for n, s in scores.items()}


def _scores(
    score: Score, model: nn.Module, batches: list[Any], loss: Loss | None, names: list[str]
) -> dict[str, Tensor]:
    found = score(model, batches, loss)
    missing = [n for n in names if n not in found]
    check(not missing, f"scores of {', '.join(names)}", f"none of {', '.join(missing)}")
    return {n: found[n].detach() for n in names}


def _gradients(
    model: nn.Module, batches: Iterable[Any], loss: Loss
) -> tuple[dict[str, nn.Parameter], dict[str, Tensor]]:
    """The weights of the layers that can be pruned, and the loss's gradients by them, summed over the batches."""
    weights = _weights(model)
    total = {n: torch.zeros_like(w) for n, w in weights.items()}
    for batch in batches:
        for name, g in zip(weights, torch.autograd.grad(loss(model, batch), list(weights.values())), strict=True):
            total[name] += g
    return weights, total


def _weights(model: nn.Module) -> dict[str, nn.Parameter]:
    named = named_parameters(model)
    return {n: named[n] for n in prunable(model)}


def _needed(loss: Loss | None, score: str) -> Loss:
    if loss is None:
        fail(f"loss=, a function (model, batch) -> scalar, for {score!r}", None)
    return loss
