"""The statements of Liu et al. 2019 and of a review on initial weights, judged by the results of the side experiments.

initperf.experiments.statements.claims has the rules.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from initperf.core.tables import percent
from initperf.experiments.side.outcome import ACCURACY, by_trial, compare
from initperf.experiments.side.rescaled import layers_of, mean_ratio
from initperf.experiments.statements.claims import (
    NOT_REPRODUCED,
    REPRODUCED,
    Statement,
    accuracy_statement,
    all_of,
    as_accurate,
    decide,
    untested,
)
from initperf.report.numbers.intervals import Difference
from initperf.report.words.findings import points

RETHINKING, REVIEW = "Liu et al. 2019", "review"
Rows = list[dict[str, Any]]


def rethinking(experiments: Mapping[str, Rows], budgets: Mapping[str, str]) -> list[Statement]:
    """Liu et al. 2019, from the rows of `initperf experiment scratch` and `structured`."""
    unstructured = _unstructured(experiments.get("scratch"), budgets.get("scratch", ""))
    return [*unstructured, _structured(experiments.get("structured"), budgets.get("structured", ""))]


def _unstructured(rows: Rows | None, budget: str) -> list[Statement]:
    texts = (
        "Unstructured tickets beat training from scratch (Scratch-E) at the small learning rate",
        "At the large learning rate they do not",
        "The large learning rate is the more accurate one for the dense network",
        "At the large learning rate Scratch-B (equal compute) does as well as the ticket",
    )
    if not rows:
        return [untested(RETHINKING, text, "no experiment scratch") for text in texts]
    small, large = (pick(row["lr"] for row in rows) for pick in (min, max))
    sparsest = {lr: min(r["density"] for r in rows if r["lr"] == lr) for lr in (small, large)}
    leads = {
        (lr, other): compare(
            rows,
            ACCURACY,
            {"lr": lr, "density": sparsest[lr], "network": "ticket"},
            {"lr": lr, "density": sparsest[lr], "network": other},
        )
        for lr in (small, large)
        for other in ("Scratch-E", "Scratch-B")
    }
    first = leads[small, "Scratch-E"]
    dense = compare(rows, ACCURACY, {"lr": large, "network": "dense"}, {"lr": small, "network": "dense"})
    where = f" at {percent(sparsest[small])} and learning rate {small:g}"
    return [
        accuracy_statement(RETHINKING, texts[0], first, 1, figure=False, budget=budget, also=where),
        _no_better(texts[1], leads[large, "Scratch-E"], first, budget),
        accuracy_statement(RETHINKING, texts[2], dense, 1, figure=False, budget=budget),
        _no_better(texts[3], leads[large, "Scratch-B"], first, budget),
    ]


def _structured(rows: Rows | None, budget: str) -> Statement:
    """As accurate as the fine-tuned network, for the same compute, at every share of units."""
    text = "For structured pruning, training the small network from scratch (Scratch-B) does as well as fine-tuning it"
    if not rows:
        return untested(RETHINKING, text, "no experiment structured")
    shares = sorted({row["kept"] for row in rows if row["network"] == "Scratch-B"}, reverse=True)
    leads = {
        (share, network): compare(
            rows, ACCURACY, {"kept": share, "network": network}, {"kept": share, "network": "fine-tuned"}
        )
        for share in shares
        for network in ("Scratch-B", "Scratch-E")
    }
    said = "; ".join(
        f"{percent(share)} of the units: {points(leads[share, 'Scratch-B'])} points "
        f"(Scratch-E {points(leads[share, 'Scratch-E'])})"
        for share in shares
    )
    return Statement(RETHINKING, text, said, all_of(as_accurate(leads[s, "Scratch-B"]) for s in shares), budget)


def _no_better(text: str, lead: Difference | None, small: Difference | None, budget: str) -> Statement:
    """The ticket does not lead with 95% confidence, nor by more than half its lead at the small learning rate."""
    if lead is None or small is None or lead.trials < 2:
        return untested(RETHINKING, text, points(lead), budget)
    helps = lead.sign > 0 or lead.mean > 0.5 * max(small.mean, 0)
    return Statement(
        RETHINKING, text, f"ticket minus it: {points(lead)} points", NOT_REPRODUCED if helps else REPRODUCED, budget
    )


def review(experiments: Mapping[str, Rows], budgets: Mapping[str, str]) -> list[Statement]:
    """The review's open questions, from the rows of `initperf experiment rescale`, `larger-init` and `width`."""
    return [
        *_rescale(experiments.get("rescale"), budgets.get("rescale", "")),
        *_larger(experiments.get("larger-init"), budgets.get("larger-init", "")),
        *_width(experiments.get("width"), budgets.get("width", "")),
    ]


def _rescale(rows: Rows | None, budget: str) -> list[Statement]:
    texts = (
        "With independent (shuffled) masks 1/sqrt(density) restores the variance of the dense network (within a factor of 2)",
        "With rewound magnitude masks the same factor overcorrects (variance more than doubled in every layer)",
        "A ticket whose initial weights are rescaled to the dense variance (measured) is more accurate",
        "A re-initialized sub-network rescaled to the dense variance (measured) is more accurate",
    )
    if not rows:
        return [untested(REVIEW, text, "no experiment rescale") for text in texts]
    ratios = {
        start: [mean_ratio(rows, layer, start=start, rescale="layer") for layer in layers_of(rows)]
        for start in ("shuffled", "rewound")
    }
    said = {
        start: f"variance over dense, by layer: {', '.join(f'{v:.3g}' for v in found)}"
        for start, found in ratios.items()
    }
    restored = all(0.5 <= v <= 2 for v in ratios["shuffled"])
    over = all(v > 2 for v in ratios["rewound"])
    found = [
        Statement(REVIEW, texts[0], said["shuffled"], REPRODUCED if restored else NOT_REPRODUCED, budget),
        Statement(REVIEW, texts[1], said["rewound"], REPRODUCED if over else NOT_REPRODUCED, budget),
    ]
    for text, start in zip(texts[2:], ("rewound", "re-initialized"), strict=True):
        modes = {
            mode: compare(rows, ACCURACY, {"start": start, "rescale": mode}, {"start": start, "rescale": "none"})
            for mode in ("measured", "layer", "unit", "squares")
        }
        also = "; " + ", ".join(
            f"{mode} {100 * lead.mean:+.2f}" for mode, lead in modes.items() if lead and mode != "measured"
        )
        found.append(accuracy_statement(REVIEW, text, modes["measured"], 1, figure=False, budget=budget, also=also))
    return found


def _larger(rows: Rows | None, budget: str) -> list[Statement]:
    texts = (
        "Larger initial weights (Xavier x sqrt 10) cost the dense network accuracy",
        "Larger initial weights (Xavier x sqrt 2) make a better ticket",
        "The larger the initial weights, the less the first layer's grow",
    )
    if not rows:
        return [untested(REVIEW, text, "no experiment larger-init") for text in texts]
    scales = sorted({row["scale"] for row in rows})
    one, middle, large = scales[0], scales[min(1, len(scales) - 1)], scales[-1]

    def against_one(scale: float, network: str, column: str = ACCURACY) -> Difference | None:
        return compare(rows, column, {"scale": scale, "network": network}, {"scale": one, "network": network})

    layer = next(name for name in rows[0] if name.startswith("growth_"))
    less = against_one(large, "dense", layer)
    grown = {s: by_trial(rows, layer, scale=s, network="dense").values() for s in scales}
    means = ", ".join(f"x {s:g}: {sum(v) / len(v):+.2f}" for s, v in grown.items() if v)
    return [
        accuracy_statement(REVIEW, texts[0], against_one(large, "dense"), -1, figure=False, budget=budget),
        accuracy_statement(REVIEW, texts[1], against_one(middle, "ticket"), 1, figure=False, budget=budget),
        Statement(REVIEW, texts[2], means, decide(less, -1, math.inf), budget)
        if less
        else untested(REVIEW, texts[2], means),
    ]


def _width(rows: Rows | None, budget: str) -> list[Statement]:
    text = (
        "Larger networks are more likely to have lucky sub-networks: wider, at equal survivors, gives a better ticket"
    )
    if not rows:
        return [untested(REVIEW, text, "no experiment width")]
    narrow, wide = (pick(row["width"] for row in rows) for pick in (min, max))
    gains = {
        network: compare(rows, ACCURACY, {"width": wide, "network": network}, {"width": narrow, "network": network})
        for network in ("ticket", "reinit")
    }
    also = f" from width {narrow} to {wide}; the same masks re-initialized {points(gains['reinit'])}"
    return [accuracy_statement(REVIEW, text, gains["ticket"], 1, figure=False, budget=budget, also=also)]
