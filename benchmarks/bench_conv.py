"""MaskedConv2d and SparseConv2d against nn.Conv2d with the same, pre-masked, weight: the layers of Conv-4 and Conv-6, and training Conv-4."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from benchmarks.bench_linear import backend
from initperf import MaskedConv2d, SparseConv2d, sparsify

BATCH = 60
# inputs, outputs, height = width: the 3 x 3 convolutions of Conv-4, then those that Conv-6 adds (Frankle and Carbin 2019).
LAYERS = [(3, 64, 32), (64, 64, 32), (64, 128, 16), (128, 128, 16), (128, 256, 8), (256, 256, 8)]
DENSITIES = [0.5, 0.2, 0.1, 0.03]


def pair(kind, inputs, outputs, density):
    mask = torch.rand(outputs, inputs, 3, 3, generator=torch.Generator().manual_seed(0)) <= density
    layer = kind(inputs, outputs, 3, padding=1, mask=mask)
    return layer, layer.to_conv()


@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize(("inputs", "outputs", "size"), LAYERS)
def test_masked_conv_forward(versus, inputs, outputs, size, density):
    layer, dense = pair(MaskedConv2d, inputs, outputs, density)
    x = torch.randn(BATCH, inputs, size, size)

    def check():
        torch.testing.assert_close(layer(x), dense(x), rtol=1e-4, atol=1e-4)

    with torch.no_grad():
        versus(
            lambda: layer(x),
            {"dense": lambda: dense(x)},
            check=check,
            group=f"masked conv forward {inputs} -> {outputs}, {size} x {size}",
            flops=2 * BATCH * size**2 * int(layer.weight_mask.sum()),
            density=density,
            budget=0.5,
            backend=backend("masked_conv2d", lambda: layer(x)),
        )


@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize(("inputs", "outputs", "size"), LAYERS)
@pytest.mark.parametrize("kind", [MaskedConv2d, SparseConv2d])
def test_masked_conv_step(versus, kind, inputs, outputs, size, density):
    layer, dense = pair(kind, inputs, outputs, density)
    x = torch.randn(BATCH, inputs, size, size, requires_grad=True)
    dy = torch.randn(BATCH, outputs, size, size)

    def step(module):
        module.zero_grad()
        x.grad = None
        module(x).backward(dy)
        return x.grad

    def check():
        torch.testing.assert_close(step(layer), step(dense), rtol=1e-4, atol=1e-4)
        weight_grad = layer.weight.grad if kind is MaskedConv2d else layer.expand(layer.weight_values.grad)
        expected = dense.weight.grad.masked_fill(~layer.weight_mask, 0)
        torch.testing.assert_close(weight_grad, expected, rtol=1e-3, atol=2e-2)

    versus(
        lambda: step(layer),
        {"dense": lambda: step(dense)},
        check=check,
        group=f"masked conv step {kind.__name__} {inputs} -> {outputs}, {size} x {size}",
        flops=6 * BATCH * size**2 * int(layer.weight_mask.sum()),
        density=density,
        budget=0.5,
        backend=backend("masked_conv2d_grad_weight", lambda: step(layer)),
    )


def conv4() -> nn.Sequential:
    layers: list[nn.Module] = []
    inputs = 3
    for outputs in (64, 128):
        for i in (inputs, outputs):
            layers += [nn.Conv2d(i, outputs, 3, padding=1), nn.ReLU()]
        layers.append(nn.MaxPool2d(2))
        inputs = outputs
    for i, o in ((128 * 8 * 8, 256), (256, 256), (256, 10)):
        layers += [nn.Linear(i, o), nn.ReLU()]
    return nn.Sequential(*layers[:6], *layers[6:10], nn.Flatten(), *layers[10:-1])


@pytest.mark.parametrize("sparse", [False, True], ids=["masked", "compressed"])
@pytest.mark.parametrize("density", [0.2, 0.1])
def test_masked_conv4_training(versus, density, sparse):
    """A step of Adam on Conv-4, batch 60, every layer pruned to `density`."""
    torch.manual_seed(0)
    dense = conv4()
    model = sparsify(copy.deepcopy(dense), density=density, sparse=sparse)
    x, target = torch.randn(BATCH, 3, 32, 32), torch.randint(10, (BATCH,))

    def trainer(module):
        optimizer = torch.optim.Adam(module.parameters(), 3e-4)

        def step():
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(module(x), target)
            loss.backward()
            optimizer.step()
            return loss.item()

        return step

    ours, theirs = trainer(model), trainer(dense)

    def check():
        losses = [ours() for _ in range(5)]
        assert losses[-1] < losses[0]

    group = f"masked training Conv-4, batch {BATCH}, Adam"
    versus(ours, {"dense": theirs}, check=check, group=group, density=density, budget=4.0)
