"""Of several schemes that no test rejects, the most probable: by the values' likelihood, and by what explains the rest of the model."""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from initperf.init.identify.candidates import Candidate

TRAINED = "trained, unknown"
NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")  # a part of a parameter's name
_ROUNDS = 10
_LEAST_SHARE = 0.1


class Fit(NamedTuple):
    """A candidate that no test rejects, and the log likelihood of the values under it."""

    candidate: Candidate
    likelihood: float


class Case(NamedTuple):
    """A tensor, and what fits it, the likelier beforehand first; trained: the score of a normal distribution of any mean and std."""

    name: str
    shape: tuple[int, ...]
    fits: list[Fit]
    trained: float


class _Stack(NamedTuple):
    """Tensors that one scheme made, by number of the case, and the score of each scheme that fits them all."""

    cases: list[int]
    scores: dict[str, float]


def most_probable(cases: Sequence[Case], trained: int) -> list[list[str]]:
    """For each case the names of its schemes, the most probable first; trained: other tensors of the model, that no scheme fits.

    P(scheme) ~ share(scheme) exp(log likelihood - rank among those that fit); share(scheme) is the sum of P over the model's
    tensors less one, at least _LEAST_SHARE: expectation and maximization from equal shares. The one taken off makes
    schemes that explain a single tensor give way (Figueiredo and Jain 2002).
    Tensors of one shape whose names differ by numbers only, the layers of a stack, are one case if a scheme fits them all.
    """
    stacks = [stack for group in _groups(cases) for stack in _stacks(cases, group)]
    if trained:  # then training that left a tensor near a scheme is an explanation too
        for stack in stacks:
            stack.scores[TRAINED] = sum(cases[i].trained for i in stack.cases)
    share = {scheme: 1.0 for stack in stacks for scheme in stack.scores}
    posteriors: list[dict[str, float]] = []
    for _ in range(_ROUNDS):
        posteriors = [_posterior(stack, share) for stack in stacks]
        counts: Counter[str] = Counter({TRAINED: trained})
        for stack, posterior in zip(stacks, posteriors, strict=True):
            counts.update({scheme: len(stack.cases) * p for scheme, p in posterior.items()})
        share = {scheme: max(counts[scheme] - 1, _LEAST_SHARE) for scheme in share}
    ranked: dict[int, list[str]] = {}
    for stack, posterior in zip(stacks, posteriors, strict=True):
        order = sorted(posterior, key=lambda scheme: -posterior[scheme])
        ranked |= dict.fromkeys(stack.cases, order)
    return [ranked[i] for i in range(len(cases))]


def _groups(cases: Sequence[Case]) -> list[list[int]]:
    alike: defaultdict[tuple[str, tuple[int, ...]], list[int]] = defaultdict(list)
    for i, case in enumerate(cases):
        alike[NUMBER.sub("*", case.name), case.shape].append(i)
    return list(alike.values())


def _stacks(cases: Sequence[Case], group: list[int]) -> list[_Stack]:
    """One stack of all, or, where no scheme fits them all, each alone."""
    alone = [_scores(cases[i].fits) for i in group]
    common = set.intersection(*map(set, alone))
    if not common:
        return [_Stack([i], scores) for i, scores in zip(group, alone, strict=True)]
    return [_Stack(group, {s: sum(scores[s] for scores in alone) for s in alone[0] if s in common})]


def _scores(fits: list[Fit]) -> dict[str, float]:
    scores: dict[str, float] = {}
    for rank, (candidate, likelihood) in enumerate(fits):
        scores.setdefault(candidate.scheme, likelihood - rank)
    return scores


def _posterior(stack: _Stack, share: Mapping[str, float]) -> dict[str, float]:
    scores = {scheme: score + math.log(share[scheme]) for scheme, score in stack.scores.items()}
    best = max(scores.values())
    weights = {scheme: math.exp(max(score - best, -700)) for scheme, score in scores.items()}
    total = sum(weights.values())
    return {scheme: weight / total for scheme, weight in weights.items()}
