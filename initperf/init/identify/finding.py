"""What describe says of one tensor."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from initperf.init.schemes import Init


@dataclass
class Finding:
    """One parameter: what was measured, the scheme that explains it best (init: its distribution), others that fit, and why."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    mean: float
    std: float
    low: float
    high: float
    kurtosis: float
    zeros: float
    scheme: str
    others: list[str] = field(default_factory=list)
    evidence: str = ""
    disagreement: str | None = None
    init: Init | None = None
