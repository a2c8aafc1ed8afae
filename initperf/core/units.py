"""How modules store their weights: units and their inputs."""

from __future__ import annotations

from torch import Tensor, nn

from initperf.core.torch_private import ConvTransposeNd


def _is_transformers_conv1d(module: nn.Module) -> bool:
    """The linear layer of transformers' GPT-2, whose weight is (inputs, outputs)."""
    return any(c.__module__ == "transformers.pytorch_utils" and c.__name__ == "Conv1D" for c in type(module).__mro__)


def by_unit(module: nn.Module, weight: Tensor) -> Tensor:
    """A weight or mask seen as (units, inputs of a unit, ...), a view: transposed convolutions and transformers' Conv1D store it otherwise."""
    if isinstance(module, ConvTransposeNd):
        grouped = weight.unflatten(0, (module.groups, weight.shape[0] // module.groups))
        return grouped.transpose(1, 2)  # (groups, units of a group, inputs, ...)
    return weight.t() if _is_transformers_conv1d(module) else weight


def fan_in(module: nn.Module, weight: Tensor) -> int:
    """Inputs of one unit of a layer's weight."""
    units = by_unit(module, weight)
    return units[0, 0].numel() if isinstance(module, ConvTransposeNd) else units[0].numel()
