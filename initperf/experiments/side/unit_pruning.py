"""Liu et al. 2019 on structured pruning: is a network that whole units were pruned from better than the same one from scratch?

Units of every hidden layer are pruned, those whose incoming weights have the least L1 norm after training (Li et
al. 2017, Pruning Filters for Efficient ConvNets). What is left is a small dense network: fine-tuned from the trained weights,
or trained from scratch for as many iterations (Scratch-E) or for the compute of the large network (Scratch-B, at most
`most_compute` times as many). The learning rate is constant, so Scratch-E is the beginning of Scratch-B.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import torch as safetensors
from torch import Tensor, nn

from initperf.core.checks import check
from initperf.core.files import write_atomically
from initperf.core.tables import NONE, Table, percent
from initperf.experiments.networks import weights_of
from initperf.experiments.side.figures import Panel, panels_figure
from initperf.experiments.side.outcome import ACCURACY, Outcome, compare, early_and_final, over_trials, rows_of
from initperf.experiments.side.scratch import MOST_COMPUTE, compute, scratch_rows
from initperf.experiments.side.side import Setting
from initperf.init import initialize
from initperf.report.words.findings import accuracy, points
from initperf.tickets.run import Run as Training
from initperf.tickets.run import derive_seed

KEPT = (0.5, 0.2, 0.1)  # of the units of every hidden layer
DEFAULT = {"trials": 5}
NETWORKS = ("large", "fine-tuned", "Scratch-E", "Scratch-B")


def run_unit_pruning(setting: Setting, kept: Sequence[float] = KEPT, most_compute: float = MOST_COMPUTE) -> Outcome:
    """kept: shares of the hidden units, a small network each."""
    check(len(kept) > 0 and all(0 < share < 1 for share in kept), "shares of units between 0 and 1", list(kept))
    check(most_compute >= 1, "most_compute of at least 1", most_compute)
    equal = setting.recipe.iterations
    often = math.gcd(equal, setting.recipe.evaluate_every)  # so that Scratch-E's end is an evaluation
    recipe = replace(setting.recipe, rounds=0, evaluate_every=often)

    def keep_weights(training: Training) -> None:
        state = {name: value.detach().contiguous() for name, value in training.model.state_dict().items()}
        write_atomically(_trained(setting, training.trial), safetensors.save(state))

    large = setting.search("large", recipe=recipe, after=keep_weights)
    whole = weights_of(setting.make())
    rows = [{**row, "compute": 1.0} for row in rows_of(large, 0, kept=1.0, weights=whole, network="large")]
    trials = {derive_seed(setting.seed, trial, "init"): trial for trial in range(setting.recipe.trials)}
    for share in kept:
        hidden = tuple(max(1, round(share * width)) for width in setting.recipe.hidden)
        weights = weights_of(setting.make(hidden))
        about: dict[str, Any] = {"kept": share, "weights": weights}

        def inherit(model: nn.Module, seed: int, hidden: tuple[int, ...] = hidden) -> None:
            if seed in trials:  # not so in TicketSearch's own check of the model
                state = safetensors.load(_trained(setting, trials[seed]).read_bytes())
                model.load_state_dict(prune_units(state, hidden))

        def fresh(model: nn.Module, seed: int) -> None:
            initialize(model, setting.recipe.init, seed=derive_seed(seed, "from scratch"))

        longer = math.ceil(equal * compute(weights / whole, most_compute))

        def length(training: Training, longer: int = longer) -> int:
            return longer

        small = replace(recipe, hidden=hidden)
        tuned = setting.search(f"kept{share:g}-fine-tuned", hidden=hidden, init=inherit, recipe=small)
        scratch = setting.search(
            f"kept{share:g}-scratch",
            hidden=hidden,
            init=fresh,
            recipe=small,
            most_compute=most_compute,
            iterations=length,
        )
        rows += [{**row, "compute": 1.0} for row in rows_of(tuned, 0, **about, network="fine-tuned")]
        rows += scratch_rows(scratch, 0, equal, kind="ticket", **about, network="Scratch-E")
        rows += scratch_rows(scratch, 0, None, kind="ticket", **about, network="Scratch-B")
    return Outcome("structured", rows, tables(rows), _figure(rows))


def _trained(setting: Setting, trial: int) -> Path:
    return setting.out / "large" / f"trained-trial{trial}.safetensors"


def prune_units(state: dict[str, Tensor], hidden: Sequence[int]) -> dict[str, Tensor]:
    """The parameters of an MLP (fc1.weight, fc1.bias, ...) with `hidden` units left in its hidden layers, those of greatest incoming L1 norm.

    Layer by layer, from the first: norms are of what the layer before has left (the greedy way of Li et al.). Units stay in
    their order; one that goes takes its incoming weights, its bias and its outgoing weights along.
    """
    found = dict(state)
    for i, width in enumerate(hidden, 1):
        weight = found[f"fc{i}.weight"]
        kept = weight.abs().sum(1).argsort(descending=True, stable=True)[:width].sort().values
        found[f"fc{i}.weight"], found[f"fc{i}.bias"] = weight[kept], found[f"fc{i}.bias"][kept]
        found[f"fc{i + 1}.weight"] = found[f"fc{i + 1}.weight"][:, kept]
    return found


def tables(rows: list[dict]) -> list[Table]:
    """Means over trials, at early stop and at the end."""
    return early_and_final(partial(_table, rows))


def _table(rows: list[dict], column: str, title: str) -> Table:
    large = over_trials(rows, column, network="large")
    shown = [["100%", f"{rows[0]['weights']:,}", accuracy(large), *[NONE] * 5]]
    for share in sorted({row["kept"] for row in rows if row["network"] != "large"}, reverse=True):
        at = {"kept": share}
        tuned = at | {"network": "fine-tuned"}
        longer = next(row for row in rows if (row["network"], row["kept"]) == ("Scratch-B", share))
        shown.append(
            [
                *(percent(share), f"{longer['weights']:,}", ""),
                *(accuracy(over_trials(rows, column, **at, network=network)) for network in NETWORKS[1:3]),
                f"{accuracy(over_trials(rows, column, **at, network='Scratch-B'))} x {longer['compute']:.3g}",
                *(points(compare(rows, column, at | {"network": network}, tuned)) for network in NETWORKS[2:]),
            ]
        )
    notes = [
        "Units of least incoming L1 norm pruned after training; fine-tuned: the small network from the trained weights; "
        "Scratch-E: from fresh ones, as many iterations; Scratch-B: as many times more as stand beside it, for the large "
        "network's compute. Mean (least-greatest over trials); differences in points, with 95% interval."
    ]
    columns = ["units kept", "weights", *NETWORKS, "E - fine-tuned", "B - fine-tuned"]
    return Table(f"Structured pruning: test accuracy {title}", columns, shown, notes)


def _figure(rows: list[dict]) -> str:
    shares = sorted({row["kept"] for row in rows}, reverse=True)
    lines = {n: [over_trials(rows, ACCURACY, kept=s, network=n) for s in shares] for n in NETWORKS}
    looks = {
        "large": {"color": "#555555", "marker": "x"},
        "fine-tuned": {"color": "#0072B2", "marker": "o"},
        "Scratch-E": {"color": "#D55E00", "marker": "s"},
        "Scratch-B": {"color": "#CC79A7", "marker": "D"},
    }
    panel = Panel("test accuracy at early stop, %", [percent(s) for s in shares], lines)
    return panels_figure([panel], "hidden units kept", looks)
