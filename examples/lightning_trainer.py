"""A ticket search around Lightning's Trainer: python examples/lightning_trainer.py [FOLDER]

Stop it whenever you like: the same command goes on with the network that was in training.
"""

import sys

import lightning.pytorch as pl
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from initperf import TicketSearch
from initperf.experiments.data.sets import digits
from initperf.search import SPARSE_BELOW


def make_model():
    return nn.Sequential(nn.Linear(64, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10))


class Training(pl.LightningModule):
    """Trains run.model, and logs every evaluation to the run."""

    def __init__(self, run):
        super().__init__()
        self.model, self.run = run.model, run

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1.2e-3)

    def training_step(self, batch, _):
        x, y = batch
        return F.cross_entropy(self.model(x), y)

    def validation_step(self, batch, _, dataloader_idx=0):
        x, y = batch
        scores = self.model(x)
        self.log("loss", F.cross_entropy(scores, y), batch_size=len(y))
        self.log("accuracy", (scores.argmax(1) == y).float().mean(), batch_size=len(y))

    def on_validation_epoch_end(self):
        found = self.trainer.callback_metrics
        val_loss, test_accuracy = found["loss/dataloader_idx_0"], found["accuracy/dataloader_idx_1"]
        self.run.log(self.global_step, val_loss=val_loss, test_accuracy=test_accuracy)


def main(out="runs/lightning", rounds=2, iterations=300, evaluate_every=20, batch=60):
    images = digits()
    train, val, test = (TensorDataset(s.x, s.y) for s in (images.train, images.val, images.test))
    search = TicketSearch(
        make_model,
        rounds=rounds,
        fractions={"*": 0.6, "4.weight": 0.3},
        controls=["reinit"],
        init="xavier_normal",
        sparse=SPARSE_BELOW,
        out=out,
    )
    for run in search:
        trainer = pl.Trainer(
            accelerator="cpu",
            max_steps=iterations,
            val_check_interval=evaluate_every,
            check_val_every_n_epoch=None,  # the interval counts steps, over epochs
            num_sanity_val_steps=0,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        loader = DataLoader(train, batch, shuffle=True, drop_last=True, generator=run.generator)  # the run's data order
        trainer.fit(Training(run), loader, [DataLoader(val, 300), DataLoader(test, 400)])
        print(f"{run}: {run.points[-1]['test_accuracy']:.1%}")
    print(f"initperf report {out}")


if __name__ == "__main__":
    main(*sys.argv[1:2])
