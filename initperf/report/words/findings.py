"""What a ticket run says, in words and tables: the one source of what the terminal and the HTML page show."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from initperf.core.tables import NONE, Table, count_of, joined, percent, size
from initperf.report.numbers.results import NAMES, Difference, Reach, Run, Spread

DENSE_LIBRARIES = {"mkl", "cublas"}  # backends of masked products that run dense by choice


class Verdict(NamedTuple):
    """One sentence for a headline, computed from the means at the sparsest level, and the sentences that back it."""

    headline: str
    sentences: list[str]


def name_of(kind: str) -> str:
    return NAMES.get(kind, kind)


def accuracy(value: Spread | None) -> str:
    if value is None:
        return NONE
    band = f" ({100 * value.low:.2f}–{100 * value.high:.2f})" if value.trials > 1 else ""
    return percent(value.mean, 2) + band


def points(lead: Difference | None) -> str:
    """Percentage points with the interval."""
    if lead is None:
        return NONE
    if math.isnan(lead.low):
        return f"{100 * lead.mean:+.2f} (one trial)"
    return f"{100 * lead.mean:+.2f} ({100 * lead.low:+.2f} to {100 * lead.high:+.2f})"


def reached(reach: Reach | None, budget: int) -> str:
    if reach is None:
        return NONE
    shown = f"> {budget:,}" if math.isinf(reach.median) else f"{reach.median:,.0f}"
    return f"{shown} (never: {reach.never} of {reach.networks})" if reach.never else shown


def early_stop(run: Run, level: int, kind: str) -> str:
    value = run.spread(level, kind, "early_stop_iteration")
    if value is None:
        return NONE
    return f"{'≥ ' if run.stopped_at_the_end(level, kind) else ''}{value.mean:,.0f}"


def labels(run: Run) -> list[str]:
    """What must be said beside every number of this run."""
    unfinished = ["unfinished"] if len(run.rows) < run.planned else []
    budget = run.config.get("budget")  # of a recipe
    return ([str(budget)] if budget else []) + unfinished


def verdict(run: Run) -> Verdict:
    """The honest one: not ahead of a control on the means says so in the headline; intervals and other levels follow."""
    last = run.levels[-1]
    dense = run.spread(0, "ticket", "early_stop_test_accuracy")
    shown = {kind: run.spread(last, kind, "early_stop_test_accuracy") for kind in run.kinds}
    reaches = [f"{name_of(kind)} {percent(value.mean, 1)}" for kind, value in shown.items() if value]
    trials = count_of(run.trials, "trial")
    if last == 0 or dense is None or shown["ticket"] is None:
        return Verdict(f"Only the dense network is trained so far: {accuracy(dense)} ({trials}).", [])
    leads = {kind: lead for kind in run.controls if (lead := run.lead(last, kind))}
    where = f"At {percent(run.density(last))} of the weights"
    values = f"{', '.join(reaches)}; dense {percent(dense.mean, 1)} ({trials})."
    trailing = [name_of(kind) for kind, lead in leads.items() if not lead.mean > 0]
    if trailing:
        headline = f"{where} the ticket is not ahead of {joined(trailing)}: {values}"
    else:
        headline = f"{where} the {values.replace('ticket', 'ticket reaches', 1)}"
    sentences = [_against(run, kind, lead) for kind, lead in leads.items()]
    winning = stretches(run, [level for level in run.levels[1:] if run.wins(level)])
    sentences.append(
        f"{winning[0].upper()}{winning[1:]} it is at least as accurate as the dense network and stops no later: a winning ticket, on the means."
        if winning
        else "At no level is it both as accurate as the dense network and no later: no winning ticket in the paper's sense."
    )
    return Verdict(headline, sentences)


def _against(run: Run, kind: str, lead: Difference) -> str:
    """One control: the paired difference at the sparsest level, and where along the levels the ticket is ahead of it."""
    start = f"Ticket minus {name_of(kind)}, paired by trial: {100 * lead.mean:+.2f} points"
    if lead.trials < 2:
        return f"{start}; one trial, so no interval."
    start += f" (95% interval {100 * lead.low:+.2f} to {100 * lead.high:+.2f})"
    places: dict[int, list[int]] = {1: [], 0: [], -1: []}
    for level in run.levels[1:]:
        if at := run.lead(level, kind):
            places[at.sign].append(level)
    words = {1: "ahead", 0: "undecided", -1: "behind"}
    return f"{start}. {'; '.join(f'{words[sign]} {stretches(run, at)}' for sign, at in places.items() if at).capitalize()}."


def stretches(run: Run, levels: list[int]) -> str:
    """Levels as "at 80% and from 51.3% to 3.6%"; "" for none."""
    groups: list[list[int]] = []
    for level in levels:
        if groups and run.levels.index(level) == run.levels.index(groups[-1][-1]) + 1:
            groups[-1].append(level)
        else:
            groups.append([level])
    found, singles = [], []
    for group in groups:
        shown = [percent(run.density(level)) for level in group]
        if len(group) > 2:
            found.append(f"from {shown[0]} to {shown[-1]}")
        else:
            singles += shown
    return joined(([f"at {joined(singles)}"] if singles else []) + found) if groups else ""


def levels_table(run: Run) -> Table:
    """Every network at every level."""
    rows = []
    for level in run.levels:
        budget = max(row.iterations for row in run.rows if row.level == level)
        for kind in run.kinds if level else ["ticket"]:
            stop = run.spread(level, kind, "early_stop_test_accuracy")
            if stop is None:
                continue
            rows.append(
                [
                    percent(run.density(level)) if kind == "ticket" else "",
                    name_of(kind) if level else "dense",
                    early_stop(run, level, kind),
                    accuracy(stop),
                    accuracy(run.spread(level, kind, "final_test_accuracy")),
                    NONE if kind == "ticket" else points(run.lead(level, kind)),
                    reached(run.reach(level, kind), budget),
                ]
            )
    notes = [
        f"{count_of(run.trials, 'trial')}: means, in brackets least and greatest. Early stop: the iteration of least validation "
        "loss; ≥ where some trial was still improving at its last iteration. Ticket minus it: percentage points of test accuracy "
        "at early stop, paired by trial, with 95% interval (Student's t, each taken alone). To dense's best: median iterations "
        "until the validation loss is down to the dense network's least, and how many never got there."
    ]
    columns = ["surviving", "network", "early stop", "test accuracy there", "at the end"]
    return Table("Every level", [*columns, "ticket minus it", "to dense's best"], rows, notes)


def steps_table(run: Run) -> Table | None:
    """Time of a training step, wins and losses alike."""
    if not run.steps:
        return None
    rows, previous = [], None
    compressed = any(step.sparse_ms for step in run.steps)
    for step in sorted(run.steps, key=lambda s: (s.batch, s.level)):
        batch = "" if step.batch == previous else str(step.batch)
        cells = [f"{step.dense_ms:.3f}", f"{step.masked_ms:.3f}", _ratio(step.speedup)]
        if compressed:
            cells += [f"{step.sparse_ms:.3f}" if step.sparse_ms else NONE, _ratio(step.sparse_speedup)]
        rows.append([batch, percent(step.density), *cells])
        previous = step.batch
    losing = sum(step.speedup < 1 for step in run.steps)
    notes = [
        "Median of alternated runs of one training step (forward, backward, optimizer), in milliseconds. "
        + (
            f"The masked layers are slower than dense in {losing} of {len(run.steps)} rows."
            if losing
            else "No row loses."
        )
    ]
    columns = ["batch", "surviving", "dense ms", "masked ms", "dense / masked"]
    return Table("Time of a step", columns + ["compressed ms", "dense / compressed"] * compressed, rows, notes)


def _ratio(speedup: float | None) -> str:
    return NONE if speedup is None else f"{speedup:.2f}x" + (" (slower)" if speedup < 1 else "")


def files_table(run: Run) -> Table | None:
    """The ticket's file against the dense checkpoint."""
    tickets, checkpoints = (by_level(run.summary.get(key)) for key in ("ticket_bytes", "dense_checkpoint_bytes"))
    rows = [
        [percent(run.density(level)), size(tickets[level]), size(checkpoints[level])]
        + [f"1/{checkpoints[level] / tickets[level]:.1f}"]
        for level in run.levels
        if level in tickets and level in checkpoints
    ]
    notes = ["A ticket is a seed and one bit a weight; the initial weights come back from the seed, proven by a hash."]
    return (
        Table("Size on disk", ["surviving", "ticket file", "dense checkpoint", "ratio"], rows, notes) if rows else None
    )


def by_level(found: Any) -> dict[int, float]:
    """{"1": bytes} or {"1": [bytes of each trial]} or one number for all levels, as {level: mean bytes}."""
    if not isinstance(found, dict):
        return {}
    return {int(k): sum(v) / len(v) if isinstance(v, list) else float(v) for k, v in found.items() if v}


def backends(run: Run) -> tuple[Table | None, str]:
    """Which backend ran every op, and whether any ran on the reference."""
    ops: dict[str, dict[str, int]] = run.summary.get("ops") or {}
    rows = [[op, backend, f"{calls:,}"] for op, used in sorted(ops.items()) for backend, calls in sorted(used.items())]
    if not rows:
        return None, "No record of which backend ran the ops."
    slow = sorted(op for op, used in ops.items() if used.get("reference"))
    if slow:
        said = f"{joined(slow)} ran on the plain-torch reference: correct, but slow (see `initperf doctor`)."
    else:
        said = f"None of the {count_of(len(ops), 'op')} ran on the plain-torch reference."
    dense = sum(calls for used in ops.values() for backend, calls in used.items() if backend in DENSE_LIBRARIES)
    if dense:
        share = dense / sum(sum(used.values()) for used in ops.values() if used.keys() & DENSE_LIBRARIES)
        said += f" The masked products chose the dense product in {percent(share, 0)} of their calls."
    return Table("Ops", ["op", "backend", "calls"], rows, [said]), said


def tables(run: Run) -> list[Table]:
    """All tables of a run, in reading order."""
    found = [levels_table(run), steps_table(run), files_table(run), backends(run)[0]]
    return [table for table in found if table]


def variance_tables(layers: list[dict[str, Any]], factors: list[dict[str, Any]]) -> list[Table]:
    """Of the rows of a VarianceResult: some layers of every initialization, and the factors from a layer to the next."""
    last = max(row["layer"] for row in layers)
    shown = {1 + round(i * (last - 1) / 5) for i in range(6)}
    ways = ("forward", "backward")
    rows = [
        [row["init"] if row["layer"] == 1 else "", str(row["layer"])]
        + [f"{row[way + suffix]:.3g}" for way in ways for suffix in ("", "_expected")]
        for row in layers
        if row["layer"] in shown
    ]
    sums = [
        [row["init"]] + [f"{row[f'{way}_factor{suffix}']:.4g}" for way in ways for suffix in ("", "_expected")]
        for row in factors
    ]
    columns = ["forward", "predicted", "backward", "predicted"]
    notes = [
        "Variance of the pre-activations and of the loss gradients by them: mean over the nets, and the analytic value."
    ]
    level = ["Per layer; 1 keeps the variance level. Backward: towards the input."]
    return [
        Table("Variance by layer", ["weights", "layer", *columns], rows, notes),
        Table("Factor from a layer to the next", ["weights", *columns], sums, level),
    ]
