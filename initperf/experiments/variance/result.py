"""What the variance experiment measured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Line:
    """One initialization: `forward` and `backward` have a row a seed and a column a layer; the expected ones a value a layer."""

    label: str
    forward: Tensor
    backward: Tensor
    forward_expected: list[float]
    backward_expected: list[float]
    mask: str = "random"
    rescale: str | None = None

    def factors(self) -> tuple[float, float]:
        """The mean factor from a layer to the next, over seeds and layers: forward, and backward (towards the input)."""
        ahead = self.forward[:, 1:] / self.forward[:, :-1]
        back = self.backward[:, :-1] / self.backward[:, 1:]
        return float(ahead.mean()), float(back.mean())


@dataclass(frozen=True)
class VarianceResult:
    """What `run_variance` measured; `config` holds its arguments."""

    lines: list[Line]
    config: dict[str, Any]

    def table(self) -> list[dict[str, Any]]:
        """A row an initialization and layer: mean over the seeds, least, greatest, and the analytic value, both ways."""
        rows = []
        for line in self.lines:
            for k in range(line.forward.shape[1]):
                row: dict[str, Any] = {"init": line.label, "layer": k + 1}
                for name in ("forward", "backward"):
                    seen = getattr(line, name)[:, k]
                    row[name] = float(seen.mean())
                    row[f"{name}_min"], row[f"{name}_max"] = float(seen.min()), float(seen.max())
                    row[f"{name}_expected"] = getattr(line, f"{name}_expected")[k]
                rows.append(row)
        return rows

    def summary(self) -> list[dict[str, Any]]:
        """A row an initialization: the factor by which a layer multiplies the variance, measured and analytic, both ways."""
        rows = []
        for line in self.lines:
            ahead, back = line.factors()
            wanted_ahead, wanted_back = line.forward_expected, line.backward_expected
            steps = len(wanted_ahead) - 1
            rows.append(
                {
                    "init": line.label,
                    "forward_factor": ahead,
                    "forward_factor_expected": (wanted_ahead[-1] / wanted_ahead[0]) ** (1 / steps),
                    "backward_factor": back,
                    "backward_factor_expected": (wanted_back[0] / wanted_back[-1]) ** (1 / steps),
                }
            )
        return rows
