"""The recipes of the lottery-ticket experiments, number by number, and what each budget reduces.

Three recipes go by the name LeNet-300-100 and disagree, so every table names the recipe (Frankle & Carbin 2019, figure 2
and appendices; their own MNIST code; open_lth).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from torch import nn

from initperf.core.checks import check, fail
from initperf.experiments.networks import network, small_network
from initperf.tickets.search import SPARSE_BELOW

OPTIMIZERS = ("adam", "sgd")
REDUCED = "reduced budget"
COSTS = ("iterations", "rounds", "trials", "reinits")
BUDGETS: dict[str, dict[str, int]] = {
    "quick": {"iterations": 1000, "rounds": 12, "trials": 5, "reinits": 1},
    "medium": {"iterations": 5000, "rounds": 15, "trials": 5, "reinits": 1},
    "paper": {},
}
CONVOLUTIONAL = {  # a step of Conv-2 takes 150 times longer than LeNet's, and an evaluation as long as 70 steps
    "quick": {"iterations": 300, "rounds": 5, "trials": 1, "reinits": 1, "evaluate_every": 150},
    "medium": {"iterations": 2000, "rounds": 12, "trials": 2, "reinits": 1, "evaluate_every": 250},
}


@dataclass(frozen=True)
class Recipe:
    """One experiment: network, data, training, pruning, trials.

    channels: of the convolutions; hidden: of the linear layers. warmup: iterations over which the learning rate grows
    linearly to lr. fractions: pruned a round, of the survivors. sparse: networks below this density train compressed.
    learning_rates: at which every network trains, too, beside lr.
    """

    name: str
    source: str
    data: str
    hidden: tuple[int, ...]
    init: str
    optimizer: str
    lr: float
    batch: int
    iterations: int
    evaluate_every: int
    rounds: int
    fractions: dict[str, float]
    scope: str
    trials: int
    reinits: int
    controls: tuple[str, ...] = ("reinit", "shuffle")
    channels: tuple[int, ...] = ()
    warmup: int = 0
    rewind_to: int = 0
    criterion: str = "magnitude"
    sparse: float = SPARSE_BELOW
    learning_rates: tuple[float, ...] = ()
    budget: str | None = None
    reduced: dict[str, str] = field(default_factory=dict)

    def changed(self, budget: str | None = None, **given: Any) -> Recipe:
        """The recipe at a budget of BUDGETS (the paper's if None), then with the numbers given (None: left as they are).

        Where anything that costs time is less than the recipe's, `budget` says so and `reduced` tells what.
        """
        budget = budget or "paper"
        check(budget in BUDGETS, f"a budget of {', '.join(BUDGETS)}", repr(budget))
        limits = BUDGETS[budget] | (CONVOLUTIONAL.get(budget, {}) if self.channels else {})
        cheaper = {"evaluate_every": max}
        numbers = {k: cheaper.get(k, min)(v, getattr(self, k)) for k, v in limits.items()}
        numbers |= {k: v for k, v in given.items() if v is not None}
        less = {k: f"{v:,} of {getattr(self, k):,}" for k, v in numbers.items() if k in COSTS and v < getattr(self, k)}
        if (every := numbers.get("evaluate_every", 0)) > self.evaluate_every:
            less["evaluate_every"] = f"{every:,}, not {self.evaluate_every:,}"
        if (fractions := numbers.get("fractions", self.fractions)) != self.fractions:
            less["fractions"] = f"{_written(fractions)}, not {_written(self.fractions)}"
        found = replace(self, **numbers, budget=REDUCED if less else None, reduced=less)
        for name, least in (("iterations", 1), ("evaluate_every", 1), ("batch", 1), ("warmup", 0)):
            check(getattr(found, name) >= least, f"{name} to be at least {least}", getattr(found, name))
        check(0 < found.lr < math.inf, "lr, the learning rate, to be above 0 and finite", found.lr)
        check(found.optimizer in OPTIMIZERS, f"an optimizer of {', '.join(OPTIMIZERS)}", repr(found.optimizer))
        check(len(found.hidden) > 0 and min(*found.hidden, *found.channels, 1) > 0, "widths above 0", found.hidden)
        return found

    def parsed(self, name: str, text: str) -> Any:
        """The value of field `name` from `text`, by the kind of its present value: "300,100", "fc*:0.2,fc3*:0.1", "1e-3"."""
        settable = [f.name for f in fields(self) if f.name not in ("name", "source", "data", "budget", "reduced")]
        check(name in settable, f"a setting of {', '.join(settable)}", repr(name))
        now = getattr(self, name)
        parts = [part for part in text.split(",") if part]
        try:
            if isinstance(now, dict):
                pairs = (part.rsplit(":", 1) for part in parts)
                return {glob: float(value) for glob, value in pairs}
            if isinstance(now, tuple):
                kind: type = {"controls": str, "learning_rates": float}.get(name, int)
                return tuple(kind(part) for part in parts)
            return type(now)(text)
        except ValueError:
            fail(f"{name} as in {name}={_written(now)}", repr(text))

    def make(self, shape: Sequence[int], classes: int) -> nn.Sequential:
        """The network for images of `shape`."""
        return network(shape, self.channels, self.hidden, classes)

    def make_small(self, shape: Sequence[int], classes: int, weights: int) -> nn.Sequential:
        """The widest one of the same proportions with at most `weights` weights."""
        return small_network(shape, self.channels, self.hidden, classes, weights)

    def config(self) -> dict[str, Any]:
        """For config.json."""
        found = asdict(self)
        return {"recipe": found.pop("name"), **found}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Recipe:
        """The recipe that wrote a config.json."""
        found = {f.name: config[f.name] for f in fields(cls) if f.name != "name"}
        found |= {name: tuple(value) for name, value in found.items() if isinstance(value, list)}
        return cls(name=config["recipe"], **found)


def _written(value: Any) -> str:
    if isinstance(value, dict):
        return ",".join(f"{glob}:{number:g}" for glob, number in value.items())
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _conv(pairs: int, lr: float, iterations: int, fraction: float) -> Recipe:
    """Conv-2, -4 or -6: their numbers differ in these."""
    widths = (64, 64, 128, 128, 256, 256)[: 2 * pairs]
    return Recipe(
        name=f"conv{2 * pairs}",
        source=f"Frankle & Carbin 2019, The Lottery Ticket Hypothesis, figure 2: Conv-{2 * pairs} on CIFAR-10",
        data="cifar10",
        channels=widths,
        hidden=(256, 256),
        init="xavier_normal",
        optimizer="adam",
        lr=lr,
        batch=60,
        iterations=iterations,
        evaluate_every=100,
        rounds=20,
        fractions={"conv*.weight": fraction, "fc*.weight": 0.2, "fc3.weight": 0.1},
        scope="layerwise",
        trials=5,
        reinits=3,
    )


LAYERWISE = {"fc1.weight": 0.2, "fc2.weight": 0.2, "fc3.weight": 0.1}

RECIPES = {
    r.name: r
    for r in (
        Recipe(
            name="digits",
            source="this package: the procedure of Frankle & Carbin 2019 on the UCI digits, in three steep rounds",
            data="digits",
            hidden=(300, 100),
            init="xavier_normal",
            optimizer="adam",
            lr=1.2e-3,
            batch=60,
            iterations=600,
            evaluate_every=20,
            rounds=3,
            fractions={"fc1.weight": 0.65, "fc2.weight": 0.65, "fc3.weight": 0.4},
            scope="layerwise",
            trials=5,
            reinits=1,
        ),
        Recipe(
            name="lenet-paper",
            source="Frankle & Carbin 2019, The Lottery Ticket Hypothesis, figure 2: LeNet-300-100 on MNIST",
            data="mnist",
            hidden=(300, 100),
            init="xavier_normal",
            optimizer="adam",
            lr=1.2e-3,
            batch=60,
            iterations=50_000,
            evaluate_every=100,
            rounds=20,
            fractions=LAYERWISE,
            scope="layerwise",
            trials=5,
            reinits=3,
        ),
        Recipe(
            name="lenet-open-lth",
            source="open_lth: LeNet-300-100 on MNIST, 40 epochs of 429 whole batches",
            data="mnist",
            hidden=(300, 100),
            init="kaiming_normal",
            optimizer="sgd",
            lr=0.1,
            batch=128,
            iterations=40 * 429,
            evaluate_every=429,
            rounds=20,
            fractions={"*.weight": 0.2, "fc3.weight": 0.0},
            scope="global",
            trials=5,
            reinits=1,
        ),
        _conv(1, 2e-4, 20_000, 0.10),
        _conv(2, 3e-4, 25_000, 0.10),
        _conv(3, 3e-4, 30_000, 0.15),
    )
}
DEFAULT = {  # data: recipe, budget
    "digits": ("digits", "paper"),
    "mnist": ("lenet-paper", "quick"),
    "cifar10": ("conv2", "quick"),
}


def find(name: str) -> Recipe:
    """The recipe of that name."""
    check(name in RECIPES, f"a recipe of {', '.join(RECIPES)}", repr(name))
    return RECIPES[name]
