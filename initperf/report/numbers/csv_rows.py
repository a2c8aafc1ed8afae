"""The rows of a run folder's csv files, read and checked."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from initperf.core.checks import fail


class Row(NamedTuple):
    """One trained network; None where it never reached the dense network's best validation loss."""

    trial: int
    level: int
    kind: str
    density: float
    iterations: int
    early_stop_iteration: int
    early_stop_val_loss: float
    early_stop_test_accuracy: float
    final_test_accuracy: float
    iterations_to_dense_best: int | None
    train_seconds: float
    lr: float | None = None


class Point(NamedTuple):
    """One evaluation during training."""

    trial: int
    level: int
    kind: str
    iteration: int
    val_loss: float
    test_accuracy: float | None = None
    lr: float | None = None


class Step(NamedTuple):
    """A training step at one density: milliseconds, dense, masked and, where it was timed, compressed."""

    level: int
    density: float
    batch: int
    dense_ms: float
    masked_ms: float
    sparse_ms: float | None = None

    @property
    def speedup(self) -> float:
        """How many times faster than dense; below 1 the mask costs time."""
        return self.dense_ms / self.masked_ms

    @property
    def sparse_speedup(self) -> float | None:
        return self.dense_ms / self.sparse_ms if self.sparse_ms else None


class Moved(NamedTuple):
    """One layer's weights in one training, those kept by the pruning after it against those pruned (criteria.movement).

    measured and null: "kept_moved", "pruned_grew", "kept_flipped", ... -> value; kept and pruned are counts.
    """

    trial: int
    level: int
    parameter: str
    kept: int
    pruned: int
    measured: dict[str, float]
    null: dict[str, float]


def _accuracy(text: str) -> float:
    if not text:
        raise ValueError("no test accuracy (run.log(iteration, val_loss=..., test_accuracy=...) records it)")
    return float(text)


def _optional_int(text: str) -> int | None:
    return int(text) if text else None


ROW: dict[str, Callable[[str], Any]] = {
    "trial": int,
    "level": int,
    "kind": str,
    "density": float,
    "iterations": int,
    "early_stop_iteration": int,
    "early_stop_val_loss": float,
    "early_stop_test_accuracy": _accuracy,
    "final_test_accuracy": _accuracy,
    "iterations_to_dense_best": _optional_int,
    "train_seconds": float,
}
POINT: dict[str, Callable[[str], Any]] = {"trial": int, "level": int, "kind": str, "iteration": int, "val_loss": float}
_MOVES = [f"{part}_{name}" for part in ("kept", "pruned") for name in ("moved", "grew", "flipped")]
_MOVED: dict[str, Callable[[str], Any]] = {
    "trial": int,
    "level": int,
    "parameter": str,
    "weights": int,
    "survivors": int,
    **{f"{null}{name}": float for null in ("", "null_") for name in _MOVES},
}
STEP: dict[str, Callable[[str], Any]] = {
    "level": int,
    "density": float,
    "batch": int,
    "dense_ms": float,
    "masked_ms": float,
}


def _optional_float(text: str | None) -> float | None:
    return float(text) if text else None


def read_table(
    path: Path, columns: dict[str, Callable[[str], Any]], make: Callable[..., Any], optional: tuple[str, ...] = ()
) -> list[Any]:
    """Rows of a csv file; `optional` columns are numbers, None where the file has no such column or cell."""
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        missing = columns.keys() - set(reader.fieldnames or ())
        if missing:
            fail(f"{path} to have the columns {', '.join(columns)}", f"none named {', '.join(sorted(missing))}")
        rows = []
        for row in reader:
            try:
                values = [convert(row[column]) for column, convert in columns.items()]
                rows.append(make(*values, **{name: _optional_float(row.get(name)) for name in optional}))
            except (ValueError, TypeError) as error:
                fail(f"a number for each of {', '.join(columns)} in line {reader.line_num} of {path}", error)
    return rows


def read_movement(path: Path) -> list[Moved]:
    """movement.csv; how many weights a layer had before a pruning is what the level before left of it."""
    rows = read_table(path, _MOVED, lambda *values: dict(zip(_MOVED, values, strict=True))) if path.is_file() else []
    left = {(row["trial"], row["level"], row["parameter"]): row["survivors"] for row in rows}
    found = []
    for row in rows:
        trial, level, parameter, kept = (row[name] for name in ("trial", "level", "parameter", "survivors"))
        before = left.get((trial, level - 1, parameter), row["weights"])
        measured, null = ({name: row[f"{of}{name}"] for name in _MOVES} for of in ("", "null_"))
        found.append(Moved(trial, level, parameter, kept, before - kept, measured, null))
    return found


def read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        fail(f"JSON in {path}", error)
    return found if isinstance(found, dict) else fail(f"a JSON object in {path}", type(found).__name__)
