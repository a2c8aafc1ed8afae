"""MaskedLinear against nn.Linear with the same, pre-masked, weight: forward, and a step (forward, both gradients, bias)."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from initperf import ops
from initperf.masked import MaskedLinear

# batch, inputs, outputs, density: the rows of the project's targets, then rows where dense is to run.
ROWS = [
    (256, 4096, 4096, 0.2),
    (256, 4096, 4096, 0.1),
    (256, 4096, 4096, 0.036),
    (512, 1024, 1024, 0.1),
    (60, 784, 300, 0.1),
    (1, 4096, 4096, 0.1),
    (256, 4096, 4096, 0.5),
    (256, 1024, 1024, 1.0),
    (60, 784, 300, 1.0),
    (16, 64, 64, 1.0),
]


def pair(inputs: int, outputs: int, density: float) -> tuple[MaskedLinear, nn.Linear]:
    generator = torch.Generator().manual_seed(0)
    masked = MaskedLinear(inputs, outputs, mask=torch.rand(outputs, inputs, generator=generator) <= density)
    return masked, masked.to_linear()


@pytest.mark.parametrize(("batch", "inputs", "outputs", "density"), ROWS)
def test_forward(versus, batch, inputs, outputs, density):
    masked, dense = pair(inputs, outputs, density)
    x = torch.randn(batch, inputs)

    def check():
        torch.testing.assert_close(masked(x), dense(x), rtol=1e-4, atol=1e-4)

    with torch.no_grad():
        versus(
            lambda: masked(x),
            {"dense": lambda: dense(x)},
            check=check,
            group=f"masked forward {batch} x {inputs} -> {outputs}",
            flops=2 * batch * int(masked.weight_mask.sum()),
            density=density,
            budget=0.6,
            backend=backend("masked_linear", lambda: masked(x)),
        )


@pytest.mark.parametrize(("batch", "inputs", "outputs", "density"), ROWS)
def test_step(versus, batch, inputs, outputs, density):
    masked, dense = pair(inputs, outputs, density)
    x, dy = torch.randn(batch, inputs, requires_grad=True), torch.randn(batch, outputs)

    def step(layer):
        layer.zero_grad()
        x.grad = None
        layer(x).backward(dy)
        return x.grad, layer.weight.grad

    def check():
        (dx, dw), (dense_dx, dense_dw) = step(masked), step(dense)
        torch.testing.assert_close(dx, dense_dx, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(dw, dense_dw.masked_fill(~masked.weight_mask, 0), rtol=1e-4, atol=1e-3)

    versus(
        lambda: step(masked),
        {"dense": lambda: step(dense)},
        check=check,
        group=f"masked step {batch} x {inputs} -> {outputs}",
        flops=6 * batch * int(masked.weight_mask.sum()),
        density=density,
        budget=0.6,
        backend=backend("masked_grad_weight", lambda: step(masked)),
    )


@pytest.mark.parametrize("density", [0.5, 0.1, 0.01])
def test_index(versus, density):
    """Building the index of a 4096 x 4096 mask, both directions, against torch's conversion to CSR."""
    mask = torch.rand(4096, 4096, generator=torch.Generator().manual_seed(0)) < density
    weight = mask.float()
    build = ops.implementation("pattern_tensors", "cpu")

    def check():
        assert mask.sum() <= build(mask)[1].numel() <= 1.1 * mask.sum()

    versus(
        lambda: build(mask),
        {"to_csr": lambda: weight.to_sparse_csr()},
        check=check,
        group="index 4096 x 4096",
        density=density,
    )


def backend(op: str, call: Callable[[], object]) -> str:
    """The backend that `call` runs `op` with, as ops.CALLS counts it."""
    before = ops.CALLS.copy()
    call()
    return next(name for called, name in ops.CALLS - before if called == op)
