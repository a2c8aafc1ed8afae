"""Liu et al. 2019, Rethinking the Value of Network Pruning: does the ticket beat its sparse network trained from scratch?

Scratch-E trains the pruned network from fresh weights for as many iterations as the ticket, Scratch-B for as much compute
as the dense network had (iterations / density, at most `most_compute` times as many), at two learning rates. Since the
learning rate is constant, Scratch-E is the beginning of Scratch-B: one training, read twice.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from initperf.core.checks import check
from initperf.core.tables import NONE, Table, percent
from initperf.experiments.side.figures import Panel, panels_figure
from initperf.experiments.side.outcome import ACCURACY, Outcome, compare, early_and_final, over_trials, rows_of
from initperf.experiments.side.side import Setting
from initperf.report.numbers.results import Run
from initperf.report.words.findings import accuracy, points
from initperf.tickets.run import Run as Training

FASTER = 5  # the second learning rate, over the recipe's
MOST_COMPUTE = 4.0
DEFAULT = {"trials": 3}
NETWORKS = ("dense", "ticket", "Scratch-E", "Scratch-B")


def run_scratch(
    setting: Setting, learning_rates: Sequence[float] | None = None, most_compute: float = MOST_COMPUTE
) -> Outcome:
    """learning_rates: dense network, ticket and scratch alike; the recipe's and five times that, if not given."""
    rates = list(learning_rates or (setting.recipe.lr, FASTER * setting.recipe.lr))
    check(len(set(rates)) == len(rates) and min(rates) > 0, "different learning rates above 0", rates)
    check(most_compute >= 1, "most_compute of at least 1", most_compute)
    equal = setting.recipe.iterations
    rows: list[dict[str, Any]] = []
    for lr in rates:
        often = math.gcd(equal, setting.recipe.evaluate_every)  # so that Scratch-E's end is an evaluation
        recipe = replace(setting.recipe, lr=lr, evaluate_every=often)

        def length(training: Training) -> int:
            return math.ceil(equal * compute(training.density, most_compute)) if training.kind == "reinit" else equal

        run = setting.search(
            f"lr{lr:g}", recipe=recipe, controls=["reinit"], iterations=length, most_compute=most_compute
        )
        for level in run.levels:
            about: dict[str, Any] = {"lr": lr, "density": run.density(level)}
            network = "ticket" if level else "dense"
            rows += [{**row, "compute": 1.0} for row in rows_of(run, level, **about, network=network)]
            if level:
                rows += scratch_rows(run, level, equal, **about, network="Scratch-E")
                rows += scratch_rows(run, level, None, **about, network="Scratch-B")
    return Outcome("scratch", rows, tables(rows), _figure(rows))


def compute(density: float, most: float) -> float:
    """How many times longer a network of `density` trains for the compute of the dense one, counted as weights x iterations."""
    return min(most, 1 / density)


def scratch_rows(run: Run, level: int, until: int | None, kind: str = "reinit", **about: Any) -> list[dict[str, Any]]:
    """The re-initialized (or other) networks of a level, each as if its training had ended at iteration `until`."""
    found = []
    for trial in run.by_trial(level, kind, "iterations"):
        points = [
            p
            for p in run.points
            if (p.trial, p.level, p.kind) == (trial, level, kind) and (until is None or p.iteration <= until)
        ]
        best = min(points, key=lambda p: math.inf if math.isnan(p.val_loss) else p.val_loss)
        found.append(
            {
                "trial": trial,
                **about,
                "early_stop_iteration": best.iteration,
                ACCURACY: best.test_accuracy,
                "final_test_accuracy": points[-1].test_accuracy,
                "compute": points[-1].iteration / (until or run.config["iterations"]),
            }
        )
    return found


def tables(rows: list[dict]) -> list[Table]:
    """Means over trials, at early stop and at the end."""
    return early_and_final(partial(_table, rows))


def _table(rows: list[dict], column: str, title: str) -> Table:
    shown: list[list[str]] = []
    for lr in dict.fromkeys(row["lr"] for row in rows):
        dense = over_trials(rows, column, lr=lr, network="dense")
        shown.append([f"{lr:g}", "100% (dense)", accuracy(dense), *[NONE] * 4])
        levels = {row["density"] for row in rows if row["lr"] == lr and row["network"] == "ticket"}
        for density in sorted(levels, reverse=True):
            at = {"lr": lr, "density": density}
            ticket = at | {"network": "ticket"}
            longer = next(r["compute"] for r in rows if (r["network"], r["density"]) == ("Scratch-B", density))
            shown.append(
                [
                    *("", percent(density)),
                    *(accuracy(over_trials(rows, column, **at, network=network)) for network in NETWORKS[1:3]),
                    f"{accuracy(over_trials(rows, column, **at, network='Scratch-B'))} x {longer:.3g}",
                    *(points(compare(rows, column, ticket, at | {"network": network})) for network in NETWORKS[2:]),
                ]
            )
    notes = [
        "Scratch-E: the ticket's mask, fresh weights, as many iterations as the ticket; Scratch-B: as many times more as stand "
        "beside it, for the dense network's compute. Mean (least-greatest over trials); differences in points, with 95% interval."
    ]
    columns = ["learning rate", "surviving", *NETWORKS[1:], "ticket - E", "ticket - B"]
    return Table(f"Training from scratch: test accuracy {title}", columns, shown, notes)


def _figure(rows: list[dict]) -> str:
    panels = []
    for lr in dict.fromkeys(row["lr"] for row in rows):
        densities = sorted({row["density"] for row in rows if row["lr"] == lr}, reverse=True)
        lines = {n: [over_trials(rows, ACCURACY, lr=lr, density=d, network=n) for d in densities] for n in NETWORKS}
        title = f"test accuracy at early stop, %: learning rate {lr:g}"
        panels.append(Panel(title, [percent(d) for d in densities], lines))
    looks = {"Scratch-E": {"color": "#D55E00", "marker": "s"}, "Scratch-B": {"color": "#CC79A7", "marker": "D"}}
    return panels_figure(panels, "weights surviving", looks)
