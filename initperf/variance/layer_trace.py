"""What follows each layer: its activation function, read off the autograd graph, so that functional calls are seen as modules are."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

RELU_LIKE = frozenset({"relu", "relu6"})  # exactly 0, with gradient 0, below 0
SATURATING = frozenset({"tanh", "sigmoid"})
_NODES = {
    "Relu": "relu",
    "LeakyRelu": "leaky_relu",
    "Hardtanh": "relu6",
    "Gelu": "gelu",
    "Tanh": "tanh",
    "Sigmoid": "sigmoid",
    "Silu": "silu",
    "Mish": "mish",
    "Softplus": "softplus",
    "PreluKernel": "leaky_relu",
}
_FUNCTIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "relu6": nn.functional.relu6,
    "leaky_relu": nn.functional.leaky_relu,
    "gelu": nn.functional.gelu,
    "elu": nn.functional.elu,
    "silu": nn.functional.silu,
    "mish": nn.functional.mish,
    "softplus": nn.functional.softplus,
}
_FARTHEST = 12  # nodes between an activation and its layer: casts, views, pooling, dropout


def squared_gain(activation: str | None) -> float:
    """fan_in * var(w) that keeps the variance: 1 / E[a(z)^2] for a standard normal z; 1 for tanh, sigmoid, SELU and none.

    For tanh and sigmoid it is Xavier's 1, which keeps the variance where they are linear; for SELU LeCun's 1.
    """
    function = _FUNCTIONS.get(activation or "")
    if function is None:
        return 1.0
    z = torch.linspace(-8, 8, 4001, dtype=torch.float64, device="cpu")
    weight = torch.exp(-z.square() / 2) / math.sqrt(2 * math.pi)
    return 1 / torch.trapezoid(function(z).square() * weight, z).item()


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Tensors of a module's arguments or result: in tuples, lists, dicts and dataclass-like dicts, in their order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for v in value:
            yield from tensors_in(v)
    elif isinstance(value, Mapping):
        for v in value.values():
            yield from tensors_in(v)


class LayerTrace:
    """Activations found while a forward pass runs. `activations`: {layer: name, or None where the next layer takes it as it is}."""

    def __init__(self) -> None:
        self.activations: dict[str, str | None] = {}
        self._nodes: dict[Any, str] = {}

    def leaves(self, layer: str, output: Tensor) -> None:
        """A layer gave `output`."""
        if output.grad_fn is not None:
            self._nodes[output.grad_fn] = layer

    def enters(self, value: Tensor) -> None:
        """The next layer takes `value`, or the model returns it."""
        node, found = value.grad_fn, None
        for _ in range(_FARTHEST):
            if node is None:
                return
            if node in self._nodes:
                self.activations.setdefault(self._nodes[node], found)
                return
            found = _activation(node) or found
            before = [
                n for n, _ in node.next_functions if n is not None and n.name() != "torch::autograd::AccumulateGrad"
            ]
            if len(before) != 1:
                return
            node = before[0]

    def end(self) -> None:
        """Let go of the graph."""
        self._nodes.clear()


def _activation(node: Any) -> str | None:
    name = node.name().split("Backward")[0]
    if name == "Elu":  # SELU is ELU times 1.0507
        return "selu" if abs(float(getattr(node, "_saved_scale", 1.0)) - 1.0507) < 1e-3 else "elu"
    return _NODES.get(name)
