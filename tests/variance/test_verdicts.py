"""Verdicts: planted faults are named, healthy networks are passed in silence, and check_init leaves no trace."""

import copy
import itertools
import math
import re

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from initperf import check_init, initialize, sparsify
from initperf.core.checks import InitPerfError
from initperf.variance.faults import Evidence
from initperf.variance.monitor import VarianceMonitor
from initperf.verdicts import THRESHOLDS, judge

BATCH = 256


def deep(activation, depth: int = 12, width: int = 128, init=None, bias: float = 0.0, out: int = 10) -> nn.Sequential:
    """Linear layers with `activation` between; init(weight) for every weight."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for _ in range(depth):
        layers += [nn.Linear(width, width), activation()]
    model = nn.Sequential(*layers, nn.Linear(width, out))
    for layer in model:
        if isinstance(layer, nn.Linear):
            (init or nn.init.kaiming_normal_)(layer.weight)
            nn.init.constant_(layer.bias, bias)
    return model


def normal(std: float):
    return lambda weight: nn.init.normal_(weight, std=std)


def he(weight: torch.Tensor) -> torch.Tensor:
    return nn.init.kaiming_normal_(weight, nonlinearity="relu")


def xavier(weight: torch.Tensor) -> torch.Tensor:
    return nn.init.xavier_normal_(weight)


def lecun(weight: torch.Tensor) -> torch.Tensor:
    return nn.init.kaiming_normal_(weight, nonlinearity="linear")


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase], gain: float = 0.0) -> None:
        super().__init__()
        self.cell, self.out = kind(32, 64, batch_first=True), nn.Linear(64, 5)
        if gain:
            nn.init.normal_(self.cell.weight_hh_l0, std=gain / 8)

    def forward(self, x):
        return self.out(self.cell(x)[0][:, -1])


class Residual(nn.Module):
    def __init__(self, norm: bool = True) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64)) for _ in range(12)
        )
        self.out = nn.Linear(64, 10)

    def forward(self, x):
        for block in self.blocks:
            x = x + block(x)
        return self.out(x)


class Cut(nn.Module):
    """The first layer is cut off from the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(20, 20), nn.Linear(20, 3)

    def forward(self, x):
        return self.second(F.relu(self.first(x)).detach())


def x(*shape: int, scale: float = 1.0, shift: float = 0.0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3)) * scale + shift


def large_last() -> nn.Module:
    model = deep(nn.ReLU, 3)
    model[-1].weight.data *= 30
    return model


FAULTS = {
    "std 1.41x He's": (lambda: deep(nn.ReLU, init=normal(0.1768)), x(BATCH, 128), "variance explodes", "2x a layer"),
    "std too small": (lambda: deep(nn.ReLU, init=normal(0.01)), x(BATCH, 128), "variance vanishes", "0.08x He's"),
    "Xavier for deep ReLU": (lambda: deep(nn.ReLU, init=xavier), x(BATCH, 128), "variance vanishes", "0.71x He's"),
    "torch's default for deep ReLU": (
        lambda: deep(nn.ReLU, init=lambda w: nn.init.kaiming_uniform_(w, a=5**0.5)),
        x(BATCH, 128),
        "variance vanishes",
        "0.41x He's",
    ),
    "He for deep tanh": (lambda: deep(nn.Tanh, 20, init=he), x(BATCH, 128), "He for tanh", "Xavier's"),
    "all weights zero": (lambda: deep(nn.ReLU, 3, init=nn.init.zeros_), x(BATCH, 128), "zero weights", "are 0"),
    "one value everywhere": (
        lambda: deep(nn.ReLU, 3, init=lambda w: nn.init.constant_(w, 0.1)),
        x(BATCH, 128),
        "symmetric",
        "same weights",
    ),
    "dead ReLUs": (lambda: deep(nn.ReLU, 3, init=he, bias=-6.0), x(BATCH, 128), "dead units", "biases are -6"),
    "saturated tanh": (lambda: deep(nn.Tanh, 4, init=normal(0.5)), x(BATCH, 128), "saturated", "tanh"),
    "saturated sigmoid": (lambda: deep(nn.Sigmoid, 4, init=normal(3.0)), x(BATCH, 128), "saturated", "sigmoid"),
    "deep sigmoid": (lambda: deep(nn.Sigmoid, 12, init=xavier), x(BATCH, 128), "gradient vanishes", "from layer"),
    "exploding RNN": (lambda: Recurrent(nn.RNN, 3.0), x(BATCH, 20, 32), "exploding recurrence", "radius"),
    "inputs of mean 100": (lambda: deep(nn.ReLU, 2, init=he), x(BATCH, 128, shift=100), "unscaled inputs", "mean 100"),
    "inputs of 0 to 255": (
        lambda: deep(nn.ReLU, 2, init=he),
        torch.rand(BATCH, 128) * 255,
        "unscaled inputs",
        "standard deviation",
    ),
    "tiny inputs": (lambda: deep(nn.ReLU, 2, init=he), x(BATCH, 128, scale=0.01), "unscaled inputs", "deviation 0.01"),
    "large last layer": (large_last, x(BATCH, 128), "large output", "loss starts large"),
    "cut layer": (Cut, x(BATCH, 20), "frozen", "gets no gradient"),
    "overflow": (lambda: deep(nn.ReLU, init=normal(1e5)), x(BATCH, 128), "non-finite", "infinite"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_named_with_a_remedy(name):
    make, sample, fault, words = FAULTS[name]
    torch.manual_seed(1)
    verdicts = check_init(make(), sample)
    assert verdicts
    hits = [v for v in verdicts if v.fault.startswith(fault)]
    assert hits, str(verdicts)
    assert words in hits[0].text, str(verdicts)
    assert all(v.remedy for v in verdicts)
    assert len(verdicts.faults) == 1, str(verdicts)


def test_a_frozen_layer_is_named():
    model = deep(nn.ReLU, 3, init=he)
    model[2].weight.requires_grad_(False)
    assert [(v.fault, v.layer) for v in check_init(model, x(BATCH, 128))] == [("frozen", "2")]


def test_compressed_layers_are_judged_as_the_masked_ones_they_come_from():
    torch.manual_seed(0)
    model = nn.Sequential(*(m for _ in range(8) for m in (nn.Linear(128, 128), nn.ReLU())), nn.Linear(128, 10))
    x = torch.randn(64, 128)
    initialize(model, "kaiming_normal", seed=0)
    masked = check_init(sparsify(model, density=0.1), x)
    assert masked.faults == ["variance vanishes"]
    masks = {f"{i}.weight": model[i].weight_mask for i in range(0, 17, 2)}
    compressed = check_init(sparsify(model, masks=masks, sparse=True), x)
    assert [tuple(v) for v in compressed] == [tuple(v) for v in masked]
    for parameter in model[4].parameters():
        parameter.requires_grad_(False)
    assert "frozen" in check_init(model, x).faults


def test_a_tied_weight_is_not_called_frozen():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Embedding(50, 32), nn.Linear(32, 50, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, x):
            return self.head(self.embed(x))

    model = Tied()
    initialize(model, "gpt2", seed=0)
    assert "frozen" not in check_init(model, torch.randint(0, 50, (64, 8))).faults


@pytest.mark.parametrize(("rate", "faults"), [(10.0, ["learning rate too large"]), (1e-3, [])])
def test_the_learning_rate_is_judged_by_the_update(rate, faults):
    model = deep(nn.ReLU, 3, init=he)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    y = torch.arange(BATCH) % 10
    with VarianceMonitor(model) as monitor:
        for _ in range(2):
            optimizer.zero_grad()
            F.cross_entropy(model(x(BATCH, 128)), y).backward()
            monitor.step()
            found = judge(monitor)
            optimizer.step()
        if rate < 1:
            found = judge(monitor)
    with VarianceMonitor(fresh := deep(nn.ReLU, 3, init=he)) as monitor:
        optimizer = torch.optim.Adam(fresh.parameters(), lr=rate if rate < 1 else 0.3)
        for _ in range(2):
            optimizer.zero_grad()
            F.cross_entropy(fresh(x(BATCH, 128)), y).backward()
            optimizer.step()
            monitor.step()
        adam = judge(monitor)
    assert (faults == []) == (found.faults == [])
    assert set(faults) <= set(adam.faults)
    assert bool(faults) == bool(adam)


def cnn() -> nn.Module:
    widths = [3, 16, 32, 64]
    blocks = [
        nn.Sequential(
            nn.Conv2d(i, o, 3, padding=1, bias=False), nn.BatchNorm2d(o), nn.ReLU(inplace=True), nn.MaxPool2d(2)
        )
        for i, o in zip(widths, widths[1:], strict=False)
    ]
    return nn.Sequential(*blocks, nn.Flatten(), nn.Linear(64 * 4, 10))


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.out = nn.Embedding(100, 32), nn.Linear(32, 100)

    def forward(self, tokens):
        return self.out(self.embedding(tokens))


HEALTHY = {
    "He MLP": (lambda: deep(nn.ReLU, 8, init=he), x(BATCH, 128)),
    "deep residual network with norm": (Residual, x(BATCH, 64)),
    "CNN": (cnn, x(32, 3, 16, 16)),
    "transformer": (
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(64, 4, 128, batch_first=True), 3),
        x(8, 20, 64),
    ),
    "LSTM": (lambda: Recurrent(nn.LSTM), x(BATCH, 20, 32)),
    "RNN": (lambda: Recurrent(nn.RNN), x(BATCH, 20, 32)),
    "Xavier tanh": (lambda: deep(nn.Tanh, 8, init=xavier), x(BATCH, 128)),
    "LeCun SELU": (lambda: deep(nn.SELU, 12, init=lecun), x(BATCH, 128)),
    "He GELU": (lambda: deep(nn.GELU, 4, init=he), x(BATCH, 128)),
    "embedding and linear": (Words, torch.randint(100, (BATCH,))),
    "autoencoder": (
        lambda: nn.Sequential(
            nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 8), nn.ReLU(), nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 64)
        ),
        x(BATCH, 64),
    ),
    "torch's default MLP of three layers": (
        lambda: nn.Sequential(
            nn.Flatten(), nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10)
        ),
        torch.rand(BATCH, 1, 28, 28),
    ),
    "He leaky ReLU of 50 layers": (lambda: deep(lambda: nn.LeakyReLU(0.2), 50, init=he), x(BATCH, 128)),
    "four layers that double the variance": (
        lambda: scaled_last(deep(nn.ReLU, 4, init=normal(0.1768)), 0.5),
        x(BATCH, 128),
    ),
    "small last layer": (lambda: scaled_last(deep(nn.ReLU, 4, init=he), 1e-3), x(BATCH, 128)),
    "zero last layer": (lambda: scaled_last(deep(nn.ReLU, 4, init=he), 0), x(BATCH, 128)),
}


def scaled_last(model: nn.Sequential, factor: float) -> nn.Sequential:
    model[-1].weight.data.mul_(factor)
    return model


@pytest.mark.parametrize("name", HEALTHY)
@pytest.mark.parametrize("seed", [1, 2])
def test_a_healthy_network_is_passed_in_silence(name, seed):
    make, sample = HEALTHY[name]
    torch.manual_seed(seed)
    verdicts = check_init(make(), sample)
    assert not verdicts, str(verdicts)
    assert "nothing wrong" in str(verdicts)
    assert "nothing wrong" in verdicts._repr_html_()


def test_the_model_is_left_as_it_was():
    model = nn.Sequential(cnn(), nn.Dropout(0.5))
    model[0][0].eval()
    model(x(32, 3, 16, 16)).sum().backward()
    called = []
    model[0][-1].weight.register_post_accumulate_grad_hook(lambda p: called.append(p))
    before = copy.deepcopy(model.state_dict())
    grads = [p.grad for p in model.parameters()]
    values = [g.clone() for g in grads]
    modes = [m.training for m in model.modules()]
    rng = torch.get_rng_state()
    check_init(model, x(32, 3, 16, 16), torch.arange(32) % 10)
    assert torch.equal(rng, torch.get_rng_state())
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key
    assert all(p.grad is g and torch.equal(g, v) for p, g, v in zip(model.parameters(), grads, values, strict=True))
    assert modes == [m.training for m in model.modules()]
    assert not called
    assert not any(m._forward_hooks for m in model.modules())


def test_a_model_that_fails_is_left_as_it_was_too():
    model = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 4))
    before = model[0].running_mean.clone()
    with pytest.raises(ZeroDivisionError):
        check_init(model, x(8, 4), loss=lambda out: 1 / 0)
    assert torch.equal(model[0].running_mean, before)
    assert not any(m._forward_hooks for m in model.modules())


def test_losses_targets_and_inputs_of_every_kind_are_taken():
    model = deep(nn.ReLU, 2, init=he)
    for target, loss in (
        (None, None),
        (torch.arange(BATCH) % 10, None),
        (x(BATCH, 10), None),
        (None, lambda out: out.square().mean()),
        (x(BATCH, 10), F.l1_loss),
    ):
        assert not check_init(model, x(BATCH, 128), target, loss)
    pixels = nn.Conv2d(3, 7, 3, padding=1)
    assert str(check_init(pixels, x(16, 3, 8, 6), torch.arange(16 * 48).view(16, 8, 6) % 7)) == "nothing wrong is seen"
    assert not check_init(model, (x(BATCH, 128),))
    assert not check_init(model, {"input": x(BATCH, 128)})


def test_tables_and_the_picture_say_the_same():
    verdicts = check_init(deep(nn.ReLU, init=normal(0.1768)), x(BATCH, 128))
    assert "variance grows 2" in " ".join(str(verdicts).split())
    assert "<table>" in verdicts._repr_html_()
    lines = verdicts.figure().axes[0].get_lines()
    assert [len(line.get_xdata()) for line in lines] == [13, 13]
    assert lines[0].get_ydata()[-1] > 1000 * lines[0].get_ydata()[0]


def test_the_std_is_compared_with_that_of_the_fan_in():
    model = nn.Sequential(nn.Linear(50, 200), nn.ReLU(), nn.Linear(200, 10))
    with torch.no_grad():
        for layer in (model[0], model[2]):
            layer.weight.normal_(0, 3 * math.sqrt(2 / layer.in_features))
    with VarianceMonitor(model) as monitor:
        model(x(64, 50)).square().mean().backward()
        monitor.step()
    evidence = Evidence.of(monitor)
    assert evidence.std_ratio("0") == pytest.approx(3, rel=0.05)
    assert evidence.std_ratio("2") == pytest.approx(3 * math.sqrt(2), rel=0.05)  # no activation follows: LeCun's


def test_every_threshold_has_its_reason():
    assert all(value > 0 and len(reason) > 20 for value, reason in THRESHOLDS.values())


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: check_init(3, x(2, 2)), "Module"),
        (lambda: check_init(torch.compile(nn.Linear(2, 2)), x(2, 2)), "compile"),
        (lambda: check_init(nn.Linear(2, 1), x(4, 2), x(4)), "shape"),
        (lambda: check_init(nn.Linear(2, 3), x(4, 2), torch.tensor([0, 1, 2])), "shape"),
        (lambda: check_init(nn.Linear(2, 2).requires_grad_(False), x(2, 2)), "gradient"),
        (lambda: check_init(nn.Linear(2, 2), x(2, 2), loss=lambda out: out.detach().sum()), "gradient"),
    ],
)
def test_misuse_is_named(wrong, message):
    with pytest.raises(InitPerfError, match=message):
        wrong()


def test_what_check_init_cannot_work_with_is_named():
    model, x = nn.Sequential(nn.Linear(4, 3)), torch.randn(16, 4)
    with pytest.raises(InitPerfError, match="outside torch.inference_mode"), torch.inference_mode():
        check_init(model, x)
    with pytest.raises(InitPerfError, match="a tensor of one value. Got float"):
        check_init(model, x, loss=lambda output: 1.0)
    with pytest.raises(InitPerfError, match="0.weight on the meta device"):
        check_init(nn.Sequential(nn.Linear(4, 3, device="meta")), x)
    with pytest.raises(InitPerfError, match="requires a gradient"):
        check_init(model.requires_grad_(False), x)


@pytest.mark.parametrize(
    "name",
    ["std 1.41x He's", "std too small", "Xavier for deep ReLU", "torch's default for deep ReLU", "He for deep tanh"],
)
def test_the_remedys_factor_makes_the_network_healthy(name):
    make, sample, _, _ = FAULTS[name]
    model = make()
    (verdict,) = check_init(model, sample)
    factor = float(re.search(r"multiply the weights by ([\d.]+)", verdict.remedy)[1])
    with torch.no_grad():
        for layer in model[:-1]:
            if isinstance(layer, nn.Linear):
                layer.weight.mul_(factor)
    assert not check_init(model, sample)


def test_a_vanished_gradient_is_placed_at_the_last_layer_that_has_a_hundredth_of_the_last_ones():
    verdicts = check_init(deep(nn.Sigmoid, 12, init=xavier), x(BATCH, 128))
    norms = {n: r.count * r.mean_square for n in verdicts.order[:-1] for r in [verdicts.readings[n, "backward"]]}
    small = [n for n, v in norms.items() if v < list(norms.values())[-1] / 100]
    (verdict,) = verdicts
    assert 1 < len(small) < len(norms)
    assert verdict.layer == small[-1]
    assert f"from layer {small[-1]} up to the input" in verdict.text


def test_a_gradient_that_is_not_finite_is_placed_where_it_arises():
    class Rooted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)

        def forward(self, x):
            return self.c((self.b(self.a(x)) * 0).abs().sqrt())

    found = check_init(Rooted(), x(BATCH, 8))
    assert [(v.fault, v.layer) for v in found] == [("non-finite", "b")]


def test_units_that_a_few_inputs_do_not_reach_are_not_called_dead():
    model = deep(nn.ReLU, 1, init=he, bias=-2.0)
    for batch in (4, BATCH):
        assert not check_init(model, x(batch, 128))
    with VarianceMonitor(model) as monitor:
        model(x(4, 128)).sum().backward()
        monitor.step()
    assert monitor.scalars()["0/dead"] > THRESHOLDS["dead"][0]


def test_without_a_loss_the_outputs_gradients_are_a_fixed_normal_sample_over_the_batch():
    model = deep(nn.ReLU, 2, init=he, out=100)
    first, again = (check_init(model, x(BATCH, 128)).readings["4", "backward"] for _ in range(2))
    assert (first.mean, first.var) == (again.mean, again.var)
    assert first.var * BATCH**2 == pytest.approx(1, rel=6 * math.sqrt(2 / (100 * BATCH)))


def test_the_remedy_for_transposed_convolutions_goes_by_their_own_fan_in():
    torch.manual_seed(0)
    widths = [512, 256, 128, 64, 32, 16, 8]
    layers = [m for i, o in itertools.pairwise(widths) for m in (nn.ConvTranspose2d(i, o, 1), nn.ReLU())]
    net = nn.Sequential(*layers, nn.Conv2d(8, 3, 1))
    for layer in net:
        if hasattr(layer, "weight"):
            nn.init.normal_(layer.weight, std=3 * math.sqrt(2 / layer.in_channels))
            nn.init.zeros_(layer.bias)
    (verdict,) = check_init(net, torch.randn(64, 512, 4, 4))
    assert verdict.text.endswith("weights' std is 3.00x He's")
    assert verdict.remedy.endswith("multiply the weights by 0.33")
