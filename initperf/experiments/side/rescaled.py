"""Rescaled initial weights of a sub-network, the review's question: does a ticket train better with its lost variance restored?

The masks of one search, each with rewound, fresh and shuffled survivors, scaled in the modes of initperf.init.model.rescale; measured
are the variance of every layer's pre-activations over that of the dense network, and the accuracy after training.
"""

from __future__ import annotations

import math
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from initperf.core.tables import Table
from initperf.experiments.side.figures import Panel, panels_figure
from initperf.experiments.side.outcome import ACCURACY, Outcome, compare, over_trials, rows_of
from initperf.experiments.side.side import Setting
from initperf.init.model.rescale import MODES
from initperf.report.words.findings import accuracy, points
from initperf.variance.moments import moments

STARTS = {"ticket": "rewound", "reinit": "re-initialized", "shuffle": "shuffled"}
ALL = ("none", *MODES)
DEFAULT = {"trials": 3, "iterations": 400}


def run_rescale(setting: Setting) -> Outcome:
    """The masks are those of the recipe's last round."""
    last = setting.recipe.rounds
    dense = setting.search("masks")
    masks = setting.masks("masks", last)
    rows: list[dict[str, Any]] = []
    for kind, start in STARTS.items():
        for mode in ALL:
            rescale = None if mode == "none" else mode
            run = setting.train_masks(f"{start}-{mode}", kind, masks, rescale=rescale)
            about: dict[str, Any] = {"start": start, "rescale": mode, "density": dense.density(last)}
            for row in rows_of(run, 0, **about):
                trial = row["trial"]
                whole = layer_variances(setting.begin(setting.make(), kind, trial, None), setting.sample)
                model = setting.begin(setting.make(), kind, trial, masks[trial], rescale=rescale)
                found = layer_variances(model, setting.sample)
                rows.append(row | {f"variance_{name}": found[name] / whole[name] for name in whole})
    rows += [
        row | {f"variance_{name}": 1.0 for name in layer_variances(setting.make(), setting.sample)}
        for row in rows_of(dense, 0, start="dense", rescale="none", density=1.0)
    ]
    return Outcome("rescale", rows, tables(rows), _figure(rows))


@torch.no_grad()
def layer_variances(model: nn.Module, x: Tensor) -> dict[str, float]:
    """name -> variance over batch and units of every linear layer's output."""
    outputs: dict[str, Tensor] = {}
    layers = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    hooks = [
        module.register_forward_hook(lambda _, __, out, name=name: outputs.__setitem__(name, out))
        for name, module in layers.items()
    ]
    try:
        model(x)
    finally:
        for hook in hooks:
            hook.remove()
    return dict(zip(outputs, moments(list(outputs.values()), order=2).var.tolist(), strict=True))


def mean_ratio(rows: list[dict], layer: str, **where: Any) -> float:
    """Geometric mean over trials of a layer's variance over the dense network's."""
    found = [row[layer] for row in rows if all(row[name] == value for name, value in where.items())]
    return math.exp(fmean(math.log(value) for value in found)) if found and min(found) > 0 else 0.0


def layers_of(rows: list[dict]) -> list[str]:
    return [name for name in rows[0] if name.startswith("variance_")]


def tables(rows: list[dict]) -> list[Table]:
    """Means over trials."""
    shown = []
    for start in STARTS.values():
        for mode in ALL:
            at = {"start": start, "rescale": mode}
            lead = compare(rows, ACCURACY, at, {"start": start, "rescale": "none"})
            shown.append(
                [
                    start if mode == "none" else "",
                    mode,
                    ", ".join(f"{mean_ratio(rows, layer, **at):.3g}" for layer in layers_of(rows)),
                    accuracy(over_trials(rows, ACCURACY, **at)),
                    points(lead) if mode != "none" else "–",
                ]
            )
    density = next(row["density"] for row in rows if row["start"] != "dense")
    notes = [
        f"At {100 * density:.3g}% of the weights; the dense network has {accuracy(over_trials(rows, ACCURACY, start='dense'))}. "
        "Variance of the pre-activations over that of the dense network with the same initial weights, layer by layer "
        f"({', '.join(layer.removeprefix('variance_') for layer in layers_of(rows))}), geometric mean over trials. layer: "
        "1/sqrt(density); unit: sqrt(fan-in / live fan-in); squares: the layer's sum of squares restored; measured: the variance "
        "on a batch restored. Test accuracy at early stop: mean (least-greatest over trials), difference with 95% interval."
    ]
    columns = ["survivors", "rescaled by", "variance over dense", "test accuracy", "minus not rescaled"]
    return [Table("Rescaled initial weights", columns, shown, notes)]


def _figure(rows: list[dict]) -> str:
    lines: dict[str, dict[str, Any]] = {ACCURACY: {}, layers_of(rows)[-1]: {}}
    for column, found in lines.items():
        for kind, start in STARTS.items():
            found[kind] = [over_trials(rows, column, start=start, rescale=mode) for mode in ALL]
    accuracies, variances = lines.values()
    last = layers_of(rows)[-1].removeprefix("variance_")
    looks = {kind: {"label": start, "linestyle": ""} for kind, start in STARTS.items()}
    panels = [
        Panel("test accuracy at early stop, %", ALL, accuracies),
        Panel(f"variance of {last}'s outputs over dense", ALL, variances, scale=1, log=True),
    ]
    return panels_figure(panels, "rescaled by", looks)
