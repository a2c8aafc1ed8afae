"""A run's numbers beyond accuracy: how its weights moved against the permutation null, and every table of the analysis as a csv file."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from initperf.core.files import make_folder
from initperf.report.numbers.csv_rows import Moved
from initperf.report.numbers.intervals import Difference, paired_difference
from initperf.report.numbers.results import Run
from initperf.report.numbers.survivors import BINS, Overlap, Survivors
from initperf.tickets.run_folder import write_csv

FOLDER = "analysis"
_COLUMNS = ("early_stop_iteration", "early_stop_test_accuracy", "final_test_accuracy")


class Gap(NamedTuple):
    """Kept minus pruned weights, mean over trials: as measured, under the null, and measured minus null, paired by trial."""

    measured: Difference
    null: Difference
    beyond: Difference

    @property
    def explained(self) -> float:
        """The share of the measured gap that the null has too: 1 where selection by magnitude explains all of it."""
        return self.null.mean / self.measured.mean if self.measured.mean else float("nan")


def movement_of(run: Run, level: int) -> dict[int, Moved]:
    """trial -> the movement of all layers together, each kept or pruned weight counting once."""
    by_trial: dict[int, list[Moved]] = {}
    for moved in run.movement:
        if moved.level == level:
            by_trial.setdefault(moved.trial, []).append(moved)
    return {trial: _pooled(layers) for trial, layers in sorted(by_trial.items())}


def _pooled(layers: list[Moved]) -> Moved:
    counts = {part: sum(getattr(m, part) for m in layers) for part in ("kept", "pruned")}

    def pool(of: str) -> dict[str, float]:
        names = layers[0].measured
        parts = {name: name.split("_")[0] for name in names}
        return {
            name: sum(getattr(m, part) * getattr(m, of)[name] for m in layers) / max(1, counts[part])
            for name, part in parts.items()
        }

    first = layers[0]
    return Moved(first.trial, first.level, "all", counts["kept"], counts["pruned"], pool("measured"), pool("null"))


def movement_gap(run: Run, level: int, what: str) -> Gap | None:
    """what: "moved" |w_T - w_0|, "grew" |w_T| - |w_0|, or "flipped", the share of sign changes."""
    moved = list(movement_of(run, level).values())
    if not moved:
        return None
    measured, null = (
        [of[f"kept_{what}"] - of[f"pruned_{what}"] for of in side]
        for side in ([m.measured for m in moved], [m.null for m in moved])
    )
    beyond = [a - b for a, b in zip(measured, null, strict=True)]
    return Gap(paired_difference(measured), paired_difference(null), paired_difference(beyond))


def growth(run: Run, level: int, what: str = "grew") -> Difference | None:
    """Of the kept weights alone, mean over trials with its interval: above 0, they moved away from zero."""
    moved = movement_of(run, level).values()
    return paired_difference(m.measured[f"kept_{what}"] for m in moved) if moved else None


def write_analysis(run: Run, survivors: Iterable[Survivors], overlaps: Iterable[Overlap]) -> list[Path]:
    """Write RUN/analysis/*.csv: levels, own_rates, movement, survivors, initial_histogram, overlap, as far as the run has them."""
    survivors = list(survivors)
    own, rates = run.own_rates()
    tables: dict[str, list[dict[str, Any]]] = {
        "levels": levels(run),
        "own_rates": levels(own, rates) if run.other_rows else [],
        "movement": _movement(run),
        "survivors": [{k: v for k, v in s._asdict().items() if k != "histogram"} for s in survivors],
        "initial_histogram": [
            {"trial": s.trial, "level": s.level, "parameter": s.parameter, "from": low, "to": high, "share": share}
            for s in survivors
            for (low, high), share in zip(pairwise(BINS), s.histogram, strict=True)
        ],
        "overlap": [o._asdict() for o in overlaps],
    }
    folder = make_folder(run.folder / FOLDER)
    paths = []
    for name, rows in tables.items():
        path = folder / f"{name}.csv"
        if rows:
            write_csv(path, list(rows[0]), rows)
            paths.append(path)
        else:
            path.unlink(missing_ok=True)
    return paths


def levels(run: Run, rates: Mapping[tuple[int, str], float] | None = None) -> list[dict[str, Any]]:
    """A row a level and network: mean, least and greatest over trials; ticket minus it, with interval; when it reached dense's best."""
    rows = []
    for level in run.levels:
        for kind in run.kinds if level else ["ticket"]:
            if run.spread(level, kind, _COLUMNS[0]) is None:
                continue
            row: dict[str, Any] = {"level": level, "kind": kind, "surviving": run.density(level)}
            if rates is not None:
                row["lr"] = rates.get((level, kind))
            for column in _COLUMNS:
                value, lead = run.spread(level, kind, column), run.lead(level, kind, column)
                row |= {f"{column}_{name}": of for name, of in zip(("mean", "min", "max"), value or (), strict=False)}
                row |= {f"{column}_lead{end}": None for end in ("", "_low", "_high")}
                if lead and kind != "ticket":
                    row |= {f"{column}_lead{end}": of for end, of in zip(("", "_low", "_high"), lead, strict=False)}
            reach = run.reach(level, kind)
            if reach:
                row |= {"to_dense_best_median": reach.median, "never": reach.never, "networks": reach.networks}
            rows.append(row | {"stopped_at_the_end": run.stopped_at_the_end(level, kind)})
    return rows


def _movement(run: Run) -> list[dict[str, Any]]:
    rows = []
    for level in run.levels:
        for what in ("moved", "grew", "flipped"):
            gap = movement_gap(run, level, what)
            if gap:
                row: dict[str, Any] = {"level": level, "surviving": run.density(level), "what": what}
                for name, value in zip(Gap._fields, gap, strict=True):
                    row |= {name: value.mean, f"{name}_low": value.low, f"{name}_high": value.high}
                rows.append(row | {"explained_by_null": gap.explained, "trials": gap.measured.trials})
    return rows
