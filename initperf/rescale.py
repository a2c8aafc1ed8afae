"""Scaling the survivors of a mask, so that pre-activations keep the variance that the dense layer gives them.

layer     by 1 / sqrt(density): right for masks that do not look at the weights (random, shuffled)
unit      each output unit by sqrt(fan-in / its live fan-in) (Evci et al., rigl)
squares   by sqrt(sum w^2 dense / sum w^2 of the survivors): right for magnitude masks too
measured  so that the variance of each layer's pre-activations on a batch is what the dense model gives
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from initperf.checks import fail
from initperf.stats import moments

MODES = ("layer", "unit", "squares", "measured")


def rescale_factor(mode: str, dense: Tensor, mask: Tensor, module: nn.Module) -> Tensor:
    """What to multiply the survivors of `dense` with, for "unit" and "squares". A unit or layer without survivors keeps 1."""
    if mode == "unit":
        unit = 1 if isinstance(module, _ConvTransposeNd) else 0
        others = [d for d in range(mask.dim()) if d != unit]
        fan = mask.numel() // max(1, mask.shape[unit])
        live = mask.double().sum(dim=others, keepdim=True) if others else mask.double()
        return torch.where(live > 0, fan / live.clamp(min=1), 1.0).sqrt().to(dense.dtype)
    found = moments([dense, dense.masked_fill(~mask, 0)], order=2)
    whole, kept = found.var + found.mean**2
    return (whole / kept if kept > 0 else torch.ones((), dtype=torch.float64)).sqrt().to(dense.dtype)


def reached(model: nn.Module, sample: Any, layers: Mapping[nn.Module, Tensor]) -> set[nn.Module]:
    """Which of `layers` a forward pass of the sample calls. Raises what the model raises on a sample that does not fit."""
    return set(_sweep(model, sample, layers, None))


def measured(model: nn.Module, sample: Any, layers: Mapping[nn.Module, Tensor]) -> None:
    """Mask the dense weights of `layers` {module: mask of its weight} and scale the survivors, in the order of the forward pass.

    Compared are variances of the outputs without bias, in evaluation mode. Products are torch's, so the last bits of the
    factors may differ between machines.
    """
    dense = _sweep(model, sample, layers, None)
    for module, mask in layers.items():
        module.weight.masked_fill_(~mask, 0)  # type: ignore[operator]
    _sweep(model, sample, layers, dense)


def _sweep(
    model: nn.Module, sample: Any, layers: Mapping[nn.Module, Tensor], wanted: Mapping[nn.Module, Tensor] | None
) -> dict[nn.Module, Tensor]:
    """Variance of each layer's output without bias at its first call; with `wanted`, its weight is scaled to that first."""
    found: dict[nn.Module, Tensor] = {}

    def forward_of(module: Any) -> Any:
        plain: Any = next(
            vars(c)["forward"]
            for c in type(module).__mro__
            if c.__module__.startswith("torch.nn.") and "forward" in vars(c)
        )

        def forward(*args: Any, **kwargs: Any) -> Any:
            if module not in found:
                bias = module._parameters.get("bias")
                module._parameters["bias"] = None
                try:
                    variance = plain(module, *args, **kwargs).double().var(correction=0)
                finally:
                    module._parameters["bias"] = bias
                found[module] = variance
                if wanted is not None and variance > 0:
                    module.weight.mul_((wanted[module] / variance).sqrt().to(module.weight.dtype))
            return plain(module, *args, **kwargs)

        return forward

    training = {m: m.training for m in model.modules()}
    try:
        for module in layers:
            module.forward = forward_of(module)
        model.eval()
        with torch.no_grad():
            model(*sample) if isinstance(sample, tuple) else model(sample)
    finally:
        for module in layers:
            del module.__dict__["forward"]
        for m, mode in training.items():
            m.training = mode
    return found


def check_layers(layers: Mapping[nn.Module, tuple[str, str]]) -> None:
    """Raise unless each {module: (name, leaf)} is a linear or convolutional layer whose `weight` is masked."""
    for module, (name, leaf) in layers.items():
        if leaf != "weight" or not isinstance(module, (nn.Linear, _ConvNd)) or "weight" not in module._parameters:
            fail('rescale="measured" for weights of linear and convolutional layers only', f"a mask of {name}")
