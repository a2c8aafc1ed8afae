"""The training loop of the built-in experiments, and the timing of its steps."""

from __future__ import annotations

import ctypes
import sys
import time
from collections.abc import Callable, Mapping
from statistics import median

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from initperf.experiments.data.data_set import DataSet, Split, permutation
from initperf.experiments.recipes import Recipe
from initperf.tickets.search import Run

EVALUATION_BATCH = {2: 1000, 4: 32}  # by dimensions of the images, flat or not: larger activations leave the caches
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
TIMED_STEPS = 60
TIMED_SECONDS = 3.0  # for networks whose steps take long
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adam": lambda parameters, lr: torch.optim.Adam(parameters, lr=lr, fused=True),
    "sgd": lambda parameters, lr: torch.optim.SGD(parameters, lr=lr, fused=True),
}


def train(run: Run, data: DataSet, recipe: Recipe, tick: Callable[[Run, int], None] | None = None) -> None:
    """Train run.model for the recipe's iterations, evaluating now and then; continues from a checkpoint if there is one."""
    rate = recipe.lr if run.lr is None else run.lr
    optimizer = OPTIMIZERS[recipe.optimizer](run.model.parameters(), lr=rate)
    start = run.restore(optimizer=optimizer)
    batches = len(data.train) // recipe.batch
    order, epoch_of_order = torch.empty(0), -1
    for iteration in range(start + 1, recipe.iterations + 1):
        if iteration <= recipe.warmup:
            optimizer.param_groups[0]["lr"] = rate * iteration / recipe.warmup
        epoch, at = divmod(iteration - 1, batches)
        if epoch != epoch_of_order:
            order, epoch_of_order = permutation(len(data.train), run.data_seed, epoch), epoch
        chosen = order[at * recipe.batch : (at + 1) * recipe.batch]
        loss = step(run.model, optimizer, data.train.x[chosen], data.train.y[chosen])
        if iteration % recipe.evaluate_every == 0 or iteration == recipe.iterations:
            val_loss, val_accuracy = evaluate(run.model, data.val)
            _, test_accuracy = evaluate(run.model, data.test)
            run.log(
                iteration,
                train_loss=loss.item(),
                val_loss=val_loss,
                val_accuracy=val_accuracy,
                test_accuracy=test_accuracy,
            )
        run.step(iteration)
        if tick:
            tick(run, iteration)


def keep_freed_memory() -> None:
    """Have glibc keep large freed blocks: given back, a convolution's activations cost a third of every step to be faulted in anew."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        for option, value in ((_M_MMAP_THRESHOLD, 1 << 25), (_M_TRIM_THRESHOLD, (1 << 31) - 1)):  # the largest allowed
            mallopt(option, value)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> Tensor:
    """One training step; returns the loss."""
    optimizer.zero_grad(set_to_none=True)
    loss = F.cross_entropy(model(x), y)
    loss.backward()
    optimizer.step()
    return loss.detach()


@torch.no_grad()
def evaluate(model: nn.Module, split: Split) -> tuple[float, float]:
    """Mean cross-entropy and accuracy (a fraction) over a whole split, in large batches."""
    training = model.training
    model.eval()
    loss, right = 0.0, 0
    size = EVALUATION_BATCH[split.x.dim()]
    for x, y in zip(split.x.split(size), split.y.split(size), strict=True):
        if x.dim() == 4:  # without gradients convolution and pooling take two thirds of the time in this layout
            x = x.contiguous(memory_format=torch.channels_last)
        scores = model(x)
        loss += float(F.cross_entropy(scores, y, reduction="sum"))
        right += int((scores.argmax(1) == y).sum())
    model.train(training)
    return loss / len(split), right / len(split)


def measure_steps(models: Mapping[str, nn.Module], data: DataSet, recipe: Recipe) -> dict[str, float]:
    """Median milliseconds of a training step of each model, in alternation."""
    x, y = data.train.x[: recipe.batch].clone(), data.train.y[: recipe.batch].clone()
    optimizers = {k: OPTIMIZERS[recipe.optimizer](m.parameters(), lr=recipe.lr) for k, m in models.items()}
    for kind, model in models.items():
        for _ in range(3):  # the first build caches
            step(model, optimizers[kind], x, y)
    times: dict[str, list[float]] = {kind: [] for kind in models}
    end = time.perf_counter() + TIMED_SECONDS
    for i in range(TIMED_STEPS):
        if i >= 5 and time.perf_counter() > end:
            break
        for kind, model in models.items():
            start = time.perf_counter()
            step(model, optimizers[kind], x, y)
            times[kind].append(1e3 * (time.perf_counter() - start))
    return {kind: round(median(found), 4) for kind, found in times.items()}
