"""The networks of the ticket experiments: linear layers fc1, fc2, ..., where wanted after 3 x 3 convolutions conv1, conv2, ..."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import nn


def network(shape: Sequence[int], channels: Sequence[int], hidden: Sequence[int], outputs: int) -> nn.Sequential:
    """Images of `shape` (inputs,) or (C, H, W): convolutions with `channels` outputs, halved by pooling after each pair, then linear layers.

    ReLU after every layer but the last; 3 x 3 with padding 1 (Frankle & Carbin 2019, figure 2).
    """
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    inputs, *size = shape
    for i, width in enumerate(channels, 1):
        layers[f"conv{i}"] = nn.Conv2d(inputs, width, 3, padding=1)
        layers[f"conv{i}_relu"] = nn.ReLU()
        inputs = width
        if i % 2 == 0:
            layers[f"pool{i // 2}"] = nn.MaxPool2d(2)
            size = [s // 2 for s in size]
    if size:
        layers["flatten"] = nn.Flatten()
    sizes = [inputs * math.prod(size), *hidden, outputs]
    for i, (a, b) in enumerate(zip(sizes, sizes[1:], strict=False), 1):
        layers[f"fc{i}"] = nn.Linear(a, b)
        if i < len(sizes) - 1:
            layers[f"relu{i}"] = nn.ReLU()
    return nn.Sequential(layers)


def mlp(inputs: int, hidden: Sequence[int], outputs: int) -> nn.Sequential:
    """Linear layers fc1, fc2, ... with ReLU between them."""
    return network((inputs,), (), hidden, outputs)


def small_network(
    shape: Sequence[int], channels: Sequence[int], hidden: Sequence[int], outputs: int, weights: int
) -> nn.Sequential:
    """The widest network of the same proportions with at most `weights` weights (one unit a layer at least)."""

    def shrunk(width: int) -> tuple[list[int], list[int]]:
        channels_, hidden_ = ([max(1, round(width * w / hidden[0])) for w in widths] for widths in (channels, hidden))
        return channels_, hidden_

    def size(width: int) -> int:
        with torch.device("meta"):
            return weights_of(network(shape, *shrunk(width), outputs))

    width = bisect_right(range(1, hidden[0] + 1), weights, key=size)
    return network(shape, *shrunk(max(width, 1)), outputs)


def weights_of(model: nn.Module) -> int:
    """Weights without biases."""
    return sum(p.numel() for p in model.parameters() if p.dim() > 1)
