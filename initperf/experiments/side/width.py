"""Are larger networks more likely to hold a lucky sub-network? Networks of several widths, pruned to as many survivors each.

Every network is pruned by about the recipe's fraction a round, the output layer by half of it, in as many rounds as it
needs; the fraction is adjusted so that the survivors are equal in number.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any

from torch import nn

from initperf.core.checks import check
from initperf.core.tables import Table
from initperf.experiments.side.figures import Panel, panels_figure
from initperf.experiments.side.outcome import ACCURACY, Outcome, compare, over_trials, rows_of
from initperf.experiments.side.side import Setting
from initperf.report.words.findings import accuracy, points

WIDTHS = (75, 150, 300, 600)
FRACTION = 0.5  # a round, about
DEFAULT = {"trials": 3, "iterations": 400}


def run_width(
    setting: Setting, widths: Sequence[int] = WIDTHS, survivors: int = 2500, fraction: float = FRACTION
) -> Outcome:
    """widths: of the first hidden layer, the second has a third of it. Control: the same masks with fresh weights."""
    check(len(widths) > 0 and min(widths) >= 3, "widths of at least 3", list(widths))
    rows = []
    for width in widths:
        hidden = (width, width // 3)
        rounds, fractions = schedule(setting.make(hidden), survivors, fraction)
        recipe = replace(setting.recipe, rounds=rounds, fractions=fractions, hidden=hidden)
        name = f"width{width}"
        run = setting.search(name, hidden=hidden, recipe=recipe)
        masks = setting.masks(name, rounds)
        total = sum(w.numel() for n, w in setting.make(hidden).named_parameters() if n.endswith("weight"))
        about: dict[str, Any] = {
            "width": width,
            "hidden": "-".join(map(str, hidden)),
            "weights": total,
            "rounds": rounds,
        }
        left = sum(int(m.sum()) for m in masks[0].values())
        again = setting.train_masks(f"{name}-reinit", "reinit", masks, hidden=hidden)
        rows += rows_of(run, 0, **about, network="dense", survivors=total)
        rows += rows_of(run, rounds, **about, network="ticket", survivors=left)
        rows += rows_of(again, 0, **about, network="reinit", survivors=left)
    return Outcome("width", rows, tables(rows), _figure(rows))


def schedule(model: nn.Module, survivors: int, fraction: float) -> tuple[int, dict[str, float]]:
    """Rounds, and fractions by layer, that leave `survivors` weights (but for rounding): `fraction` a round or a little less."""
    sizes = {n: w.numel() for n, w in model.named_parameters() if n.endswith("weight")}
    last, total = list(sizes)[-1], sum(sizes.values())
    check(0 < survivors < total, f"fewer survivors than the network's {total:,} weights", survivors)

    def left(f: float, rounds: int) -> float:
        return sum(size * (1 - f * (0.5 if name == last else 1)) ** rounds for name, size in sizes.items())

    rounds = 1
    while left(fraction, rounds) > survivors:
        rounds += 1
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if left(middle, rounds) > survivors else (low, middle)
    return rounds, {name: high * (0.5 if name == last else 1) for name in sizes}


def tables(rows: list[dict]) -> list[Table]:
    """Means over trials."""
    widths = list(dict.fromkeys(row["width"] for row in rows))
    shown = []
    for width in widths:
        first = next(row for row in rows if row["width"] == width and row["network"] == "ticket")
        ours = {"width": width, "network": "ticket"}
        shown.append(
            [
                first["hidden"],
                f"{first['weights']:,}",
                str(first["rounds"]),
                f"{first['survivors']:,}",
                *(accuracy(over_trials(rows, ACCURACY, width=width, network=n)) for n in ("dense", "ticket", "reinit")),
                points(compare(rows, ACCURACY, ours, {"width": width, "network": "reinit"})),
                points(compare(rows, ACCURACY, ours, {"width": widths[0], "network": "ticket"}))
                if width != widths[0]
                else "–",
            ]
        )
    columns = ["hidden", "weights", "rounds", "survivors", "dense", "ticket", "re-initialized", "ticket minus it"]
    notes = [
        "Test accuracy at early stop: mean (least-greatest over trials); differences in points, with 95% interval."
    ]
    return [Table("Width, at equal survivors", [*columns, "minus the narrowest ticket"], shown, notes)]


def _figure(rows: list[dict]) -> str:
    widths = list(dict.fromkeys(row["width"] for row in rows))
    lines = {
        n: [over_trials(rows, ACCURACY, width=w, network=n) for w in widths] for n in ("ticket", "reinit", "dense")
    }
    left = round(fmean(r["survivors"] for r in rows if r["network"] == "ticket"))
    title = f"test accuracy at early stop, %: {left:,} survivors each"
    places = [next(r["hidden"] for r in rows if r["width"] == w) for w in widths]
    return panels_figure([Panel(title, places, lines)], "hidden units")
