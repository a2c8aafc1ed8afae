"""`initperf experiment`: the side experiments around the lottery ticket. Heavy modules are imported when it runs."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

from initperf.core.extras import needed

with needed("cli"):
    import typer


class Experiment(str, Enum):
    width = "width"
    rescale = "rescale"
    larger_init = "larger-init"
    scratch = "scratch"
    structured = "structured"


class ImageSet(str, Enum):
    digits = "digits"
    mnist = "mnist"


def experiment(
    name: Annotated[
        Experiment,
        typer.Argument(
            help="width: networks of several widths pruned to equally many survivors. rescale: survivors scaled to the dense "
            "variance in four modes. larger-init: Xavier x 1, sqrt 2, sqrt 10 for the whole network. scratch: Liu et al., "
            "training from scratch for equal epochs and equal compute, at two learning rates. structured: the same for whole units "
            "that are pruned."
        ),
    ],
    data: Annotated[
        ImageSet, typer.Option(help="digits ships with the package; mnist is read from --data-dir.")
    ] = ImageSet.digits,
    data_dir: Annotated[Path | None, typer.Option(help="Folder with the MNIST IDX files.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder; an unfinished experiment in it goes on. [default: runs/NAME]")
    ] = None,
    iterations: Annotated[int | None, typer.Option(min=1, help="Training iterations of every network.")] = None,
    trials: Annotated[int | None, typer.Option(min=1, help="Repetitions with seeds of their own.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of everything.")] = 0,
) -> None:
    """Run a side experiment: raw numbers as CSV, a figure, and a table.

    The same command again continues one that was interrupted; in a second terminal at once, it shares the work.
    """
    from initperf.cli.terminal import open_console, show
    from initperf.experiments.side.side import run_experiment

    console = open_console()
    with console.status(name.value) as status:
        outcome, files = run_experiment(
            name.value,
            data.value,
            data_dir,
            out or Path("runs") / name.value,
            iterations=iterations,
            trials=trials,
            seed=seed,
            progress=lambda text: status.update(f"{name.value}: {text}"),
        )
    for table in outcome.tables:
        show(console, table)
    for file in files:
        console.print(str(file), soft_wrap=True, markup=False)
