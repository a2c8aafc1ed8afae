"""VarianceMonitor: the variance of what flows forward and back through every layer, cheap enough to stay on."""

from __future__ import annotations

import copy
from collections import defaultdict, deque
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .checks import InitPerfRuntimeError, InitPerfTypeError, check, fail
from .stats import moments

OUT, GRAD, DEAD = "forward_var", "backward_var", "dead"
Row = dict[str, float]


class VarianceMonitor:
    """Watches every layer of `model` that holds a weight of two or more dimensions: hooks, no copies of the model.

    At each step (`step()` ends one): forward_var = var of the layer's outputs (pre-activations f), backward_var = var of
    dl/df, both over batch and units, and weight_grad_var = var of the gradient of its weight; every `costly_every` steps
    also the mean, skew and kurtosis of f, and `dead`: the share of units whose f is above 0 for no input of the step.
    Gradients are divided by `scale`: set it to a GradScaler's scale, or to the batch size where the loss is a sum, to get
    those of an unscaled mean. Calls of a module within a step (shared modules, accumulation) are taken together; what
    activation checkpointing computes again is passed over. Values are measured when they appear, and not kept.

    The last `history` steps are kept as device tensors and read back when asked: `rows()`, `scalars()`. Use it as a
    context manager, or `attach()` and `close()`; after close what was measured can still be read.
    """

    def __init__(self, model: nn.Module, *, every: int = 1, costly_every: int = 10, history: int = 1000) -> None:
        if not isinstance(model, nn.Module):
            fail("model to be a torch.nn.Module", type(model).__name__, kind=InitPerfTypeError)
        for name, value in (("every", every), ("costly_every", costly_every), ("history", history)):
            check(isinstance(value, int) and value >= 1, f"{name} to be an int of at least 1", value)
        if isinstance(model, torch._dynamo.OptimizedModule) or getattr(model, "_compiled_call_impl", None) is not None:
            expected = (
                "a model that is not compiled, since hooks on one never fire; attach before torch.compile is called"
            )
            fail(expected, "a model returned or changed by torch.compile", kind=InitPerfRuntimeError)
        self.layers = {name: m for name, m in model.named_modules() if _is_layer(m)}
        check(bool(self.layers), "a model with at least one layer that has a weight of two dimensions", "none")
        self.every, self.costly_every = every, costly_every
        self.scale = 1.0
        self._history: deque[tuple[int, list[tuple[str, str]], Tensor]] = deque(maxlen=history)
        self._handles: list[Any] = []
        self._closed = False
        self._step = 0
        self._parts: dict[tuple[str, str], list[Tensor]] = defaultdict(list)

    def attach(self) -> VarianceMonitor:
        """Install the hooks; returns the monitor."""
        self._check_open()
        if not self._handles:
            self._handles = [m.register_forward_hook(_Hook(self, name)) for name, m in self.layers.items()]
        return self

    def close(self) -> None:
        """Remove the hooks. What was measured stays readable."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._closed = [], True
        self._parts.clear()

    def __enter__(self) -> VarianceMonitor:
        return self.attach()

    def __exit__(self, *_: object) -> None:
        self.close()

    def __deepcopy__(self, memo: dict[int, Any]) -> VarianceMonitor:
        return self  # a copied model's hooks name their monitor; `_Hook` then ignores the copy's modules

    def step(self) -> None:
        """End a step: after backward, before gradients are set to zero. Reads nothing back."""
        self._check_open()
        if not self._handles:
            fail("an attached monitor: call attach() or use `with`", "step() before", kind=InitPerfRuntimeError)
        if self.measuring:
            weights = {n: m.weight.grad for n, m in self.layers.items() if isinstance(m.weight.grad, Tensor)}
            if weights:
                var = moments(list(weights.values()), order=2).var
                for name, value in zip(weights, var / self.scale**2, strict=True):
                    self._parts[name, "weight_grad_var"].append(torch.stack([value * 0 + 1, value * 0, value]))
            if self._parts:
                keys, columns = [], []
                for (name, statistic), parts in self._parts.items():
                    keys.append((name, statistic))
                    columns.append(_pooled(parts) if statistic.endswith("var") else torch.stack(parts).mean(0))
                self._history.append((self._step, keys, torch.stack(columns)))
        self._step += 1
        self._parts.clear()

    @property
    def measuring(self) -> bool:
        """Whether this step is one of those that are measured."""
        return not self._closed and self._step % self.every == 0

    def _take_output(self, name: str, f: Tensor) -> None:
        costly = self._step % self.costly_every == 0
        m = moments(f, order=4 if costly else 2)
        self._parts[name, OUT].append(torch.stack([m.count.double(), m.mean, m.var]))
        if costly:
            for field in ("mean", "skew", "kurtosis"):
                self._parts[name, field].append(getattr(m, field))
            if f.dim() > 1:
                unit = 1 if isinstance(self.layers[name], nn.modules.conv._ConvNd) else f.dim() - 1
                highest = moments(f, dim=[d for d in range(f.dim()) if d != unit], order=2).max
                self._parts[name, DEAD].append((highest <= 0).double().mean())

    def _take_gradient(self, name: str, gradient: Tensor) -> None:
        m = moments(gradient, order=2)
        self._parts[name, GRAD].append(torch.stack([m.count.double(), m.mean / self.scale, m.var / self.scale**2]))

    def rows(self) -> Iterator[tuple[int, str, Row]]:
        """(step, layer, {statistic: value}) of every measured step that is kept. Waits for the device."""
        for step, keys, values in self._history:
            layers: dict[str, Row] = defaultdict(dict)
            for (name, statistic), value in zip(keys, values.tolist(), strict=True):
                layers[name][statistic] = value
            for name, row in layers.items():
                yield step, name, row

    def scalars(self) -> Row:
        """The last measured value of every statistic, as {"layer/statistic": value}: for any logger."""
        flat: Row = {}
        for _, name, row in self.rows():
            flat |= {f"{name or 'model'}/{statistic}": value for statistic, value in row.items()}
        return flat

    def _check_open(self) -> None:
        if self._closed:
            fail("a monitor that is not closed; make a new one", "a closed one", kind=InitPerfRuntimeError)


class _Hook:
    """Takes the outputs of one layer, and the gradients with respect to them."""

    def __init__(self, monitor: VarianceMonitor, name: str) -> None:
        self.monitor, self.name = monitor, name

    def __deepcopy__(self, memo: dict[int, Any]) -> _Hook:
        return copy.copy(self)

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        monitor = self.monitor
        if monitor.layers[self.name] is not module or not monitor.measuring:
            return
        f = next(
            (v for v in (output if isinstance(output, (tuple, list)) else [output]) if isinstance(v, Tensor)), None
        )
        if f is None or not f.is_floating_point():
            return
        if not _recomputing():
            monitor._take_output(self.name, f.detach())
        if f.requires_grad:
            f.register_hook(self.take_gradient)

    def take_gradient(self, gradient: Tensor) -> None:
        if self.monitor.measuring:
            self.monitor._take_gradient(self.name, gradient.detach())


def _pooled(parts: list[Tensor]) -> Tensor:
    """The variance of parts that are given as (count, mean, var), taken together."""
    if len(parts) == 1:
        return parts[0][2]
    count, mean, var = torch.stack(parts, 1)
    share = count / count.sum()
    middle = (share * mean).sum()
    return (share * (var + (mean - middle) ** 2)).sum()


def _recomputing() -> bool:
    """Whether autograd is running this forward pass again, for activation checkpointing."""
    return torch._C._current_graph_task_id() != -1


def _is_layer(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.dim() >= 2 and not isinstance(module, nn.Embedding)
