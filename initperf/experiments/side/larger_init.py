"""Larger initial weights of the whole network: what they do to the dense net, to its ticket, and to how far weights grow.

Xavier's standard deviation times a scale (the review's question: weights that are large from the start, and so less
ambiguous to prune, without compromising the full network's training).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Any

from torch import Tensor, nn

from initperf.core.checks import check
from initperf.core.tables import Table
from initperf.experiments.side.figures import Panel, panels_figure
from initperf.experiments.side.outcome import ACCURACY, Outcome, compare, over_trials, rows_of
from initperf.experiments.side.side import Setting
from initperf.init import Init, initialize
from initperf.report.numbers.results import Run
from initperf.report.words.findings import accuracy, points
from initperf.tickets.ticket import Ticket

SCALES = (1.0, math.sqrt(2), math.sqrt(10))
DEFAULT = {"trials": 3}


def run_larger_init(setting: Setting, scales: Sequence[float] = SCALES) -> Outcome:
    """For every scale a search of the recipe's rounds, and its last masks with fresh weights of that scale."""
    check(len(scales) > 0 and min(scales) > 0, "scales above 0", list(scales))
    rows = []
    for scale in scales:
        name, init, last = f"scale{scale:.3f}", scaled_xavier(scale), setting.recipe.rounds
        run = setting.search(name, init=init, scale=scale)
        again = setting.train_masks(f"{name}-reinit", "reinit", setting.masks(name, last), init=init, scale=scale)
        grown = growth(run)
        for level, network, source in ((0, "dense", run), (last, "ticket", run), (last, "reinit", again)):
            about: dict[str, Any] = {"scale": round(scale, 3), "network": network, "density": run.density(level)}
            found = rows_of(source, 0 if network == "reinit" else level, **about)
            layers = list(next(iter(grown.values())))
            rows += [
                {**row, **{f"growth_{n}": grown[row["trial"]][n] if network == "dense" else None for n in layers}}
                for row in found
            ]
    return Outcome("larger-init", rows, tables(rows), _figure(rows))


def scaled_xavier(scale: float) -> Callable[[nn.Module, int], Any]:
    """(model, seed) -> None: weights normal with std scale * sqrt(2 / (fan_in + fan_out)), biases 0."""

    def scheme(name: str, parameter: Tensor, module: nn.Module) -> Init | str:
        if parameter.dim() < 2:
            return "zeros"
        receptive = math.prod(parameter.shape[2:])
        return Init("normal", (0.0, scale * math.sqrt(2 / (receptive * sum(parameter.shape[:2])))))

    def init(model: nn.Module, seed: int) -> Any:
        return initialize(model, scheme, seed=seed)

    return init


def growth(run: Run) -> dict[int, dict[str, float]]:
    """trial -> layer -> mean |w_T| / mean |w_0| - 1 of the dense network."""
    found: dict[int, dict[str, float]] = {}
    for moved in run.movement:
        if moved.level == 0:
            initial = _initial(run, moved.trial)[moved.parameter].abs().double().mean()
            grew = moved.kept * moved.measured["kept_grew"] + moved.pruned * moved.measured["pruned_grew"]
            layer = moved.parameter.removesuffix(".weight")
            found.setdefault(moved.trial, {})[layer] = float(grew / (moved.kept + moved.pruned) / initial)
    return found


def _initial(run: Run, trial: int) -> dict[str, Tensor]:
    return Ticket.load(run.folder / "tickets" / f"trial{trial}-level0.safetensors").weights()


def tables(rows: list[dict]) -> list[Table]:
    """Means over trials."""
    scales = list(dict.fromkeys(row["scale"] for row in rows))
    layers = [name for name in rows[0] if name.startswith("growth_")]
    shown = []
    for scale in scales:
        ticket = {"scale": scale, "network": "ticket"}
        grown = [over_trials(rows, name, scale=scale, network="dense") for name in layers]
        shown.append(
            [
                f"{scale:g}",
                *(accuracy(over_trials(rows, ACCURACY, scale=scale, network=n)) for n in ("dense", "ticket", "reinit")),
                points(compare(rows, ACCURACY, ticket, ticket | {"network": "reinit"})),
                points(compare(rows, ACCURACY, ticket, {"scale": scales[0], "network": "ticket"}))
                if scale != scales[0]
                else "–",
                ", ".join(f"{value.mean:+.2f}" for value in grown if value),
            ]
        )
    density = fmean(row["density"] for row in rows if row["network"] == "ticket")
    notes = [
        f"Ticket and re-initialized at {100 * density:.3g}% of the weights; test accuracy at early stop: mean (least-greatest over "
        "trials); differences in points, with 95% interval. Growth: mean |w_T| / mean |w_0| - 1 of the dense network, by layer."
    ]
    columns = ["scale", "dense", "ticket", "re-initialized", "ticket minus it", f"ticket minus scale {scales[0]:g}"]
    return [Table("Larger initial weights (Xavier x scale)", [*columns, "growth of the layers"], shown, notes)]


def _figure(rows: list[dict]) -> str:
    scales = list(dict.fromkeys(row["scale"] for row in rows))
    lines = {
        n: [over_trials(rows, ACCURACY, scale=s, network=n) for s in scales] for n in ("ticket", "reinit", "dense")
    }
    grown = {
        name.removeprefix("growth_"): [over_trials(rows, name, scale=s, network="dense") for s in scales]
        for name in rows[0]
        if name.startswith("growth_")
    }
    places = [f"x {scale:g}" for scale in scales]
    colours = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")
    looks = {name: {"color": colours[i % 4], "marker": "osD^"[i % 4]} for i, name in enumerate(grown)}
    panels = [
        Panel("test accuracy at early stop, %", places, lines),
        Panel("growth of the dense net's weights, %", places, grown),
    ]
    return panels_figure(panels, "scale of Xavier's standard deviation", looks)
