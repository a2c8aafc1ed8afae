"""A gradient masked in place, by definition."""

from __future__ import annotations

from torch import Tensor


def zero_pruned(tensor: Tensor, mask: Tensor, bits: Tensor | None = None) -> Tensor:
    """`tensor` with 0 where the bool mask, of the same shape, is False. bits: the same mask packed, for kernels."""
    return tensor.masked_fill_(~mask, 0)
