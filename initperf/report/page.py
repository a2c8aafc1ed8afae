"""report.html of a run folder: one self-contained page, its headline computed from the numbers."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from initperf.core.extras import need
from initperf.core.files import write_atomically
from initperf.core.tables import NONE, Table, count_of, percent, size
from initperf.report.numbers.movement import FOLDER, write_analysis
from initperf.report.numbers.results import Run, read_run
from initperf.report.numbers.survivors import Overlap, Survivors, examine
from initperf.report.style import CSS
from initperf.report.words import findings
from initperf.report.words.movement import (
    movement_table,
    overlap_table,
    own_rates_sentence,
    own_rates_table,
    side_by_side,
    survivors_table,
)

FIGURES = {
    "How weights moved": "Kept by the pruning after a training against pruned; dashed: the permutation null, which has the selection and not the training.",
    "Initial values of survivors": "Values before training of those that survive, in standard deviations of their layer's initialization (appendix F.1); dashed: all of them.",
    "Layers and masks": "Which part of every layer survives, and how many survivors two trials share.",
}


def write_report(run_dir: str | Path, compare: str | Path | None = None) -> Path:
    """Write RUN/report.html from the run's csv and json files; `compare` adds a second run (another learning rate, say)."""
    need("report")
    run = read_run(run_dir)
    other = read_run(compare) if compare is not None else None
    found = examine(run)
    write_analysis(run, *found)
    page = render(run, other, *found)
    return write_atomically(run.folder / "report.html", page)


def render(
    run: Run, other: Run | None = None, survivors: Sequence[Survivors] = (), overlaps: Sequence[Overlap] = ()
) -> str:
    """The page as text; survivors and overlaps as initperf.report.numbers.survivors.examine finds them."""
    found = findings.verdict(run)
    labels = "".join(f"<b>{escape(label)}</b>" for label in findings.labels(run))
    tag = f"Lottery ticket · {escape(str(run.config.get('recipe', run.folder.name)))}{labels}"
    parts = [
        f'<div class="tag">{tag}</div>',
        f"<h1>{escape(found.headline)}</h1>",
        _bullets([*found.sentences, *own_rates_sentence(run)]),
        _facts(run),
        _figures(run, other),
    ]
    if other is not None:
        parts.append(_comparison(run, other))
    levels, *tables = findings.tables(run)
    parts += [_table(levels), _analysis(run, list(survivors), list(overlaps))]
    parts += [_table(table) for table in tables]
    parts += [
        "<h2>Recipe</h2>",
        _table_body(["setting", "value"], [list(pair) for pair in flatten(run.config)], text=True),
        _hashes(run),
        "<h2>Limits of this run</h2>",
        _bullets(limitations(run)),
        _footer(run),
    ]
    title = f"{percent(run.density(run.levels[-1]))} of the weights · initperf"
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>{escape(title)}</title>\n'
        f"<style>{CSS}</style>\n</head>\n<body>\n<main>\n" + "\n".join(parts) + "\n</main>\n</body>\n</html>\n"
    )


def _bullets(sentences: Iterable[str]) -> str:
    return '<ul class="said">' + "".join(f"<li>{escape(s)}</li>" for s in sentences) + "</ul>"


def _facts(run: Run) -> str:
    """Three or four numbers one asks for first."""
    facts = []
    last = run.levels[-1]
    tickets, checkpoints = (
        findings.by_level(run.summary.get(f"{key}_bytes")) for key in ("ticket", "dense_checkpoint")
    )
    if last in tickets and last in checkpoints:
        ratio = checkpoints[last] / tickets[last]
        facts.append(
            (
                f"1/{ratio:.0f}",
                f"ticket file {size(tickets[last])}, dense checkpoint {size(checkpoints[last])}",
            )
        )
    for step in (s for s in run.steps if s.level == last):
        facts.append((f"{step.speedup:.2f}x", f"speed of a training step against dense, batch {step.batch}"))
    ops: dict[str, dict[str, int]] = run.summary.get("ops") or {}
    if ops:
        slow = sum(used.get("reference", 0) for used in ops.values())
        total = sum(sum(used.values()) for used in ops.values())
        facts.append(
            (
                f"{total:,}",
                "calls of ops, " + (f"{slow:,} on the reference" if slow else "none on the reference"),
            )
        )
    if "seconds" in run.summary:
        facts.append(
            (
                f"{run.summary['seconds']:,.0f} s",
                f"{count_of(len(run.rows), 'training')}, from nothing to here",
            )
        )
    return (
        '<div class="facts">'
        + "".join(f"<div><b>{escape(a)}</b><span>{escape(b)}</span></div>" for a, b in facts)
        + "</div>"
    )


def _figures(run: Run, other: Run | None) -> str:
    from initperf.report.pictures import figures

    shown = [
        (
            "Accuracy",
            "Test accuracy at early stopping; mean, and range over trials as a band.",
            figures.accuracy_figure(run, other),
            "",
        ),
        (
            "Time of a step",
            "Masked layers against dense ones on this machine; below the line they lose.",
            figures.steps_figure(run),
            "",
        ),
        (
            "How soon",
            "As the paper's figure 4: iteration of early stopping; median iteration at which the dense network's best validation loss is reached; accuracy at the end.",
            figures.speed_figure(run),
            "wide",
        ),
        (
            "Accuracy during training",
            "As the paper's figure 3: the ticket at several levels, and two levels with every control; means and ranges over trials.",
            figures.training_figure(run),
            "wide",
        ),
        ("Validation loss", "Means during training, and range over trials.", figures.curves_figure(run), "wide"),
    ]
    return '<div class="figures">' + "".join(_figure(*figure) for figure in shown) + "</div>"


def _analysis(run: Run, survivors: list[Survivors], overlaps: list[Overlap]) -> str:
    """Own learning rates, movement, initial values, overlap: as far as the run has them."""
    from initperf.report.pictures import movement as figures

    rates = own_rates_table(run)
    parts = [_table(rates)] if rates else []
    for table, title, svg in (
        (movement_table(run), "How weights moved", figures.movement_figure(run)),
        (survivors_table(run, survivors), "Initial values of survivors", figures.survivors_figure(run, survivors)),
        (overlap_table(run, overlaps), "Layers and masks", figures.layers_figure(run, survivors, overlaps)),
    ):
        if table:
            parts.append(_table(table, _figure("", FIGURES[title], svg, "wide")))
    return "".join(parts)


def _figure(title: str, caption: str, svg: str | None, css: str) -> str:
    if svg is None:
        return ""
    data = base64.b64encode(svg.encode()).decode()
    heading = f"<b>{escape(title)}</b>" if title else ""
    return (
        f'<figure class="{css}"><figcaption>{heading}{escape(caption)}</figcaption><div class="scroll">'
        f'<img alt="{escape(caption)}" src="data:image/svg+xml;base64,{data}"></div></figure>'
    )


def _table(table: Table, figure: str = "") -> str:
    notes = "".join(f'<p class="note">{escape(note)}</p>' for note in table.notes)
    return f"<h2>{escape(table.title)}</h2>{figure}" + _table_body(table.columns, table.rows) + notes


def _table_body(columns: list[str], rows: list[list[str]], text: bool = False) -> str:
    head = "".join(f"<th>{escape(column)}</th>" for column in columns)
    body = []
    for row in rows:
        css = ("group " if row[0] and not text else "") + ("ticket" if "ticket" in row[1:2] else "")
        cell = '<td class="text">' if text else "<td>"
        body.append(
            f'<tr class="{css.strip()}"><td>{escape(row[0])}</td>'
            + "".join(f"{cell}{escape(c)}</td>" for c in row[1:])
            + "</tr>"
        )
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(body)}</tbody></table></div>'


def flatten(config: dict[str, Any], prefix: str = "") -> Iterable[tuple[str, str]]:
    """Nested settings as ("recipe.lr", "0.0012") pairs."""
    for key, value in config.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield (
                f"{prefix}{key}",
                ", ".join(map(str, value)) if isinstance(value, list) else NONE if value is None else str(value),
            )


def _hashes(run: Run) -> str:
    files = sorted(run.folder.glob("tickets/*.safetensors"))
    rows = [[p.name, f"{p.stat().st_size:,}", hashlib.sha256(p.read_bytes()).hexdigest()] for p in files]
    return "<h2>Tickets</h2>" + _table_body(["file", "bytes", "SHA-256"], rows, text=True) if rows else ""


def limitations(run: Run) -> list[str]:
    """What a careful reader would object, as far as the run's own files tell."""
    found = []
    if len(run.rows) < run.planned:
        found.append(f"Unfinished: {len(run.rows)} of {run.planned} networks are trained.")
    if run.config.get("budget"):
        less = ", ".join(f"{key} {value}" for key, value in (run.config.get("reduced") or {}).items())
        found.append(
            f"{str(run.config['budget']).capitalize()}, against the recipe: {less or 'less of something that costs time'}."
        )
    if run.trials < 5:
        found.append(f"{count_of(run.trials, 'trial')}: the paper used five.")
    late = sum(row.early_stop_iteration >= row.iterations for row in run.rows)
    if late:
        found.append(
            f"{late} of {len(run.rows)} networks had their least validation loss at the last iteration, so their early stop is a "
            "lower bound; iterations to the dense network's best loss do not suffer from that."
        )
    found += [
        "The intervals are for one comparison each; over many levels and controls some will miss by chance.",
        "At its own best learning rate each network was only set beside the others in the table of those."
        if run.other_rows
        else "All networks were trained with one learning rate: a control might do better at its own best one (--control-lrs).",
        "Times hold for this machine, this batch size and these layers.",
    ]
    return found


def _comparison(run: Run, other: Run) -> str:
    """Both runs side by side: what differs in their settings, and their accuracies."""
    mine, theirs = dict(flatten(run.config)), dict(flatten(other.config))
    keys = [key for key in mine | theirs if mine.get(key) != theirs.get(key)]
    rows = [[key, mine.get(key, NONE), theirs.get(key, NONE)] for key in keys]
    same = sorted(row._replace(train_seconds=0) for row in run.rows) == sorted(
        r._replace(train_seconds=0) for r in other.rows
    )
    said = "Their results are equal in every digit." if same else findings.verdict(other).headline
    names = run.folder.resolve().name, other.folder.resolve().name
    beside, whole = side_by_side(run, other, names), findings.levels_table(other)
    return (
        f"<h2>Compared with {escape(names[1])}</h2>"
        + _bullets([said])
        + (
            _table_body(["setting", *names], rows, text=True)
            if rows
            else '<p class="note">Their settings are the same.</p>'
        )
        + (
            ""
            if same
            else (_table(beside) if beside else "") + _table(whole._replace(title=f"Every level of {names[1]}"))
        )
    )


def _footer(run: Run) -> str:
    links = [
        name
        for name in ("results.csv", "curves.csv", "movement.csv", "steps.csv", "config.json", "summary.json")
        if (run.folder / name).is_file()
    ]
    links += [f"{FOLDER}/{path.name}" for path in sorted((run.folder / FOLDER).glob("*.csv"))]
    data = run.config.get("attribution", "")
    return (
        f"<footer><p>{escape(str(data))}</p><p>Every number here comes from "
        + ", ".join(f'<a href="{name}">{name}</a>' for name in links)
        + "; <code>initperf report</code> makes the page again.</p></footer>"
    )
