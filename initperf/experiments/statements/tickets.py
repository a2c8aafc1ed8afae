"""The statements of Frankle & Carbin 2019 (LeNet-300-100, Conv-2/4/6, appendix F.5), judged by the results of a run.

initperf.experiments.statements.claims has the rules.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from initperf.core.tables import percent
from initperf.experiments.side.outcome import ACCURACY
from initperf.experiments.statements.claims import (
    NOT_REPRODUCED,
    NOT_TESTED,
    REPRODUCED,
    Statement,
    accuracy_statement,
    all_of,
    as_accurate,
    decide,
    level_at,
    sooner,
    sooner_statement,
    untested,
)
from initperf.report.numbers.intervals import Difference
from initperf.report.numbers.movement import Gap, growth, movement_gap, movement_of
from initperf.report.numbers.results import Run
from initperf.report.words.findings import name_of, points
from initperf.report.words.movement import explained

SOURCE = "Frankle & Carbin 2019"
CONVOLUTIONAL = {  # times earlier, at; points better, at
    "conv2": (3.5, 0.088, 0.034, 0.046),
    "conv4": (3.5, 0.092, 0.035, 0.111),
    "conv6": (2.5, 0.151, 0.033, 0.264),
}


def budget_of(run: Run) -> str:
    """ "reduced budget" or ""."""
    return str(run.config.get("budget") or "")


def lenet(run: Run) -> list[Statement]:
    """LeNet-300-100 on MNIST."""
    budget, found = budget_of(run), []
    at = {density: level_at(run, density) for density in (0.513, 0.211, 0.135, 0.036, 0.029)}
    where = {density: f"{percent(density)}" for density in at}

    def missing(text: str, density: float) -> Statement:
        return untested(SOURCE, text, f"the run has no level at {where[density]}", budget)

    def add(text: str, density: float, make: Any) -> None:
        level = at[density]
        found.append(missing(text, density) if level is None else make(text, level))

    def faster(kind: str, base: int | None, **claim: float) -> Any:
        def make(text: str, level: int) -> Statement:
            other = (level if base is None else base, kind)
            if run.spread(*other, "early_stop_iteration") is None:
                return untested(SOURCE, text, f"the run has no network {kind}", budget)
            return sooner_statement(SOURCE, text, sooner(run, (level, "ticket"), other), budget=budget, **claim)

        return make

    def better(kind: str, base: int | None, claimed: float, figure: bool = True) -> Any:
        def make(text: str, level: int) -> Statement:
            return accuracy_statement(
                SOURCE,
                text,
                run.lead(level, kind, base=base),
                claimed,
                figure=figure,
                budget=budget,
                what=f"ticket minus {'dense' if base == 0 else name_of(kind)}: ",
                also=_peak(run) if figure and base == 0 else "",
            )

        return make

    add("At 51.3% of the weights the ticket learns faster than the dense network", 0.513, faster("ticket", 0))
    add(
        "At 51.3% it is more accurate at early stop than the dense network", 0.513, better("ticket", 0, 1, figure=False)
    )
    add("At 21.1% it stops 38% earlier than the dense network", 0.211, faster("ticket", 0, share=0.38))
    add("At 21.1% it stops 2.51x earlier than re-initialized", 0.211, faster("reinit", None, times=2.51))
    add("At 21.1% re-initialized is 0.5 points less accurate", 0.211, better("reinit", None, 0.005))
    add("At 13.5% accuracy peaks, more than 0.3 points above dense", 0.135, better("ticket", 0, 0.003))
    add(
        "At 3.6% the ticket is still as accurate as the dense network",
        0.036,
        lambda text, level: _matches(run, text, level),
    )
    found.append(
        _worse_from(run, "Re-initialized networks are less accurate than dense from 21.1% on", "reinit", 0.211)
    )
    found.append(_tickets_last(run))
    return found


def _peak(run: Run) -> str:
    leads = {level: run.lead(level, "ticket", base=0) for level in run.levels[1:]}
    best = max(leads, key=lambda level: leads[level].mean if leads[level] else -math.inf)  # type: ignore[union-attr]
    return f"; highest at {percent(run.density(best))}: {points(leads[best])}"


def _matches(run: Run, text: str, level: int) -> Statement:
    lead = run.lead(level, "ticket", base=0)
    if lead is None or lead.trials < 2:
        return untested(SOURCE, text, points(lead), budget_of(run))
    return Statement(SOURCE, text, f"{points(lead)} points against dense", as_accurate(lead), budget_of(run))


def _worse_from(run: Run, text: str, kind: str, density: float) -> Statement:
    """Below dense with 95% confidence at every level of at most `density`."""
    levels = [
        at for at in run.levels[1:] if run.density(at) < density * math.exp(0.11) and run.by_trial(at, kind, ACCURACY)
    ]
    if not levels:
        return untested(SOURCE, text, f"no {kind} at {percent(density)} or below", budget_of(run))
    found = {at: run.difference((at, kind), (0, "ticket")) for at in levels}
    verdicts = [decide(lead, -1, math.inf) for lead in found.values() if lead]
    said = "; ".join(
        f"{percent(run.density(at))}: {points(lead)}" for at, lead in found.items() if at in (levels[0], levels[-1])
    )
    low = sum(verdict == REPRODUCED for verdict in verdicts)
    return Statement(
        SOURCE, text, f"below dense at {low} of {len(levels)} levels; {said}", all_of(verdicts), budget_of(run)
    )


def _tickets_last(run: Run) -> Statement:
    """Tickets fall below dense at 2.9% and not before."""
    text, edge = "Tickets are less accurate than dense only from 2.9% on", level_at(run, 0.029)
    if edge is None:
        return untested(SOURCE, text, "the run has no level at 2.9%", budget_of(run))
    found = {at: run.lead(at, "ticket", base=0) for at in run.levels[1:] if at <= edge}
    below = [at for at, lead in found.items() if lead and lead.sign < 0]
    if any(lead is None or lead.trials < 2 for lead in found.values()):
        return untested(SOURCE, text, "one trial, no interval", budget_of(run))
    shown = ", ".join(percent(run.density(at)) for at in below) or "at no level down to 2.9%"
    verdict = REPRODUCED if below == [edge] else NOT_REPRODUCED
    return Statement(SOURCE, text, f"below dense: {shown}", verdict, budget_of(run))


def convolutional(runs: Mapping[str, Run]) -> list[Statement]:
    """Conv-2, -4 and -6 on CIFAR-10; runs by recipe name."""
    found = []
    for name, (times, faster_at, better, better_at) in CONVOLUTIONAL.items():
        title = f"Conv-{name.removeprefix('conv')}"
        texts = (
            f"{title}: at {percent(faster_at)} the ticket stops {times}x earlier than dense",
            f"{title}: at {percent(better_at)} it is {100 * better:g} points more accurate than dense",
        )
        run = runs.get(name)
        if run is None:
            found += [untested(SOURCE, text, f"no run of the recipe {name}") for text in texts]
            continue
        budget, levels = budget_of(run), [level_at(run, density) for density in (faster_at, better_at)]
        missing = [
            untested(SOURCE, text, f"the run has no level at {percent(density)}", budget)
            for text, density in zip(texts, (faster_at, better_at), strict=True)
        ]
        first, second = missing
        if levels[0] is not None:
            first = sooner_statement(
                SOURCE, texts[0], sooner(run, (levels[0], "ticket"), (0, "ticket")), times=times, budget=budget
            )
        if levels[1] is not None:
            lead = run.lead(levels[1], "ticket", base=0)
            second = accuracy_statement(
                SOURCE, texts[1], lead, better, budget=budget, what="ticket minus dense: ", also=_peak(run)
            )
        found += [first, second]
    return found


def movement(run: Run) -> list[Statement]:
    """Appendix F.5 with its control, at every level that was trained and pruned."""
    budget, source = budget_of(run), f"{SOURCE}, F.5"
    levels = [level for level in run.levels if movement_of(run, level)]
    gaps = {level: gap for level in levels if (gap := movement_gap(run, level, "moved"))}
    grown = {level: found for level in levels if (found := growth(run, level))}
    rows: list[tuple[str, dict[int, str], dict[int, str]]] = [
        (
            "Weights of the ticket move more in training than pruned ones",
            *_judged({n: g.measured for n, g in gaps.items()}),
        ),
        ("Weights of the ticket move away from zero", *_judged(grown)),
        (
            "They move more than selection by final magnitude makes any weights seem to (the permutation null)",
            *_judged({n: g.beyond for n, g in gaps.items()}),
        ),
        (
            "The null explains nearly all (at least 80%) of how much more they move",
            {level: explained(gap) for level, gap in gaps.items()},
            {level: _explained(gap) for level, gap in gaps.items()},
        ),
    ]
    return [_over_levels(run, source, *row, budget) for row in rows]


def _judged(found: Mapping[int, Difference]) -> tuple[dict[int, str], dict[int, str]]:
    """What is said of every level's difference, and the verdict: above 0 with 95% confidence."""
    return {n: _gap(d) for n, d in found.items()}, {n: decide(d, 1, math.inf) for n, d in found.items()}


def _explained(gap: Gap) -> str:
    if gap.measured.trials < 2:
        return NOT_TESTED
    return REPRODUCED if gap.measured.sign > 0 and gap.explained >= 0.8 else NOT_REPRODUCED


def _over_levels(
    run: Run, source: str, text: str, said: Mapping[int, str], verdicts: Mapping[int, str], budget: str
) -> Statement:
    """Reproduced where it holds at every level."""
    if not said:
        return untested(source, text, "no movement.csv in the run", budget)
    ends = dict.fromkeys((min(said), max(said)))
    holds = sum(verdict == REPRODUCED for verdict in verdicts.values())
    shown = "; ".join(f"at {percent(run.density(level))} {said[level]}" for level in ends)
    return Statement(
        source, text, f"holds at {holds} of {len(said)} levels; {shown}", all_of(verdicts.values()), budget
    )


def _gap(found: Difference) -> str:
    interval = f" ({found.low:+.4f} to {found.high:+.4f})" if found.trials > 1 else " (one trial)"
    return f"{found.mean:+.4f}{interval}"
