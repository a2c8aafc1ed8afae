"""The command line. Heavy modules are imported by the command that needs them: --help and --version import no torch."""

from __future__ import annotations

import json
import math
import sys
from enum import Enum
from pathlib import Path
from typing import Annotated

from initperf import __version__
from initperf.cli.experiment import experiment
from initperf.core.extras import need, needed

with needed("cli"):
    import typer

app = typer.Typer(
    name="initperf",
    help="Weight initialization, lottery tickets and layer variance for PyTorch.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
INTERRUPTED = 130


class _Interrupted(Exception):
    """Ctrl-C, with what to do next."""


class Data(str, Enum):
    digits = "digits"
    mnist = "mnist"
    cifar10 = "cifar10"


def main(args: list[str] | None = None) -> int:
    """Run the command line; every foreseeable problem is one line on stderr: exit code 1, or 2 for wrong usage."""
    try:
        code = app(args, prog_name="initperf", standalone_mode=False)
    except _Interrupted as error:
        return _problem(str(error), INTERRUPTED)
    except (KeyboardInterrupt, typer.Abort):
        return _problem("Interrupted.", INTERRUPTED)
    except OSError as error:
        where = error.filename2 or error.filename  # of a rename, its target: the other one is our temporary file
        return _problem(f"{error.strerror or error}{f': {where}' if where else ''}.")
    except Exception as error:
        if hasattr(error, "format_message"):  # a usage error of typer
            context = getattr(error, "ctx", None)
            command = context.command_path if context else "initperf"
            if not error.format_message():  # no command given: the help has been printed
                return 2
            return _problem(f"{error.format_message()} (`{command} --help` lists the options.)", 2)
        from initperf.core.checks import InitPerfError

        if not isinstance(error, InitPerfError):
            raise
        return _problem(str(error))
    if code == INTERRUPTED:  # how typer passes on Ctrl-C
        return _problem("Interrupted.", INTERRUPTED)
    return code if isinstance(code, int) else 0


def _problem(message: str, code: int = 1) -> int:
    print(f"initperf: {' '.join(message.split())}", file=sys.stderr)
    return code


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
        Data | None,
        typer.Option(help="If not given, the recipe or the files in --data-dir tell; without both, digits."),
    ] = None,
    data_dir: Annotated[
        Path | None, typer.Option(help="Folder with IDX files (MNIST or any set of its format), or CIFAR-10.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Run folder; an unfinished run in it goes on.")] = Path("runs/ticket"),
    recipe: Annotated[
        str | None, typer.Option(help="digits, lenet-paper, lenet-open-lth, conv2, conv4, conv6; the data choose one.")
    ] = None,
    budget: Annotated[
        str | None, typer.Option(help="quick, medium or paper; if not given quick, and for digits paper.")
    ] = None,
    rounds: Annotated[int | None, typer.Option("--rounds", "--levels", min=1, help="Rounds of pruning.")] = None,
    iterations: Annotated[int | None, typer.Option(min=1, help="Training iterations of every network.")] = None,
    trials: Annotated[int | None, typer.Option(min=1, help="Repetitions with seeds of their own.")] = None,
    lr: Annotated[float | None, typer.Option(min=0, help="Learning rate.")] = None,
    control_lrs: Annotated[
        str | None, typer.Option(help="Learning rates, with commas, at which ticket and controls train, too.")
    ] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Batch size.")] = None,
    controls: Annotated[
        str | None,
        typer.Option(help="Any of reinit,sign-reinit,shuffle,random,small-dense, with commas; all; none."),
    ] = None,
    setting: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="NAME=VALUE", help="Any other number of the recipe: warmup=100, evaluate_every=50."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of everything: weights, data order, controls.")] = 0,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes that train networks side by side.")] = None,
) -> None:
    """Find a lottery ticket: train, prune, rewind, compare with every control, and write a report.

    The same command again continues a run that was interrupted.
    """
    need("report")  # before the training, and not after it
    from initperf.cli.terminal import Bars, open_console
    from initperf.core.checks import check
    from initperf.experiments.tickets import run_ticket
    from initperf.tickets.run_folder import KINDS

    check(lr is None or 0 < lr < math.inf, "--lr, the learning rate, to be above 0 and finite", lr)
    settings = list(setting or []) + ([f"learning_rates={control_lrs}"] if control_lrs else [])
    names = None
    if controls is not None:
        names = KINDS[1:] if controls == "all" else [name for name in controls.split(",") if name not in ("", "none")]
    with Bars(open_console()) as bars:
        try:
            folder = run_ticket(
                data.value if data else None,
                data_dir,
                out,
                recipe=recipe,
                budget=budget,
                rounds=rounds,
                iterations=iterations,
                trials=trials,
                lr=lr,
                batch=batch,
                controls=names if names is None else tuple(names),
                settings=settings,
                seed=seed,
                workers=workers,
                progress=bars.on,
            )
        except KeyboardInterrupt:
            kept = f" {bars.done} of {bars.networks} networks are kept in {out};" if bars.networks else ""
            raise _Interrupted(f"Interrupted.{kept} the same command again goes on from there.") from None
    _show_run(folder)


def _show_run(folder: Path, compare: Path | None = None) -> None:
    """Print the tables, write the report."""
    from initperf.cli.terminal import open_console, show
    from initperf.report.numbers.results import read_run
    from initperf.report.page import write_report
    from initperf.report.words.findings import labels, tables, verdict
    from initperf.report.words.movement import own_rates_sentence, own_rates_table

    run = read_run(folder)
    page = write_report(folder, compare)
    console = open_console()
    levels, *others = tables(run)
    for table in (levels, own_rates_table(run), *others):
        if table:
            show(console, table)
    found = verdict(run)
    for label in labels(run):
        console.print(label, style="bold yellow", markup=False)
    console.print(found.headline, style="bold", markup=False)
    for sentence in [*found.sentences, *own_rates_sentence(run)]:
        console.print(f"  {sentence}", markup=False)
    console.print(f"\nReport: {page}", soft_wrap=True, markup=False)


app.command()(experiment)


@app.command()
def variance(
    out: Annotated[Path, typer.Option(help="Folder for variance.csv and variance.png.")] = Path("runs/variance"),
    depth: Annotated[int, typer.Option(min=2, help="Hidden layers.")] = 50,
    width: Annotated[int, typer.Option(min=1, help="Units of a hidden layer.")] = 100,
    inputs: Annotated[int, typer.Option(min=1, help="Dimensions of the input.")] = 100,
    batch: Annotated[int, typer.Option(min=2, help="Inputs, standard normal.")] = 1000,
    variances: Annotated[str, typer.Option(help="Variances of a weight, with commas.")] = "0.001,0.01,0.02,0.1,1",
    init: Annotated[
        str,
        typer.Option(help="Named initializations beside them, with commas: default (PyTorch's), kaiming_normal, ..."),
    ] = "default",
    activation: Annotated[str, typer.Option(help="relu, leaky_relu, tanh, gelu, selu, linear.")] = "relu",
    density: Annotated[float, typer.Option(help="Surviving fraction of every weight matrix.")] = 1.0,
    mask: Annotated[
        str, typer.Option(help="What survives: random, magnitude, rewound; several with commas.")
    ] = "random",
    rescale: Annotated[
        str, typer.Option(help="Make up for the pruned: none, layer, unit, squares, measured; several with commas.")
    ] = "none",
    seeds: Annotated[int, typer.Option(min=1, help="Nets to average over.")] = 5,
    seed: Annotated[int, typer.Option(min=0, help="First seed.")] = 0,
) -> None:
    """Reproduce figure 7.4: the variance of activations and gradients by layer, measured and predicted."""
    from initperf.cli.terminal import open_console, show
    from initperf.core.checks import fail
    from initperf.experiments.variance.variance import run_variance
    from initperf.report.words.findings import variance_tables

    try:
        chosen = [float(v) for v in variances.split(",") if v]
    except ValueError:
        fail("--variances to be numbers with commas between them", repr(variances))
    console = open_console()
    with console.status("measuring"):
        found = run_variance(
            out,
            depth=depth,
            width=width,
            inputs=inputs,
            batch=batch,
            variances=chosen,
            init=[name for name in init.split(",") if name not in ("", "none")],
            activation=activation,
            density=density,
            mask=[name for name in mask.split(",") if name],
            rescale=[None if name == "none" else name for name in rescale.split(",") if name],
            seeds=seeds,
            seed=seed,
        )
    for table in variance_tables(found.table(), found.summary()):
        show(console, table)
    console.print(f"Every layer: {out / 'variance.csv'}\nFigure: {out / 'variance.png'}", soft_wrap=True, markup=False)


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="Run folder of `initperf ticket`.")],
    compare: Annotated[
        Path | None, typer.Option(help="A second run to set beside it, another learning rate say.")
    ] = None,
) -> None:
    """Print the tables of a run again and rewrite its report.html."""
    _show_run(run, compare)


@app.command()
def inspect(
    file: Annotated[
        Path, typer.Argument(help="A ticket, or a checkpoint: .safetensors, its index.json, or torch.save.")
    ],
    expect: Annotated[
        list[str] | None,
        typer.Option(
            metavar="GLOB=SCHEME",
            help="What a text says of these parameters: kaiming_normal, ..., or as in 'normal(0, 0.02)'. Exit 1 if one disagrees.",
        ),
    ] = None,
) -> None:
    """Show what a ticket holds and prove its hash, or which initialization explains the weights of a checkpoint."""
    from initperf.cli.inspect import tables
    from initperf.cli.terminal import open_console, show

    console = open_console()
    found, disagreements = tables(file, expect or [])
    for table in found:
        show(console, table)
    if disagreements:
        raise typer.Exit(1)


@app.command()
def export(
    file: Annotated[Path, typer.Argument(help="A ticket.")],
    dense: Annotated[Path, typer.Option(help="The .safetensors file to write.")],
) -> None:
    """Write a ticket's initial weights as a dense checkpoint, zero where pruned; it loads without initperf."""
    from initperf.tickets.ticket import Ticket

    written = Ticket.load(file).export(dense)
    typer.echo(f"{written}: {written.stat().st_size:,} bytes, from a ticket of {file.stat().st_size:,}")


@app.command()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="For machines.")] = False,
    check: Annotated[bool, typer.Option(help="Compare the compiled kernels with the reference.")] = True,
    calibrate: Annotated[
        bool, typer.Option("--calibrate", help="Measure from which density on sparse kernels pay here, and keep it.")
    ] = False,
    gpu: Annotated[
        str | None,
        typer.Option(
            help="Instead: which kernel would run on this GPU and why, on any machine: h100, a100, mi300x, ..."
        ),
    ] = None,
    dtype: Annotated[str, typer.Option(help="With --gpu: bfloat16, float16 or float32.")] = "bfloat16",
    tf32: Annotated[bool, typer.Option("--tf32", help="With --gpu: float32 products may run in TF32.")] = False,
    ticket: Annotated[Path | None, typer.Option(help="With --gpu: for the masks of this ticket.")] = None,
) -> None:
    """Show versions, devices, which backend runs each op, from which density on it pays, and what is missing and how to get it."""
    from initperf.cli.doctor import examine, tables
    from initperf.cli.terminal import open_console, show

    console = open_console()
    if gpu is not None:
        from initperf.cli.gpu_report import report as gpu_report
        from initperf.tickets.ticket import Ticket

        masks = None if ticket is None else Ticket.load(ticket).masks
        for table in gpu_report(gpu, dtype=dtype, tf32=tf32, masks=masks):
            show(console, table)
        return
    if calibrate:
        from rich.progress import track

        from initperf.layers.choice.calibrate import STEPS, steps

        for _ in track(steps(), "timing sparse and dense products", total=STEPS, console=console, disable=as_json):
            pass
    if as_json:
        found = examine(check)
        typer.echo(json.dumps(found, indent=2))
    else:
        with console.status("comparing every op with its reference; the first time, kernels are compiled"):
            found = examine(check)
        for table in tables(found):
            show(console, table)
    if any(op["equal"] is False for op in found["ops"].values()):
        raise typer.Exit(1)


if __name__ == "__main__":
    sys.exit(main())
