"""TicketSearch: iterative magnitude pruning with rewinding and controls, around the user's own training loop."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from initperf import __version__, prune, rng
from initperf.core import ops
from initperf.core.checks import InitPerfTypeError, check, check_seed, fail
from initperf.core.files import FileLock
from initperf.tickets.criteria import CRITERIA, masks_by, movement
from initperf.tickets.prunable import density, full_masks, prunable, take_signs
from initperf.tickets.run import Run, derive_seed
from initperf.tickets.run_folder import KINDS, Network, RunFolder
from initperf.tickets.saliency import SCORES, Loss, Score, prune_at_start
from initperf.tickets.start_weights import Starts
from initperf.tickets.ticket import Ticket, dense_parameters, mask_layers

POLL_SECONDS = 0.05
# density from which compressed layers pay on every machine measured (initperf/layers/choice/table.py)
SPARSE_BELOW = 0.4


class TicketSearch:
    """Train, prune, rewind, repeat, and train every control: iterate to get the networks, one `Run` at a time.

    for run in TicketSearch(make_model, rounds=3, fractions={"*.weight": 0.2, "fc3.weight": 0.1}, out="runs/mine"):
        optimizer = torch.optim.Adam(run.model.parameters(), lr=1.2e-3)
        for iteration, (x, y) in enumerate(batches(run.generator), 1):
            ...                                                      # the user's own training step
            run.log(iteration, val_loss=..., test_accuracy=...)      # now and then

    make_model: () -> nn.Module; the search initializes it: `init` is a scheme of initperf.init.initialize, or a function
    (model, seed), which may return what initialize returned. fractions: pruned a round, of the survivors, by glob over the
    weights of nn.Linear and nn.Conv2d layers (the last glob that matches counts). criterion: of initperf.tickets.criteria, after
    training, or one of a network before training: "snip", "grasp", "synflow" or a function (model, batches, loss) ->
    {weight: score} (initperf.tickets.saliency), for which `batches` and `loss` are. rewind_to: the iteration whose weights tickets
    start from; keep: globs of other parameters and buffers (biases, norms) that are not rewound but go on from the level
    before. Controls at every level: "reinit" (the ticket's mask, fresh weights), "sign-reinit" (fresh magnitudes, the
    initial signs), "shuffle" (mask permuted within each layer, initial weights kept), "random" (a mask of equal layer
    densities and fresh weights), "small-dense" (`make_small(survivors)`, a dense network of about as many weights).
    learning_rates: train every network at these, too (`run.lr`), each from the same start and mask. sparse: True trains
    pruned networks on compressed layers, a number those below this density (SPARSE_BELOW pays everywhere).
    `config` is kept in config.json, `recipe` in every ticket. Finished networks are kept in `out`: the same search on the
    same folder goes on after them, to the same bits on the same machine and thread count; several processes may share it.
    """

    def __init__(
        self,
        make_model: Callable[[], nn.Module],
        *,
        rounds: int,
        fractions: prune.Fraction = 0.2,
        scope: str = "layerwise",
        criterion: str | Score = "magnitude",
        batches: Iterable[Any] = (),
        loss: Loss | None = None,
        rewind_to: int = 0,
        keep: Sequence[str] = (),
        controls: Sequence[str] = ("reinit", "shuffle"),
        learning_rates: Sequence[float] = (),
        trials: int = 1,
        seed: int = 0,
        out: str | Path,
        init: str | Callable[[nn.Module, int], Any] | None = None,
        make_small: Callable[[int], nn.Module] | None = None,
        reinits: int = 1,
        sparse: bool | float = False,
        checkpoint_seconds: float = 30.0,
        config: Mapping[str, Any] | None = None,
        recipe: Mapping[str, Any] | None = None,
    ) -> None:
        for name, value, least in (
            ("rounds", rounds, 0),
            ("rewind_to", rewind_to, 0),
            ("trials", trials, 1),
            ("reinits", reinits, 1),
        ):
            if isinstance(value, bool) or not isinstance(value, int):
                fail(f"{name} to be an int", type(value).__name__, kind=InitPerfTypeError)
            check(value >= least, f"{name} to be at least {least}", value)
        check(scope in ("layerwise", "global"), 'scope "layerwise" or "global"', repr(scope))
        known = (*CRITERIA, *SCORES)
        check(callable(criterion) or criterion in known, f"a criterion of {', '.join(known)}", repr(criterion))
        at_start = callable(criterion) or criterion in SCORES
        check(not at_start or bool(batches), f"batches= for the criterion {criterion!r}", "none")
        check(not isinstance(controls, str), 'controls as a list, such as ["reinit"]', repr(controls))
        for kind in controls:
            check(kind in KINDS[1:], f"controls of {', '.join(KINDS[1:])}", repr(kind))
        check("small-dense" not in controls or make_small is not None, 'make_small for the control "small-dense"', None)
        check(not isinstance(keep, str), 'keep as a list, such as ["*.bias"]', repr(keep))
        for rate in learning_rates:
            check(0 < rate < math.inf, "learning_rates above 0 and finite", rate)
        check(0 <= sparse <= 1, "sparse to be True, False or a density", sparse)
        self.make_model, self.make_small, self.init = make_model, make_small, init
        self.rounds, self.scope, self.rewind_to, self.trials = rounds, scope, rewind_to, trials
        self.criterion, self.batches, self.loss = criterion, list(batches), loss
        self.seed, self.reinits, self.sparse = check_seed(seed), reinits, sparse
        self.controls = tuple(sorted(set(controls), key=KINDS.index))
        self.config, self.recipe = dict(config or {}), dict(recipe or {})
        self.learning_rates = sorted({float(rate) for rate in learning_rates} - {self.config.get("lr")})
        self.checkpoint_seconds = checkpoint_seconds
        starts: dict[str, Any] = {"seed": self.seed, "rewind_to": rewind_to, "keep": keep, "sparse": bool(sparse)}
        self.starts = Starts(make_model, init, fractions, **starts)
        self.fractions = self.starts.fractions
        self.folder = self.starts.folder = RunFolder(out)
        self.folder.claim_config(self._config())

    def networks(self) -> list[Network]:
        """Everything to train, in order."""
        return self._networks(self.trials, self.rounds)

    def _networks_of_folder(self) -> list[Network]:
        """Also those of a longer run in the same folder."""
        self.folder.read_size()
        return self._networks(self.folder.trials, self.folder.rounds)

    def _networks(self, trials: int, rounds: int) -> list[Network]:
        return [
            Network(trial, level, kind, repeat, rate)
            for trial in range(trials)
            for level in range(rounds + 1)
            for rate in (None, *self.learning_rates)
            for kind in (("ticket", *self.controls) if level else ("ticket",))
            for repeat in range(self.reinits if kind == "reinit" else 1)
        ]

    @property
    def done(self) -> int:
        """Networks finished so far, by this process or another."""
        return sum(self.folder.record(n) is not None for n in self.networks())

    def __iter__(self) -> Iterator[Run]:
        while (claim := self._claim()) is not None:
            network, lock = claim
            try:
                calls = Counter(ops.CALLS)
                run = self._prepare(network)
                yield run
                self._finish(run, calls)
            finally:
                lock.release()
        self.folder.write_tables(self._networks_of_folder())
        for network in self.networks():  # nothing is missing any more, so nobody waits for these
            lock = self.folder.lock(network)
            if lock.path.exists() and lock.acquire(wait=False):  # a longer run may hold it
                lock.path.unlink(missing_ok=True)
                lock.release()

    def _claim(self) -> tuple[Network, FileLock] | None:
        """A network that is neither finished nor in another's hands, whose mask is known, and its lock; waits while others work."""
        while missing := [n for n in self.networks() if self.folder.record(n) is None]:
            for network in missing:
                if any(self.folder.record(needed) is None for needed in _needs(network)):
                    continue
                lock = self.folder.lock(network)
                if lock.acquire(wait=False):
                    if self.folder.record(network) is None:
                        self.folder.clear(network)
                        return network, lock
                    lock.release()
            if any(self.folder.lock(n).path in FileLock.held for n in missing):
                fail(
                    "one open loop over a run in a process", f"another one, which holds a network of {self.folder.path}"
                )
            time.sleep(POLL_SECONDS)
        return None

    def _prepare(self, network: Network) -> Run:
        """Initialize, rewind and mask the model of `network`."""
        trial, level, kind, repeat, _ = network
        masks = Ticket.load(self.folder.ticket(trial, level)).masks if level else {}
        first = self.starts.seed_of(trial)
        fresh = derive_seed(self.seed, trial, level, kind, repeat)
        if kind == "small-dense":
            run = self._small(network, masks, fresh)
        else:
            if kind in ("shuffle", "random"):
                masks = prune.shuffle(masks, fresh)
            keeps = kind in ("ticket", "shuffle")
            model = self.starts.at(trial, level)[0] if keeps else self.starts.fresh(self.make_model, fresh)[0]
            if kind == "sign-reinit":
                take_signs(model, self.starts.at(trial, level)[0], masks)
            part = density(model, masks)
            if masks:
                mask_layers(model, masks, sparse=self._compressed(part))
            run = self._run(network, model, masks, part, first if keeps else fresh)
        torch.manual_seed(derive_seed(self.seed, trial, level, "global"))  # dropout and the like
        return run

    def _small(self, network: Network, masks: dict[str, Tensor], seed: int) -> Run:
        total = sum(w.numel() for w in prunable(self.starts.at(network.trial, network.level)[0]).values())
        make, survivors = self.make_small, total - sum(int((~m).sum()) for m in masks.values())
        check(make is not None, 'make_small for the control "small-dense"', None)
        model, _ = self.starts.fresh(lambda: make(survivors), seed)  # type: ignore[misc]
        weights = sum(w.numel() for w in prunable(model).values())
        return self._run(network, model, {}, weights / total, seed)

    def _run(self, network: Network, model: nn.Module, masks: dict[str, Tensor], density: float, seed: int) -> Run:
        keeps_point = network.level == 0 and self.rewind_to > 0 and network.lr is None
        return Run(
            network,
            model,
            masks,
            density=density,
            layers=self.layers_at(density) if masks else "dense",
            seed=seed,
            data_seed=derive_seed(self.seed, network.trial, network.level, "data"),
            start=self.start_of(network),
            checkpoint=self.folder.checkpoint(network),
            checkpoint_seconds=self.checkpoint_seconds,
            rewind_point=(self.rewind_to, self.folder.rewind_point(network.trial)) if keeps_point else None,
        )

    def _compressed(self, density: float) -> bool:
        """Whether a pruned network of this density trains on compressed layers: by configuration, never by what a clock says."""
        return self.sparse is True or density < self.sparse

    def start_of(self, network: Network) -> int:
        """The iteration that the network's weights come from."""
        return self.rewind_to if network.level and network.kind in ("ticket", "shuffle") else 0

    def layers_at(self, density: float) -> str:
        """How a pruned network of this density is stored: "masked" or "sparse"."""
        return "sparse" if self._compressed(density) else "masked"

    def _finish(self, run: Run, calls: Counter[tuple[str, str]]) -> None:
        """Prune for the next level, and keep the results."""
        check(len(run.points) > 0, f"run.log(iteration, val_loss=...) to be called for {run}", "no call")
        moved: list[dict[str, Any]] = []
        if run.kind == "ticket" and run.lr is None:
            if run.level == 0:
                self._write_ticket(run.trial, 0, {})
            self.folder.read_size()
            if run.level < self.folder.rounds:
                moved = self._prune(run)
        used: dict[str, dict[str, int]] = {}
        for (op, backend), count in (Counter(ops.CALLS) - calls).items():
            used.setdefault(op, {})[backend] = count
        record = {
            "row": run.row(self._goal(run), self.config.get("lr")),
            "points": run.points,
            "movement": moved,
            "ops": used,
        }
        self.folder.finish(run.network, record, self._networks_of_folder())
        run.done = True

    def _prune(self, run: Run) -> list[dict[str, Any]]:
        """Write the ticket of the next level; returns how the weights of each layer moved."""
        final, initial = self.starts.pruned(run.model), self.starts.pruned(self.starts.at(run.trial, run.level)[0])
        seed = derive_seed(self.seed, run.trial, run.level, "prune")
        masks = self._masks(run, final, initial, seed)
        self.starts.keep_state(run.model, run.trial, run.level + 1)
        self._write_ticket(run.trial, run.level + 1, {n: m.cpu() for n, m in masks.items()})
        return [
            {"parameter": n, "survivors": int(m.sum()), "weights": m.numel()}
            | movement(final[n], initial[n], run.masks.get(n), m, seed=seed)
            for n, m in masks.items()
        ]

    def _masks(self, run: Run, final: dict[str, Tensor], initial: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
        """The masks of the next level."""
        if callable(self.criterion) or self.criterion in SCORES:
            model, _ = self.starts.at(run.trial, 0)
            given: dict[str, Any] = {"batches": self.batches, "loss": self.loss, "scope": self.scope}
            return prune_at_start(self.criterion, model, self.fractions, rounds=run.level + 1, **given)
        masks = run.masks or None
        return masks_by(self.criterion, final, initial, self.fractions, masks=masks, scope=self.scope, seed=seed)

    def _write_ticket(self, trial: int, level: int, masks: dict[str, Tensor]) -> None:
        model, inits = self.starts.at(trial, level)
        later = self.starts.differ(level)
        ticket = Ticket.from_model(
            model,
            masks=masks,
            inits=inits,
            weights=dense_parameters(model) if later else None,
            buffers=dict(model.named_buffers()) if later else None,
            recipe=self._ticket_recipe(trial, level),
        )
        ticket.save(self.folder.ticket(trial, level))

    def _ticket_recipe(self, trial: int, level: int) -> dict[str, Any]:
        return {**self.recipe, "trial": trial, "level": level, "rewind_to": self.rewind_to}

    def _goal(self, run: Run) -> float | None:
        """The dense network's least validation loss, at the search's own learning rate; None where `run` is that network."""
        if run.level == 0 and run.lr is None:
            return None
        dense = self.folder.record(Network(run.trial, 0, "ticket"))
        return dense["row"]["early_stop_val_loss"] if dense else math.nan

    def kinds_of_layers(self, trial: int, level: int) -> tuple[dict[str, nn.Module], float]:
        """For timing: the network of a finished level as {"dense", "masked", "sparse"} (level 0: nothing pruned), and its density."""
        masks = Ticket.load(self.folder.ticket(trial, level)).masks
        models = {kind: self.starts.at(trial, level)[0] for kind in ("dense", "masked", "sparse")}
        part = density(models["dense"], masks)
        for kind in ("masked", "sparse"):
            mask_layers(models[kind], masks or full_masks(self.starts.pruned(models[kind])), sparse=kind == "sparse")
        return models, part

    def _config(self) -> dict[str, Any]:
        """What must be equal for the same results."""
        return {
            **self.config,
            "rounds": self.rounds,
            "fractions": self.fractions,
            "scope": self.scope,
            "criterion": _name(self.criterion),
            "rewind_to": self.rewind_to,
            "keep": self.starts.keep,
            "learning_rates": self.learning_rates,
            "controls": list(self.controls),
            "reinits": self.reinits,
            "trials": self.trials,
            "seed": self.seed,
            "init": _name(self.init),
            "sparse": self.sparse,
            "threads": torch.get_num_threads(),
            "rng_version": rng.VERSION,
            "versions": {"initperf": __version__, "torch": torch.__version__},
        }


def _needs(network: Network) -> list[Network]:
    """What must be finished before: the ticket one level up, and for another learning rate the dense network of the own."""
    level = network.level - 1 if network.level else 0
    return [Network(network.trial, level, "ticket")] if network.level or network.lr is not None else []


def _name(value: Any) -> str | None:
    """For config.json."""
    return value if isinstance(value, str) or value is None else getattr(value, "__qualname__", "callable")
