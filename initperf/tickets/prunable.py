"""Which weights of a model the lottery-ticket procedure prunes, and how many of them survive."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from initperf.layers.convert import FAMILIES
from initperf.tickets.ticket import compressed_layers, dense_parameters, named_parameters


def prunable(model: nn.Module) -> dict[str, Tensor]:
    """canonical name -> dense weight of every nn.Linear and nn.Conv2d, masked and compressed ones too.

    Not of subclasses, such as the projection inside an attention.
    """
    kinds = {kind for dense, family in FAMILIES.items() for kind in (dense, family.masked)}
    plain = {id(m.weight) for m in model.modules() if type(m) in kinds}
    sparse = {family.sparse for family in FAMILIES.values()}
    compressed = {name for name, layer in compressed_layers(model).items() if type(layer) in sparse}
    found = dense_parameters(model)
    return {name: p.detach() for name, p in found.items() if name in compressed or id(p) in plain}


def density(model: nn.Module, masks: Mapping[str, Tensor]) -> float:
    """Survivors / weights over all prunable layers, those without a mask included."""
    total = sum(w.numel() for w in prunable(model).values())
    return (total - sum(int((~mask).sum()) for mask in masks.values())) / total


def full_masks(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Masks that keep every weight."""
    return {name: torch.ones_like(w, dtype=torch.bool) for name, w in weights.items()}


def take_signs(model: nn.Module, signs: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Give the masked weights of `model` the signs of those of `signs`."""
    other = named_parameters(signs)
    with torch.no_grad():
        for name, parameter in named_parameters(model).items():
            if name in masks:
                parameter.copysign_(other[name].to(parameter.device))
