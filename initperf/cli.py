"""The command line. Heavy modules are imported by the command that needs them: --help and --version import no torch."""

from __future__ import annotations

import json
import sys
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from initperf import __version__

if TYPE_CHECKING:
    from rich.console import Console

    from initperf.findings import Table
    from initperf.results import Run

app = typer.Typer(
    name="initperf",
    help="Weight initialization, lottery tickets and layer variance for PyTorch.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
LOG_WIDTH = 150  # where there is no terminal to ask
INTERRUPTED = 130


class Data(str, Enum):
    digits = "digits"
    mnist = "mnist"


def main(args: list[str] | None = None) -> int:
    """Run the command line; every foreseeable problem is one line on stderr: exit code 1, or 2 for wrong usage."""
    try:
        code = app(args, standalone_mode=False)
    except typer.Abort:
        return _problem("Interrupted.", INTERRUPTED)
    except OSError as error:
        where = f": {error.filename}" if error.filename else ""
        return _problem(f"{error.strerror or error}{where}.")
    except Exception as error:
        if hasattr(error, "format_message"):  # a usage error of typer
            context = getattr(error, "ctx", None)
            command = context.command_path if context else "initperf"
            if not error.format_message():  # no command given: the help has been printed
                return 2
            return _problem(f"{error.format_message()} (`{command} --help` lists the options.)", 2)
        from initperf.checks import InitPerfError

        if not isinstance(error, InitPerfError):
            raise
        return _problem(str(error))
    return code if isinstance(code, int) else 0


def _problem(message: str, code: int = 1) -> int:
    print(f"initperf: {' '.join(message.split())}", file=sys.stderr)
    return code


def _console() -> Console:
    from rich.console import Console

    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=LOG_WIDTH)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"initperf {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


@app.command()
def ticket(
    data: Annotated[
        Data, typer.Option(help="digits ships with the package; mnist is read from --data-dir.")
    ] = Data.digits,
    data_dir: Annotated[Path | None, typer.Option(help="Folder with the MNIST IDX files.")] = None,
    out: Annotated[Path, typer.Option(help="Run folder; an unfinished run in it goes on.")] = Path("runs/ticket"),
    recipe: Annotated[str | None, typer.Option(help="Named recipe; the data choose one if not given.")] = None,
    rounds: Annotated[int | None, typer.Option("--rounds", "--levels", min=1, help="Rounds of pruning.")] = None,
    iterations: Annotated[int | None, typer.Option(min=1, help="Training iterations of every network.")] = None,
    trials: Annotated[int | None, typer.Option(min=1, help="Repetitions with seeds of their own.")] = None,
    lr: Annotated[float | None, typer.Option(min=0, help="Learning rate.")] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Batch size.")] = None,
    controls: Annotated[
        str | None, typer.Option(help="Any of reinit,shuffle,random,small-dense, with commas; none for no control.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of everything: weights, data order, controls.")] = 0,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes that train networks side by side.")] = None,
) -> None:
    """Find a lottery ticket: train, prune, rewind, compare with every control, and write a report.

    The same command again continues a run that was interrupted.
    """
    from initperf.experiments.lenet import run_ticket

    console = _console()
    names = None if controls is None else [name for name in controls.split(",") if name not in ("", "none")]
    given = {"recipe": recipe, "rounds": rounds, "iterations": iterations, "trials": trials, "lr": lr, "batch": batch}
    with _Bars(console) as bars:
        try:
            folder = run_ticket(
                data.value, data_dir, out, **given, controls=names, seed=seed, workers=workers, progress=bars.on
            )
        except KeyboardInterrupt:
            bars.stop()
            kept = f" {bars.done} of {bars.networks} networks are kept in {out};" if bars.networks else ""
            raise typer.Exit(
                _problem(f"Interrupted.{kept} the same command again goes on from there.", INTERRUPTED)
            ) from None
    _show_run(console, folder)


class _Bars:
    """Progress of a run: networks trained, and the iteration of the one in training; lines of text where there is no terminal."""

    def __init__(self, console: Console) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self.console = console
        self.networks = self.done = self.printed = 0
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

    def __enter__(self) -> _Bars:
        if self.console.is_terminal:
            self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        if self.console.is_terminal:
            self._progress.stop()

    def on(self, event: dict[str, Any]) -> None:
        """An event of run_ticket."""
        from initperf.findings import name_of, percent

        what = event["event"]
        if "networks" in event:
            self.networks, self.done = event["networks"], event["done"]
            self._progress.update(self._all, total=self.networks, completed=self.done)
        if what == "start":
            label = f" ({event['label']})" if event.get("label") else ""
            state = f", {self.done} done before" if 0 < self.done < self.networks else ""
            state = ", all done before: only the report is made again" if self.done == self.networks else state
            self.console.print(f"{event['recipe']}{label}: {self.networks} networks{state}")
        elif what == "step":
            text = f"{name_of(event['kind'])} at {percent(event['density'])}, trial {event['trial'] + 1}"
            self._progress.update(
                self._one, description=text, total=event["iterations"], completed=event["iteration"], visible=True
            )
        elif what == "measure":
            self._progress.update(self._one, description="timing of steps", total=None)
        elif what == "network" and not self.console.is_terminal and self.done * 10 // self.networks > self.printed:
            self.printed = self.done * 10 // self.networks
            self.console.print(f"{self.done} of {self.networks} networks")


def _show_run(console: Console, folder: Path, compare: Path | None = None) -> None:
    """Print the tables, write the report."""
    from initperf.findings import tables, verdict
    from initperf.report import write_report
    from initperf.results import read_run

    run: Run = read_run(folder)
    page = write_report(folder, compare)
    for table in tables(run):
        _show(console, table)
    found = verdict(run)
    if run.config.get("budget"):
        console.print(f"\n[bold yellow]{run.config['budget']}[/]")
    console.print(f"\n[bold]{found.headline}[/]")
    for sentence in found.sentences:
        console.print(f"  {sentence}")
    console.print(f"\nReport: [bold]{page}[/]", soft_wrap=True)


def _show(console: Console, table: Table) -> None:
    from rich import box
    from rich.table import Table as RichTable

    shown = RichTable(title=table.title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in table.columns:
        shown.add_column(column, overflow="fold")
    for row in table.rows:
        if row[0] and shown.row_count and len(table.columns) > 6:
            shown.add_section()
        shown.add_row(*row, style="bold cyan" if "ticket" in row[1:2] else "")
    console.print(shown)
    for note in table.notes:
        console.print(note, style="dim")
    console.print()


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="Run folder of `initperf ticket`.")],
    compare: Annotated[
        Path | None, typer.Option(help="A second run to set beside it, another learning rate say.")
    ] = None,
) -> None:
    """Print the tables of a run again and rewrite its report.html."""
    _show_run(_console(), run, compare)


@app.command()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="For machines.")] = False,
    check: Annotated[bool, typer.Option(help="Compare the compiled kernels with the reference.")] = True,
) -> None:
    """Show versions, devices, which backend runs each op, and what is missing and how to get it."""
    from initperf.doctor import examine, show

    found = examine(check=check)
    if as_json:
        typer.echo(json.dumps(found, indent=2))
    else:
        show(found, _console())
    if not all(op["equal"] in (True, None) for op in found["ops"].values()):
        raise typer.Exit(1)


if __name__ == "__main__":
    sys.exit(main())
