"""initialize: every parameter of a model from one seed, each from the stream of its own name, so that no layer depends on another."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from initperf import rng
from initperf.core.checks import InitPerfTypeError, check, check_mapping, check_seed, fail
from initperf.core.torch_private import DisableTorchFunction, NormBase
from initperf.init.model import parametrized
from initperf.init.model.meta import check_buffers, materialize
from initperf.init.model.plan import Scheme, Task, attach_masks, plan
from initperf.init.model.rescale import MODES, check_layers, measured, reached
from initperf.init.model.transformers import init_weights
from initperf.init.model.write import SEPARATE, Figures, fill, local
from initperf.init.redirect import fast_init_by_name
from initperf.init.schemes import Init
from initperf.variance.moments import moments


class Record(NamedTuple):
    """What one parameter got. init, asked are None where no distribution says it all; measured is (mean, variance) with stats=True."""

    name: str
    shape: tuple[int, ...]
    text: str
    stream: int
    init: Init | None
    asked: tuple[float, float] | None = None
    measured: tuple[float, float] | None = None


class Initialized(Mapping[str, Init]):
    """What initialize did: `records` of all parameters; as a mapping, name -> Init where seed, stream and Init give the values back."""

    def __init__(self, seed: int, records: list[Record], exact: set[str]) -> None:
        self.seed, self.records, self.rng_version = seed, records, rng.VERSION
        self._inits = {r.name: r.init for r in records if r.init is not None and r.name in exact}

    def __getitem__(self, name: str) -> Init:
        return self._inits[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._inits)

    def __len__(self) -> int:
        return len(self._inits)

    def __str__(self) -> str:
        rows = [("parameter", "shape", "values", "stream", *self._heads())]
        for r in self.records:
            figures = [f"{m:.4g} / {f'{r.asked[i]:.4g}' if r.asked else '-'}" for i, m in enumerate(r.measured or ())]
            rows.append((r.name, " x ".join(map(str, r.shape)) or "()", r.text, f"{r.stream:016x}", *figures))
        widths = [max(len(row[i]) for row in rows if i < len(row)) for i in range(max(map(len, rows)))]
        lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=False)).rstrip() for row in rows]
        return "\n".join([f"seed {self.seed}, RNG contract version {self.rng_version}", *lines])

    def _heads(self) -> tuple[str, ...]:
        return ("mean / asked", "variance / asked") if any(r.measured for r in self.records) else ()


def initialize(
    model: nn.Module,
    scheme: Scheme = None,
    *,
    seed: int | None = None,
    rules: Mapping[str, Scheme] | None = None,
    masks: Mapping[str, Tensor] | None = None,
    rescale: str | None = None,
    sample: Any = None,
    stats: bool = False,
    device: torch.device | str | None = None,
) -> Initialized:
    """Initialize all parameters in place: value = f(seed, stream of the parameter's name, index). Nothing is touched unless all of it fits.

    scheme: None or "torch" (what each class's reset_parameters means), "kaiming_normal", "kaiming_uniform", "xavier_normal",
    "xavier_uniform", "trunc_normal", "orthogonal", "gpt2", "timm", "zeros", "ones", "keep", or "normal(0, 0.02)" and the like; or a function of (name, parameter,
    module) that returns such a name, an Init, a Distribution, a number, or None for the class's own. Named schemes mean
    weights of two and more dimensions; biases get 0, norms 1 and 0, embeddings N(0, 1) (gpt2, timm, trunc_normal: std 0.02).
    A function and its numbers, an Init, a Distribution or a number fills every parameter, biases and norms included.
    rules: {glob of names: scheme}; the last glob that matches a name counts, and one that matches none raises.
    masks: {name: bool tensor}: zeros where False; layers with a mask of their own (MaskedLinear) keep to it. A
    compressed layer (weight_values, weight_mask_bits, weight_shape) gets the survivors of its dense values, alone. rescale:
    "layer", "unit", "squares" or "measured" scale masked weights (initperf/init/model/rescale.py); sample: for "measured", the
    model's input (a tensor, or a tuple of arguments). stats: measure mean and variance of each parameter.
    device: where parameters of the meta device are made; the CPU if not given. seed: drawn from torch's if not given.
    A module of an unknown class runs its own reset_parameters under fast_init, seeded by its name; without one, its
    parameters need a rule. Running statistics of norms are reset. Tied parameters go by their first name.
    """
    if not isinstance(model, nn.Module):
        fail("model to be a torch.nn.Module", type(model).__name__, kind=InitPerfTypeError)
    check_mapping(rules, "rules", "{glob of names: scheme}")
    check_mapping(masks, "masks", "{name: bool tensor}")
    tasks = plan(model, scheme, rules or {})
    if rescale is not None and rescale not in MODES:
        fail(f"rescale to be one of {', '.join(MODES)} or None", rescale)
    attach_masks(tasks, masks or {}, rescale)
    check((rescale == "measured") == (sample is not None), 'sample exactly with rescale="measured"', f"{rescale=}")
    if rescale is not None:
        masked = any(t.mask is not None or t.bits is not None for t in tasks)
        check(masked, f"masks for rescale={rescale!r} (masks=, or layers that have their own)", "none")
    on_meta = any(t.memory.is_meta for t in tasks)
    check(on_meta or device is None, "device only for a model on the meta device", device)
    buffers = check_buffers(model)
    layers = {t.place.module: t.mask for t in tasks if t.mask is not None} if rescale == "measured" else {}
    if rescale == "measured":
        check(not on_meta, 'a model with memory for rescale="measured"', "one on the meta device")
        check_layers({t.place.module: (t.name, t.place.leaf) for t in tasks if t.mask is not None})
        missed = layers.keys() - reached(model, sample, layers)
        check(not missed, "a sample that reaches every masked layer", f"no call of {missed}")
    with DisableTorchFunction():  # torch.device as a context must not move the seed's tensor
        seed = rng.draw_seed(None) if seed is None else check_seed(seed)

    if on_meta or buffers:
        moved = materialize(model, device or "cpu")
        for task in tasks:
            task.memory = moved[id(task.memory)]
            if task.bits is None:
                task.place = task.place._replace(parameter=task.memory)
    exact: set[str] = set()
    figures: Figures = {}
    with torch.no_grad():
        _execute(model, tasks, seed, rescale, stats, buffers, exact, figures)
        if layers:
            measured(model, sample, layers)
        if stats:
            _measure([t for t in tasks if t.name not in figures], figures)
    records = [
        Record(t.name, t.shape, t.text, t.stream, t.init, _asked(t, rescale), figures.get(t.name)) for t in tasks
    ]
    return Initialized(seed, records, exact)


def _asked(task: Task, rescale: str | None) -> tuple[float, float] | None:
    """Mean and variance of a survivor, as far as the distribution alone tells: not of one that is scaled by its values or its unit."""
    masked = task.mask is not None or task.bits is not None
    return None if task.init is None or (masked and rescale in SEPARATE) else task.init.moments(task.shape)


def _measure(tasks: list[Task], figures: Figures) -> None:
    """Mean and variance of what was not measured while it was written (of survivors, of the local part), one pass a device."""
    values = [local(t.memory)[0].detach() for t in tasks]
    values = [v if t.mask is None else v[t.mask.to(v.device)] for v, t in zip(values, tasks, strict=True)]
    for device in {v.device for v in values}:
        here = [i for i, v in enumerate(values) if v.device == device]
        found = moments([values[i] for i in here], order=2)
        for i, mean, variance in zip(here, found.mean.tolist(), found.var.tolist(), strict=True):
            figures[tasks[i].name] = mean, variance


def _execute(
    model: nn.Module,
    tasks: list[Task],
    seed: int,
    rescale: str | None,
    stats: bool,
    buffers: bool,
    exact: set[str],
    figures: Figures,
) -> None:
    """Write everything; `exact` and `figures` as initperf.init.model.write.fill has them."""
    for module in model.modules():
        if isinstance(module, NormBase):
            module.reset_running_stats()
    for task in tasks:
        if task.given and task.place.leaf == "weight" and hasattr(task.place.module, "set_mask"):
            task.place.module.set_mask(task.mask)  # type: ignore[operator]
    if buffers or any(t.pretrained for t in tasks):
        _init_pretrained(model, tasks, seed)
    tasks = [t for t in tasks if not t.pretrained]
    resets = any(t.reset is not None for t in tasks)
    fill([t for t in tasks if not (resets and t.ruled)], seed, rescale, stats, exact, figures)
    if resets:
        _reset(tasks, seed, exact, figures)
        fill([t for t in tasks if t.ruled], seed, rescale, stats, exact, figures)
    changed = parametrized.finish(model, {id(t.memory) for t in tasks if not t.keep}, seed)
    exact.difference_update(t.name for t in tasks if id(t.memory) in changed)
    for module in model.modules():
        _zero_padding(module, tasks, exact, figures)


def _init_pretrained(model: nn.Module, tasks: list[Task], seed: int) -> None:
    """transformers' `_init_weights` for what it alone knows; what it leaves gets its class's own, or stays."""
    kept = [(t.memory, t.memory.clone()) for t in tasks if t.keep]
    written = init_weights(model, seed)
    for memory, values in kept:
        memory.copy_(values)
    for task in tasks:
        if task.pretrained and id(task.memory) in written:
            if task.mask is not None:
                task.memory.masked_fill_(~task.mask.to(task.memory.device), 0)
        elif task.pretrained and task.fallback is not None and task.memory.numel():
            task.init, task.text, task.pretrained = task.fallback, str(task.fallback), False
            task.distribution = task.init.distribution(task.memory.dtype)
        elif task.pretrained:
            task.text = "kept: _init_weights() says nothing of it"


def _reset(tasks: list[Task], seed: int, exact: set[str], figures: Figures) -> None:
    """Run the reset functions of unknown classes, children first; what they set in other modules counts as theirs."""
    calls = {id(t.reset[1]): t.reset for t in tasks if t.reset is not None}
    for path, module, function in sorted(calls.values(), key=lambda call: -call[0].count(".") - bool(call[0])):
        before = {t.name: t.memory._version for t in tasks}
        with fast_init_by_name(seed, path):
            getattr(module, function)()
        for task in tasks:
            if task.memory._version != before[task.name]:
                task.text, task.init = f"{type(module).__name__}.{function}()", None
                exact.discard(task.name)
                figures.pop(task.name, None)
                if task.mask is not None:
                    task.memory.masked_fill_(~task.mask.to(task.memory.device), 0)


def _zero_padding(module: nn.Module, tasks: list[Task], exact: set[str], figures: Figures) -> None:
    """The row of padding_idx is 0, as in torch."""
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.padding_idx is not None:
        for task in tasks:
            if task.memory is module.weight and not task.keep:
                module.weight[module.padding_idx] = 0
                exact.discard(task.name)
                figures.pop(task.name, None)
