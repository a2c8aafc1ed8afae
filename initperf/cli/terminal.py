"""What the command line draws with rich: tables, and the progress of a run."""

from __future__ import annotations

from typing import Any

from initperf.core.extras import needed
from initperf.core.tables import Table, percent
from initperf.report.words.findings import name_of

with needed("cli"):
    from rich import box
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    from rich.table import Table as RichTable

LOG_WIDTH = 150  # where there is no terminal to ask


def open_console() -> Console:
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=LOG_WIDTH)


def show(console: Console, table: Table) -> None:
    """Print a table; the ticket's rows stand out."""
    drawn = RichTable(
        title=table.title,
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        show_header=any(table.columns),
    )
    for column in table.columns:
        drawn.add_column(column, overflow="fold")
    groups = any(not row[0] for row in table.rows)
    for row in table.rows:
        if groups and row[0] and drawn.row_count:
            drawn.add_section()
        drawn.add_row(*row, style="bold cyan" if "ticket" in row[1:2] else "")
    console.print(drawn)
    for note in table.notes:
        console.print(note, style="dim", markup=False)
    console.print()


class Bars:
    """Progress of run_ticket: networks trained, and the one in training; lines of text where there is no terminal."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.networks = self.done = self.tenths = 0
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
        )
        self._all = self._progress.add_task("networks", total=None)
        self._one = self._progress.add_task("training", total=None, visible=False)

    def __enter__(self) -> Bars:
        if self.console.is_terminal:
            self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.console.is_terminal:
            self._progress.stop()

    def on(self, event: dict[str, Any]) -> None:
        """An event of run_ticket."""
        what = event["event"]
        if "networks" in event:
            self.networks, self.done = event["networks"], event["done"]
            self._progress.update(self._all, total=self.networks, completed=self.done)
        if what == "start":
            self._start(event)
        elif what == "step":
            text = f"{name_of(event['kind'])} at {percent(event['density'])}, trial {event['trial'] + 1}"
            self._progress.update(
                self._one, description=text, total=event["iterations"], completed=event["iteration"], visible=True
            )
        elif what == "steps" and event["trained"]:
            self._saved(event)
        elif what == "measure":
            self._progress.update(self._one, description="timing steps", total=None, visible=True)
        elif what == "network" and not self.console.is_terminal:
            tenths, self.tenths = self.tenths, self.done * 10 // self.networks
            if self.tenths > tenths:
                self.console.print(f"{self.done} of {self.networks} networks")

    def _start(self, event: dict[str, Any]) -> None:
        label = f" ({event['label']})" if event.get("label") else ""
        if self.done == self.networks:
            state = ": finished before; only the report is made again"
        elif self.done:
            state = f": going on after {self.done} of {self.networks} networks"
        else:
            state = f": {self.networks} networks to train"
        self.console.print(f"{event['recipe']}{label}{state}", markup=False)
        self.console.print(event["about"], style="dim", markup=False)
        if event["reduced"]:
            reduced = ", ".join(f"{what} {much}" for what, much in event["reduced"].items())
            self.console.print(f"Less than the recipe: {reduced}", style="dim", markup=False)

    def _saved(self, event: dict[str, Any]) -> None:
        """What compressed layers saved; a loss is a negative saving, and said as it is."""
        last = event["rows"][-1]
        self.console.print(
            f"{event['trained']} networks below density {event['below']:g} trained on compressed layers in {event['seconds']:,.1f} s, "
            f"by the steps timed {event['saved_to_dense']:,.1f} s less than dense, {event['saved_to_masked']:,.1f} s less than "
            f"masked; at {percent(last['density'])} a step takes {last['sparse_ms']:.3g} ms, dense {last['dense_ms']:.3g}, "
            f"masked {last['masked_ms']:.3g}.",
            markup=False,
        )
