"""A training step with VarianceMonitor at its defaults, against the same step without it, and with hooks that call .var().item()."""

import pytest
import torch
from torch import nn

from initperf.variance.monitor import VarianceMonitor

WIDTH, DEPTH, BATCH = 1024, 8, 256


def training_step(x: torch.Tensor):
    """A step of a fresh model: called with the monitor, if there is one."""
    torch.manual_seed(0)
    layers = [layer for _ in range(DEPTH) for layer in (nn.Linear(WIDTH, WIDTH), nn.ReLU())]
    model = nn.Sequential(*layers[:-1])
    optimizer = torch.optim.Adam(model.parameters())

    def step(monitor: VarianceMonitor | None = None) -> None:
        optimizer.zero_grad()
        model(x).square().mean().backward()
        if monitor:
            monitor.step()
        optimizer.step()

    return model, step


@pytest.mark.parametrize("costly_every", [1 << 30, 1])
def test_a_step_of_an_mlp(versus, costly_every):
    """The median of steps without and with the costlier statistics; the defaults take 9 and 1 of ten."""
    x = torch.randn(BATCH, WIDTH)
    watched, step = training_step(x)
    read: list[float] = []
    naive, naive_step = training_step(x)
    _, plain_step = training_step(x)
    for layer in naive:
        layer.register_forward_hook(lambda _, __, out: read.append(out.var().item()))
        layer.register_full_backward_hook(lambda _, __, grads: read.append(grads[0].var().item()))
    with VarianceMonitor(watched, costly_every=costly_every) as monitor:
        for _ in range(10):
            step(monitor)

        def check() -> None:
            step(monitor)
            row = monitor.scalars()
            assert row["0/forward_var"] > 0
            assert row["0/backward_var"] > 0

        info = versus(
            lambda: step(monitor),
            {"without": plain_step, "var().item() hooks": naive_step},
            check=check,
            group=f"monitor: a step of an MLP of {DEPTH} x {WIDTH}, batch {BATCH}, Adam",
            costly_every=costly_every,
            budget=6.0,
        )
    assert info["times_without"] > 0
