"""Scaling the survivors of a mask, so that pre-activations keep the variance that the dense layer gives them.

layer     by 1 / sqrt(density): right for masks that do not look at the weights (random, shuffled)
unit      each output unit by sqrt(fan-in / its live fan-in) (Evci et al., rigl)
squares   by sqrt(sum w^2 dense / sum w^2 of the survivors): right for magnitude masks too
measured  so that the variance of each layer's pre-activations on a batch is what the dense model gives
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from initperf.core import ops
from initperf.core.checks import fail
from initperf.core.torch_private import ConvNd, ConvTransposeNd
from initperf.core.units import by_unit
from initperf.kernels.reference.precision import in_float64
from initperf.variance.layer_trace import tensors_in
from initperf.variance.moments import moments

if TYPE_CHECKING:
    from initperf.init.model.plan import Task

_PART = 1 << 20  # dense values of a compressed weight that are made at a time
MODES = ("layer", "unit", "squares", "measured")


def rescale_all(mode: str, tasks: Sequence[Task], seed: int) -> None:
    """Mask the dense values that the tasks' memory holds and scale the survivors, by "unit" or "squares".

    A compressed weight holds survivors only; its dense sum of squares is that of its distribution's values, made in parts.
    """
    whole = _squares(tasks) if mode == "squares" else {}
    for task in tasks:
        if task.mask is not None:
            task.memory.masked_fill_(~task.mask.to(task.memory.device), 0)
    kept = _squares(tasks) if mode == "squares" else {}
    for task in tasks:
        if mode == "unit":
            task.memory.mul_(_unit_factor(task))
        elif kept[task.name] > 0:
            dense = whole[task.name] if task.bits is None else _dense_squares(task, seed)
            task.memory.mul_(torch.tensor(dense / kept[task.name], device="cpu").sqrt().to(task.memory.dtype))


def _squares(tasks: Sequence[Task]) -> dict[str, float]:
    """The mean square of every task's values, the pruned ones counted as 0; one pass a device."""
    result = {}
    for device in {t.memory.device for t in tasks}:
        here = [t for t in tasks if t.memory.device == device]
        found = moments([t.memory for t in here], order=2)
        for task, square in zip(here, (found.var + found.mean**2).tolist(), strict=True):
            result[task.name] = square * task.memory.numel() / task.place.parameter.numel()
    return result


def _dense_squares(task: Task, seed: int) -> float:
    """The mean square of the dense values of a compressed weight, in parts."""
    n = task.place.parameter.numel()
    scratch = torch.empty(min(n, _PART), dtype=task.memory.dtype, device=task.memory.device)
    sample_ = ops.implementation("sample_", scratch.device.type)
    total = 0.0
    for start in range(0, n, _PART):
        values = scratch[: n - start]
        sample_(values, *task.distribution, seed, task.stream, start)  # type: ignore[misc]
        found = moments(values, order=2)
        total += float(found.var + found.mean**2) * len(values)
    return total / n


def _unit_factor(task: Task) -> Tensor:
    """What to multiply the survivors with; a unit without survivors keeps 1. For each survivor of a compressed weight."""
    mask = task.mask if task.mask is not None else task.unpacked_bits()
    factor = torch.empty(mask.shape, dtype=task.memory.dtype, device=mask.device)
    units = by_unit(task.place.module, mask)
    inputs = list(range(2 if isinstance(task.place.module, ConvTransposeNd) else 1, units.dim()))
    live = in_float64(units.sum(dim=inputs, keepdim=True) if inputs else units)
    fan = units.numel() / max(1, live.numel())
    by_unit(task.place.module, factor).copy_(torch.where(live > 0, fan / live.clamp(min=1), 1.0).sqrt())
    return factor if task.bits is None else factor[mask].view(task.memory.shape)


def reached(model: nn.Module, sample: Any, layers: Mapping[nn.Module, Tensor]) -> set[nn.Module]:
    """Which of `layers` a forward pass of the sample calls. Raises what the model raises on a sample that does not fit."""
    for tensor in tensors_in(sample):
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            fail("a sample of finite numbers", "NaN or infinity in it")
        if tensor.numel() and not bool(tensor.any()) and tensor.is_floating_point():
            fail("a sample that says something of the layers' inputs", "one of zeros only")
    return set(_sweep(model, sample, layers, None))


def measured(model: nn.Module, sample: Any, layers: Mapping[nn.Module, Tensor]) -> None:
    """Mask the dense weights of `layers` {module: mask of its weight} and scale the survivors, in the order of the forward pass.

    Compared are variances of the outputs without bias, in evaluation mode. Products are torch's, so the last bits of the
    factors may differ between machines.
    """
    dense = _sweep(model, sample, layers, None)
    for module, mask in layers.items():
        module.weight.masked_fill_(~mask, 0)  # type: ignore[operator]
    _sweep(model, sample, layers, dense)


def _sweep(
    model: nn.Module, sample: Any, layers: Mapping[nn.Module, Tensor], wanted: Mapping[nn.Module, Tensor] | None
) -> dict[nn.Module, Tensor]:
    """Variance of each layer's output without bias at its first call; with `wanted`, its weight is scaled to that first."""
    found: dict[nn.Module, Tensor] = {}

    def forward_of(module: Any) -> Any:
        plain: Any = next(
            vars(c)["forward"]
            for c in type(module).__mro__
            if c.__module__.startswith("torch.nn.") and "forward" in vars(c)
        )

        def forward(*args: Any, **kwargs: Any) -> Any:
            if module not in found:
                bias = module._parameters.get("bias")
                module._parameters["bias"] = None
                try:
                    variance = in_float64(plain(module, *args, **kwargs)).var(correction=0)
                finally:
                    module._parameters["bias"] = bias
                found[module] = variance
                if wanted is not None and variance > 0:
                    module.weight.mul_((wanted[module] / variance).sqrt().to(module.weight.dtype))
            return plain(module, *args, **kwargs)

        return forward

    training = {m: m.training for m in model.modules()}
    try:
        for module in layers:
            module.forward = forward_of(module)
        model.eval()
        with torch.no_grad():
            model(*sample) if isinstance(sample, tuple) else model(sample)
    finally:
        for module in layers:
            del module.__dict__["forward"]
        for m, mode in training.items():
            m.training = mode
    return found


def check_layers(layers: Mapping[nn.Module, tuple[str, str]]) -> None:
    """Raise unless each {module: (name, leaf)} is a linear or convolutional layer whose `weight` is masked."""
    for module, (name, leaf) in layers.items():
        if leaf != "weight" or not isinstance(module, (nn.Linear, ConvNd)) or "weight" not in module._parameters:
            fail('rescale="measured" for weights of linear and convolutional layers only', f"a mask of {name}")
