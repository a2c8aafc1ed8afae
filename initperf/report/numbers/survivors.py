"""What the tickets of a run have in common: initial values of their survivors (Frankle & Carbin 2019, F.1), layer densities, and overlap of masks between trials."""

from __future__ import annotations

import math
from itertools import combinations
from statistics import fmean
from typing import NamedTuple

import torch
from torch import Tensor

from initperf.report.numbers.results import Run
from initperf.tickets.criteria import overlap
from initperf.tickets.ticket import Ticket
from initperf.variance.moments import moments

BINS = [k / 4 for k in range(-14, 15)]  # edges in standard deviations; what lies beyond counts in the outermost


class Survivors(NamedTuple):
    """Initial values of one layer's survivors. std_ratio, mean_abs_ratio: of the survivors, over those of all the layer's weights.

    histogram: share of the survivors in each of BINS, in standard deviations of all the layer's initial weights.
    """

    trial: int
    level: int
    parameter: str
    weights: int
    survivors: int
    density: float
    mean: float
    std: float
    kurtosis: float
    std_ratio: float
    mean_abs_ratio: float
    positive: float
    histogram: list[float]


class Overlap(NamedTuple):
    """Survivors that the masks of two trials share, over those of the first; by chance, mean and standard deviation
    (hypergeometric: as many survivors at random places)."""

    level: int
    parameter: str
    trial: int
    other: int
    shared: float
    chance: float
    chance_std: float


def read_tickets(run: Run, level: int) -> dict[int, Ticket]:
    """trial -> ticket, where the run folder has the file."""
    trials = sorted({row.trial for row in run.rows})
    files = {trial: run.folder / "tickets" / f"trial{trial}-level{level}.safetensors" for trial in trials}
    return {trial: Ticket.load(file) for trial, file in files.items() if file.is_file()}


def examine(run: Run) -> tuple[list[Survivors], list[Overlap]]:
    """Of every level whose tickets are there, the dense network's initial weights (level 0) among the survivors."""
    survivors: list[Survivors] = []
    overlaps: list[Overlap] = []
    whole: dict[int, dict[str, Tensor]] = {}
    for level in run.levels:
        tickets = read_tickets(run, level)
        names = {name for ticket in tickets.values() for name in ticket.masks}
        for trial, ticket in tickets.items():
            initial = ticket.weights()
            if level == 0:
                whole[trial] = initial
                continue
            if level == run.levels[1]:
                full = {n: torch.ones_like(w, dtype=torch.bool) for n, w in whole.get(trial, {}).items() if n in names}
                survivors += [_survivors(trial, 0, n, whole[trial][n], m, whole[trial][n]) for n, m in full.items()]
            survivors += [
                _survivors(trial, level, name, initial[name], mask, whole.get(trial, initial)[name])
                for name, mask in ticket.masks.items()
            ]
        overlaps += [
            _overlap(level, name, trial, other, tickets[trial].masks[name], tickets[other].masks[name])
            for trial, other in combinations(tickets, 2)
            for name in tickets[trial].masks
        ]
    return survivors, overlaps


def _survivors(trial: int, level: int, name: str, initial: Tensor, mask: Tensor, whole: Tensor) -> Survivors:
    values = initial[mask].double()
    found, of_all = moments(values), moments(whole.double())
    std, scale = float(found.var.sqrt()), float(of_all.var.sqrt())
    edges = torch.tensor(BINS[1:-1], dtype=torch.float64, device=values.device) * scale
    counts = torch.bincount(torch.bucketize(values, edges), minlength=len(BINS) - 1)
    return Survivors(
        *(trial, level, name, mask.numel(), len(values), len(values) / mask.numel()),
        *(float(found.mean), std, float(found.kurtosis), std / scale if scale else math.nan),
        float(values.abs().mean() / whole.double().abs().mean()),
        float((values > 0).double().mean()),
        (counts / max(1, len(values))).tolist(),
    )


def _overlap(level: int, name: str, trial: int, other: int, mask: Tensor, second: Tensor) -> Overlap:
    found = overlap({name: mask}, {name: second})[name]
    n, kept, rate = mask.numel(), max(1, int(mask.sum())), found["chance"]
    variance = rate * (1 - rate) * (n - kept) / max(1, n - 1) / kept
    return Overlap(level, name, trial, other, found["shared"], rate, math.sqrt(variance))


def mean_histogram(survivors: list[Survivors], level: int, parameter: str) -> list[float] | None:
    """The mean over trials, or None where no ticket has that layer at that level."""
    found = [s.histogram for s in survivors if (s.level, s.parameter) == (level, parameter)]
    return [fmean(shares) for shares in zip(*found, strict=True)] if found else None
