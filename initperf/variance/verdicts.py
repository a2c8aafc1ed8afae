"""Verdicts: what a lecturer would say of a network's variances, with the remedy; `check_init` asks before training."""

from __future__ import annotations

import html
import io
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from initperf.core.checks import InitPerfRuntimeError, InitPerfTypeError, check, fail
from initperf.core.extras import needed
from initperf.variance.layer_trace import tensors_in
from initperf.variance.monitor import VarianceMonitor
from initperf.variance.records import BACKWARD, FORWARD, Key, Reading
from initperf.variance.thresholds import THRESHOLDS as THRESHOLDS
from initperf.variance.thresholds import Verdict

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table

NOTHING = "nothing wrong is seen"


class Verdicts:
    """What is wrong, as a list; true where there is something. str() is a plain table; Jupyter shows it as one."""

    def __init__(self, found: list[Verdict], readings: dict[Key, Reading], order: list[str]) -> None:
        self.found, self.readings, self.order = found, readings, order

    @property
    def faults(self) -> list[str]:
        """Names of the faults, each once."""
        return list(dict.fromkeys(v.fault for v in self.found))

    def __bool__(self) -> bool:
        return bool(self.found)

    def __len__(self) -> int:
        return len(self.found)

    def __iter__(self) -> Iterator[Verdict]:
        return iter(self.found)

    def table(self) -> Table:
        """For rich."""
        with needed("cli"):
            from rich.table import Table

        table = Table("fault", "layer", "what is seen", "remedy", title=None if self.found else NOTHING)
        for verdict in self.found:
            table.add_row(*verdict)
        return table

    def __str__(self) -> str:
        if not self.found:
            return NOTHING
        try:
            from rich.console import Console
        except ImportError:  # print() needs no extra
            return "\n".join(f"{v.fault}, {v.layer}: {v.text}: {v.remedy}" for v in self.found)
        out = io.StringIO()
        Console(file=out, width=140, no_color=True).print(self.table())
        return out.getvalue().rstrip()

    __repr__ = __str__

    def _repr_html_(self) -> str:
        if not self.found:
            return f"<p>{NOTHING}</p>"
        rows = ("".join(f"<td>{html.escape(cell)}</td>" for cell in verdict) for verdict in self.found)
        head = "".join(f"<th>{name}</th>" for name in ("fault", "layer", "what is seen", "remedy"))
        return f"<table><tr>{head}</tr>" + "".join(f"<tr>{row}</tr>" for row in rows) + "</table>"

    def figure(self) -> Figure:
        """Variance of pre-activations and of their gradients, by layer, on a logarithmic scale."""
        with needed("report"):
            from matplotlib.figure import Figure

        figure = Figure(figsize=(max(5, 0.3 * len(self.order)), 4), layout="constrained")
        axes = figure.subplots()
        for what, label in ((FORWARD, "pre-activations"), (BACKWARD, "their gradients")):
            points = [(i, self.readings[n, what].var) for i, n in enumerate(self.order) if (n, what) in self.readings]
            points = [(i, v) for i, v in points if v > 0 and math.isfinite(v)]
            if points:
                axes.semilogy(*zip(*points, strict=True), marker="o", label=label)
        axes.set_xticks(range(len(self.order)), self.order, rotation=90)
        axes.set(xlabel="layer", ylabel="variance")
        axes.legend()
        return figure


def judge(monitor: VarianceMonitor) -> Verdicts:
    """Verdicts on what a monitor last measured. Waits for the device."""
    from initperf.variance.faults import Evidence, find

    evidence = Evidence.of(monitor)
    return Verdicts(find(evidence), evidence.readings, evidence.order)


def check_init(
    model: nn.Module,
    sample_input: Any,
    target: Tensor | None = None,
    loss: Callable[..., Tensor] | None = None,
) -> Verdicts:
    """One forward and backward pass before training, and the verdicts on it. The model is left exactly as it was.

    sample_input: a batch (of 16 inputs or more): a tensor, a tuple of arguments or a dict of keyword arguments.
    loss(output, target), or loss(output) without target; with a target alone cross-entropy (integers: classes,
    the output's last dimension, or its second, as of pixels) or mean squares (floating point, of the output's shape);
    with neither, the mean over the batch of a fixed random projection of the outputs, whose gradients have variance 1.
    """
    if not isinstance(model, nn.Module):
        fail("model to be a torch.nn.Module", type(model).__name__, kind=InitPerfTypeError)
    if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
        model = model.module
    monitor = VarianceMonitor(model)
    check(not torch.is_inference_mode_enabled(), "check_init to be called outside torch.inference_mode()", "inside")
    meta = next((n for n, p in model.named_parameters() if p.is_meta), None)
    check(meta is None, "a model with memory (initialize() materializes one)", f"{meta} on the meta device")
    check(any(p.requires_grad for p in model.parameters()), "a model with a parameter that requires a gradient", "none")
    kept = [(b, b.detach().clone()) for b in model.buffers()]
    parameters = [p for p in model.parameters() if p.requires_grad]
    with _forked_rng(model), torch.enable_grad(), monitor:
        try:
            output = _call(model, sample_input)
            value = _loss(output, target, loss)
            if not isinstance(value, Tensor) or value.numel() != 1:
                fail(
                    "loss to return a tensor of one value",
                    type(value).__name__ if not isinstance(value, Tensor) else f"shape {tuple(value.shape)}",
                    kind=InitPerfTypeError,
                )
            if not value.requires_grad:
                fail("a loss that depends on a parameter", "one without a gradient", kind=InitPerfRuntimeError)
            gradients = torch.autograd.grad(value, parameters, allow_unused=True)
        finally:
            with torch.no_grad():
                for buffer, before in kept:
                    buffer.copy_(before)
        monitor.step({p: g for p, g in zip(parameters, gradients, strict=True) if g is not None})
        return judge(monitor)


@contextmanager
def _forked_rng(model: nn.Module) -> Iterator[None]:
    """torch.random.fork_rng for all devices of a model."""
    devices = {p.device for p in model.parameters()}
    others = [torch.get_device_module(kind) for kind in {d.type for d in devices} - {"cpu", "cuda"}]
    with torch.random.fork_rng(sorted(d.index or 0 for d in devices if d.type == "cuda")):
        states = [module.get_rng_state() for module in others]
        try:
            yield
        finally:
            for module, state in zip(others, states, strict=True):
                module.set_rng_state(state)


def _call(model: nn.Module, sample: Any) -> Any:
    if isinstance(sample, dict) or hasattr(sample, "keys"):
        return model(**sample)
    return model(*sample) if isinstance(sample, tuple) else model(sample)


def _loss(output: Any, target: Tensor | None, loss: Callable[..., Tensor] | None) -> Tensor:
    if loss is not None:
        return loss(output) if target is None else loss(output, target)
    first = next((t for t in tensors_in(output) if t.requires_grad), None)
    if first is None:
        fail("the model to return a tensor with a gradient, or a loss that does", type(output).__name__)
    if target is None:
        direction = torch.randn(first.shape, generator=torch.Generator().manual_seed(0), device="cpu")
        return (first * direction.to(first)).sum() / max(first.shape[0] if first.dim() else 1, 1)
    if target.is_floating_point():
        check(target.shape == first.shape, f"target of the output's shape {tuple(first.shape)}", tuple(target.shape))
        return nn.functional.mse_loss(first, target)
    if first.dim() < 2 or first.shape[:-1] == target.shape:  # classes last, as of tokens
        return nn.functional.cross_entropy(first.reshape(-1, first.shape[-1]), target.flatten())
    by_pixel = first.shape[:1] + first.shape[2:]
    expected = f"target of classes, of shape {tuple(first.shape[:-1])} or {tuple(by_pixel)}"
    check(target.shape == by_pixel, expected, tuple(target.shape))
    return nn.functional.cross_entropy(first, target)
