"""A small ticket search, and a plain training loop as a user writes it."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from initperf.experiments.networks import mlp
from initperf.search import TicketSearch

FRACTIONS = {"*.weight": 0.5, "fc2.weight": 0.25}
X = torch.randn(64, 12, generator=torch.Generator().manual_seed(0))
Y = (X[:, 0] > 0).long() + 2 * (X[:, 1] > 0).long()
ITERATIONS = 12


def make_model():
    return mlp(12, (16,), 4)


def make_small(weights):
    return mlp(12, (max(1, weights // 16),), 4)


def search(out, **given):
    defaults = {"rounds": 2, "fractions": FRACTIONS, "trials": 2, "seed": 3, "init": "xavier_normal"}
    return TicketSearch(make_model, out=out, **{**defaults, **given})


def train(run, iterations=ITERATIONS, interrupt_at=None):
    """A plain training loop, as a user writes it."""
    optimizer = torch.optim.Adam(run.model.parameters(), lr=1e-2)
    for iteration in range(run.restore(optimizer=optimizer) + 1, iterations + 1):
        chosen = torch.randint(64, (16,), generator=run.generator)
        optimizer.zero_grad()
        F.cross_entropy(run.model(X[chosen]), Y[chosen]).backward()
        optimizer.step()
        if iteration % 4 == 0:
            with torch.no_grad():
                scores = run.model(X)
                accuracy = float((scores.argmax(1) == Y).float().mean())
                run.log(iteration, val_loss=F.cross_entropy(scores, Y), test_accuracy=accuracy)
        run.step(iteration)
        if iteration == interrupt_at:
            raise KeyboardInterrupt
