"""The analysis of a run in tables: movement against its null, initial values of survivors, overlap of masks, own learning rates."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean
from typing import TypeVar

from initperf.core.tables import NONE, Table, count_of, percent
from initperf.report.numbers.movement import Gap, movement_gap, movement_of
from initperf.report.numbers.results import Run
from initperf.report.numbers.survivors import Overlap, Survivors
from initperf.report.words.findings import accuracy, early_stop, name_of, points

MOST_LEVELS = 6
SAME_DENSITY = 0.02  # relative: levels of two runs that may be set side by side
T = TypeVar("T")


def evenly(found: Sequence[T], most: int = MOST_LEVELS) -> list[T]:
    """At most `most` of them, evenly spread, the first and the last among them."""
    count = min(len(found), most)
    return [found[round(i * (len(found) - 1) / max(1, count - 1))] for i in range(count)]


def explained(gap: Gap) -> str:
    """How much of a measured gap the null has too; "none" where the null's goes the other way."""
    if not gap.measured.sign:
        return NONE
    return "none" if gap.explained < 0 else "> 100%" if gap.explained > 1 else f"{100 * gap.explained:.0f}%"


def movement_table(run: Run) -> Table | None:
    """Appendix F.5 with the control that it asks for."""
    rows = []
    names = {"moved": "distance moved |w_T - w_0|", "grew": "growth |w_T| - |w_0|", "flipped": "sign changes"}
    levels = evenly([level for level in run.levels if movement_of(run, level)])
    for what, name in names.items():
        for level in levels:
            gap = movement_gap(run, level, what)
            if gap is None:
                continue
            moved = movement_of(run, level).values()
            sides = [
                fmean(of[f"{part}_{what}"] for of in side)
                for side in ([m.measured for m in moved], [m.null for m in moved])
                for part in ("kept", "pruned")
            ]
            shown = [percent(v) if what == "flipped" else f"{v:.4f}" for v in sides]
            beyond = f"{gap.beyond.mean:+.4f}"
            if gap.beyond.trials > 1:
                beyond += f" ({gap.beyond.low:+.4f} to {gap.beyond.high:+.4f})"
            rows.append(
                [name if level == levels[0] else "", percent(run.density(level)), *shown, beyond, explained(gap)]
            )
    notes = [
        "Weights that the pruning after a training kept, against those it pruned, all layers together, in the units of the "
        "weights. The null permutes w_T - w_0 within each layer and then selects by magnitude as the pruning does: what it "
        "shows, selection alone does. Beyond the null: (kept - pruned) minus the same under the null, paired by trial, with "
        "95% interval. Explained: the null's gap over the measured one, where the measured gap is not zero within its interval; none where the null's "
        "goes the other way."
    ]
    columns = ["", "trained at", "kept", "pruned", "kept, null", "pruned, null", "beyond the null", "explained by it"]
    return Table("How weights moved", columns, rows, notes) if rows else None


def survivors_table(run: Run, survivors: list[Survivors]) -> Table | None:
    """Appendix F.1 in moments, and the density of every layer."""
    rows = []
    levels = evenly([level for level in run.levels if any(s.level == level for s in survivors)])
    for name in dict.fromkeys(s.parameter for s in survivors):
        for level in levels:
            found = [s for s in survivors if (s.level, s.parameter) == (level, name)]
            if not found:
                continue
            means = {
                field: fmean(getattr(s, field) for s in found)
                for field in ("density", "survivors", "std_ratio", "mean_abs_ratio", "kurtosis", "positive")
            }
            rows.append(
                [
                    name if level == levels[0] else "",
                    percent(run.density(level)),
                    f"{percent(means['density'])} ({means['survivors']:,.0f})",
                    f"{means['std_ratio']:.2f}",
                    f"{means['mean_abs_ratio']:.2f}",
                    f"{means['kurtosis']:.2f}",
                    percent(means["positive"]),
                ]
            )
    notes = [
        "Values before training of the weights that survive, mean over trials. Standard deviation and mean magnitude are over "
        "those of all the layer's initial weights: above 1, weights that began large survive. Kurtosis: 3 is a normal "
        "distribution's, less means two humps with a gap at zero."
    ]
    columns = ["layer", "surviving", "of the layer", "std", "mean |w_0|", "kurtosis", "positive"]
    return Table("What the survivors began with", columns, rows, notes) if rows else None


def overlap_table(run: Run, overlaps: list[Overlap]) -> Table | None:
    """Masks of different trials, which started from different weights and saw the data in different order."""
    rows = []
    levels = evenly(sorted({o.level for o in overlaps}))
    for name in dict.fromkeys(o.parameter for o in overlaps):
        for level in levels:
            found = [o for o in overlaps if (o.level, o.parameter) == (level, name)]
            if not found:
                continue
            shared, chance = fmean(o.shared for o in found), fmean(o.chance for o in found)
            sigma = fmean((o.shared - o.chance) / o.chance_std if o.chance_std else 0.0 for o in found)
            ratio = f"{shared / chance:.2f}" if chance else NONE
            rows.append(
                [
                    name if level == levels[0] else "",
                    percent(run.density(level)),
                    percent(shared),
                    percent(chance),
                    ratio,
                    f"{sigma:+.1f}",
                ]
            )
    notes = [
        f"Over {count_of(len({(o.trial, o.other) for o in overlaps}), 'pair')} of trials: survivors of one that survive in the "
        "other too. Chance: as many survivors at random places of the layer; the last column is the distance from chance in "
        "its standard deviations (hypergeometric), mean over pairs."
    ]
    columns = ["layer", "surviving", "shared", "by chance", "ratio", "standard deviations"]
    return Table("Overlap of masks between trials", columns, rows, notes) if rows else None


def own_rates_table(run: Run) -> Table | None:
    """The ticket against every control, each at the learning rate that suits it best."""
    if not run.other_rows:
        return None
    own, rates = run.own_rates()
    rows = []
    for level in run.levels:
        for kind in run.kinds if level else ["ticket"]:
            value = own.spread(level, kind, "early_stop_test_accuracy")
            if value is None:
                continue
            lead = own.lead(level, kind) if kind != "ticket" else None
            rows.append(
                [
                    percent(run.density(level)) if kind == "ticket" else "",
                    name_of(kind) if level else "dense",
                    f"{rates[level, kind]:g}" if (level, kind) in rates else NONE,
                    accuracy(value),
                    points(lead),
                ]
            )
    tried = sorted({row.lr for row in [*run.rows, *run.other_rows] if row.lr is not None})
    notes = [
        f"Of the learning rates {', '.join(f'{lr:g}' for lr in tried)}, the one of least mean validation loss at early stop for "
        "each network and level; test accuracies had no part in the choice."
    ]
    columns = ["surviving", "network", "learning rate", "test accuracy at early stop", "ticket minus it"]
    return Table("Each at its own best learning rate", columns, rows, notes)


def own_rates_sentence(run: Run) -> list[str]:
    """What the controls at their own best learning rates leave of the ticket's lead at the sparsest level; [] if none were tried."""
    if not run.other_rows:
        return []
    own, last = run.own_rates()[0], run.levels[-1]
    leads = {kind: lead for kind in run.controls if (lead := own.lead(last, kind))}
    shown = "; ".join(f"{name_of(kind)} {points(lead)}" for kind, lead in leads.items())
    return [f"Each at its own best learning rate, at {percent(run.density(last))}, the ticket leads by: {shown}."]


def side_by_side(run: Run, other: Run, names: tuple[str, str]) -> Table | None:
    """Both runs at the densities that they share."""
    rows = []
    for level in run.levels:
        there = [at for at in other.levels if math.isclose(run.density(level), other.density(at), rel_tol=SAME_DENSITY)]
        for kind in (k for k in run.kinds if there and k in other.kinds and (level or k == "ticket")):
            cells = [
                cell
                for one, at in ((run, level), (other, there[0]))
                for cell in (accuracy(one.spread(at, kind, "early_stop_test_accuracy")), early_stop(one, at, kind))
            ]
            rows.append(
                [percent(run.density(level)) if kind == "ticket" else "", name_of(kind) if level else "dense", *cells]
            )
    columns = [f"{name}: {what}" for name in names for what in ("test accuracy at early stop", "early stop")]
    return Table("Side by side", ["surviving", "network", *columns], rows, []) if rows else None
