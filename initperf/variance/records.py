"""What a monitor keeps: moments as the kernels write them, on the device, and their reading."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from initperf.variance.moments import Moments

FORWARD, BACKWARD, INPUT, INPUT_GRAD = "forward", "backward", "input", "input_grad"
GRADIENT, UPDATE, BEFORE = "_grad", "_update", "_before"  # after a parameter's name
Key = tuple[str, str]  # layer, what


class Reading(NamedTuple):
    """Moments of one tensor of a layer in one step; gradients as those of an unscaled mean loss."""

    count: float  # type: ignore[assignment]  # hides tuple.count
    nonfinite: float
    mean: float
    var: float
    skew: float
    kurtosis: float
    min: float
    max: float

    @property
    def mean_square(self) -> float:
        return self.mean**2 + self.var


@dataclass
class Record:
    """One measured step. blocks: keys and their moments' rows; single: keys and values; scales: gradients were multiplied by these."""

    step: int
    costly: bool
    blocks: list[tuple[list[Key], Tensor]] = field(default_factory=list)
    single: list[tuple[Key, Tensor]] = field(default_factory=list)
    scales: list[Tensor | float] = field(default_factory=list)
    parameter_scales: list[Tensor | float] = field(default_factory=list)

    def readings(self) -> dict[Key, Reading]:
        """Of every tensor; calls of a layer are taken together. Waits for the device."""
        parts: dict[Key, list[Reading]] = defaultdict(list)
        scale = math.prod(float(s) for s in self.scales)
        parameter_scale = math.prod(float(s) for s in self.parameter_scales)
        for keys, rows in self.blocks:
            m = Moments(rows.cpu(), [torch.Size()] * len(keys))
            columns = zip(*(getattr(m, name).tolist() for name in Reading._fields), strict=True)
            for key, column in zip(keys, columns, strict=True):
                what = key[1]
                by = scale if what in (BACKWARD, INPUT_GRAD) else parameter_scale if what.endswith(GRADIENT) else 1.0
                parts[key].append(_divided(Reading(*map(float, column)), by))
        return {key: _pooled(readings) for key, readings in parts.items()}

    def values(self) -> Iterator[tuple[str, str, float]]:
        """(layer, statistic, value)."""
        readings = self.readings()
        for (layer, what), r in readings.items():
            if what.endswith(UPDATE):
                weight = readings[layer, what.removesuffix(UPDATE) + BEFORE].mean_square
                yield layer, what + "_ratio", math.sqrt(r.mean_square / weight) if weight else math.nan
            elif not what.endswith(BEFORE):
                yield layer, what + "_var", r.var
            if what in (FORWARD, INPUT):
                yield layer, what + "_mean", r.mean
            if what in (FORWARD, BACKWARD):
                yield layer, what + "_nonfinite", r.nonfinite
            if what == FORWARD and self.costly:
                yield layer, "skew", r.skew
                yield layer, "kurtosis", r.kurtosis
        for (layer, what), value in self.single:
            yield layer, what, value.item()


def _divided(r: Reading, by: float) -> Reading:
    if by == 1:
        return r
    return r._replace(mean=r.mean / by, var=r.var / by**2, min=r.min / by, max=r.max / by)


def _pooled(parts: list[Reading]) -> Reading:
    """The moments of all parts' values together: mk of the whole from each part's moments about the common mean."""
    parts = [p for p in parts if p.count] or parts[:1]
    if len(parts) == 1:
        return parts[0]
    count = sum(p.count for p in parts)
    mean = sum(p.count * p.mean for p in parts) / count
    var = m3 = m4 = 0.0
    for p in parts:
        share, d = p.count / count, p.mean - mean
        third, fourth = p.skew * p.var**1.5, p.kurtosis * p.var**2
        var += share * (p.var + d**2)
        m3 += share * (third + 3 * d * p.var + d**3)
        m4 += share * (fourth + 4 * d * third + 6 * d**2 * p.var + d**4)
    skew, kurtosis = (m3 / var**1.5, m4 / var**2) if var > 0 else (math.nan, math.nan)
    low, high = min(p.min for p in parts), max(p.max for p in parts)
    return Reading(count, sum(p.nonfinite for p in parts), mean, var, skew, kurtosis, low, high)
