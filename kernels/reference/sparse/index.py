"""The reference products read the mask itself."""

from __future__ import annotations

from torch import Tensor


def pattern_tensors(mask: Tensor) -> list[Tensor]:
    """What the device's products take as `pattern`: here nothing."""
    return []
