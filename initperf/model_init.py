"""initialize: every parameter of a model from one seed, each from the stream of its own name, so that no layer depends on another."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from initperf import rng
from initperf.checks import (
    InitPerfTypeError,
    check,
    check_seed,
    fail,
)
from initperf.init_plan import Scheme, Task, attach_masks, plan
from initperf.materialize import check_buffers, materialize
from initperf.rescale import MODES, check_layers, measured, reached, rescale_factor
from initperf.sampling import is_sharded, write, write_orthogonal, write_shard
from initperf.schemes import Init
from initperf.stats import moments


class Record(NamedTuple):
    """What one parameter got. init is None where no distribution says it all; measured is (mean, variance) with stats=True."""

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
            figures = [f"{m[i]:.4g} / {a[i]:.4g}" for m, a in [(r.measured, r.asked)] if m and a for i in (0, 1)]
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
    "xavier_uniform", "trunc_normal", "orthogonal", "gpt2", "timm", "zeros", "ones", "keep"; or a function of (name, parameter,
    module) that returns such a name, an Init, a Distribution, a number, or None for the class's own. Named schemes mean
    weights of two and more dimensions; biases get 0, norms 1 and 0, embeddings N(0, 1) (gpt2, timm, trunc_normal: std 0.02).
    rules: {glob of names: scheme}; the last glob that matches a name counts, and one that matches none raises.
    masks: {name: bool tensor}: zeros where False; layers with a mask of their own (MaskedLinear) keep to it. rescale:
    "layer", "unit", "squares" or "measured" scale masked weights (initperf/rescale.py); sample: for "measured", the
    model's input (a tensor, or a tuple of arguments). stats: measure mean and variance of each parameter.
    device: where parameters of the meta device are made; the CPU if not given. seed: drawn from torch's if not given.
    A module of an unknown class runs its own reset_parameters under fast_init, seeded by its name; without one, its
    parameters need a rule. Running statistics of norms are reset. Tied parameters go by their first name.
    """
    if not isinstance(model, nn.Module):
        fail("model to be a torch.nn.Module", type(model).__name__, kind=InitPerfTypeError)
    tasks = plan(model, scheme, rules or {})
    if rescale is not None and rescale not in MODES:
        fail(f"rescale to be one of {', '.join(MODES)} or None", rescale)
    attach_masks(tasks, masks or {}, rescale)
    check((rescale == "measured") == (sample is not None), 'sample exactly with rescale="measured"', f"{rescale=}")
    on_meta = any(t.place.parameter.is_meta for t in tasks)
    check(on_meta or device is None, "device only for a model on the meta device", device)
    check_buffers(model)
    layers = {t.place.module: t.mask for t in tasks if t.mask is not None} if rescale == "measured" else {}
    if rescale == "measured":
        check(not on_meta, 'a model with memory for rescale="measured"', "one on the meta device")
        check_layers({t.place.module: (t.name, t.place.leaf) for t in tasks if t.mask is not None})
        missed = layers.keys() - reached(model, sample, layers)
        check(not missed, "a sample that reaches every masked layer", f"no call of {missed}")
    with torch._C.DisableTorchFunction():  # torch.device as a context must not move the seed's tensor
        seed = rng.draw_seed(None) if seed is None else check_seed(seed)

    if on_meta:
        moved = materialize(model, device or "cpu")
        for task in tasks:
            task.place = task.place._replace(parameter=moved[id(task.place.parameter)])
    with torch.no_grad():
        exact = _execute(model, tasks, seed, rescale)
        if layers:
            measured(model, sample, layers)
        figures = _measure(tasks) if stats else [None] * len(tasks)
    records = [
        Record(t.name, t.shape, t.text, rng.stream_of(t.name), t.init, t.init.moments(t.shape) if t.init else None, f)
        for t, f in zip(tasks, figures, strict=True)
    ]
    return Initialized(seed, records, exact)


def _measure(tasks: list[Task]) -> list[tuple[float, float] | None]:
    """Mean and variance of every parameter's values (of survivors, of the local part), one pass a device."""
    values = [_local(t.place.parameter)[0].detach() for t in tasks]
    values = [v if t.mask is None else v[t.mask] for v, t in zip(values, tasks, strict=True)]
    figures: list[tuple[float, float] | None] = [None] * len(tasks)
    for device in {v.device for v in values}:
        here = [i for i, v in enumerate(values) if v.device == device]
        found = moments([values[i] for i in here], order=2)
        for i, mean, variance in zip(here, found.mean.tolist(), found.var.tolist(), strict=True):
            figures[i] = mean, variance
    return figures


def _execute(model: nn.Module, tasks: list[Task], seed: int, rescale: str | None) -> set[str]:
    """Write everything; returns the names whose values are exactly f(seed, stream, index) of the task's Init, zero where pruned."""
    for module in model.modules():
        if isinstance(module, _NormBase):
            module.reset_running_stats()
    exact: set[str] = set()
    for task in tasks:
        if task.mask is not None and task.place.leaf == "weight" and hasattr(task.place.module, "set_mask"):
            task.place.module.set_mask(task.mask)  # type: ignore[operator]
        if not task.ruled:
            _fill(task, seed, exact, rescale)
    _reset(tasks, seed, exact)
    for task in tasks:
        if task.ruled:
            _fill(task, seed, exact, rescale)
    for module in model.modules():
        _zero_padding(module, tasks, exact)
    return exact


def _fill(task: Task, seed: int, exact: set[str], rescale: str | None) -> None:
    if task.keep or task.reset is not None:
        return
    parameter, module = task.place.parameter, task.place.module
    if not parameter.numel():
        return
    if task.mask is not None and rescale == "layer":
        _scale_distribution(task, float(task.mask.double().mean()) ** -0.5 if task.mask.any() else 1.0)
    stream = rng.stream_of(task.name)
    tensor, shape, start = _local(parameter)
    if task.distribution is None:
        _orthogonal(tensor, shape, start, task.init.args[0], seed, stream)  # type: ignore[union-attr]
    elif start is not None:
        write_shard(tensor, task.distribution, shape, start, seed, stream)
    else:
        write(tensor, task.distribution, seed, stream)
    if task.mask is not None and rescale != "measured":
        scale = rescale_factor(rescale, tensor, task.mask, module) if rescale in ("unit", "squares") else None
        tensor.masked_fill_(~_part(task.mask, tensor, start), 0)
        if scale is not None:
            tensor.mul_(scale)
    if task.mask is not None and rescale in ("unit", "squares", "measured"):
        task.text += f", rescaled ({rescale})"
    elif task.init is not None:
        exact.add(task.name)


def _scale_distribution(task: Task, factor: float) -> None:
    init = task.init.scaled(factor)  # type: ignore[union-attr]
    task.init, task.text = init, str(init)
    if task.distribution is not None:
        task.distribution = init.distribution(task.place.parameter.dtype)


def _orthogonal(
    tensor: Tensor, shape: tuple[int, ...], start: tuple[int, ...] | None, gain: float, seed: int, stream: int
) -> None:
    if start is None:
        write_orthogonal(tensor, gain, seed, stream)
        return
    whole = write_orthogonal(torch.empty(shape, dtype=tensor.dtype, device="cpu"), gain, seed, stream)
    tensor.copy_(_part(whole, tensor, start))


def _part(whole: Tensor, like: Tensor, start: tuple[int, ...] | None) -> Tensor:
    """The block of `whole` that `like` holds."""
    for d, first in enumerate(start or ()):
        whole = whole.narrow(d, first, like.shape[d])
    return whole


def _local(parameter: Tensor) -> tuple[Tensor, tuple[int, ...], tuple[int, ...] | None]:
    """The memory to write: (tensor, global shape, where the tensor begins in it; None for a tensor that is the whole)."""
    if not is_sharded(parameter):
        return parameter, tuple(parameter.shape), None
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    _, start = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)  # type: ignore[attr-defined]
    return parameter.to_local(), tuple(parameter.shape), tuple(start)  # type: ignore[attr-defined]


def _reset(tasks: list[Task], seed: int, exact: set[str]) -> None:
    """Run the reset functions of unknown classes, children first; what they set in other modules counts as theirs."""
    from initperf.redirect import fast_init

    calls = {id(t.reset[1]): t.reset for t in tasks if t.reset is not None}
    for path, module, function in sorted(calls.values(), key=lambda call: -call[0].count(".") - bool(call[0])):
        before = {t.name: t.place.parameter._version for t in tasks}
        digest = hashlib.sha256(f"{seed}:{rng.canonical_name(path)}".encode()).digest()
        with fast_init(seed=int.from_bytes(digest[:8], "little")):
            getattr(module, function)()
        for task in tasks:
            if task.place.parameter._version != before[task.name]:
                task.text, task.init = f"{type(module).__name__}.{function}()", None
                exact.discard(task.name)
                if task.mask is not None:
                    task.place.parameter.masked_fill_(~task.mask, 0)


def _zero_padding(module: nn.Module, tasks: list[Task], exact: set[str]) -> None:
    """The row of padding_idx is 0, as in torch."""
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.padding_idx is not None:
        for task in tasks:
            if task.place.parameter is module.weight and not task.keep:
                module.weight[module.padding_idx] = 0
                exact.discard(task.name)
