"""What a side experiment found: rows of its csv file, a row a trained network and trial, and their statistics."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from initperf.core.checks import check
from initperf.core.files import make_folder, write_atomically
from initperf.core.tables import Table
from initperf.report.numbers.intervals import Difference, Spread, paired_difference, spread
from initperf.report.numbers.results import Run
from initperf.tickets.run_folder import write_csv

Row = Mapping[str, Any]
ACCURACY = "early_stop_test_accuracy"


class Outcome(NamedTuple):
    """Rows, tables over trials, and a figure (SVG text)."""

    name: str
    rows: list[dict[str, Any]]
    tables: list[Table]
    figure: str

    def write(self, out: Path, about: Mapping[str, Any]) -> list[Path]:
        """OUT/<name>.csv, .svg, and .json (`about`: the recipe)."""
        make_folder(out)
        write_csv(out / f"{self.name}.csv", list(self.rows[0]), self.rows)
        write_atomically(out / f"{self.name}.svg", self.figure)
        write_atomically(out / f"{self.name}.json", json.dumps(dict(about), indent=1) + "\n")
        return [out / f"{self.name}.{end}" for end in ("csv", "svg", "json")]


def rows_of(run: Run, level: int, kind: str = "ticket", **about: Any) -> list[dict[str, Any]]:
    """The networks of one level and kind of a search, with what the experiment says of them."""
    return [
        {
            "trial": row.trial,
            **about,
            "early_stop_iteration": row.early_stop_iteration,
            ACCURACY: row.early_stop_test_accuracy,
            "final_test_accuracy": row.final_test_accuracy,
        }
        for row in run.rows
        if (row.level, row.kind) == (level, kind)
    ]


def by_trial(rows: list[Any], column: str, **where: Any) -> dict[int, float]:
    """trial -> value of the rows whose cells are as in `where`; several of one trial count as their mean."""
    found: dict[int, list[float]] = {}
    for row in rows:
        if all(row[name] == value for name, value in where.items()) and row[column] is not None:
            found.setdefault(row["trial"], []).append(float(row[column]))
    return {trial: fmean(values) for trial, values in sorted(found.items())}


def over_trials(rows: list[Any], column: str, **where: Any) -> Spread | None:
    values = by_trial(rows, column, **where)
    return spread(values.values()) if values else None


def compare(rows: list[Any], column: str, ours: Row, other: Row) -> Difference | None:
    """The networks `ours` minus `other`, paired by trial."""
    one, two = by_trial(rows, column, **ours), by_trial(rows, column, **other)
    both = sorted(one.keys() & two.keys())
    return paired_difference(one[trial] - two[trial] for trial in both) if both else None


def early_and_final(table: Callable[[str, str], Table]) -> list[Table]:
    """table(column of the accuracy, in words) for both times at which a network is judged."""
    return [table(ACCURACY, "at early stop"), table("final_test_accuracy", "at the end")]


def read_rows(path: Path) -> list[dict[str, Any]]:
    """An experiment's csv file: numbers as numbers, an empty cell as None."""
    check(path.is_file(), f"the csv file of an experiment (initperf experiment {path.stem})", f"{path}, not a file")
    with path.open(newline="", encoding="utf-8") as file:
        return [{name: _read(cell) for name, cell in row.items()} for row in csv.DictReader(file)]


def _read(cell: str) -> Any:
    for kind in (int, float):
        try:
            return kind(cell)
        except ValueError:
            pass
    return cell or None
