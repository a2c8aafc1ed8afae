"""Searches over convolutions and on compressed layers, what is rewound and what is kept, and further learning rates."""

import csv
import json

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from initperf import prune
from initperf.core.checks import InitPerfError
from initperf.experiments.networks import network, small_network
from initperf.init import initialize
from initperf.search import SPARSE_BELOW, TicketSearch
from initperf.ticket import Ticket, dense_parameters, mask_layers
from initperf.tickets.prunable import prunable
from initperf.tickets.run_folder import KINDS
from tolerance import bits

SHAPE = (2, 8, 8)
X = torch.randn(40, *SHAPE, generator=torch.Generator().manual_seed(0))
Y = (X[:, 0].mean((1, 2)) > 0).long()


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def conv_net():
    return network(SHAPE, (16, 16), (12,), 2)


class Normed(nn.Module):
    """Two linear layers with a batch norm between them."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(128, 20), nn.BatchNorm1d(20), nn.Linear(20, 2)

    def forward(self, x):
        return self.last(self.norm(self.first(x.flatten(1))).relu())


def train(run, steps=6, lr=1e-2, stop_after=None):
    """Adam, as a user writes it; returns the state at step 3."""
    optimizer = torch.optim.Adam(run.model.parameters(), lr=run.lr or lr)
    at_three = None
    for step in range(run.restore(optimizer=optimizer) + 1, steps + 1):
        chosen = torch.randint(40, (20,), generator=run.generator)
        optimizer.zero_grad()
        loss = F.cross_entropy(run.model(X[chosen]), Y[chosen])
        loss.backward()
        optimizer.step()
        run.log(step, val_loss=loss.detach(), test_accuracy=0.5)
        run.step(step)
        if step == 3:
            at_three = {n: t.clone() for n, t in run.model.state_dict().items()}
        if step == stop_after:
            raise KeyboardInterrupt
    return at_three


def rows(folder, table="results.csv"):
    with open(folder / table, newline="") as file:
        return [{k: v for k, v in row.items() if k != "train_seconds"} for row in csv.DictReader(file)]


def test_convolutions_are_pruned_with_every_control(tmp_path):
    fractions = {"conv*.weight": 0.25, "fc*.weight": 0.5}
    counts, kinds = {}, set()
    search = TicketSearch(
        conv_net,
        rounds=2,
        fractions=fractions,
        controls=KINDS[1:],
        out=tmp_path / "run",
        init="xavier_normal",
        make_small=lambda weights: small_network(SHAPE, (16, 16), (12,), 2, weights),
        sparse=0.4,
    )
    for run in search:
        kinds.add(run.kind)
        types = {type(m).__name__ for m in run.model.modules() if type(m).__name__.endswith(("Conv2d", "Linear"))}
        expected = {"dense": "", "masked": "Masked", "sparse": "Sparse"}[run.layers]
        assert types == {f"{expected}Conv2d", f"{expected}Linear"}
        assert run.layers == ("dense" if not run.masks else "sparse" if run.density < 0.4 else "masked")
        if run.kind == "ticket":
            counts[run.level] = {n: int(m.sum()) for n, m in run.masks.items()}
        train(run)
    assert kinds == set(KINDS)
    assert counts[1] == {"conv1.weight": 216, "conv2.weight": 1728, "fc1.weight": 1536, "fc2.weight": 12}
    assert counts[2] == {"conv1.weight": 162, "conv2.weight": 1296, "fc1.weight": 768, "fc2.weight": 6}
    ticket = Ticket.load(tmp_path / "run/tickets/trial0-level2.safetensors")
    assert ticket.values == {}
    assert "conv1.weight" in ticket.apply(conv_net()).state_dict()
    assert {r["layers"] for r in rows(tmp_path / "run")} == {"dense", "masked", "sparse"}


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_masked_and_compressed_training_give_the_same_weights_within_rounding(optimizer):
    """Both stay as near to training in float64 as float32 allows: twice the masked layers' own distance, and one rounding."""
    from initperf.experiments import training
    from initperf.experiments.data import sets
    from initperf.experiments.recipes import RECIPES

    images, recipe = sets.digits(), RECIPES["digits"]
    steps = (20, 100)  # later a unit may flip at a rounding, and the paths part

    def trained(sparse, dtype):
        model = recipe.make((64,), 10)
        initialize(model, "xavier_normal", seed=3)
        mask_layers(model.to(dtype), prune.random(prunable(model), 0.7, seed=1), sparse=sparse)
        stepper = training.OPTIMIZERS[optimizer](model.parameters(), lr=1.2e-3 if optimizer == "adam" else 0.1)
        for step in range(1, steps[-1] + 1):
            at = torch.arange(60 * step, 60 * step + 60) % len(images.train)
            training.step(model, stepper, images.train.x[at].to(dtype), images.train.y[at])
            if step in steps:
                yield torch.cat([p.detach().double().flatten() for _, p in sorted(dense_parameters(model).items())])

    runs = zip(trained(False, torch.float64), trained(False, torch.float32), trained(True, torch.float32), strict=True)
    for step, (exact, masked, compressed) in zip(steps, runs, strict=True):
        rounding = torch.finfo(torch.float32).eps / 2 * exact.norm()
        allowed = 2 * (masked - exact).norm() + rounding if step == steps[0] else 1e-3 * exact.norm()
        assert 0 < (compressed - exact).norm() <= allowed
        assert torch.equal(compressed == 0, exact == 0)


def test_which_levels_train_compressed_depends_on_the_configuration_alone(tmp_path):
    found = {}
    for sparse in (False, True, SPARSE_BELOW):
        out = tmp_path / str(sparse)
        for run in TicketSearch(Normed, rounds=3, fractions=0.3, controls=(), out=out, sparse=sparse):
            found.setdefault(sparse, []).append(run.layers)
            run.log(1, val_loss=1.0)
    assert found == {
        False: ["dense", "masked", "masked", "masked"],
        True: ["dense", "sparse", "sparse", "sparse"],
        SPARSE_BELOW: ["dense", "masked", "masked", "sparse"],
    }
    with pytest.raises(InitPerfError, match="sparse = "):
        TicketSearch(Normed, rounds=3, fractions=0.3, controls=(), out=tmp_path / "True", sparse=False)


@pytest.mark.parametrize("stop", [(0, 2), (1, 4), (2, 3)])
def test_compressed_layers_with_adam_continue_from_a_checkpoint_to_the_same_bits(tmp_path, stop):
    def search(name):
        given = {"rounds": 2, "fractions": 0.5, "controls": (), "out": tmp_path / name, "sparse": True}
        return TicketSearch(conv_net, **given, checkpoint_seconds=0)

    finals = {"whole": [], "cut": []}
    for run in search("whole"):
        train(run)
        finals["whole"].append(dense_parameters(run.model))
    with pytest.raises(KeyboardInterrupt):  # noqa: PT012
        for number, run in enumerate(search("cut")):
            train(run, stop_after=stop[1] if number == stop[0] else None)
            finals["cut"].append(dense_parameters(run.model))
    for run in search("cut"):
        train(run)
        finals["cut"].append(dense_parameters(run.model))
    assert len(finals["cut"]) == len(finals["whole"]) == 3
    for own, other in zip(finals["cut"], finals["whole"], strict=True):
        assert all(torch.equal(bits(own[n]), bits(other[n])) for n in other)
    assert rows(tmp_path / "cut") == rows(tmp_path / "whole")


def test_rewinding_a_model_with_batch_norm_takes_its_statistics_along(tmp_path):
    point = None
    for run in TicketSearch(
        Normed, rounds=1, fractions={"first.weight": 0.5}, controls=["shuffle", "reinit"], rewind_to=3, out=tmp_path
    ):
        start = {n: t.clone() for n, t in run.model.state_dict().items()}
        if run.level and run.kind != "reinit":
            assert point is not None
            for name in ("norm.running_mean", "norm.running_var", "norm.weight", "norm.bias", "last.weight"):
                assert torch.equal(start[name], point[name]), name
            assert int(start["norm.num_batches_tracked"]) == 3
        elif run.level:
            assert not start["norm.running_mean"].any()
        point = train(run) or point if run.level == 0 else point
        run.log(7, val_loss=1.0)
    ticket = Ticket.load(tmp_path / "tickets/trial0-level1.safetensors")
    applied = ticket.apply(Normed())
    for name in ("norm.running_mean", "norm.running_var", "norm.num_batches_tracked"):
        assert torch.equal(applied.state_dict()[name], point[name])
    other = nn.Sequential(nn.Linear(128, 20))
    with pytest.raises(InitPerfError, match="norm"):
        ticket.apply(other)


def test_without_rewinding_statistics_and_biases_are_reset_and_keep_lets_them_go_on(tmp_path):
    starts, ends = {}, {}
    for keep in ((), ("norm.*", "*.bias")):
        for run in TicketSearch(
            Normed,
            rounds=2,
            fractions={"first.weight": 0.5},
            controls=["reinit"],
            out=tmp_path / str(len(keep)),
            keep=keep,
        ):
            state = {n: t.clone() for n, t in run.model.state_dict().items()}
            if run.kind == "ticket":
                starts[keep, run.level] = state
            train(run)
            if run.kind == "ticket":
                ends[keep, run.level] = {n: t.clone() for n, t in run.model.state_dict().items()}
    kept = ("norm.*", "*.bias")
    for level in (1, 2):
        for name in ("norm.running_mean", "norm.weight", "norm.bias", "first.bias", "last.bias"):
            assert torch.equal(starts[(), level][name], starts[(), 0][name])
            assert torch.equal(starts[kept, level][name], ends[kept, level - 1][name])
            assert not torch.equal(starts[kept, level][name], starts[(), 0][name])
        assert torch.equal(starts[kept, level]["last.weight"], starts[kept, 0]["last.weight"])
    ticket = Ticket.load(tmp_path / "2/tickets/trial0-level2.safetensors")
    applied = ticket.apply(Normed()).state_dict()
    assert all(torch.equal(applied[n], starts[kept, 2][n]) for n in ("norm.running_var", "first.bias", "first.weight"))
    assert "last.weight" not in ticket.values  # still from the seed


@pytest.mark.parametrize(
    ("keep", "message"), [("*.bias", "as a list"), (["nom.*"], "no match"), (["first.*"], "first.weight")]
)
def test_wrong_keep_is_refused_before_anything_is_written(tmp_path, keep, message):
    with pytest.raises(InitPerfError, match=message):
        TicketSearch(Normed, rounds=1, fractions={"first.weight": 0.5}, out=tmp_path / "run", keep=keep)
    assert not (tmp_path / "run").exists()


def test_other_learning_rates_train_every_network_from_the_same_start(tmp_path):
    starts, order = {}, []
    search = TicketSearch(
        Normed,
        rounds=1,
        fractions=0.5,
        controls=["reinit"],
        reinits=2,
        learning_rates=[1e-3, 1e-1],
        out=tmp_path,
        config={"lr": 1e-2},
    )
    for run in search:
        starts[run.network] = dense_parameters(run.model)["first.weight"].clone()
        order.append((run.level, run.kind, run.repeat, run.lr))
        train(run)
    assert len(order) == 3 * (1 + 1 + 2)
    assert [lr for level, _, _, lr in order if level == 0] == [None, 1e-3, 1e-1]
    for which, start in starts.items():
        assert torch.equal(start, starts[which._replace(lr=None)])
    found = rows(tmp_path)
    assert {r["lr"] for r in found} == {"0.01", "0.001", "0.1"}
    by_rate = {r["lr"]: r["early_stop_val_loss"] for r in found if (r["level"], r["kind"]) == ("1", "ticket")}
    assert len(set(by_rate.values())) == 3
    goal = next(float(r["early_stop_val_loss"]) for r in found if r["level"] == "0" and r["lr"] == "0.01")
    for row in found:  # everyone's goal is the dense network of the run's own rate
        assert (row["iterations_to_dense_best"] != "") == (float(row["early_stop_val_loss"]) <= goal)
    assert {p["lr"] for p in rows(tmp_path, "curves.csv")} == {"0.01", "0.001", "0.1"}
    assert len(list((tmp_path / "tickets").iterdir())) == 2
    with pytest.raises(InitPerfError, match="learning_rates above 0"):
        TicketSearch(Normed, rounds=1, fractions=0.5, learning_rates=[0.0], out=tmp_path / "other")


def test_trials_may_grow_although_the_label_of_what_is_reduced_changes(tmp_path):
    for trials in (1, 2):
        about = {"reduced": {"trials": f"{trials} of 5"}, "budget": "reduced budget", "lr": 1.0}
        search = TicketSearch(Normed, rounds=1, fractions=0.5, controls=(), trials=trials, out=tmp_path, config=about)
        for run in search:
            run.log(1, val_loss=1.0)
    assert len(rows(tmp_path)) == 4
    assert json.loads((tmp_path / "config.json").read_text())["reduced"] == {"trials": "2 of 5"}
