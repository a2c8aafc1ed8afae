"""MaskedLinear and SparseLinear against nn.Linear with the same, pre-masked, weight: forward, a step (forward, both
gradients, bias), whole training steps with Adam, and inference.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from initperf import choice, ops
from initperf.layers.linear import MaskedLinear, SparseLinear
from initperf.layers.sequential import fuse

# batch, inputs, outputs, density: the rows of the project's targets, then rows where dense is to run.
ROWS = [
    (256, 4096, 4096, 0.2),
    (256, 4096, 4096, 0.1),
    (256, 4096, 4096, 0.036),
    (512, 1024, 1024, 0.1),
    (60, 784, 300, 0.1),
    (1, 4096, 4096, 0.1),
    (1, 1024, 1024, 0.5),
    (4, 1024, 1024, 0.5),
    (256, 4096, 4096, 0.5),
    (60, 784, 300, 0.7),
    (60, 784, 300, 1.0),
    (16, 64, 64, 0.5),
    (16, 64, 64, 1.0),
]
# For the chart of speed against density.
CHART = [(256, 1024, 1024, density) for density in (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0)]
CHART += [(16, 1024, 1024, density) for density in (0.02, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0)]
LAYERS = {
    "masked": (MaskedLinear, "masked_linear", "masked_grad_weight"),
    "sparse": (SparseLinear, "sparse_linear", "sparse_grad_values"),
}
CASES = [(*row, "auto", storage) for row in ROWS + CHART for storage in LAYERS]
FORCED = [(*row, "sparse", storage) for row in CHART if 0.1 <= row[-1] < choice.MOST for storage in LAYERS]


@pytest.fixture(autouse=True, scope="module")
def measured_choice():
    """Sparse or dense is chosen as after `initperf doctor --calibrate`, which takes a minute and is kept."""
    if choice.measured(torch.get_num_threads()) is None and not torch.cuda.is_available():
        from initperf.layers.choice.calibrate import calibrate

        calibrate()


def pair(inputs: int, outputs: int, density: float, storage: str) -> tuple[nn.Module, nn.Linear]:
    generator = torch.Generator().manual_seed(0)
    layer = LAYERS[storage][0](inputs, outputs, mask=torch.rand(outputs, inputs, generator=generator) <= density)
    return layer, layer.to_dense()


def survivors(layer: nn.Module) -> int:
    return int(layer.weight_mask.sum())


@pytest.mark.parametrize(("batch", "inputs", "outputs", "density", "mode", "storage"), CASES + FORCED)
def test_forward(versus, batch, inputs, outputs, density, mode, storage):
    layer, dense = pair(inputs, outputs, density, storage)
    x = torch.randn(batch, inputs)

    def check():
        torch.testing.assert_close(layer(x), dense(x), rtol=1e-4, atol=1e-4)

    with torch.no_grad(), choice.prefer(mode):
        versus(
            lambda: layer(x),
            {"dense": lambda: dense(x)},
            check=check,
            group=f"{storage} forward {batch} x {inputs} -> {outputs}",
            flops=2 * batch * survivors(layer),
            density=density,
            mode=mode,
            budget=0.3,
            backend=backend(LAYERS[storage][1], lambda: layer(x)),
        )


@pytest.mark.parametrize(("batch", "inputs", "outputs", "density", "mode", "storage"), CASES + FORCED)
def test_step(versus, batch, inputs, outputs, density, mode, storage):
    layer, dense = pair(inputs, outputs, density, storage)
    x, dy = torch.randn(batch, inputs, requires_grad=True), torch.randn(batch, outputs)
    parameter = "weight" if storage == "masked" else "weight_values"

    def step(layer, name):
        layer.zero_grad()
        x.grad = None
        layer(x).backward(dy)
        return x.grad, getattr(layer, name).grad

    def check():
        (dx, dw), (dense_dx, dense_dw) = step(layer, parameter), step(dense, "weight")
        torch.testing.assert_close(dx, dense_dx, rtol=1e-4, atol=1e-4)
        mask = layer.weight_mask
        wanted = dense_dw.masked_fill(~mask, 0) if storage == "masked" else dense_dw[mask][:, None]
        torch.testing.assert_close(dw, wanted, rtol=1e-4, atol=1e-3)

    with choice.prefer(mode):
        versus(
            lambda: step(layer, parameter),
            {"dense": lambda: step(dense, "weight")},
            check=check,
            group=f"{storage} step {batch} x {inputs} -> {outputs}",
            flops=6 * batch * survivors(layer),
            density=density,
            mode=mode,
            budget=0.3,
            backend=backend(LAYERS[storage][2], lambda: step(layer, parameter)),
        )


MODELS = {"MLP 4 x 4096": ((4096,) * 5, 256), "LeNet-300-100": ((784, 300, 100, 10), 60)}


def mlp(widths: tuple[int, ...], make: Callable[[int, int, int], nn.Module]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for i, (inputs, outputs) in enumerate(zip(widths, widths[1:], strict=False)):
        layers += [make(i, inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def models(name: str, storage: str, density: float = 0.1) -> tuple[nn.Module, nn.Module]:
    """Ours, and the dense one with the same pre-masked weights. The output layer of LeNet keeps half, as in the paper."""
    widths, _ = MODELS[name]
    generator = torch.Generator().manual_seed(0)

    def make(i, inputs, outputs):
        keep = density if outputs > 10 else 0.5
        return LAYERS[storage][0](inputs, outputs, mask=torch.rand(outputs, inputs, generator=generator) <= keep)

    ours = mlp(widths, make)
    theirs = nn.Sequential(*(m.to_dense() if hasattr(m, "to_dense") else m for m in ours))
    fuse(ours)  # into SparseSequential, as sparsify does: runs of small layers are one call
    return ours, theirs


@pytest.mark.parametrize("storage", LAYERS)
@pytest.mark.parametrize("name", MODELS)
def test_training_step_with_adam(versus, name, storage):
    ours, theirs = models(name, storage)
    widths, batch = MODELS[name]
    x, target = torch.randn(batch, widths[0]), torch.randint(0, widths[-1], (batch,))

    def trainer(model):
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)

        def step():
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x), target)
            loss.backward()
            optimizer.step()
            return loss

        return step

    first, second = trainer(ours), trainer(theirs)

    def check():
        torch.testing.assert_close(first(), second(), rtol=1e-4, atol=1e-4)

    versus(first, {"dense": second}, check=check, group=f"{storage} training {name}", density=0.1, budget=1.5)


@pytest.mark.parametrize("batch", [1, 256])
@pytest.mark.parametrize("name", MODELS)
def test_inference(versus, name, batch):
    ours, theirs = models(name, "sparse")
    x = torch.randn(batch, MODELS[name][0][0])

    def check():
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-3, atol=1e-4)

    with torch.inference_mode():
        versus(
            lambda: ours(x),
            {"dense": lambda: theirs(x)},
            check=check,
            group=f"sparse inference {name}",
            density=0.1,
            budget=0.6,
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
    return next((name for called, name in ops.CALLS - before if called == op), "torch")
