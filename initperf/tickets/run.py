"""One network of a ticket search, as the training loop sees it."""

from __future__ import annotations

import hashlib
import io
import math
import time
from pathlib import Path
from typing import Any

import torch
from safetensors import torch as safetensors
from torch import Tensor, nn

from initperf.core.checks import check
from initperf.core.files import write_atomically
from initperf.tickets.run_folder import Network


def derive_seed(*parts: object) -> int:
    """A 64-bit seed: the first 8 bytes of SHA-256 of the parts joined by "/", little-endian."""
    return int.from_bytes(hashlib.sha256("/".join(map(str, parts)).encode()).digest()[:8], "little")


class Run:
    """One network to train: `model` (initialized, masked), and where its results go.

    kind "ticket" (level 0: the dense network) or a control; density: survivors / weights; `generator` is seeded for the
    data order, the same for all kinds of one trial and level; `start` is the iteration the weights come from (rewind_to).
    `lr` is None, or the learning rate to train at instead of the loop's own (TicketSearch's learning_rates). `layers` says
    how the weights are stored: "dense", "masked" or "sparse".
    """

    def __init__(
        self,
        network: Network,
        model: nn.Module,
        masks: dict[str, Tensor],
        *,
        density: float,
        layers: str,
        seed: int,
        data_seed: int,
        start: int,
        checkpoint: Path,
        checkpoint_seconds: float,
        rewind_point: tuple[int, Path] | None,
    ) -> None:
        self.trial, self.level, self.kind, self.repeat, self.lr = self.network = network
        self.model, self.masks, self.density, self.layers = model, masks, density, layers
        self.seed, self.data_seed, self.start = seed, data_seed, start
        self.generator = torch.Generator().manual_seed(data_seed)
        self.points: list[dict[str, Any]] = []
        self.done = False
        self._checkpoint, self._checkpoint_seconds, self._rewind_point = checkpoint, checkpoint_seconds, rewind_point
        self._states: dict[str, Any] = {}
        self._seconds, self._since, self._saved = 0.0, time.perf_counter(), time.perf_counter()

    def __repr__(self) -> str:
        lr = "" if self.lr is None else f", lr={self.lr:g}"
        return f"Run(trial={self.trial}, level={self.level}, kind={self.kind!r}, density={self.density:.4g}{lr})"

    def log(
        self,
        iteration: int,
        *,
        val_loss: float | Tensor,
        train_loss: float | Tensor | None = None,
        val_accuracy: float | Tensor | None = None,
        test_accuracy: float | Tensor | None = None,
    ) -> None:
        """One evaluation; accuracies are fractions. Early stopping is the iteration of least val_loss, found afterwards."""
        check(not self.points or iteration > self.points[-1]["iteration"], "growing iterations", iteration)
        values = {
            "train_loss": train_loss,
            "val_loss": val_loss,
            "val_accuracy": val_accuracy,
            "test_accuracy": test_accuracy,
        }
        self.points.append(
            {"iteration": int(iteration), **{k: None if v is None else float(v) for k, v in values.items()}}
        )

    def restore(self, **states: Any) -> int:
        """Register what else must survive an interruption (optimizer=..., anything with state_dict); returns the iteration
        to continue after: `start`, or that of a checkpoint, whose state the model, the generators and `states` now have."""
        self._states = states
        if not self._checkpoint.exists():
            return self.start
        saved = torch.load(self._checkpoint, weights_only=True)
        self.model.load_state_dict(saved["model"])
        for name, state in states.items():
            state.load_state_dict(saved["states"][name])
        self.generator.set_state(saved["generator"])
        torch.set_rng_state(saved["torch"])
        self.points, self._seconds = saved["points"], saved["seconds"]
        self._since = time.perf_counter()
        return int(saved["iteration"])

    def step(self, iteration: int) -> None:
        """Call after every iteration: keeps the weights to rewind to, and a checkpoint every `checkpoint_seconds`, if `restore` was called."""
        if self._rewind_point and iteration == self._rewind_point[0]:
            state = {n: t.detach().cpu().contiguous() for n, t in self.model.state_dict().items()}
            write_atomically(self._rewind_point[1], safetensors.save(state))
        now = time.perf_counter()
        if self._states and now - self._saved >= self._checkpoint_seconds:
            self._saved = now
            buffer = io.BytesIO()
            torch.save(
                {
                    "model": self.model.state_dict(),
                    "states": {name: state.state_dict() for name, state in self._states.items()},
                    "generator": self.generator.get_state(),
                    "torch": torch.get_rng_state(),
                    "points": self.points,
                    "seconds": self.seconds,
                    "iteration": iteration,
                },
                buffer,
            )
            write_atomically(self._checkpoint, buffer.getvalue())

    def row(self, goal: float | None, lr: float | None) -> dict[str, Any]:
        """What results.csv says of the network. goal: the dense network's least validation loss (None: the own); lr: the loop's own."""
        best = min(self.points, key=lambda p: math.inf if math.isnan(p["val_loss"]) else p["val_loss"])
        goal = best["val_loss"] if goal is None else goal
        reached = (p["iteration"] for p in self.points if p["val_loss"] <= goal)
        return {
            "trial": self.trial,
            "level": self.level,
            "kind": self.kind,
            "density": self.density,
            "iterations": self.points[-1]["iteration"],
            "early_stop_iteration": best["iteration"],
            "early_stop_val_loss": best["val_loss"],
            "early_stop_test_accuracy": best["test_accuracy"],
            "final_test_accuracy": self.points[-1]["test_accuracy"],
            "iterations_to_dense_best": next(reached, None),
            "seed": self.seed,
            "train_seconds": round(self.seconds, 3),
            "repeat": self.repeat,
            "lr": lr if self.lr is None else self.lr,
            "layers": self.layers,
        }

    @property
    def seconds(self) -> float:
        """Training time so far, of interrupted parts too."""
        return self._seconds + time.perf_counter() - self._since
