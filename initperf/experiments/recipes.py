"""The recipes of the lottery-ticket experiments, number by number, and what each budget reduces.

Three recipes go by the name LeNet-300-100 and disagree, so every table names the recipe (Frankle & Carbin 2019, table 2
and appendix; their own MNIST code; open_lth).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from torch import nn

from initperf.checks import check

REDUCED = "reduced budget"
COSTS = ("iterations", "rounds", "trials", "reinits")
BUDGETS = {
    "quick": {"iterations": 1000, "rounds": 12, "trials": 5, "reinits": 1},
    "medium": {"iterations": 5000, "rounds": 15, "trials": 5, "reinits": 1},
    "paper": {},
}


@dataclass(frozen=True)
class Recipe:
    """One experiment: network, data, training, pruning, trials. `fractions` are pruned a round, of the survivors."""

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
    controls: tuple[str, ...]
    budget: str | None = None
    reduced: dict[str, str] = field(default_factory=dict)

    def changed(self, budget: str | None = None, **given: Any) -> Recipe:
        """The recipe at a budget of BUDGETS (the paper's if None), then with the numbers given (None: left as they are).

        Where anything that costs time is less than the recipe's, `budget` says so and `reduced` tells what.
        """
        budget = budget or "paper"
        check(budget in BUDGETS, f"a budget of {', '.join(BUDGETS)}", repr(budget))
        numbers = {k: min(v, getattr(self, k)) for k, v in BUDGETS[budget].items()}
        numbers |= {k: v for k, v in given.items() if v is not None}
        less = {k: f"{v:,} of {getattr(self, k):,}" for k, v in numbers.items() if k in COSTS and v < getattr(self, k)}
        return replace(self, **numbers, budget=REDUCED if less else None, reduced=less)

    def config(self) -> dict[str, Any]:
        """For config.json."""
        found = asdict(self)
        return {"recipe": found.pop("name"), **found}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Recipe:
        """The recipe that wrote a config.json."""
        found = {f.name: config[f.name] for f in fields(cls) if f.name != "name"}
        found |= {name: tuple(found[name]) for name in ("hidden", "controls")}
        return cls(name=config["recipe"], **found)


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
            controls=("reinit", "shuffle"),
        ),
        Recipe(
            name="lenet-paper",
            source="Frankle & Carbin 2019, The Lottery Ticket Hypothesis, table 2: LeNet-300-100 on MNIST",
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
            controls=("reinit", "shuffle"),
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
            controls=("reinit", "shuffle"),
        ),
    )
}
DEFAULT = {"digits": ("digits", "paper"), "mnist": ("lenet-paper", "quick")}  # data: recipe, budget


def find(name: str) -> Recipe:
    """The recipe of that name."""
    check(name in RECIPES, f"a recipe of {', '.join(RECIPES)}", repr(name))
    return RECIPES[name]


def mlp(inputs: int, hidden: tuple[int, ...], outputs: int) -> nn.Sequential:
    """Linear layers fc1, fc2, ... with ReLU between them."""
    sizes = (inputs, *hidden, outputs)
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for i, (a, b) in enumerate(zip(sizes, sizes[1:], strict=False), 1):
        layers[f"fc{i}"] = nn.Linear(a, b)
        if i < len(sizes) - 1:
            layers[f"relu{i}"] = nn.ReLU()
    return nn.Sequential(layers)


def small_mlp(inputs: int, hidden: tuple[int, ...], outputs: int, weights: int) -> nn.Sequential:
    """The widest MLP of the same proportions with at most `weights` weights (one unit a layer at least)."""

    def shrunk(width: int) -> tuple[int, ...]:
        return tuple(max(1, round(width * h / hidden[0])) for h in hidden)

    def size(widths: tuple[int, ...]) -> int:
        sizes = (inputs, *widths, outputs)
        return sum(a * b for a, b in zip(sizes, sizes[1:], strict=False))

    fits = [w for w in range(1, hidden[0] + 1) if size(shrunk(w)) <= weights]
    return mlp(inputs, shrunk(max(fits, default=1)), outputs)
