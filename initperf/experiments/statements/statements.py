"""docs/results: the statements of the papers, each marked by what was measured, with tables, figures and raw numbers.

python -m initperf.experiments.statements RUN [--conv RUN2] [--experiments DIR] --out docs/results
RUN: a run folder of LeNet-300-100 on MNIST; --conv (again for more): of Conv-2, -4, -6 on CIFAR-10; DIR: holds the folders
of `initperf experiment`, width, rescale, larger-init, scratch and structured, as far as they were run.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from initperf.core.checks import InitPerfError, check
from initperf.core.files import make_folder, write_atomically
from initperf.core.tables import Table, count_of, joined
from initperf.experiments.side.outcome import read_rows
from initperf.experiments.side.side import EXPERIMENTS
from initperf.experiments.statements.claims import NOT_REPRODUCED, NOT_TESTED, REPRODUCED, Statement
from initperf.experiments.statements.side import Rows, rethinking, review
from initperf.experiments.statements.tickets import budget_of, convolutional, lenet, movement
from initperf.report.numbers.csv_rows import read_json
from initperf.report.numbers.movement import write_analysis
from initperf.report.numbers.results import Run, read_run
from initperf.report.numbers.survivors import examine
from initperf.report.words import findings
from initperf.report.words.movement import movement_table, overlap_table, own_rates_table, survivors_table

RULES = (
    "Every verdict is computed. Differences are paired by trial; their 95% intervals are Student's t, each taken alone. A "
    "statement with a figure is *reproduced* where the interval excludes 0 on the paper's side and the effect is at least half "
    "of the paper's; one without a figure, where the interval excludes 0; *as accurate as* means that the interval stays above "
    "minus half a point; statements over several levels must hold at each. *Earlier* goes by early stopping (the iteration of "
    "least validation loss); where the end of training cuts that off, by the iteration at which the dense network's best "
    "validation loss is reached, and a network that never reaches it counts as reaching it at the end if that makes the claim "
    "harder, and as never if that does. Fewer than two trials test nothing."
)


def write_results(
    run: str | Path, out: str | Path, *, conv: Sequence[str | Path] = (), experiments: str | Path | None = None
) -> Path:
    """Write OUT/README.md, and in a folder for each run and experiment its figures (SVG) and numbers (CSV). Returns README.md."""
    main = read_run(run)
    others = {str(other.config.get("recipe")): other for other in map(read_run, conv)}
    rows, budgets = _experiments(Path(experiments) if experiments is not None else None)
    found = {
        "LeNet-300-100 on MNIST": lenet(main),
        "How weights move": movement(main),
        "Convolutional networks on CIFAR-10": convolutional(others),
        "Training from scratch": rethinking(rows, budgets),
        "Initial weights and width": review(rows, budgets),
    }
    folder = make_folder(out)
    parts = [_summary(found, [main, *others.values()], budgets), *(_statements(title, s) for title, s in found.items())]
    parts += [_run(one, folder) for one in (main, *others.values())]
    parts += [_experiment(name, rows[name], budgets[name], Path(experiments or ""), folder) for name in rows]
    return write_atomically(folder / "README.md", "\n\n".join(part for part in parts if part) + "\n")


def _experiments(folder: Path | None) -> tuple[dict[str, Rows], dict[str, str]]:
    """The rows of every experiment that is there, and how its budget is reduced."""
    if folder is None:
        return {}, {}
    check(folder.is_dir(), "a folder with the folders of experiments", folder)
    rows, budgets = {}, {}
    for name in EXPERIMENTS:
        path = folder / name / f"{name}.csv"
        if path.is_file():
            rows[name], about = read_rows(path), read_json(path.with_suffix(".json"))
            budgets[name] = ", ".join(part for part in (about["data"], about.get("budget")) if part)
    return rows, budgets


def _summary(found: dict[str, list[Statement]], runs: list[Run], budgets: dict[str, str]) -> str:
    counts = Counter(statement.verdict for statements in found.values() for statement in statements)
    total = sum(counts.values())
    verdicts = joined(f"{counts[v]} {v}" for v in (REPRODUCED, NOT_REPRODUCED, NOT_TESTED))
    lines = [f"# Results\n\nOf {total} statements {verdicts}.\n"]
    for run in runs:
        missing = f", unfinished: {len(run.rows)} of {run.planned} networks" if len(run.rows) < run.planned else ""
        less = ", ".join(f"{key} {value}" for key, value in (run.config.get("reduced") or {}).items())
        budget = f", **{budget_of(run)}** ({less})" if budget_of(run) else ", the whole recipe"
        about = f"{count_of(run.trials, 'trial')}{missing}{budget}"
        lines.append(f"- {run.config.get('recipe')}: {about}. {run.config.get('attribution', '')}")
    lines += [f"- experiment {name}{f': **{budget}**' if budget else ''}" for name, budget in budgets.items()]
    return "\n".join(lines) + f"\n\n{RULES}"


def _statements(title: str, statements: list[Statement]) -> str:
    rows = [[s.text, s.measured, f"**{s.verdict}**", s.budget] for s in statements]
    sources = joined(dict.fromkeys(s.source for s in statements))
    table = Table(f"{title} ({sources})", ["statement", "measured", "verdict", "budget"], rows, [])
    return _markdown(table)


def _markdown(table: Table) -> str:
    """A table as text that GitHub shows as one."""

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    notes = [f"\n{note}" for note in table.notes]
    body = [line(table.columns), line(["---"] * len(table.columns)), *map(line, table.rows)]
    return f"## {table.title}\n" + "\n".join(body + notes)


def _run(run: Run, folder: Path) -> str:
    """Figures and tables of a run; its numbers beside."""
    from initperf.report.pictures import figures
    from initperf.report.pictures import movement as analysis_figures

    name = str(run.config.get("recipe", run.folder.name))
    survivors, overlaps = examine(run)
    drawn = {
        "accuracy": figures.accuracy_figure(run),
        "speed": figures.speed_figure(run),
        "training": figures.training_figure(run),
        "movement": analysis_figures.movement_figure(run),
        "survivors": analysis_figures.survivors_figure(run, survivors),
        "layers": analysis_figures.layers_figure(run, survivors, overlaps),
        "steps": figures.steps_figure(run),
    }
    place = make_folder(folder / name)
    for csv in (run.folder / "results.csv", *write_analysis(run, survivors, overlaps)):
        if csv.name != "initial_histogram.csv":  # large, and drawn
            write_atomically(place / csv.name, csv.read_bytes())
    images = []
    for title, svg in drawn.items():
        if svg is not None:
            write_atomically(place / f"{title}.svg", svg)
            images.append(f"![{title}]({name}/{title}.svg)")
    tables = [
        findings.levels_table(run),
        own_rates_table(run),
        findings.steps_table(run),
        findings.files_table(run),
        movement_table(run),
        survivors_table(run, survivors),
        overlap_table(run, overlaps),
    ]
    budget = budget_of(run)
    title = f"# {name}{f' ({budget})' if budget else ''}"
    numbers = f"Raw numbers: {', '.join(f'[{p.name}]({name}/{p.name})' for p in sorted(place.glob('*.csv')))}."
    return "\n\n".join([title, *images, *(_markdown(table) for table in tables if table), numbers])


def _experiment(name: str, rows: Rows, budget: str, experiments: Path, folder: Path) -> str:
    module = import_module(EXPERIMENTS[name][0])
    place = make_folder(folder / name)
    for end in ("csv", "svg", "json"):
        write_atomically(place / f"{name}.{end}", (experiments / name / f"{name}.{end}").read_bytes())
    title = f"# Experiment {name}{f' ({budget})' if budget else ''}"
    tables = [_markdown(table) for table in module.tables(rows)]
    return "\n\n".join(
        [title, f"![{name}]({name}/{name}.svg)", *tables, f"Raw numbers: [{name}.csv]({name}/{name}.csv)."]
    )


def main(args: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m initperf.experiments.statements", description=__doc__)
    parser.add_argument("run", help="run folder of LeNet-300-100 on MNIST")
    parser.add_argument("--conv", action="append", default=[], help="run folder of Conv-2, -4 or -6 on CIFAR-10")
    parser.add_argument("--experiments", help="folder with the folders of `initperf experiment`")
    parser.add_argument("--out", default="docs/results")
    given = parser.parse_args(args)
    try:
        print(write_results(given.run, given.out, conv=given.conv, experiments=given.experiments))
    except InitPerfError as error:
        print(error, file=sys.stderr)
        return 1
    return 0
