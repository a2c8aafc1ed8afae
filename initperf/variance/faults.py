"""The faults a network's readings show, each found by a function of its own, and named once for one cause."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from initperf.core.units import fan_in
from initperf.kernels.reference.precision import in_float64
from initperf.variance.layer_trace import SATURATING, squared_gain
from initperf.variance.monitor import VarianceMonitor
from initperf.variance.records import BACKWARD, FORWARD, GRADIENT, INPUT, Key, Reading
from initperf.variance.thresholds import _FEW, THRESHOLDS, Verdict

_RULES = {"tanh": "Xavier's", "sigmoid": "Xavier's", "selu": "LeCun's", None: "LeCun's"}


def limit(name: str) -> float:
    return THRESHOLDS[name][0]


@dataclass
class Evidence:
    """Readings, the layers with weights in the order in which they ran, and what follows each."""

    layers: dict[str, nn.Module]
    readings: dict[Key, Reading]
    values: dict[str, float]
    order: list[str]
    activations: dict[str, str | None]

    @classmethod
    def of(cls, monitor: VarianceMonitor) -> Evidence:
        readings = monitor.readings()
        ran = [layer for layer, what in readings if what == FORWARD]
        order = [n for n in ran if _weight(monitor.layers[n]) is not None]
        return cls(monitor.layers, readings, monitor.scalars(), order, monitor.trace.activations)

    def weight(self, name: str) -> Tensor:
        weight = _weight(self.layers[name])
        assert weight is not None
        return weight

    def gradient(self, name: str) -> Reading | None:
        """Of the weight; of its survivors in a compressed layer."""
        found = (self.readings.get((name, w + GRADIENT)) for w in ("weight", "weight_values"))
        return next((r for r in found if r is not None), None)

    def std_ratio(self, name: str) -> float:
        """Standard deviation of the weight / that which keeps the variance: sqrt(gain^2 / fan_in)."""
        weight = self.weight(name)
        kept = squared_gain(self.activations.get(name)) / fan_in(self.layers[name], weight)
        return in_float64(weight).std(correction=0).item() / math.sqrt(kept)


def find(e: Evidence) -> list[Verdict]:
    """All faults. What follows from another one is left out: a symmetric network's gradients also vanish."""
    broken = non_finite(e)
    if broken:
        return broken
    same = symmetric(e)
    if same:
        return same
    inputs, units = unscaled_inputs(e), dead_units(e)
    recurrent, saturated_units = recurrence(e), saturated(e)
    flow = [] if units or saturated_units else variance(e) or gradients(e) or he_for_tanh(e)
    output = [] if flow or inputs or saturated_units else large_output(e)
    return [*inputs, *units, *saturated_units, *recurrent, *flow, *output, *without_gradient(e), *updates(e)]


def non_finite(e: Evidence) -> list[Verdict]:
    for what, words in ((FORWARD, "outputs"), (BACKWARD, "gradients")):
        for name in e.order if what == FORWARD else reversed(e.order):
            r = e.readings.get((name, what))
            if r and r.nonfinite:
                text = f"{r.nonfinite:.0f} of its {words} are infinite or NaN, the first where this is so"
                return [
                    Verdict(
                        "non-finite", name, text, "smaller weights (He, Xavier), a smaller learning rate, or float32"
                    )
                ]
    return []


def symmetric(e: Evidence) -> list[Verdict]:
    found = []
    for name in e.order:
        weight, gradient = e.weight(name), e.gradient(name)
        if len(weight) < 2 or not torch.equal(weight, weight[:1].expand_as(weight)):
            continue
        zero = not weight.any()
        if not zero:
            found.append(
                Verdict("symmetric", name, "all its units have the same weights", "random weights: He or Xavier")
            )
        elif gradient is not None and gradient.mean_square == 0:  # else a last layer that starts from zero, and learns
            text = "all its weights are 0, and so is their gradient: it cannot learn"
            found.append(Verdict("zero weights", name, text, "random weights: He or Xavier"))
    return found


def unscaled_inputs(e: Evidence) -> list[Verdict]:
    r = e.readings.get((e.order[0], INPUT)) if e.order else None
    if r is None or r.mean_square == 0:
        return []
    std, rms = math.sqrt(r.var), math.sqrt(r.mean_square)
    if abs(r.mean) <= limit("input mean") * std and 1 / limit("input rms") <= rms <= limit("input rms"):
        return []
    text = f"the inputs have mean {r.mean:.3g} and standard deviation {std:.3g}"
    return [Verdict("unscaled inputs", e.order[0], text, "subtract the mean and divide by the standard deviation")]


def dead_units(e: Evidence) -> list[Verdict]:
    found = []
    for name in e.layers:
        dead, r = e.values.get(f"{name or 'model'}/dead", 0.0), e.readings.get((name, FORWARD))
        weight = _weight(e.layers[name])
        if dead <= limit("dead") or r is None or (weight is not None and r.count / len(weight) < limit("samples")):
            continue
        text = f"{dead:.0%} of units of {name} are dead: 0 for every input"
        bias = getattr(e.layers[name], "bias", None)
        if isinstance(bias, Tensor) and in_float64(bias).mean().item() < -math.sqrt(r.var):
            text += f"; its biases are {in_float64(bias).mean().item():.3g} on average"
            found.append(Verdict("dead units", name, text, "biases of 0"))
        else:
            found.append(Verdict("dead units", name, text, "a smaller learning rate, He's weights, or leaky ReLU"))
    return found


def saturated(e: Evidence) -> list[Verdict]:
    found = []
    for name, activation in e.activations.items():
        r = e.readings.get((name, FORWARD))
        if activation in SATURATING and r and math.sqrt(r.mean_square) > limit(activation):
            text = f"{activation} is saturated: its pre-activations have rms {math.sqrt(r.mean_square):.3g}"
            if name in e.order:
                text += f"; weights' std is {e.std_ratio(name):.3g}x Xavier's"
            found.append(Verdict("saturated", name, text, "Xavier's weights, biases of 0, scaled inputs"))
    return found


def recurrence(e: Evidence) -> list[Verdict]:
    found = []
    for name, layer in e.layers.items():
        if not isinstance(layer, (nn.RNN, nn.RNNCell)):
            continue
        for key, weight in layer.named_parameters():
            if "weight_hh" in key and weight.shape[0] == weight.shape[1]:
                radius = torch.linalg.eigvals(in_float64(weight.detach())).abs().max().item()
                if radius > limit("spectral radius"):
                    text = f"{key}'s spectral radius is {radius:.3g}: the state grows by it at every time step"
                    found.append(Verdict("exploding recurrence", name, text, "orthogonal recurrent weights (radius 1)"))
    return found


def variance(e: Evidence) -> list[Verdict]:
    """Of pre-activations; the last layer is left out, since it may be scaled for the loss."""
    hidden = [n for n in e.order[:-1] if e.readings[n, FORWARD].var > 0]
    growth = _growth([e.readings[n, FORWARD].var for n in hidden])
    if growth is None:
        return []
    total = growth ** (len(hidden) - 1)
    if not _outside(total, limit("variance in all")) or not _outside(growth, limit("variance a layer")):
        return []
    fault = "variance explodes" if growth > 1 else "variance vanishes"
    text = (
        f"variance {'grows' if growth > 1 else 'falls'} {growth:.2g}x a layer, expected 1.0x{_weights_say(e, hidden)}"
    )
    return [Verdict(fault, f"{hidden[0]} to {hidden[-1]}", text, _remedy(e, hidden))]


def gradients(e: Evidence) -> list[Verdict]:
    """Of the squared norm of dl/df: He's rule keeps it at any widths."""
    hidden = [n for n in e.order[:-1] if (n, BACKWARD) in e.readings]
    norms = [e.readings[n, BACKWARD].count * e.readings[n, BACKWARD].mean_square for n in hidden]
    hidden, norms = [n for n, v in zip(hidden, norms, strict=True) if v], [v for v in norms if v]
    growth = _growth(norms)
    if growth is None or not _outside(growth ** (len(norms) - 1), limit("gradient in all")):
        return []
    if growth > 1:
        small = [n for n, v in zip(hidden, norms, strict=True) if v < norms[-1] / 100]
        where = small[-1] if small else hidden[0]
        text = f"gradient vanishes from layer {where} up to the input: {growth:.2g}x its square a layer{_weights_say(e, hidden)}"
        return [Verdict("gradient vanishes", where, text, _remedy(e, hidden))]
    text = f"gradient explodes towards the input: {1 / growth:.2g}x its square a layer{_weights_say(e, hidden)}"
    return [Verdict("gradient explodes", hidden[0], text, _remedy(e, hidden))]


def he_for_tanh(e: Evidence) -> list[Verdict]:
    """It shows in no growth: tanh's bend bounds the variance at 0.5 and not 0.1, and gradients fall less evenly."""
    hidden = [n for n in e.order[:-1] if e.activations.get(n) in SATURATING]
    ratio = statistics.median([e.std_ratio(n) for n in hidden] or [1.0])
    if len(hidden) < _FEW or _outside(ratio / math.sqrt(2), limit("He for tanh")):
        return []
    activation = _rule(e, hidden)[0]
    text = f"weights' std is {ratio:.2f}x Xavier's: He's rule, which is ReLU's, before {activation}"
    return [
        Verdict(
            "He for tanh",
            f"{hidden[0]} to {hidden[-1]}",
            text,
            f"Xavier's std: multiply the weights by {1 / ratio:.2f}",
        )
    ]


def large_output(e: Evidence) -> list[Verdict]:
    if not e.order or len(e.order) < 2:
        return []
    name = e.order[-1]
    r, ratio = e.readings[name, FORWARD], e.std_ratio(name)
    if math.sqrt(r.mean_square) <= limit("output rms") or ratio <= 2:
        return []
    text = (
        f"outputs have rms {math.sqrt(r.mean_square):.3g}, weights' std is {ratio:.3g}x LeCun's: the loss starts large"
    )
    return [Verdict("large output", name, text, "smaller weights in the last layer")]


def without_gradient(e: Evidence) -> list[Verdict]:
    trained = [n for n in e.order if e.weight(n).requires_grad]
    seen = any(e.gradient(n) for n in e.layers)
    found = []
    read = {id(getattr(e.layers[n], "weight", None)) for n, what in e.readings if what == "weight" + GRADIENT}
    for name in e.order if seen else []:
        r = e.gradient(name)
        if (
            r is None and id(getattr(e.layers[name], "weight", read)) in read
        ):  # tied: its gradient goes by the parameter's first name
            continue
        if name not in trained:
            text, remedy = (
                "its weight does not require a gradient",
                "requires_grad_(True), unless it is meant (fine-tuning)",
            )
        elif r is None:
            text, remedy = (
                "its weight gets no gradient: it is detached from the loss",
                "look for detach(), no_grad() or .data",
            )
        else:
            continue
        found.append(Verdict("frozen", name, text, remedy))
    return found


def updates(e: Evidence) -> list[Verdict]:
    ratios = [v for k, v in e.values.items() if k.endswith("_update_ratio") and math.isfinite(v)]
    if not ratios or statistics.median(ratios) <= limit("update ratio"):
        return []
    text = f"an update is {statistics.median(ratios):.2g} of the weight in the median layer; 0.001 is usual"
    return [Verdict("learning rate too large", "all", text, "a learning rate smaller by 10 or more")]


def _weight(layer: nn.Module) -> Tensor | None:
    if "weight_mask_bits" in layer._buffers:  # compressed
        layer = cast(Any, layer).to_dense()
    weight: Any = getattr(layer, "weight", None)
    usable = isinstance(weight, Tensor) and weight.dim() > 1 and not isinstance(layer, (nn.Embedding, nn.EmbeddingBag))
    return weight.detach().requires_grad_(weight.requires_grad) if usable else None


def _growth(values: list[float]) -> float | None:
    """Factor a layer: exp of the slope of log(values); None for too few."""
    if len(values) < _FEW:
        return None
    slope, _ = statistics.linear_regression(range(len(values)), [math.log(v) for v in values])
    return math.exp(slope)


def _outside(value: float, most: float) -> bool:
    return not 1 / most <= value <= most


def _rule(e: Evidence, names: list[str]) -> tuple[str | None, str]:
    activation = statistics.mode(e.activations.get(n) for n in names)
    return activation, _RULES.get(activation, "He's")


def _weights_say(e: Evidence, names: list[str]) -> str:
    ratio = statistics.median(e.std_ratio(n) for n in names)
    rule = _rule(e, names)[1]
    return f": weights' std is {ratio:.2f}x {rule}" if _outside(ratio, limit("std ratio")) else ""


def _remedy(e: Evidence, names: list[str]) -> str:
    activation, rule = _rule(e, names)
    ratio = statistics.median(e.std_ratio(n) for n in names)
    if _outside(ratio, limit("std ratio")):
        return f"{rule} std for {activation or 'linear layers'}: multiply the weights by {1 / ratio:.2f}"
    return "normalization, residual connections, or fewer layers" + (" (or ReLU)" if activation in SATURATING else "")
