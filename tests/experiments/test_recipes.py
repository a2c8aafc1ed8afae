"""The recipes, number by number as published, and what may be changed of them."""

from fnmatch import fnmatchcase

import pytest
import torch
from torch import nn

from initperf.core.checks import InitPerfError
from initperf.experiments.networks import network, small_network, weights_of
from initperf.experiments.recipes import DEFAULT, RECIPES, Recipe
from initperf.init import initialize

IMAGE = (3, 32, 32)
PAPER_PERCENTS = (
    *(80.0, 64.1, 51.3, 41.1, 32.9, 26.3, 21.1, 16.9, 13.5, 10.8),
    *(8.7, 7.0, 5.6, 4.5, 3.6, 2.9, 2.3, 1.8, 1.5, 1.2),
)
PUBLISHED = {  # Frankle & Carbin 2019, figure 2; the authors' code for lenet-open-lth
    "lenet-paper": {
        "data": "mnist",
        "channels": (),
        "hidden": (300, 100),
        "init": "xavier_normal",
        "optimizer": "adam",
        "lr": 1.2e-3,
        "batch": 60,
        "iterations": 50_000,
        "evaluate_every": 100,
        "rounds": 20,
        "fractions": {"fc1.weight": 0.2, "fc2.weight": 0.2, "fc3.weight": 0.1},
        "scope": "layerwise",
        "trials": 5,
        "reinits": 3,
        "warmup": 0,
        "rewind_to": 0,
        "criterion": "magnitude",
    },
    "lenet-open-lth": {
        "data": "mnist",
        "channels": (),
        "hidden": (300, 100),
        "init": "kaiming_normal",
        "optimizer": "sgd",
        "lr": 0.1,
        "batch": 128,
        "iterations": 40 * (55_000 // 128),
        "fractions": {"*.weight": 0.2, "fc3.weight": 0.0},
        "scope": "global",
    },
    "conv2": {"channels": (64, 64), "lr": 2e-4, "iterations": 20_000},
    "conv4": {"channels": (64, 64, 128, 128), "lr": 3e-4, "iterations": 25_000},
    "conv6": {"channels": (64, 64, 128, 128, 256, 256), "lr": 3e-4, "iterations": 30_000},
}
CONVOLUTIONAL = {
    "data": "cifar10",
    "hidden": (256, 256),
    "init": "xavier_normal",
    "optimizer": "adam",
    "batch": 60,
    "evaluate_every": 100,
    "scope": "layerwise",
    "trials": 5,
    "reinits": 3,
    "warmup": 0,
    "rewind_to": 0,
    "criterion": "magnitude",
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_recipe_has_the_published_numbers(name):
    recipe = RECIPES[name]
    expected = PUBLISHED[name] | (CONVOLUTIONAL if name.startswith("conv") else {})
    assert {key: getattr(recipe, key) for key in expected} == expected
    assert recipe.budget is None


def survivors(recipe, shape):
    """Surviving percent by round."""
    counts = {n: p.numel() for n, p in recipe.make(shape, 10).named_parameters() if n.endswith("weight")}
    whole, found = sum(counts.values()), []
    fraction = {n: f for n in counts for glob, f in recipe.fractions.items() if fnmatchcase(n, glob)}
    for _ in range(recipe.rounds):
        counts = {n: c - round(fraction[n] * c) for n, c in counts.items()}
        found.append(100 * sum(counts.values()) / whole)
    return found


def test_lenets_survivors_by_round_are_the_papers():
    assert weights_of(RECIPES["lenet-paper"].make((784,), 10)) == 266_200
    assert survivors(RECIPES["lenet-paper"], (784,)) == pytest.approx(PAPER_PERCENTS, abs=0.06)


@pytest.mark.parametrize(
    ("name", "weights", "convolutions", "fraction", "published"),
    [
        ("conv2", 4_300_992, 38_592, 0.10, (8.8, 4.6)),
        ("conv4", 2_425_024, 259_776, 0.10, (9.2, 11.1)),
        ("conv6", 2_261_184, 1_144_512, 0.15, (15.1, 26.4)),
    ],
)
def test_convolutional_networks_have_the_papers_sizes_and_survivors(name, weights, convolutions, fraction, published):
    """The paper gives 4.3 M, 2.4 M and 1.7 M; its own description of Conv-6 has 2.3 M, of which 1.1 M are convolutions, as it says."""
    recipe = RECIPES[name]
    model = recipe.make(IMAGE, 10)
    kinds = [type(m) for m in model if not isinstance(m, nn.ReLU)]
    pairs = len(recipe.channels) // 2
    assert kinds == [nn.Conv2d, nn.Conv2d, nn.MaxPool2d] * pairs + [nn.Flatten] + [nn.Linear] * 3
    assert all(
        (c.kernel_size, c.padding, c.stride) == ((3, 3), (1, 1), (1, 1)) for c in model if isinstance(c, nn.Conv2d)
    )
    assert weights_of(model) == weights
    assert sum(m.weight.numel() for m in model if isinstance(m, nn.Conv2d)) == convolutions
    assert recipe.fractions == {"conv*.weight": fraction, "fc*.weight": 0.2, "fc3.weight": 0.1}
    for percent in published:  # the levels at which the paper names its best results are levels here
        assert min(abs(percent - found) for found in survivors(recipe, IMAGE)) < (0.06 if name != "conv6" else 0.25)


def test_weights_are_gaussian_glorot_and_biases_zero():
    model = RECIPES["conv2"].make(IMAGE, 10)
    initialize(model, "xavier_normal", seed=0)
    for layer, fans in ((model.conv2, 2 * 9 * 64), (model.fc1, 16_384 + 256)):
        assert float(layer.weight.detach().std()) == pytest.approx((2 / fans) ** 0.5, rel=0.02)
        assert not layer.bias.any()


def test_every_data_set_has_a_default_recipe_for_it():
    assert {data: (RECIPES[name].data, budget) for data, (name, budget) in DEFAULT.items()} == {
        "digits": ("digits", "paper"),
        "mnist": ("mnist", "quick"),
        "cifar10": ("cifar10", "quick"),
    }


def test_less_of_a_recipe_is_labelled_reduced_and_more_is_not():
    r = RECIPES["lenet-paper"]
    assert r.changed(iterations=1000).reduced == {"iterations": "1,000 of 50,000"}
    assert r.changed(trials=1).budget == "reduced budget"
    assert r.changed(evaluate_every=500).reduced == {"evaluate_every": "500, not 100"}
    assert r.changed(iterations=60_000, lr=None).budget is None
    assert RECIPES["digits"].changed("quick").iterations <= 1000
    assert RECIPES["digits"].changed().budget is None
    with pytest.raises(InitPerfError, match="quick, medium, paper"):
        r.changed("huge")


def test_the_quick_budget_of_lenet_is_twelve_levels_of_1000_iterations():
    chosen = RECIPES["lenet-paper"].changed("quick")
    assert (chosen.iterations, chosen.rounds, chosen.evaluate_every) == (1000, 12, 100)
    assert chosen.reduced == {"iterations": "1,000 of 50,000", "rounds": "12 of 20", "reinits": "1 of 3"}


@pytest.mark.parametrize("name", ["conv2", "conv4", "conv6"])
def test_a_quick_convolution_says_what_is_reduced(name):
    chosen = RECIPES[name].changed("quick")
    assert chosen.reduced.keys() == {"iterations", "rounds", "trials", "reinits", "evaluate_every"}
    assert chosen.lr == RECIPES[name].lr


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("hidden=75,25", (75, 25)),
        ("evaluate_every=50", 50),
        ("lr=6e-4", 6e-4),
        ("fractions=fc*:0.3,fc3*:0.1", {"fc*": 0.3, "fc3*": 0.1}),
        ("learning_rates=1e-3,2e-3", (1e-3, 2e-3)),
        ("controls=", ()),
        ("criterion=snip", "snip"),
        ("sparse=0", 0.0),
    ],
)
def test_every_number_can_be_given_as_text(text, expected):
    name, _, value = text.partition("=")
    recipe = RECIPES["lenet-paper"]
    assert getattr(recipe.changed(**{name: recipe.parsed(name, value)}), name) == expected


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("wamup", "3", "warmup"),
        ("name", "x", "a setting of"),
        ("batch", "many", "batch as in batch=60"),
        ("fractions", "0.2", "fc1.weight:0.2"),
        ("evaluate_every", "0", "at least 1"),
        ("lr", "nan", "above 0 and finite"),
        ("optimizer", "lion", "adam, sgd"),
        ("hidden", "", "widths"),
    ],
)
def test_wrong_settings_are_named(name, value, message):
    recipe = RECIPES["lenet-paper"]
    with pytest.raises(InitPerfError, match=message):
        recipe.changed(**{name: recipe.parsed(name, value)})


def test_a_recipe_comes_back_from_its_config():
    chosen = RECIPES["conv4"].changed("quick", controls=("reinit",), learning_rates=(1e-3,))
    assert Recipe.from_config(chosen.config()) == chosen


@pytest.mark.parametrize(("shape", "channels"), [((784,), ()), (IMAGE, (64, 64)), (IMAGE, (64, 64, 128, 128))])
def test_a_small_dense_network_is_the_widest_that_fits(shape, channels):
    hidden = (300, 100) if not channels else (256, 256)
    whole = weights_of(network(shape, channels, hidden, 10))
    for part in (1, 0.2, 0.04):
        model = small_network(shape, channels, hidden, 10, int(part * whole))
        assert 0.9 * part * whole < weights_of(model) <= part * whole
        assert model(torch.randn(2, *shape)).shape == (2, 10)
    assert weights_of(small_network(shape, channels, hidden, 10, 1)) > 1  # one unit a layer
