"""VarianceMonitor: what it reads equals the definition, and training does not notice it."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from initperf.checks import InitPerfError
from initperf.monitor import VarianceMonitor


def mlp(*widths: int, inplace: bool = False) -> nn.Sequential:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for i, o in zip(widths, widths[1:], strict=False):
        layers += [nn.Linear(i, o), nn.ReLU(inplace=inplace)]
    return nn.Sequential(*layers[:-1])


def definition(model: nn.Sequential, x: torch.Tensor) -> dict[str, float]:
    """The same statistics by plain autograd, for a mean-square loss."""
    a, kept, want = x, {}, {}
    for name, layer in model.named_children():
        a = layer(a.clone())
        if isinstance(layer, nn.Linear):
            kept[name] = a
            a.retain_grad()
    model.zero_grad()
    a.square().mean().backward()
    for name, f in kept.items():
        want[f"{name}/forward_var"] = f.double().var(correction=0).item()
        want[f"{name}/backward_var"] = f.grad.double().var(correction=0).item()
        if model.get_submodule(name) is not model[-1]:
            want[f"{name}/dead"] = (f <= 0).all(0).double().mean().item()
        gradient = model.get_submodule(name).weight.grad
        want[f"{name}/weight_grad_var"] = gradient.double().var(correction=0).item()
    return want


def _calls(monitor: VarianceMonitor, layer: str, what: str) -> int:
    monitor._flush()
    return sum((layer, what) in keys for keys, _ in monitor._current.blocks)


def assert_reads(got: dict[str, float], want: dict[str, float]) -> None:
    for key, value in want.items():
        assert math.isclose(got[key], value, rel_tol=1e-5, abs_tol=1e-30), key


@pytest.mark.parametrize("inplace", [False, True])
def test_it_reads_what_the_definition_says(inplace):
    model, x = mlp(30, 40, 50, 7, inplace=inplace), torch.randn(64, 30)
    model[0].bias.data[:10] = -100.0
    want = definition(model, x)
    assert want["0/dead"] == 0.25
    with VarianceMonitor(model) as monitor:
        model.zero_grad()
        model(x).square().mean().backward()
        monitor.step()
    assert_reads(monitor.scalars(), want)


def test_scale_undoes_a_scaled_or_summed_loss():
    model, x = mlp(10, 20, 5), torch.randn(16, 10)
    want = definition(model, x)
    with VarianceMonitor(model) as monitor:
        monitor.scale = 1024.0
        model.zero_grad()
        (model(x).square().mean() * 1024).backward()
        monitor.step()
    assert_reads(monitor.scalars(), want)


def test_accumulated_batches_read_as_one():
    model, x = mlp(10, 20, 5), torch.randn(32, 10)
    with VarianceMonitor(model) as monitor:
        for part in (x[:8], x[8:]):
            model(part).sum().backward()
        monitor.step()
        model.zero_grad()
        model(x).sum().backward()
        monitor.step()
    rows = {(step, name): row for step, name, row in monitor.rows()}
    for name in ("0", "2"):
        for key in ("forward_var", "backward_var", "weight_grad_var"):
            assert math.isclose(rows[0, name][key], rows[1, name][key], rel_tol=1e-5, abs_tol=1e-12)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_counts_nothing_twice(reentrant):
    model, x = mlp(10, 20, 5), torch.randn(16, 10, requires_grad=True)
    want = definition(model, x)
    with VarianceMonitor(model) as monitor:
        model.zero_grad()
        checkpoint(model, x, use_reentrant=reentrant).square().mean().backward()
        assert _calls(monitor, "0", "forward") == _calls(monitor, "0", "backward") == 1
        monitor.step()
    assert_reads(monitor.scalars(), want)


def test_training_is_the_same_to_the_bit_with_and_without_it():
    def train(watch: bool) -> list[torch.Tensor]:
        model, g = mlp(10, 20, 5), torch.Generator().manual_seed(1)
        optimizer = torch.optim.Adam(model.parameters())
        monitor = VarianceMonitor(model).attach() if watch else None
        for _ in range(5):
            optimizer.zero_grad()
            model(torch.randn(8, 10, generator=g)).square().mean().backward()
            if monitor:
                monitor.step()
            optimizer.step()
        return [p.detach() for p in model.parameters()]

    for a, b in zip(train(True), train(False), strict=True):
        assert torch.equal(a, b)


def test_modules_that_return_tuples_and_are_shared_are_read():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shared = nn.Linear(6, 6)

        def forward(self, x):
            return self.shared(self.shared(x))

    model = Twice()
    with VarianceMonitor(model) as monitor:
        model(torch.randn(9, 6)).sum().backward()
        assert _calls(monitor, "shared", "forward") == 2
        monitor.step()
    assert set(monitor.scalars()) >= {"shared/forward_var", "shared/backward_var"}


def test_intervals_and_the_ring_buffer_bound_what_is_kept():
    model = mlp(4, 4, 4)
    with VarianceMonitor(model, every=2, costly_every=4, history=3) as monitor:
        for _ in range(12):
            model(torch.randn(3, 4)).sum().backward()
            monitor.step()
    rows = list(monitor.rows())
    assert sorted({step for step, _, _ in rows}) == [6, 8, 10]
    assert [("kurtosis" in row) for step, name, row in rows if name == "0"] == [False, True, False]


def test_a_copy_of_the_model_is_not_watched():
    model = mlp(4, 4)
    with VarianceMonitor(model) as monitor:
        copy.deepcopy(model)(torch.randn(3, 4)).sum().backward()
        assert not monitor._current.blocks
        model(torch.randn(3, 4))
        assert monitor._current.blocks


def test_autocast_and_convolutions_are_read():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 4))
    with VarianceMonitor(model) as monitor, torch.autocast("cpu", torch.bfloat16):
        model(torch.randn(5, 3, 8, 8)).sum().backward()
        monitor.step()
    got = monitor.scalars()
    assert got["0/forward_var"] > 0
    assert 0 <= got["0/dead"] < 1
    assert got["3/backward_var"] == 0  # the gradient of a sum is 1 everywhere


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: VarianceMonitor(3), "Module"),
        (lambda: VarianceMonitor(nn.ReLU()), "at least one layer"),
        (lambda: VarianceMonitor(mlp(2, 2), every=0), "every"),
        (lambda: VarianceMonitor(torch.compile(mlp(2, 2))), "compile"),
        (lambda: VarianceMonitor(mlp(2, 2)).step(), "attach"),
    ],
)
def test_misuse_is_named(wrong, message):
    with pytest.raises(InitPerfError, match=message):
        wrong()


def test_a_closed_monitor_says_so_and_still_reads():
    model = mlp(2, 2)
    with VarianceMonitor(model) as monitor:
        model(torch.randn(3, 2)).sum().backward()
        monitor.step()
    with pytest.raises(InitPerfError, match="closed"):
        monitor.step()
    with pytest.raises(InitPerfError, match="closed"):
        monitor.attach()
    assert "0/forward_var" in monitor.scalars()
    assert not model[0]._forward_hooks
