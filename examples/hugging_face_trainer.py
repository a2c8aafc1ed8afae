"""A ticket search around Hugging Face's Trainer: python examples/hugging_face_trainer.py [FOLDER]

Stop it whenever you like: the same command goes on with the network that was in training.
"""

import sys
import tempfile

import torch
from torch import nn
from torch.nn import functional as F
from transformers import Trainer, TrainerCallback, TrainingArguments

from initperf import TicketSearch
from initperf.experiments.data.sets import digits
from initperf.search import SPARSE_BELOW


class Classifier(nn.Module):
    """What Trainer asks of a model: arguments by name, a dict with the loss."""

    def __init__(self):
        super().__init__()
        self.fc1, self.fc2, self.fc3 = nn.Linear(64, 300), nn.Linear(300, 100), nn.Linear(100, 10)

    def forward(self, x, labels):
        logits = self.fc3(self.fc2(self.fc1(x).relu()).relu())
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


class Logs(TrainerCallback):
    """Trainer evaluates the validation set; the test set is added here."""

    def __init__(self, run, test):
        self.run, self.test = run, test

    @torch.no_grad()
    def on_evaluate(self, args, state, control, metrics, model, **_):
        right = model(self.test.x, self.test.y)["logits"].argmax(1) == self.test.y
        self.run.log(state.global_step, val_loss=metrics["eval_loss"], test_accuracy=right.float().mean())


def examples(split):
    return [{"x": x, "labels": y} for x, y in zip(split.x, split.y, strict=True)]


def main(out="runs/hugging-face", rounds=2, iterations=300, evaluate_every=20, batch=60):
    images = digits()
    search = TicketSearch(
        Classifier,
        rounds=rounds,
        fractions={"fc*.weight": 0.6, "fc3.weight": 0.3},
        controls=["reinit"],
        init="xavier_normal",
        sparse=SPARSE_BELOW,
        out=out,
    )
    for run in search:
        arguments = TrainingArguments(
            tempfile.gettempdir(),
            max_steps=iterations,
            per_device_train_batch_size=batch,
            per_device_eval_batch_size=300,
            eval_strategy="steps",
            eval_steps=evaluate_every,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            seed=run.data_seed % 2**32,  # the run's data order
            learning_rate=1.2e-3,
            lr_scheduler_type="constant",
        )
        data = {"train_dataset": examples(images.train), "eval_dataset": examples(images.val)}
        Trainer(run.model, arguments, callbacks=[Logs(run, images.test)], **data).train()
        print(f"{run}: {run.points[-1]['test_accuracy']:.1%}")
    print(f"initperf report {out}")


if __name__ == "__main__":
    main(*sys.argv[1:2])
