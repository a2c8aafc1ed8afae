"""What the networks of a ticket search start from: a model from a trial's seed, or rewound, and what is kept of the level before."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from safetensors import torch as safetensors
from torch import Tensor, nn

from initperf import prune
from initperf.core.checks import check
from initperf.core.files import write_atomically
from initperf.init import initialize
from initperf.init.schemes import Init
from initperf.tickets.prunable import full_masks, prunable
from initperf.tickets.run import derive_seed
from initperf.tickets.run_folder import RunFolder
from initperf.tickets.ticket import canonical, mask_layers

Made = tuple[nn.Module, Mapping[str, Init] | None]  # a model, and how it was initialized, where initialize told


class Starts:
    """Models by trial and level, the same bits whenever they are asked for. Arguments: see TicketSearch."""

    folder: RunFolder  # given once everything is checked

    def __init__(
        self,
        make_model: Callable[[], nn.Module],
        init: str | Callable[[nn.Module, int], Any] | None,
        fractions: prune.Fraction,
        *,
        seed: int,
        rewind_to: int,
        keep: Sequence[str],
        sparse: bool,
    ) -> None:
        """Raises unless `make_model` makes a model with weights that the fractions name, and all else fits it."""
        self.make_model, self.init, self.seed, self.rewind_to = make_model, init, seed, rewind_to
        self.fractions = dict(fractions) if isinstance(fractions, Mapping) else {"*": fractions}
        with torch.random.fork_rng(devices=[]):
            model, _ = self.fresh(make_model, 0)
        found = prunable(model)
        check(
            len(found) > 0, "a model with nn.Linear layers or nn.Conv2d (others are not pruned)", type(model).__name__
        )
        self.keep = self._names(keep, list(model.state_dict()), list(self.pruned(model)))
        mask_layers(model, full_masks(self.pruned(model)), sparse=sparse)  # fits, before training

    def _names(self, keep: Sequence[str], names: list[str], pruned: list[str]) -> list[str]:
        """What `keep` matches of the names in the model's state_dict."""
        for glob in keep:
            found = [n for n in names if fnmatchcase(n, glob)]
            check(len(found) > 0, f"{glob!r} in keep to match one of {', '.join(names)}", "no match")
            wrong = [n for n in found if canonical(n) in pruned]
            check(not wrong, "keep to leave out weights that are pruned", ", ".join(wrong))
        return [n for n in names if any(fnmatchcase(n, glob) for glob in keep)]

    def fresh(self, make: Callable[[], nn.Module], seed: int) -> Made:
        """A model of `make` initialized from `seed`."""
        torch.manual_seed(seed)
        model = make()
        check(isinstance(model, nn.Module), "make_model() to return a torch.nn.Module", type(model).__name__)
        told = self.init(model, seed) if callable(self.init) else initialize(model, self.init, seed=seed)
        return model, told if isinstance(told, Mapping) and getattr(told, "seed", None) == seed else None

    def at(self, trial: int, level: int) -> Made:
        """The unpruned model as the tickets of this level start: initialized, or rewound to iteration `rewind_to`; then what is kept."""
        model, inits = self.fresh(self.make_model, self.seed_of(trial))
        if level and self.rewind_to:
            path = self.folder.rewind_point(trial)
            call = f"run.step({self.rewind_to}) to be called while the dense network trains"
            check(path.exists(), call, "no such call")
            model.load_state_dict(safetensors.load_file(path))
            inits = None
        if level and self.keep:
            model.load_state_dict(safetensors.load_file(self.folder.kept(trial, level)), strict=False)
        return model, inits

    def seed_of(self, trial: int) -> int:
        """Of the initial weights."""
        return derive_seed(self.seed, trial, "init")

    def differ(self, level: int) -> bool:
        """Whether networks of this level start from anything but freshly initialized weights."""
        return level > 0 and (self.rewind_to > 0 or len(self.keep) > 0)

    def pruned(self, model: nn.Module) -> dict[str, Tensor]:
        """The weights that the fractions name."""
        weights = prunable(model)
        return {name: weights[name] for name in prune.fractions_by_name(list(weights), self.fractions)}

    def keep_state(self, model: nn.Module, trial: int, level: int) -> None:
        """Write what networks of `level` take over from a trained `model` of the level before."""
        if self.keep:
            state = model.state_dict()
            kept = {n: state[n].detach().cpu().contiguous() for n in self.keep}
            write_atomically(self.folder.kept(trial, level), safetensors.save(kept))
