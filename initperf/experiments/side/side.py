"""What the side experiments share: searches that differ in one thing, trained by the one training loop, and what they leave behind.

Each experiment is a set of ticket searches, one folder each, so it resumes where it was interrupted, and the same command
in a second process shares the work. Every network trains on one thread: results do not depend on the number of cores.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from initperf import __version__, prune
from initperf.core.checks import check, check_seed
from initperf.experiments.data import data_set as data_set
from initperf.experiments.data import sets
from initperf.experiments.networks import mlp
from initperf.experiments.recipes import DEFAULT, Recipe, find
from initperf.experiments.side.outcome import Outcome
from initperf.experiments.training import train
from initperf.init import initialize
from initperf.report.numbers.results import Run, read_run
from initperf.tickets.run import Run as Training
from initperf.tickets.run import derive_seed
from initperf.tickets.search import TicketSearch
from initperf.tickets.ticket import Ticket, mask_layers

Init = str | Callable[[nn.Module, int], Any]
Masks = dict[str, Tensor]
SAMPLE = 256  # training images on which variances are measured
KINDS = ("ticket", "reinit", "shuffle")
EXPERIMENTS = {  # name -> module, function
    "width": ("initperf.experiments.side.width", "run_width"),
    "rescale": ("initperf.experiments.side.rescaled", "run_rescale"),
    "larger-init": ("initperf.experiments.side.larger_init", "run_larger_init"),
    "scratch": ("initperf.experiments.side.scratch", "run_scratch"),
    "structured": ("initperf.experiments.side.unit_pruning", "run_unit_pruning"),
}
VERSIONS = {"initperf": __version__, "torch": torch.__version__}


@dataclass(frozen=True)
class Setting:
    """Data, recipe, seed and folder of one experiment; `progress(text)` hears what is being trained."""

    images: data_set.DataSet
    recipe: Recipe
    seed: int
    out: Path
    progress: Callable[[str], None] = print

    @property
    def sample(self) -> Tensor:
        return self.images.train.x[:SAMPLE]

    def make(self, hidden: Sequence[int] | None = None) -> nn.Sequential:
        """The recipe's network, or one with other hidden layers."""
        return mlp(self.images.train.x.shape[1], tuple(hidden or self.recipe.hidden), self.images.classes)

    def search(
        self,
        name: str,
        *,
        hidden: tuple[int, ...] | None = None,
        init: Init | None = None,
        recipe: Recipe | None = None,
        iterations: Callable[[Training], int] | None = None,
        controls: Sequence[str] = (),
        after: Callable[[Training], None] | None = None,
        **about: Any,
    ) -> Run:
        """Run a ticket search in the folder `name`, or what is left of it, and read its results.

        iterations: how long a network trains, the recipe's number if None; after: gets each that was trained; about: kept in config.json, so that another
        value is refused in the same folder.
        """
        recipe = recipe or self.recipe
        search = TicketSearch(
            partial(self.make, hidden),
            rounds=recipe.rounds,
            fractions=recipe.fractions,
            scope=recipe.scope,
            controls=controls,
            trials=recipe.trials,
            seed=self.seed,
            out=self.out / name,
            init=init or recipe.init,
            config={**recipe.config(), "data_sha256": self.images.sha256, **about},
            recipe={"recipe": recipe.name, "data": recipe.data},
        )
        total = len(search.networks())
        for run in search:
            self.progress(f"{name}: {search.done} of {total} networks")
            length = iterations(run) if iterations else recipe.iterations
            train(run, self.images, replace(recipe, iterations=length))
            if after:
                after(run)
        return read_run(self.out / name)

    def masks(self, name: str, level: int) -> list[Masks]:
        """The masks of every trial's ticket, of the search in the folder `name`."""
        files = [self.out / name / "tickets" / f"trial{t}-level{level}.safetensors" for t in range(self.recipe.trials)]
        return [Ticket.load(file).masks for file in files]

    def start(self, kind: str, trial: int, masks: Masks | None) -> tuple[int, Masks | None]:
        """Seed and masks of a network: "ticket" has the trial's initial weights, "reinit" fresh ones, "shuffle" the masks shuffled."""
        check(kind in KINDS, f"a kind of {', '.join(KINDS)}", repr(kind))
        fresh = derive_seed(self.seed, trial, "side", kind)
        if kind == "shuffle" and masks:
            masks = prune.shuffle(masks, fresh)
        return fresh if kind == "reinit" else derive_seed(self.seed, trial, "init"), masks

    def begin(
        self,
        model: nn.Module,
        kind: str,
        trial: int,
        masks: Masks | None,
        *,
        rescale: str | None = None,
        init: Init | None = None,
    ) -> nn.Module:
        """Mask, initialize and rescale `model` in place; masks None leaves it dense. Returns it."""
        seed, masks = self.start(kind, trial, masks)
        if masks:
            mask_layers(model, masks)
        scheme = init or self.recipe.init
        if callable(scheme):
            check(rescale is None, "a named scheme to rescale", "a function")
            scheme(model, seed)
        else:
            sample = self.sample if rescale == "measured" else None
            initialize(model, scheme, seed=seed, rescale=rescale if masks else None, sample=sample)
        return model

    def train_masks(
        self,
        name: str,
        kind: str,
        masks: list[Masks],
        *,
        hidden: tuple[int, ...] | None = None,
        rescale: str | None = None,
        init: Init | None = None,
        **about: Any,
    ) -> Run:
        """Train every trial's mask once, from the start that `begin` gives: a search without rounds. Level 0 of the result is that network."""
        trials = {derive_seed(self.seed, trial, "init"): trial for trial in range(self.recipe.trials)}

        def begin(model: nn.Module, seed: int) -> None:
            if seed in trials:  # not so in TicketSearch's own check of the model
                self.begin(model, kind, trials[seed], masks[trials[seed]], rescale=rescale, init=init)

        recipe = replace(self.recipe, rounds=0)
        return self.search(name, hidden=hidden, init=begin, recipe=recipe, kind=kind, rescale=rescale, **about)


def run_experiment(
    name: str,
    data: str = "digits",
    data_dir: str | Path | None = None,
    out: str | Path = "runs/experiment",
    *,
    iterations: int | None = None,
    trials: int | None = None,
    seed: int = 0,
    progress: Callable[[str], None] = print,
) -> tuple[Outcome, list[Path]]:
    """One of EXPERIMENTS on the data's own recipe, or what is left of it; returns what it found and the files written to `out`.

    iterations, trials: of every network, instead of the recipe's (for digits: the experiment's). progress(text) hears what
    is being trained.
    """
    check(name in EXPERIMENTS, f"an experiment of {', '.join(EXPERIMENTS)}", repr(name))
    check(data in ("digits", "mnist"), "data to be digits or mnist", repr(data))
    module, function = EXPERIMENTS[name]
    experiment = import_module(module)
    recipe_name, budget = DEFAULT[data]
    numbers: dict[str, Any] = dict(experiment.DEFAULT) if data == "digits" else {}
    numbers |= {k: v for k, v in {"iterations": iterations, "trials": trials}.items() if v is not None}
    recipe = find(recipe_name).changed(budget, **numbers)
    setting = Setting(sets.load(data, data_dir), recipe, check_seed(seed), Path(out), progress)
    with one_thread():
        outcome: Outcome = getattr(experiment, function)(setting)
    if recipe.budget:
        less = ", ".join(f"{key} {value}" for key, value in recipe.reduced.items())
        outcome.tables[-1].notes.append(f"{recipe.budget.capitalize()}, against the recipe {recipe.name}: {less}.")
    about = {**recipe.config(), "attribution": setting.images.about, "seed": seed, "versions": VERSIONS}
    return outcome, outcome.write(setting.out, about)


@contextmanager
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
