"""Pruning before training: each score by its definition, exact counts, and searches that use them."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from initperf import prune, saliency
from initperf.core.checks import InitPerfError
from initperf.experiments.networks import mlp, network
from initperf.init import initialize
from initperf.saliency import grasp, prune_at_start, snip, synflow
from initperf.search import TicketSearch

X = torch.randn(24, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
Y = torch.arange(24) % 3
BATCHES = [(X[:10], Y[:10]), (X[10:], Y[10:])]


def loss(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1], reduction="sum")


@pytest.fixture
def model():
    net = mlp(6, (5,), 3).double()
    initialize(net, "xavier_normal", seed=1)
    return net


def flat_loss(model):
    """The loss over all batches as a function of the first layer's weight."""

    def at(weight):
        h = F.linear(X, weight, model.fc1.bias).relu()
        return F.cross_entropy(F.linear(h, model.fc2.weight, model.fc2.bias), Y, reduction="sum")

    return at


def test_snip_is_the_change_of_the_loss_when_a_weight_goes(model):
    """d loss / d c at c = 1 where the weight is multiplied by c: by central differences."""
    at, weight = torch.no_grad()(flat_loss(model)), model.fc1.weight.detach()
    found = snip(model, BATCHES, loss)["fc1.weight"]
    for i, j in ((0, 0), (4, 5), (2, 3)):
        change = torch.zeros_like(weight)
        change[i, j] = 1e-6 * weight[i, j]
        expected = (at(weight + change) - at(weight - change)) / 2e-6
        assert float(found[i, j]) == pytest.approx(abs(float(expected)), rel=1e-5)


def test_grasp_is_the_weight_times_the_hessian_times_the_gradient(model):
    at, weight = flat_loss(model), model.fc1.weight.detach()
    model.fc2.weight.requires_grad_(False)
    model.fc2 = nn.utils.parametrize.register_parametrization(
        model.fc2, "weight", nn.Identity()
    )  # not prunable: a scalar problem
    hessian = torch.autograd.functional.hessian(at, weight).reshape(30, 30)
    gradient = torch.autograd.functional.jacobian(at, weight).reshape(30)
    expected = (weight.reshape(30) * (hessian @ gradient)).reshape(5, 6)
    torch.testing.assert_close(grasp(model, BATCHES, loss)["fc1.weight"], expected)


def test_synflow_is_the_sum_over_paths_of_products_of_magnitudes(model):
    found = synflow(model, BATCHES)
    first, last = model.fc1.weight.detach().abs(), model.fc2.weight.detach().abs()
    expected = first * last.sum(0)[:, None]
    torch.testing.assert_close(found["fc1.weight"] / found["fc1.weight"].sum(), expected / expected.sum())
    assert float(found["fc1.weight"].sum()) == pytest.approx(float(found["fc2.weight"].sum()))  # conserved by layer


@pytest.mark.parametrize("score", saliency.SCORES)
def test_scores_leave_model_and_gradients_as_they_are(model, score):
    before = {n: t.clone() for n, t in model.state_dict().items()}
    prune_at_start(score, model, 0.5, batches=BATCHES, loss=loss)
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("score", saliency.SCORES)
@pytest.mark.parametrize("scope", ["global", "layerwise"])
def test_as_many_survive_as_by_rounds_of_any_other_criterion(score, scope):
    net = network((2, 8, 8), (4, 4), (9,), 3).double()
    initialize(net, "xavier_normal", seed=1)
    batches = [(torch.randn(8, 2, 8, 8, dtype=torch.float64), Y[:8])]
    fractions = {"conv*.weight": 0.3, "fc*.weight": 0.55}
    masks = prune_at_start(score, net, fractions, batches=batches, loss=loss, rounds=4, scope=scope)
    weights = {n: p.detach() for n, p in net.named_parameters() if n.endswith("weight")}
    expected = None
    for _ in range(4):
        expected = prune.magnitude(weights, fractions, masks=expected, scope=scope)
    pools = (
        [[n] for n in weights]
        if scope == "layerwise"
        else [[n for n in weights if n.startswith(k)] for k in ("conv", "fc")]
    )
    for pool in pools:
        assert sum(int(masks[n].sum()) for n in pool) == sum(int(expected[n].sum()) for n in pool)


def test_synflow_keeps_every_layer_alive_where_one_step_would_empty_one():
    net = mlp(40, (40, 40, 40), 3)
    initialize(net, "xavier_normal", seed=1)
    with torch.no_grad():
        net.fc2.weight.mul_(1e-3)
    batches = [torch.zeros(1, 40)]
    masks = prune_at_start("synflow", net, 0.98, batches=batches)
    assert min(int(m.sum()) for m in masks.values()) > 0
    model_scores = synflow(net, batches)
    single = prune.by_score(model_scores, 0.98, scope="global")
    assert not all(torch.equal(single[n], m) for n, m in masks.items())


def test_a_score_of_ones_own_decides(model):
    def smallest_first(model, batches, loss):
        return {n: torch.arange(p.numel()).reshape(p.shape).float() for n, p in model.named_parameters()}

    masks = prune_at_start(smallest_first, model, {"fc1.weight": 0.5}, batches=BATCHES)
    assert masks.keys() == {"fc1.weight"}
    assert masks["fc1.weight"].flatten().tolist() == [False] * 15 + [True] * 15


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"score": "snap"}, "snip, grasp, synflow"),
        ({"score": "snip", "loss": None}, "loss="),
        ({"score": "grasp", "loss": None}, "loss="),
        ({"score": "snip", "batches": []}, "one batch"),
        ({"score": "synflow", "batches": [{"x": X}]}, "tensors"),
        ({"score": lambda model, batches, loss: {}}, "scores of fc1.weight"),
    ],
)
def test_wrong_arguments_are_named(model, given, message):
    with pytest.raises(InitPerfError, match=message):
        prune_at_start(**{"model": model, "fraction": 0.5, "batches": BATCHES, "loss": loss, **given})


@pytest.mark.parametrize("criterion", [*saliency.SCORES, snip])
def test_a_search_prunes_the_untrained_network_to_the_tickets_sizes(tmp_path, criterion):
    masks = []
    for run in TicketSearch(
        lambda: mlp(6, (5,), 3).double(),
        rounds=2,
        fractions={"fc1.weight": 0.5, "fc2.weight": 0.25},
        criterion=criterion,
        batches=BATCHES,
        loss=loss,
        controls=["shuffle"],
        out=tmp_path,
        init="xavier_normal",
    ):
        if run.kind == "ticket" and run.level:
            masks.append({n: int(m.sum()) for n, m in run.masks.items()})
        with torch.no_grad():  # "training" that would change every magnitude
            for parameter in run.model.parameters():
                parameter.mul_(torch.rand_like(parameter))
        run.log(1, val_loss=1.0)
    assert masks == [{"fc1.weight": 15, "fc2.weight": 11}, {"fc1.weight": 7, "fc2.weight": 8}]


def test_a_search_without_batches_for_its_score_is_refused(tmp_path):
    with pytest.raises(InitPerfError, match="batches="):
        TicketSearch(lambda: mlp(6, (5,), 3), rounds=1, criterion="snip", out=tmp_path / "run")
    assert not (tmp_path / "run").exists()
