"""A ticket run as numbers: reads a run folder and compares the ticket with every control, trial by trial."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean, median
from typing import Any, NamedTuple

from initperf.core.checks import fail
from initperf.report.numbers.csv_rows import (
    POINT,
    ROW,
    STEP,
    Moved,
    Point,
    Row,
    Step,
    read_json,
    read_movement,
    read_table,
)
from initperf.report.numbers.intervals import Difference, Spread, paired_difference, spread

NAMES = {
    "ticket": "ticket",
    "reinit": "re-initialized",
    "sign-reinit": "re-initialized, signs kept",
    "shuffle": "shuffled",
    "random": "random",
    "small-dense": "small dense",
}


class Reach(NamedTuple):
    """When trials reached a goal: the median iteration, infinite where half of them or more never did."""

    median: float
    never: int
    networks: int


@dataclass(frozen=True)
class Run:
    """A run folder, read. Level 0 is the dense network, with kind "ticket".

    rows and points: at the run's own learning rate; other_rows and other_points: at the other ones, if any were tried.
    """

    folder: Path
    config: dict[str, Any]
    rows: list[Row]
    points: list[Point]
    steps: list[Step]
    summary: dict[str, Any]
    movement: list[Moved] = field(default_factory=list)
    other_rows: list[Row] = field(default_factory=list)
    other_points: list[Point] = field(default_factory=list)

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

    def difference(
        self, ours: tuple[int, str], other: tuple[int, str], column: str = "early_stop_test_accuracy"
    ) -> Difference | None:
        """Network `ours` minus `other`, each (level, kind), paired by trial; None where no trial has both."""
        one, two = self.by_trial(*ours, column), self.by_trial(*other, column)
        both = sorted(one.keys() & two.keys())
        return paired_difference(one[trial] - two[trial] for trial in both) if both else None

    def lead(
        self, level: int, kind: str, column: str = "early_stop_test_accuracy", base: int | None = None
    ) -> Difference | None:
        """Ticket minus `kind`, paired by trial, at one level (the other network taken from level `base` if given)."""
        return self.difference((level, "ticket"), (level if base is None else base, kind), column)

    def own_rates(self) -> tuple[Run, dict[tuple[int, str], float]]:
        """Every network at the learning rate that is best for its level and kind, and which: least mean validation loss."""
        rows, best = [*self.rows, *self.other_rows], {}
        for level, kind in {(row.level, row.kind) for row in rows}:
            losses: dict[float, list[float]] = {}
            for row in rows:
                if (row.level, row.kind) == (level, kind) and row.lr is not None:
                    loss = row.early_stop_val_loss
                    losses.setdefault(row.lr, []).append(math.inf if math.isnan(loss) else loss)
            if losses:
                best[level, kind] = min(losses, key=lambda lr: (fmean(losses[lr]), lr))

        def chosen(found: Any) -> Any:
            return [one for one in found if one.lr == best.get((one.level, one.kind), one.lr)]

        points = chosen([*self.points, *self.other_points])
        return replace(self, rows=chosen(rows), points=points, other_rows=[], other_points=[]), best

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


def read_run(folder: str | Path) -> Run:
    """Read a run folder. curves.csv, steps.csv and summary.json may be absent (a run that was cut off); results.csv may not."""
    folder = Path(folder)
    if not folder.is_dir():
        fail("a run folder (made by `initperf ticket --out FOLDER`)", f"{folder}, which is not a folder")
    for name in ("config.json", "results.csv"):
        if not (folder / name).is_file():
            fail(f"{name} in the run folder {folder}", "no such file: is this the folder that --out named?")
    rows = read_table(folder / "results.csv", ROW, Row, ("lr",))
    if not any(row.level == 0 and row.kind == "ticket" for row in rows):
        fail(f"the dense network (level 0) in {folder / 'results.csv'}", f"{len(rows)} rows without it")
    config = read_json(folder / "config.json")
    curves, steps = folder / "curves.csv", folder / "steps.csv"
    points = read_table(curves, POINT, Point, ("test_accuracy", "lr")) if curves.is_file() else []
    rate = config.get("lr")
    rows, points = ([one._replace(lr=rate) if one.lr is None else one for one in found] for found in (rows, points))
    return Run(
        folder,
        config,
        [row for row in rows if row.lr == rate or rate is None],
        [point for point in points if point.lr == rate or rate is None],
        read_table(steps, STEP, Step, ("sparse_ms",)) if steps.is_file() else [],
        read_json(folder / "summary.json") if (folder / "summary.json").is_file() else {},
        read_movement(folder / "movement.csv"),
        [row for row in rows if row.lr != rate and rate is not None],
        [point for point in points if point.lr != rate and rate is not None],
    )
