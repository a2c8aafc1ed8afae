"""VarianceMonitor: the variance of what flows forward and back through every layer, cheap enough to stay on."""

from __future__ import annotations

import math
import warnings
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from initperf.core.checks import FLOATS, InitPerfRuntimeError, InitPerfTypeError, check, fail
from initperf.core.torch_private import ConvNd, NormBase, graph_task, has_unscaled, is_compiled, scale_of
from initperf.kernels.reference.precision import widest
from initperf.variance.layer_trace import RELU_LIKE, LayerTrace, tensors_in
from initperf.variance.moments import moments
from initperf.variance.records import (
    BACKWARD,
    BEFORE,
    FORWARD,
    GRADIENT,
    INPUT,
    INPUT_GRAD,
    UPDATE,
    Key,
    Reading,
    Record,
)

SAMPLED = 1 << 14  # values of a weight, at most, whose update is measured: its rms is then known within 1%
TOGETHER = 8 << 20  # bytes of gradients measured in one launch: one by one costs 2% of an MLP's step more; all, memory
Row = dict[str, float]


class VarianceMonitor:
    """Watches every layer of `model` that holds a parameter, by hooks; no copies of the model.

    `step()` ends a step. Each gives, by layer: forward_var of its output f (the pre-activation), backward_var of dl/df,
    input_var of its input h (the activation before it), input_grad_var of dl/dh, over batch and units; every
    `costly_every` steps also <parameter>_grad_var of every parameter, skew and kurtosis of f, `dead` (the share of ReLU
    units above 0 for no input of the last `window` such steps), and <weight>_update_ratio = rms of the update that
    follows / rms of the weight (from at most 2^14 of its values, evenly spaced).

    Gradients are those of an unscaled mean loss: they are divided by `scale`, by the samples of the step where
    `reduction` is "sum", and by the scale of `scaler`, a GradScaler. Calls of a layer
    within a step (shared modules, accumulation) are taken together, as one batch; what checkpointing computes again and
    evaluation (the model in eval mode, without gradients) are passed over.
    Outputs are measured before the next layer can overwrite them, gradients 8 MiB at a time; none is kept.

    The last `history` steps are kept on the device and read when asked: `rows()`, `scalars()`, `readings()`. Use it as a
    context manager, or attach() and detach(); a closed monitor can still be read.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        every: int = 1,
        costly_every: int = 10,
        history: int = 1000,
        window: int = 5,
        scale: float = 1.0,
        reduction: str = "mean",
        scaler: torch.amp.GradScaler | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            fail("model to be a torch.nn.Module", type(model).__name__, kind=InitPerfTypeError)
        sizes = {"every": every, "costly_every": costly_every, "history": history, "window": window}
        for name, value in sizes.items():
            whole = isinstance(value, int) and not isinstance(value, bool)
            check(whole and value >= 1, f"{name} to be an int of at least 1", value)
        usable = isinstance(scale, (int, float)) and math.isfinite(scale) and scale != 0
        check(usable, "scale to be a finite number other than 0", repr(scale))
        check(reduction in ("mean", "sum"), 'reduction to be "mean" or "sum"', repr(reduction))
        if scaler is not None and not isinstance(scaler, torch.amp.GradScaler):
            fail("scaler to be a torch.amp.GradScaler", type(scaler).__name__, kind=InitPerfTypeError)
        _refuse_compiled(model)
        if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            model = model.module
        self.model = model
        self.layers = {name: m for name, m in model.named_modules() if _is_layer(m)}
        check(bool(self.layers), "a model with at least one layer that has parameters", "none")
        self.every, self.costly_every = every, costly_every
        self.scale, self.reduction, self.scaler = scale, reduction, scaler
        self.trace = LayerTrace()
        self.skipped: dict[str, str] = {}  # layer: why it is not measured
        self._parameters = [(*name.rpartition(".")[::2], p) for name, p in model.named_parameters()]
        self._history: deque[Record] = deque(maxlen=history)
        self._alive: dict[str, deque[Tensor]] = defaultdict(lambda: deque(maxlen=window))
        self._handles: list[Any] = []
        self._closed = False
        self._step = 0
        self._before: dict[Key, Tensor] = {}
        self._begin()

    def attach(self) -> VarianceMonitor:
        """Install the hooks; returns the monitor."""
        self._check_open()
        if not self._handles:
            self._handles = [m.register_forward_hook(_Hook(self, n), with_kwargs=True) for n, m in self.layers.items()]
            self._handles.append(self.model.register_forward_hook(_ModelHook(self), with_kwargs=True))
        return self

    def detach(self) -> None:
        """Remove the hooks; attach() puts them back. What an unfinished step measured is dropped."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._begin()

    def close(self) -> None:
        """Detach for good. What was measured stays readable."""
        self.detach()
        self._before = {}
        self._closed = True

    def __enter__(self) -> VarianceMonitor:
        return self.attach()

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def steps(self) -> int:
        """Steps that are over, measured or not."""
        return self._step

    @property
    def closed(self) -> bool:
        return self._closed

    @property
    def measuring(self) -> bool:
        """Whether this step is one of those that are measured."""
        return not self._closed and self._step % self.every == 0

    @property
    def costly(self) -> bool:
        """Whether this step's costlier statistics are measured."""
        return self._step % self.costly_every == 0

    def step(self, gradients: Mapping[nn.Parameter, Tensor] | None = None) -> None:
        """End a step: after backward, before gradients are set to zero. Reads nothing back. gradients: in place of `.grad`."""
        self._check_open()
        if not self._handles:
            fail("an attached monitor: call attach() or use `with`", "step() before", kind=InitPerfRuntimeError)
        if self._before:  # of the last costly step: one update later
            after = {key: _sample(p) for key, p in self._weights() if key in self._before}
            same = {
                key: v for key, v in after.items() if v.shape == self._before[key].shape
            }  # else sparsify came between
            self._history[-1].blocks += _measure(
                {(n, w + UPDATE): v - self._before[n, w] for (n, w), v in same.items()}
            )
            self._before = {}
        if self.measuring:
            self._flush()
            if not self._current.blocks:
                warnings.warn(
                    "No layer of the watched model ran in this step: it was compiled after the monitor was attached, "
                    "another model (a copy) is trained, or it was only evaluated (eval mode, no gradients).",
                    stacklevel=2,
                )
            if self.costly:
                self._measure_parameters(gradients)
            self._finish_scales()
            for name, highest in self._highest.items():
                if self.trace.activations.get(name) not in RELU_LIKE:
                    continue
                self._alive[name].append(torch.stack(highest).amax(0) > 0)
                seen = torch.stack(list(self._alive[name])).any(0)
                self._current.single.append(((name, "dead"), 1 - seen.to(widest(seen.device.type)).mean()))
            if self.costly:
                with torch.no_grad():
                    self._before = {key: _sample(p).clone() for key, p in self._weights()}
                self._current.blocks += _measure({(n, w + BEFORE): v for (n, w), v in self._before.items()})
            self._history.append(self._current)
        self._step += 1
        self._begin()

    def readings(self, step: int | None = None) -> dict[Key, Reading]:
        """{(layer, what): moments} of a measured step, the last by default; what is "forward", "backward", "input", ..."""
        records = [r for r in self._history if step is None or r.step == step]
        check(bool(records), "a step that was measured and is kept", "none" if step is None else step)
        return records[-1].readings()

    def rows(self, start: int = 0) -> Iterator[tuple[int, str, Row]]:
        """(step, layer, {statistic: value}) of every measured step that is kept, from step `start`. Waits for the device."""
        for record in [r for r in self._history if r.step >= start]:
            layers: dict[str, Row] = defaultdict(dict)
            for name, statistic, value in record.values():
                layers[name][statistic] = value
            for name, row in layers.items():
                yield record.step, name, row

    def scalars(self) -> Row:
        """The last measured value of every statistic, as {"layer/statistic": value}: for any logger."""
        flat: Row = {}
        for record in list(self._history)[-2 * self.costly_every :]:
            flat |= {f"{name or 'model'}/{statistic}": value for name, statistic, value in record.values()}
        return flat

    def _begin(self) -> None:
        self._current = Record(self._step, self.costly)
        self._highest: dict[str, list[Tensor]] = defaultdict(list)
        self._pending: dict[Key, Tensor] = {}
        self._pending_bytes = 0
        self._samples = 0
        self._scale_seen: Tensor | None = None
        self._scale_version = 0
        self.trace.end()

    def _weights(self) -> Iterator[tuple[Key, Tensor]]:
        for layer, name, p in self._parameters:
            if p.dim() > 1 and p.requires_grad and p.dtype in FLOATS and p.layout is torch.strided:
                yield (layer, name), p.detach()

    def _measure_parameters(self, gradients: Mapping[nn.Parameter, Tensor] | None) -> None:
        found: dict[Key, Tensor] = {}
        for layer, name, p in self._parameters:
            g = p.grad if gradients is None else gradients.get(p)
            if g is None or g.dtype not in FLOATS:
                continue
            key = (layer, name + GRADIENT)
            if g.is_sparse:
                values = g.coalesce().values()
                self._current.blocks += _measure({key: values})
                self._current.blocks += _measure({key: values.new_zeros(1).expand(g.numel() - values.numel())})
            elif g.layout is torch.strided:
                found[key] = g.detach()
        self._current.blocks += _measure(found)

    def _finish_scales(self) -> None:
        record = self._current
        record.scales.append(self.scale)
        if self.reduction == "sum":
            record.scales.append(max(self._samples, 1))
        record.parameter_scales = list(record.scales)
        if self._scale_seen is not None:
            record.scales.append(self._scale_seen)
            if not self._is_unscaled():
                record.parameter_scales.append(self._scale_seen)

    def _is_unscaled(self) -> bool:
        """Whether parameters' gradients were divided by the scale already: by unscale_, or by the scaler's step before its update."""
        if self.scaler is None:
            return True
        scale = scale_of(self.scaler)
        return (scale is not None and scale._version != self._scale_version) or has_unscaled(self.scaler)

    def _take_forward(self, name: str, h: Tensor | None, f: Tensor) -> None:
        found = {(name, FORWARD): f.detach()}
        if h is not None:
            found[name, INPUT] = h.detach()
        self._current.blocks += _measure(found, order=4 if self.costly else 2)
        activation = self.trace.activations.get(name, "relu")  # not known yet in the first step
        if self.costly and f.dim() > 1 and activation in RELU_LIKE:
            unit = _unit_dimension(self.layers[name], f.dim())
            self._highest[name].append(moments(f.detach(), dim=[d for d in range(f.dim()) if d != unit], order=2).max)

    def _take_gradient(self, name: str, what: str, gradient: Tensor) -> None:
        if self.scaler is not None and self._scale_seen is None and (scale := scale_of(self.scaler)) is not None:
            self._scale_seen, self._scale_version = scale.clone(), scale._version
        if (name, what) in self._pending:
            self._flush()
        self._pending[name, what] = gradient.detach()
        self._pending_bytes += gradient.nbytes
        if self._pending_bytes >= TOGETHER:
            self._flush()

    def _flush(self) -> None:
        self._current.blocks += _measure(self._pending)
        self._pending, self._pending_bytes = {}, 0

    def _evaluating(self) -> bool:
        """Whether the pass is no part of training: reentrant checkpointing runs without gradients too, but in train mode."""
        return not self.model.training and not torch.is_grad_enabled()

    def _check_open(self) -> None:
        if self._closed:
            fail("a monitor that is not closed; make a new one", "a closed one", kind=InitPerfRuntimeError)


class _Hook:
    """Takes input and output of one layer, and the gradients with respect to them. A copied or unpickled model's does nothing."""

    def __init__(self, monitor: VarianceMonitor, name: str) -> None:
        self.monitor, self.name = monitor, name

    def __reduce__(self) -> tuple[Callable[[], Any], tuple[()]]:
        return _inert_hook, ()

    def __call__(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        monitor = self.monitor
        if not monitor.measuring or monitor._evaluating() or torch.jit.is_tracing():
            return
        f = _first_float(output)
        if f is None:
            monitor.skipped[self.name] = "it returns no floating-point tensor"
            return
        h = _first_float((args, kwargs))
        if h is not None:
            monitor.trace.enters(h)
        monitor.trace.leaves(self.name, f)
        if not _recomputing():
            monitor._take_forward(self.name, h, f)
        for what, tensor in ((BACKWARD, f), (INPUT_GRAD, h)):
            if tensor is not None and tensor.requires_grad:
                tensor.register_hook(_GradientHook(monitor, self.name, what))


class _ModelHook(_Hook):
    """Counts samples, and sees what the model returns."""

    def __init__(self, monitor: VarianceMonitor) -> None:
        super().__init__(monitor, "")

    def __call__(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if self.monitor.measuring and not self.monitor._evaluating() and not _recomputing():
            first = next((t for t in tensors_in((args, kwargs)) if t.dim()), None)
            self.monitor._samples += 0 if first is None else first.shape[0]
            for value in tensors_in(output):
                self.monitor.trace.enters(value)


class _GradientHook:
    def __init__(self, monitor: VarianceMonitor, name: str, what: str) -> None:
        self.monitor, self.name, self.what = monitor, name, what

    def __call__(self, gradient: Tensor) -> None:
        if self.monitor.measuring and self.monitor._handles:
            self.monitor._take_gradient(self.name, self.what, gradient)


def _inert_hook() -> Callable[..., None]:
    return _do_nothing


def _do_nothing(*_: object) -> None:
    """The hook of a copy."""


def _measure(tensors: Mapping[Key, Tensor], order: int = 2) -> list[tuple[list[Key], Tensor]]:
    """Moments of all, in one launch a device."""
    devices: dict[torch.device, list[Key]] = defaultdict(list)
    for key, tensor in tensors.items():
        devices[tensor.device].append(key)
    return [(keys, moments([tensors[k] for k in keys], order=order)._rows) for keys in devices.values()]


def _sample(parameter: Tensor) -> Tensor:
    """At most SAMPLED values, evenly spaced; the distance is odd, so that it does not keep to a few columns."""
    flat = parameter.detach().reshape(-1)
    return flat if flat.numel() <= SAMPLED else flat[:: (flat.numel() // SAMPLED) | 1]


def _first_float(value: Any) -> Tensor | None:
    return next((t for t in tensors_in(value) if t.dtype in FLOATS and t.layout is torch.strided), None)


def _unit_dimension(layer: nn.Module, dimensions: int) -> int:
    """Which dimension of a layer's output counts its units: channels, also of an image without a batch; else the last."""
    if isinstance(layer, ConvNd):
        return dimensions - 1 - len(layer.kernel_size)
    return 1 if isinstance(layer, (NormBase, nn.GroupNorm)) else dimensions - 1


def _recomputing() -> bool:
    """Whether autograd is running this forward pass again, for activation checkpointing."""
    return graph_task() != -1


def _is_layer(module: nn.Module) -> bool:
    if isinstance(module, nn.utils.parametrize.ParametrizationList):
        return False
    return (
        bool(module._parameters)
        and any(p is not None for p in module._parameters.values())
        or hasattr(module, "parametrizations")
    )


def _refuse_compiled(model: nn.Module) -> None:
    for module in model.modules():
        if is_compiled(module):
            expected = (
                "a model that is not compiled, since hooks on one never fire: watch the model given to torch.compile"
            )
            fail(expected, "a model returned or changed by torch.compile", kind=InitPerfRuntimeError)
