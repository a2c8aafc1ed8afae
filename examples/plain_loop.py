"""A ticket search around a plain training loop: python examples/plain_loop.py [FOLDER]

Stop it whenever you like: the same command goes on, within a network from its last checkpoint.
"""

import sys

import torch
from torch import nn
from torch.nn import functional as F

from initperf import TicketSearch
from initperf.experiments.data.sets import digits
from initperf.search import SPARSE_BELOW


def make_model():
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(256, 100),
        nn.ReLU(),
        nn.Linear(100, 10),
    )


def main(out="runs/plain", rounds=3, iterations=300, evaluate_every=20, batch=60):
    images = digits()
    search = TicketSearch(
        make_model,
        rounds=rounds,
        fractions={"*": 0.6, "7.weight": 0.3},  # the output layer, by its name in the model, is pruned more slowly
        controls=["reinit", "shuffle"],
        init="xavier_normal",
        sparse=SPARSE_BELOW,  # compressed layers where they pay
        out=out,
    )
    for run in search:  # the dense network, then tickets and controls, level by level
        optimizer = torch.optim.Adam(run.model.parameters(), lr=1.2e-3)
        for iteration in range(run.restore(optimizer=optimizer) + 1, iterations + 1):
            chosen = torch.randint(len(images.train), (batch,), generator=run.generator)
            loss = F.cross_entropy(run.model(images.train.x[chosen]), images.train.y[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if iteration % evaluate_every == 0:
                with torch.no_grad():
                    val_loss = F.cross_entropy(run.model(images.val.x), images.val.y)
                    right = run.model(images.test.x).argmax(1) == images.test.y
                run.log(iteration, val_loss=val_loss, test_accuracy=right.float().mean())
            run.step(iteration)  # keeps a checkpoint now and then
        print(f"{run}: {run.points[-1]['test_accuracy']:.1%}")
    print(f"initperf report {out}")


if __name__ == "__main__":
    main(*sys.argv[1:2])
