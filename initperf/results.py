"""A ticket run as numbers: reads a run folder and compares the ticket with every control, trial by trial."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any, NamedTuple

from initperf.checks import fail

CONFIDENCE = 0.95
NAMES = {
    "ticket": "ticket",
    "reinit": "re-initialized",
    "sign-reinit": "re-initialized, signs kept",
    "shuffle": "shuffled",
    "random": "random",
    "small-dense": "small dense",
}


class Spread(NamedTuple):
    """Mean, least and greatest over trials."""

    mean: float
    low: float
    high: float
    trials: int


class Difference(NamedTuple):
    """Mean of paired differences with its 95% interval (Student's t); the interval is NaN below two trials."""

    mean: float
    low: float
    high: float
    trials: int

    @property
    def sign(self) -> int:
        """1: above zero with 95% confidence, -1: below zero, 0: undecided."""
        return int(self.low > 0) - int(self.high < 0)


class Reach(NamedTuple):
    """When trials reached a goal: the median iteration, infinite where half of them or more never did."""

    median: float
    never: int
    networks: int


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


class Point(NamedTuple):
    """One evaluation during training."""

    trial: int
    level: int
    kind: str
    iteration: int
    val_loss: float


class Step(NamedTuple):
    """A training step at one density: milliseconds, dense and masked."""

    level: int
    density: float
    batch: int
    dense_ms: float
    masked_ms: float

    @property
    def speedup(self) -> float:
        """How many times faster than dense; below 1 the mask costs time."""
        return self.dense_ms / self.masked_ms


def t_cdf(t: float, freedom: int) -> float:
    """P(T <= t) of Student's t with whole degrees of freedom (Abramowitz & Stegun 26.7.3, 26.7.4)."""
    angle = math.atan(t / math.sqrt(freedom))
    odd = freedom % 2
    term, total = (math.cos(angle) if odd else 1.0), 0.0
    for k in range(1 + odd, freedom, 2):
        total += term
        term *= math.cos(angle) ** 2 * k / (k + 1)
    area = math.sin(angle) * total
    return 0.5 + ((angle + area) / math.pi if odd else area / 2)


def t_quantile(probability: float, freedom: int) -> float:
    """The t with P(T <= t) = probability, by bisection to the last bit; probability in [0.5, 1)."""
    low, high = 0.0, 1.0
    while t_cdf(high, freedom) < probability:
        high *= 2
    while low < (middle := (low + high) / 2) < high:
        low, high = (middle, high) if t_cdf(middle, freedom) < probability else (low, middle)
    return high


def spread(values: Iterable[float]) -> Spread:
    """Mean and range of at least one value."""
    values = list(values)
    return Spread(fmean(values), min(values), max(values), len(values))


def paired_difference(differences: Iterable[float]) -> Difference:
    """Mean and 95% interval of paired differences: mean +- t(0.975, n - 1) * s / sqrt(n)."""
    values = list(differences)
    mean, count = fmean(values), len(values)
    if count < 2:
        return Difference(mean, math.nan, math.nan, count)
    half = t_quantile((1 + CONFIDENCE) / 2, count - 1) * stdev(values) / math.sqrt(count)
    return Difference(mean, mean - half, mean + half, count)


@dataclass(frozen=True)
class Run:
    """A run folder, read. Level 0 is the dense network, with kind "ticket"."""

    folder: Path
    config: dict[str, Any]
    rows: list[Row]
    points: list[Point]
    steps: list[Step]
    summary: dict[str, Any]

    @property
    def levels(self) -> list[int]:
        """Those with a trained ticket, in order."""
        return sorted({row.level for row in self.rows if row.kind == "ticket"})

    @property
    def trials(self) -> int:
        return len({row.trial for row in self.rows})

    @property
    def planned(self) -> int:
        """Networks that config.json asks for; those of `rows` may be fewer."""
        try:
            rounds, trials = int(self.config["rounds"]), int(self.config["trials"])
            controls = list(self.config["controls"])
            a_level = 1 + len(controls) + ("reinit" in controls) * (int(self.config.get("reinits", 1)) - 1)
        except (KeyError, TypeError, ValueError):
            return len(self.rows)
        return trials * (1 + rounds * a_level)

    @property
    def kinds(self) -> list[str]:
        """The networks of this run: the ticket, then its controls."""
        found = {row.kind for row in self.rows}
        return [kind for kind in NAMES if kind in found] + sorted(found - set(NAMES))

    @property
    def controls(self) -> list[str]:
        return self.kinds[1:]

    def density(self, level: int) -> float:
        """Surviving fraction of the weights, mean over trials."""
        return fmean(row.density for row in self.rows if row.level == level and row.kind == "ticket")

    def by_trial(self, level: int, kind: str, column: str) -> dict[int, float]:
        """trial -> value; several networks of one trial (repeated re-initializations) count as their mean."""
        found: dict[int, list[float]] = {}
        for row in self.rows:
            if row.level == level and row.kind == kind:
                found.setdefault(row.trial, []).append(getattr(row, column))
        return {trial: fmean(values) for trial, values in sorted(found.items())}

    def spread(self, level: int, kind: str, column: str) -> Spread | None:
        """Over trials, or None where there is no such network."""
        values = self.by_trial(level, kind, column)
        return spread(values.values()) if values else None

    def lead(
        self, level: int, kind: str, column: str = "early_stop_test_accuracy", base: int | None = None
    ) -> Difference | None:
        """Ticket minus `kind`, paired by trial, at one level (the other network taken from level `base` if given)."""
        ours = self.by_trial(level, "ticket", column)
        other = self.by_trial(level if base is None else base, kind, column)
        both = ours.keys() & other.keys()
        return paired_difference(ours[trial] - other[trial] for trial in sorted(both)) if both else None

    def reach(self, level: int, kind: str) -> Reach | None:
        """When the networks reached the dense network's best validation loss."""
        values = [row.iterations_to_dense_best for row in self.rows if row.level == level and row.kind == kind]
        if not values:
            return None
        return Reach(median(math.inf if v is None else v for v in values), values.count(None), len(values))

    def stopped_at_the_end(self, level: int, kind: str) -> int:
        """Networks whose validation loss was least at the last iteration: they may have gone on improving."""
        return sum(
            row.early_stop_iteration >= row.iterations for row in self.rows if row.level == level and row.kind == kind
        )

    def wins(self, level: int) -> bool:
        """The paper's winning ticket, on the means: at least the dense network's accuracy, no later."""
        lead = self.lead(level, "ticket", base=0)
        ours, dense = (self.spread(at, "ticket", "early_stop_iteration") for at in (level, 0))
        return bool(lead and ours and dense and lead.mean >= 0 and ours.mean <= dense.mean)


def _accuracy(text: str) -> float:
    if not text:
        raise ValueError("no test accuracy (run.log(iteration, val_loss=..., test_accuracy=...) records it)")
    return float(text)


def _optional_int(text: str) -> int | None:
    return int(text) if text else None


_ROW: dict[str, Callable[[str], Any]] = {
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
_POINT: dict[str, Callable[[str], Any]] = {"trial": int, "level": int, "kind": str, "iteration": int, "val_loss": float}
_STEP: dict[str, Callable[[str], Any]] = {
    "level": int,
    "density": float,
    "batch": int,
    "dense_ms": float,
    "masked_ms": float,
}


def _table(path: Path, columns: dict[str, Callable[[str], Any]], make: Callable[..., Any]) -> list[Any]:
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        missing = columns.keys() - set(reader.fieldnames or ())
        if missing:
            fail(f"{path} to have the columns {', '.join(columns)}", f"none named {', '.join(sorted(missing))}")
        rows = []
        for row in reader:
            try:
                rows.append(make(*(convert(row[column]) for column, convert in columns.items())))
            except (ValueError, TypeError) as error:
                fail(f"a number for each of {', '.join(columns)} in line {reader.line_num} of {path}", error)
    return rows


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        fail(f"JSON in {path}", error)
    return found if isinstance(found, dict) else fail(f"a JSON object in {path}", type(found).__name__)


def read_run(folder: str | Path) -> Run:
    """Read a run folder. curves.csv, steps.csv and summary.json may be absent (a run that was cut off); results.csv may not."""
    folder = Path(folder)
    if not folder.is_dir():
        fail("a run folder (made by `initperf ticket --out FOLDER`)", f"{folder}, which is not a folder")
    for name in ("config.json", "results.csv"):
        if not (folder / name).is_file():
            fail(f"{name} in the run folder {folder}", "no such file: is this the folder that --out named?")
    rows = _table(folder / "results.csv", _ROW, Row)
    if not any(row.level == 0 and row.kind == "ticket" for row in rows):
        fail(f"the dense network (level 0) in {folder / 'results.csv'}", f"{len(rows)} rows without it")
    return Run(
        folder,
        _json(folder / "config.json"),
        rows,
        _table(folder / "curves.csv", _POINT, Point) if (folder / "curves.csv").is_file() else [],
        _table(folder / "steps.csv", _STEP, Step) if (folder / "steps.csv").is_file() else [],
        _json(folder / "summary.json") if (folder / "summary.json").is_file() else {},
    )
