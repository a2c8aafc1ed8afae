"""VarianceMonitor: what it reads equals the definition, and training does not notice it."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import processes
from initperf import sparsify
from initperf.core.checks import InitPerfError
from initperf.variance.monitor import VarianceMonitor


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
    x[:8] += 1.0  # batches of different means
    with VarianceMonitor(model, costly_every=1) as monitor:
        for part in (x[:8], x[8:]):
            model(part).sum().backward()
        monitor.step()
        model.zero_grad()
        model(x).sum().backward()
        monitor.step()
    rows = {(step, name): row for step, name, row in monitor.rows()}
    for name in ("0", "2"):
        for key in ("forward_var", "backward_var", "weight_grad_var", "skew", "kurtosis"):
            assert math.isclose(rows[0, name][key], rows[1, name][key], rel_tol=1e-5, abs_tol=1e-12)


def test_non_finite_values_of_all_calls_are_counted():
    model, x = mlp(10, 20, 5), torch.randn(32, 10)
    x[3, 0] = x[20, 0] = math.nan
    with VarianceMonitor(model) as monitor:
        for part in (x[:8], x[8:]):
            model(part)
        monitor.step()
    assert monitor.scalars()["0/forward_nonfinite"] == 2 * 20


def test_gradients_with_respect_to_inputs_are_unscaled_too():
    model, x, want = mlp(10, 20, 5), torch.randn(16, 10), {}
    for scale in (1.0, 64.0):
        with VarianceMonitor(model, scale=scale) as monitor:
            (scale * model(x).square().mean()).backward()
            monitor.step()
        want[scale] = monitor.scalars()["2/input_grad_var"]
    assert 0 < want[64.0] == pytest.approx(want[1.0], rel=1e-5)


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


def test_activations_and_their_gradients_are_read_apart_from_pre_activations():
    model, x = mlp(10, 20, 5), torch.randn(16, 10)
    h = model[0](x).relu()
    h.retain_grad()
    model[2](h).square().mean().backward()
    model.zero_grad()
    with VarianceMonitor(model) as monitor:
        model(x).square().mean().backward()
        monitor.step()
    got = monitor.scalars()
    assert math.isclose(got["2/input_var"], h.double().var(correction=0).item(), rel_tol=1e-5)
    assert math.isclose(got["2/input_grad_var"], h.grad.double().var(correction=0).item(), rel_tol=1e-5)
    assert got["2/input_var"] < got["0/forward_var"]
    assert "0/input_grad_var" not in got  # the batch needs no gradient


def test_every_parameter_has_its_gradient_read():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.norm = nn.Embedding(50, 8, sparse=True), nn.LayerNorm(8)
            self.lstm, self.attention = nn.LSTM(8, 8, batch_first=True), nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, tokens):
            x = self.lstm(self.norm(self.embedding(tokens)))[0]
            return {"out": self.attention(x, x, x)[0]}

    model = Net()
    with VarianceMonitor(model) as monitor:
        model(torch.randint(50, (4, 6)))["out"].square().sum().backward()
        monitor.step()
    got = monitor.scalars()
    for name, p in model.named_parameters():
        gradient = p.grad.to_dense().double()
        layer, _, parameter = name.rpartition(".")
        want = gradient.var(correction=0).item()
        assert math.isclose(got[f"{layer}/{parameter}_grad_var"], want, rel_tol=1e-4, abs_tol=1e-14), name
    assert {"lstm/forward_var", "attention/backward_var", "embedding/forward_var"} <= set(got)


@pytest.mark.parametrize("after", [False, True])
def test_the_update_ratio_is_that_of_the_optimizers_step(after):
    model = mlp(10, 20, 5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    weights = []
    with VarianceMonitor(model, costly_every=2) as monitor:
        for _ in range(4):
            optimizer.zero_grad()
            model(torch.randn(16, 10)).square().mean().backward()
            weights.append(model[0].weight.detach().clone())
            if not after:
                monitor.step()
            optimizer.step()
            if after:
                monitor.step()
        weights.append(model[0].weight.detach().clone())
    ratios = [
        (s, row["weight_update_ratio"]) for s, n, row in monitor.rows() if n == "0" and "weight_update_ratio" in row
    ]
    shift = int(after)
    want = [
        (s, ((weights[s + 1 + shift] - weights[s + shift]).norm() / weights[s + shift].norm()).item()) for s in (0, 2)
    ]
    assert [s for s, _ in ratios] == [0, 2]
    assert [r for _, r in ratios] == pytest.approx([r for _, r in want], rel=1e-4)


def test_a_summed_loss_reads_as_a_mean_one():
    model, x = mlp(10, 20, 5), torch.randn(16, 10)
    want = {}
    for reduction in ("mean", "sum"):
        with VarianceMonitor(model, reduction=reduction) as monitor:
            model.zero_grad()
            losses = model(x).square().sum(1)
            getattr(losses, reduction)().backward()
            monitor.step()
        want[reduction] = monitor.scalars()
    for key, value in want["mean"].items():
        assert math.isclose(value, want["sum"][key], rel_tol=1e-5, abs_tol=1e-12) or math.isnan(value), key


def test_evaluation_between_steps_is_passed_over():
    model, x = mlp(10, 20, 5), torch.randn(16, 10)
    want = definition(model, x)
    with VarianceMonitor(model, reduction="sum") as monitor:
        model.eval()
        with torch.no_grad():
            model(100 * x)
        model.train()
        model.zero_grad()
        (model(x).square().sum() / 5).backward()
        monitor.step()
    assert_reads(monitor.scalars(), want)


@pytest.mark.parametrize("scale", [0, math.nan, math.inf, "1"])
def test_a_scale_that_is_none_is_named(scale):
    with pytest.raises(InitPerfError, match="scale"):
        VarianceMonitor(mlp(10, 20, 5), scale=scale)


@pytest.mark.parametrize("step", ["before the optimizer's", "after unscale_", "after the optimizer's", "after update"])
def test_a_grad_scalers_scale_is_taken_out(step):
    model, x = mlp(10, 20, 5), torch.randn(16, 10)
    want = definition(model, x)
    scaler = torch.amp.GradScaler("cpu", init_scale=512.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with VarianceMonitor(model, scaler=scaler) as monitor:
        optimizer.zero_grad()
        scaler.scale(model(x).square().mean()).backward()
        if step == "after unscale_":
            scaler.unscale_(optimizer)
        if step in ("after unscale_", "before the optimizer's"):
            monitor.step()
        scaler.step(optimizer)
        if step == "after the optimizer's":
            monitor.step()
        scaler.update()
        if step == "after update":
            monitor.step()
    assert_reads(monitor.scalars(), want)


def test_dead_units_are_those_silent_in_the_whole_window():
    model = mlp(4, 4, 2)
    model[0].weight.data.copy_(torch.eye(4))
    model[0].bias.data.zero_()
    with VarianceMonitor(model, costly_every=1, window=2) as monitor:
        for unit in (0, 1, 1):
            model(torch.eye(4)[[unit, unit]]).sum().backward()
            monitor.step()
    assert [row["dead"] for _, n, row in monitor.rows() if n == "0"] == [0.75, 0.5, 0.75]


def test_the_activation_is_found_where_it_is_a_function():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c, self.d = (nn.Linear(6, 6) for _ in range(4))

        def forward(self, x):
            x = self.b(nn.functional.dropout(self.a(x).relu(), 0.1))
            return self.d(self.c(nn.functional.selu(x)).view(-1, 6)).tanh()

    model = Net()
    with VarianceMonitor(model) as monitor:
        model(torch.randn(8, 6)).sum().backward()
        monitor.step()
    assert monitor.trace.activations == {"a": "relu", "b": "selu", "c": None, "d": "tanh"}
    assert "a/dead" in monitor.scalars()
    assert "b/dead" not in monitor.scalars()


def test_a_pickled_or_copied_model_carries_no_monitor(tmp_path):
    model = mlp(4, 4)
    with VarianceMonitor(model) as monitor:
        torch.save(model, tmp_path / "model.pt")
        loaded = torch.load(tmp_path / "model.pt", weights_only=False)
        for other in (loaded, copy.deepcopy(model)):
            other(torch.randn(3, 4)).sum().backward()
        assert not monitor._current.blocks
    assert torch.equal(loaded[0].weight, model[0].weight)


def test_masked_layers_are_read():
    model = mlp(16, 32, 4)
    sparsify(model, {"0.weight": torch.rand(32, 16) < 0.5})
    with VarianceMonitor(model) as monitor:
        model(torch.randn(8, 16)).square().mean().backward()
        monitor.step()
    got = monitor.scalars()
    assert {"0/forward_var", "0/backward_var", "0/weight_grad_var", "0/dead"} <= set(got)


def test_a_weight_compressed_between_steps_goes_on_without_that_update():
    model, x = mlp(10, 20, 5), torch.randn(16, 10)
    with VarianceMonitor(model) as monitor:
        for _ in range(2):
            model(x).square().mean().backward()
            monitor.step()
            sparsify(model, density=0.3, sparse=True)
    assert monitor.steps == 2


def test_outputs_that_are_not_real_are_passed_over_with_a_reason():
    class Complex(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 4, dtype=torch.complex64))

        def forward(self, x):
            return x.to(self.weight.dtype) @ self.weight

    model = Complex()
    with VarianceMonitor(model) as monitor:
        model(torch.randn(2, 4)).abs().sum().backward()
        with pytest.warns(UserWarning, match="No layer"):
            monitor.step()
    assert "floating-point" in monitor.skipped[""]


def test_detached_and_attached_again_it_goes_on():
    model = mlp(4, 4)
    monitor = VarianceMonitor(model).attach()
    for _ in range(2):
        model(torch.randn(3, 4)).sum().backward()
        monitor.step()
        monitor.detach()
        assert not model[0]._forward_hooks
        model(torch.randn(3, 4)).sum().backward()
        monitor.attach()
    assert [s for s, _, _ in monitor.rows()] == [0, 1]


def test_a_step_of_a_model_that_never_ran_is_named():
    with VarianceMonitor(mlp(2, 2)) as monitor, pytest.warns(UserWarning, match="compiled"):
        monitor.step()


def _watch_under_ddp(rank: int) -> dict[str, float]:
    model = mlp(10, 20, 5)
    ddp = nn.parallel.DistributedDataParallel(model)
    x = torch.randn(32, 10, generator=torch.Generator().manual_seed(1))
    with VarianceMonitor(ddp) as monitor:
        ddp(x[rank::2]).square().mean().backward()
        monitor.step()
    return monitor.scalars()


def test_under_ddp_every_process_reads_its_own_batch_and_the_averaged_gradient(tmp_path):
    got = processes.run(_watch_under_ddp, tmp_path)
    model = mlp(10, 20, 5)
    x = torch.randn(32, 10, generator=torch.Generator().manual_seed(1))
    whole = definition(model, x)
    for rank, scalars in enumerate(got):
        want = definition(model, x[rank::2])
        assert math.isclose(scalars["0/forward_var"], want["0/forward_var"], rel_tol=1e-5)
        assert math.isclose(scalars["0/backward_var"], want["0/backward_var"], rel_tol=1e-4)
        assert math.isclose(scalars["0/weight_grad_var"], whole["0/weight_grad_var"], rel_tol=1e-4)


def test_parameters_are_measured_with_the_costlier_statistics_and_scalars_keep_their_last_value():
    model = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3))
    with VarianceMonitor(model, costly_every=3) as monitor:
        for _ in range(5):
            model.zero_grad()
            model(torch.randn(8, 5)).square().mean().backward()
            monitor.step()
    costly = {step for step, _, row in monitor.rows() if "weight_grad_var" in row}
    assert costly == {0, 3}
    assert {step for step, _, row in monitor.rows() if "forward_var" in row} == set(range(5))
    assert "0/weight_grad_var" in monitor.scalars()


def test_a_summed_loss_over_accumulated_batches_reads_as_one_mean():
    model, x = mlp(10, 20, 5), torch.randn(32, 10)
    read = {}
    for parts in ((x,), (x[:8], x[8:])):
        model.zero_grad()
        with VarianceMonitor(model, reduction="sum") as monitor:
            for part in parts:
                model(part).square().sum().backward()
            monitor.step()
        read[len(parts)] = monitor.scalars()
    for name in ("0/backward_var", "2/backward_var", "0/weight_grad_var"):
        assert math.isclose(read[2][name], read[1][name], rel_tol=1e-4), name


def test_a_unit_is_alive_if_any_call_of_the_step_reached_it():
    model = mlp(4, 4, 2)
    model[0].weight.data.copy_(torch.eye(4))
    model[0].bias.data.zero_()
    with VarianceMonitor(model) as monitor:
        for unit in (0, 1):
            model(torch.eye(4)[[unit, unit]]).sum().backward()
        monitor.step()
    assert monitor.scalars()["0/dead"] == 0.5


def test_units_of_images_are_channels_behind_any_norm():
    for norm in (nn.BatchNorm2d(6), nn.GroupNorm(2, 6)):
        model = nn.Sequential(nn.Conv2d(3, 6, 3), norm, nn.ReLU(), nn.Flatten(), nn.Linear(6 * 36, 2))
        norm.weight.data.zero_()
        norm.bias.data.copy_(torch.tensor([1.0, 1.0, -1.0, 1.0, 1.0, 1.0]))
        with VarianceMonitor(model) as monitor:
            model(torch.randn(5, 3, 8, 8)).sum().backward()
            monitor.step()
        assert monitor.scalars()["1/dead"] == pytest.approx(1 / 6)


def test_gradients_wait_for_no_more_than_the_bytes_measured_together(monkeypatch):
    model = mlp(16, 16, 16, 16, 16)
    monkeypatch.setattr("initperf.variance.monitor.TOGETHER", 2 * 4 * 32 * 16)
    waiting = []
    with VarianceMonitor(model) as monitor:
        first = model[0].register_full_backward_hook(
            lambda *_: waiting.append(sum(g.nbytes for g in monitor._pending.values()))
        )
        model(torch.randn(32, 16, requires_grad=True)).sum().backward()
        first.remove()
        monitor.step()
    assert waiting
    assert max(waiting) < 2 * 4 * 32 * 16


def test_both_calls_of_a_shared_layer_are_read():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shared = nn.Linear(6, 6)

        def forward(self, x):
            self.seen = [self.shared(x)]
            self.seen.append(self.shared(self.seen[0]))
            for f in self.seen:
                f.retain_grad()
            return self.seen[1]

    model = Twice()
    with VarianceMonitor(model) as monitor:
        model(torch.randn(9, 6)).square().sum().backward()
        monitor.step()
    got = monitor.scalars()
    outputs, gradients = torch.cat(model.seen).detach().double(), torch.cat([f.grad for f in model.seen]).double()
    assert got["shared/forward_var"] == pytest.approx(outputs.var(correction=0).item(), rel=1e-5)
    assert got["shared/backward_var"] == pytest.approx(gradients.var(correction=0).item(), rel=1e-5)


def test_units_of_an_image_without_a_batch_are_its_channels():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(0), nn.Linear(144, 2))
    net[0].weight.data.zero_()
    net[0].bias.data.copy_(torch.tensor([-1.0, -1.0, 1.0, 1.0]))
    with VarianceMonitor(net) as monitor:
        net(torch.randn(3, 8, 8)).sum().backward()
        monitor.step()
    assert monitor.scalars()["0/dead"] == 0.5
