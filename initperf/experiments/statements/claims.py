"""Rules by which a statement of a paper counts as reproduced: computed from the results, the same for all statements.

A difference is paired by trial and has a 95% interval. A statement with a figure is reproduced where the interval excludes
0 on the paper's side and the effect is at least half of the paper's; without a figure, where the interval excludes 0.
Fewer than two trials test nothing. A time that the end of training cuts off never makes a network look faster than it is:
see `sooner`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from statistics import fmean
from typing import NamedTuple

from initperf.core.tables import count_of, percent
from initperf.report.numbers.intervals import Difference, paired_difference
from initperf.report.numbers.results import Run
from initperf.report.words.findings import points

REPRODUCED, NOT_REPRODUCED, NOT_TESTED = "reproduced", "not reproduced", "not tested"
ENOUGH = 0.5  # of the paper's effect
MATCHES = 0.005  # a network is as accurate as another where the difference's interval stays above minus half a point
SAME_LEVEL = 0.11  # in log density: half a round of 20%


class Statement(NamedTuple):
    """One statement of a paper, what it measured, what was measured here, and the verdict."""

    source: str
    text: str
    measured: str
    verdict: str
    budget: str = ""


class Sooner(NamedTuple):
    """How much sooner one network is than another: iterations saved, paired by trial; times: mean of the other over mean of ours.

    never: how many of ours never got there; then nothing is saved. measure: what was timed.
    """

    saved: Difference
    times: float
    never: int
    measure: str

    @property
    def share(self) -> float:
        """The part of the other's iterations that is saved: 0.38 for 38% earlier."""
        return 1 - 1 / self.times if self.times else -math.inf


def untested(source: str, text: str, why: str, budget: str = "") -> Statement:
    return Statement(source, text, why, NOT_TESTED, budget)


def decide(effect: Difference, claimed: float, size: float | None = None) -> str:
    """claimed: the paper's figure, whose sign is the side; 1 or -1 and size=math.inf where it gives none. size: the effect in
    the paper's unit, where the difference is in another."""
    if effect.trials < 2:
        return NOT_TESTED
    if effect.sign != (1 if claimed > 0 else -1):
        return NOT_REPRODUCED
    size = abs(effect.mean) if size is None else size
    return REPRODUCED if size >= ENOUGH * abs(claimed) else NOT_REPRODUCED


def as_accurate(lead: Difference | None) -> str:
    """lead: the accuracy of a network minus that of the one it is to match."""
    if lead is None or lead.trials < 2:
        return NOT_TESTED
    return REPRODUCED if lead.low > -MATCHES else NOT_REPRODUCED


def level_at(run: Run, density: float) -> int | None:
    """The level of about that density, if the run has it."""
    near = [level for level in run.levels if abs(math.log(run.density(level) / density)) < SAME_LEVEL]
    return min(near, key=lambda level: abs(math.log(run.density(level) / density)), default=None)


def sooner(run: Run, ours: tuple[int, str], other: tuple[int, str]) -> Sooner:
    """Networks `ours` against `other`, each (level, kind), by early stop; or, if the training's end cuts off an early stop of
    either (it was still improving), by the iteration at which the dense network's best validation loss is reached. There
    the other's networks that never reach it count as reaching it at the end, which understates what ours save; ours that
    never do, as never."""
    cut = any(run.stopped_at_the_end(*network) for network in (ours, other))
    if not cut:
        a, b = (run.by_trial(*network, "early_stop_iteration") for network in (ours, other))
        return _sooner(a, b, 0, "early stop")
    a, b = _reached(run, ours, math.inf), _reached(run, other, None)
    never = sum(math.isinf(value) for value in a.values())
    return _sooner(a, b, never, "iterations to the dense network's best validation loss, since early stops are cut off")


def _reached(run: Run, network: tuple[int, str], never: float | None) -> dict[int, float]:
    """trial -> iterations to dense's best; `never`, or the iterations trained, for a network that did not get there."""
    found: dict[int, list[float]] = {}
    for row in run.rows:
        if (row.level, row.kind) == network:
            at = row.iterations_to_dense_best
            last = row.iterations if never is None else never
            found.setdefault(row.trial, []).append(last if at is None else at)
    return {trial: fmean(values) for trial, values in found.items()}


def _sooner(ours: dict[int, float], other: dict[int, float], never: int, measure: str) -> Sooner:
    both = sorted(ours.keys() & other.keys())
    if never or not both:
        return Sooner(Difference(-math.inf, math.nan, math.nan, len(both)), 0.0, never, measure)
    saved = paired_difference(other[t] - ours[t] for t in both)
    return Sooner(saved, fmean(other[t] for t in both) / fmean(ours[t] for t in both), 0, measure)


def sooner_statement(
    source: str, text: str, found: Sooner, *, times: float | None = None, share: float | None = None, budget: str = ""
) -> Statement:
    """times: 2.51 for "2.51x earlier"; share: 0.38 for "38% earlier"; neither for "faster"."""
    if found.never:
        said = f"{count_of(found.never, 'trial')} never got there ({found.measure})"
        return Statement(source, text, said, NOT_REPRODUCED if found.saved.trials > 1 else NOT_TESTED, budget)
    low, high = found.saved.low, found.saved.high
    interval = f"95% interval {low:+,.0f} to {high:+,.0f}" if found.saved.trials > 1 else "one trial, no interval"
    said = f"{found.times:.2f}x, {percent(found.share)} earlier ({found.saved.mean:+,.0f} iterations saved, {interval}; {found.measure})"
    if times is not None:
        verdict = decide(found.saved, times - 1, found.times - 1)
    elif share is not None:
        verdict = decide(found.saved, share, found.share)
    else:
        verdict = decide(found.saved, 1, math.inf)
    return Statement(source, text, said, verdict, budget)


def accuracy_statement(
    source: str,
    text: str,
    found: Difference | None,
    claimed: float,
    *,
    figure: bool = True,
    budget: str = "",
    also: str = "",
    what: str = "",
) -> Statement:
    """found: a difference of accuracies; claimed: the paper's, a fraction; figure=False: only its sign counts."""
    if found is None:
        return untested(source, text, "no such networks", budget)
    verdict = decide(found, claimed, None if figure else math.inf)
    return Statement(source, text, f"{what}{points(found)} points{also}", verdict, budget)


def all_of(verdicts: Iterable[str]) -> str:
    """Reproduced where all are; not tested where there is none, or one is not."""
    found = list(verdicts)
    if not found or NOT_TESTED in found:
        return NOT_TESTED
    return REPRODUCED if set(found) == {REPRODUCED} else NOT_REPRODUCED
