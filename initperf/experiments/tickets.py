"""The ticket experiments on digits, MNIST or CIFAR-10: a ticket and its controls, level by level, as a run folder."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import torch as safetensors
from torch import Tensor, nn

from initperf.core.checks import check
from initperf.core.files import write_atomically
from initperf.experiments.data import data_set as data_set
from initperf.experiments.data import sets
from initperf.experiments.recipes import DEFAULT, Recipe, find
from initperf.experiments.training import keep_freed_memory, measure_steps, train
from initperf.layers.choice import table as choice
from initperf.tickets.run_folder import STEPS, write_csv
from initperf.tickets.search import TicketSearch

Progress = Callable[[dict[str, Any]], None]
THREADS = 1  # a network: more gain nothing at batch 60, and so results do not depend on the number of cores
TICK_SECONDS = 0.1
ONE_SHOT_IMAGES = 1000  # from which SNIP and GraSP score the untrained network
WORTH_A_WORKER = 20_000  # iterations in all, below which starting a second process costs more than it saves


def run_ticket(
    data: str | None = None,
    data_dir: str | Path | None = None,
    out: str | Path = "runs/ticket",
    *,
    recipe: str | None = None,
    budget: str | None = None,
    seed: int = 0,
    workers: int | None = None,
    progress: Progress | None = None,
    settings: Sequence[str] = (),
    **given: Any,
) -> Path:
    """Run the experiment, or what is left of it, and return the run folder (report.html is not written here).

    recipe: a name of initperf.experiments.recipes; by default that of the data: "digits", "lenet-paper" for "mnist" (any
    set in IDX files), "conv2" for "cifar10"; with data_dir alone its files tell the data. budget: "quick" (if none is given,
    but for digits), "medium" or "paper". given: numbers of the Recipe (rounds=, iterations=, trials=,
    lr=, batch=, controls=, ...), and settings the same as text ("evaluate_every=50"); they override both.
    workers: processes side by side, each with one thread; by default one a core. The results do not depend on it.

    progress(event) gets dicts: {"event": "start", "recipe", "label", "reduced", "about", "networks", "done"}; during a
    training, at most ten times a second, {"event": "step", "trial", "level", "kind", "density", "iteration", "iterations",
    "networks", "done"}; {"event": "network", ...the row of results.csv, "networks", "done"} after each network (also after
    those that other worker processes trained); {"event": "measure"} before the timing of steps, {"event": "steps", "rows",
    ...of summary.json "sparse"} after it; {"event": "end"}.
    """
    check(data is None or data in DEFAULT, f"data to be one of {', '.join(DEFAULT)}", repr(data))
    chosen = _recipe(data, data_dir, recipe, budget, settings, given)
    check(
        chosen.data != "digits" or data_dir is None, "no data folder for digits, which ship with the package", data_dir
    )
    began = time.perf_counter()
    with _threads(THREADS), choice.built_in():
        search, images = _search(chosen, data_dir, Path(out), seed)
        reporter = _Reporter(search, chosen, progress, began)
        reporter.start(images.about)
        missing = len(reporter.unseen)
        if missing:
            count = workers if workers is not None else _default_workers(missing * chosen.iterations)
            with _workers(min(count, missing) - 1, search.folder.path, data_dir):
                _work(search, images, chosen, reporter)
            reporter.network()
        if missing or not (search.folder.path / "steps.csv").exists():
            reporter.send({"event": "measure"})
            reporter.measured(_measure(search, images, chosen))
        reporter.summarize()
        reporter.send({"event": "end"})
    return search.folder.path


def _recipe(
    data: str | None,
    data_dir: str | Path | None,
    name: str | None,
    budget: str | None,
    settings: Sequence[str],
    given: dict[str, Any],
) -> Recipe:
    """The recipe that is meant, changed as asked."""
    if name is None:
        data = data or ("digits" if data_dir is None else sets.kind_of(data_dir))
        name, _ = DEFAULT[data]
    chosen = find(name)
    check(data is None or chosen.data == data, f"a recipe for {data}", f"{chosen.name}, which is for {chosen.data}")
    given = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}
    for setting in settings:
        key, equals, text = setting.partition("=")
        check(bool(equals), "a setting as NAME=VALUE", repr(setting))
        given[key.strip()] = chosen.parsed(key.strip(), text.strip())
    return chosen.changed(budget or DEFAULT[chosen.data][1], **given)


def _search(recipe: Recipe, data_dir: str | Path | None, out: Path, seed: int) -> tuple[TicketSearch, data_set.DataSet]:
    images = sets.load(recipe.data, data_dir)
    size = len(images.train)
    check(recipe.batch <= size, f"a batch of at most the {size} training images", recipe.batch)
    shape = images.train.x.shape[1:]
    about = {
        **recipe.config(),
        "dataset": images.name,
        "attribution": images.about,
        "data_sha256": images.sha256,
    }
    search = TicketSearch(
        partial(recipe.make, shape, images.classes),
        rounds=recipe.rounds,
        fractions=recipe.fractions,
        scope=recipe.scope,
        criterion=recipe.criterion,
        batches=list(zip(*(t[:ONE_SHOT_IMAGES].split(100) for t in (images.train.x, images.train.y)), strict=True)),
        loss=_loss,
        rewind_to=recipe.rewind_to,
        controls=recipe.controls,
        learning_rates=recipe.learning_rates,
        trials=recipe.trials,
        reinits=recipe.reinits,
        seed=seed,
        out=out,
        init=recipe.init,
        make_small=partial(recipe.make_small, shape, images.classes),
        sparse=recipe.sparse,
        config=about,
        recipe={"recipe": recipe.name, "data": images.name},
    )
    return search, images


def _loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def _work(search: TicketSearch, images: data_set.DataSet, recipe: Recipe, reporter: _Reporter | None) -> None:
    if recipe.channels:
        keep_freed_memory()
    for run in search:
        if reporter:
            reporter.network()
        train(run, images, recipe, reporter.tick if reporter else None)


def _measure(search: TicketSearch, images: data_set.DataSet, recipe: Recipe) -> list[dict[str, Any]]:
    """steps.csv: a training step with the masks of trial 0, on dense, masked and compressed layers, in alternation."""
    rows = []
    for level in range(search.rounds + 1):
        models, density = search.kinds_of_layers(0, level)
        times = measure_steps(models, images, recipe)
        layers = search.layers_at(density) if level else "dense"
        row = {"level": level, "density": density, "batch": recipe.batch, "layers": layers}
        rows.append(row | {f"{kind}_ms": ms for kind, ms in times.items()})
    write_csv(search.folder.path / "steps.csv", STEPS, rows)
    return rows


class _Reporter:
    """Tells `progress` what happens, and keeps summary.json."""

    def __init__(self, search: TicketSearch, recipe: Recipe, progress: Progress | None, began: float) -> None:
        self.search, self.recipe, self.progress, self.began = search, recipe, progress, began
        self.networks = search.networks()
        self.unseen = [n for n in self.networks if search.folder.record(n) is None]
        self.last = 0.0
        self.path = search.folder.path / "summary.json"
        found = json.loads(self.path.read_text()) if self.path.exists() else {}
        self.before, self.saved = found.get("seconds", 0.0), found.get("sparse", {})

    def send(self, event: dict[str, Any]) -> None:
        if self.progress:
            self.progress(event)

    @property
    def counts(self) -> dict[str, int]:
        return {"networks": len(self.networks), "done": len(self.networks) - len(self.unseen)}

    def start(self, about: str) -> None:
        label, reduced = self.recipe.budget, self.recipe.reduced
        names = {"recipe": self.recipe.name, "label": label, "reduced": reduced, "about": about}
        self.send({"event": "start", **names, **self.counts})

    def tick(self, run: Any, iteration: int) -> None:
        now = time.perf_counter()
        if self.progress and now - self.last >= TICK_SECONDS:
            self.last = now
            about = {"trial": run.trial, "level": run.level, "kind": run.kind, "density": run.density}
            self.send(
                {"event": "step", **about, "iteration": iteration, "iterations": self.recipe.iterations, **self.counts}
            )

    def network(self) -> None:
        """Some networks are finished, by this process or others."""
        for network in list(self.unseen):
            record = self.search.folder.record(network)
            if record is not None:
                self.unseen.remove(network)
                self.send({"event": "network", **record["row"], **self.counts})
                self.summarize()

    def measured(self, rows: list[dict[str, Any]]) -> None:
        """Keep what training the sparse levels on compressed layers saved: steps times the difference of their medians."""
        saved = {
            "below": self.recipe.sparse,
            "trained": 0,
            "seconds": 0.0,
            "saved_to_masked": 0.0,
            "saved_to_dense": 0.0,
        }
        by_level = {row["level"]: row for row in rows}
        for network in self.networks:
            row = (self.search.folder.record(network) or {"row": {}})["row"]
            if row.get("layers") == "sparse":
                step, iterations = by_level[network.level], row["iterations"] - self.search.start_of(network)
                saved["trained"] += 1
                saved["seconds"] += row["train_seconds"]
                for kind in ("masked", "dense"):
                    saved[f"saved_to_{kind}"] += iterations * (step[f"{kind}_ms"] - step["sparse_ms"]) / 1000
        self.saved = {k: round(v, 1) for k, v in saved.items()}
        self.send({"event": "steps", "rows": rows, **self.saved})

    def summarize(self) -> None:
        folder, ops = self.search.folder, {}  # type: ignore[var-annotated]
        for network in self.networks:
            for op, used in (folder.record(network) or {"ops": {}})["ops"].items():
                total = ops.setdefault(op, {})
                for backend, count in used.items():
                    total[backend] = total.get(backend, 0) + count
        files = {level: folder.ticket(0, level) for level in range(self.search.rounds + 1)}
        dense = len(safetensors.save(self.search.make_model().state_dict()))
        summary = {
            "ops": dict(sorted(ops.items())),
            "ticket_bytes": {level: f.stat().st_size for level, f in files.items() if f.exists()},
            "dense_checkpoint_bytes": {level: dense for level in files},
            "sparse": self.saved,
            "seconds": round(self.before + time.perf_counter() - self.began, 1),
        }
        write_atomically(self.path, json.dumps(summary, indent=1) + "\n")


def _default_workers(iterations: int) -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return cores if iterations >= WORTH_A_WORKER else 1


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _workers(count: int, folder: Path, data_dir: str | Path | None) -> Iterator[None]:
    """Processes that share the run folder; they end when this process does, since their standard input ends then."""
    command = [
        sys.executable,
        "-m",
        "initperf.experiments.tickets",
        str(folder),
        *([str(data_dir)] if data_dir else []),
    ]
    started = [subprocess.Popen(command, stdin=subprocess.PIPE) for _ in range(count)]
    try:
        yield
        for process in started:
            if process.poll():  # what it had begun was done here
                warnings.warn(f"a worker process ended with exit code {process.returncode}", stacklevel=2)
    finally:
        for process in started:
            if process.stdin:
                process.stdin.close()
            process.wait()


def _worker(folder: str, data_dir: str | None = None) -> None:
    """A worker process: trains networks of the run in `folder` until none is left."""

    def end_with_parent() -> None:
        os.read(0, 1)  # unlike sys.stdin, holds no lock that the interpreter needs when it ends
        os._exit(0)

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to tell
    threading.Thread(target=end_with_parent, daemon=True).start()
    torch.set_num_threads(THREADS)
    config = json.loads((Path(folder) / "config.json").read_text())
    recipe = Recipe.from_config(config)
    with choice.built_in():
        search, images = _search(recipe, data_dir, Path(folder), config["seed"])
        _work(search, images, recipe, None)


if __name__ == "__main__":
    _worker(*sys.argv[1:])
