"""SparsePattern: what a mask means to a kernel, built once per mask: indices on the CPU, bits and live tiles on a GPU."""

from __future__ import annotations

import torch
from torch import Tensor

from initperf import ops

ops.register("pattern_tensors", "pattern")

DENSE_FROM = 0.7  # density from which no CPU kernel beats the dense product, so no index is built


class SparsePattern:
    """Built from a bool mask (N, K); of more dimensions, (N, ...), it is read as (N, the product of the others).

    tensors: the op argument `pattern`, empty where only dense products run; nnz: survivors; density: nnz / weights.
    """

    def __init__(self, mask: Tensor) -> None:
        self.mask, self._version = mask, _version(mask)
        self.nnz = 0 if mask.is_meta else int(torch.count_nonzero(mask))
        self.density = self.nnz / mask.numel() if mask.numel() else 1.0
        self.tensors: list[Tensor] = []
        device = mask.device.type
        if self.nnz and (device != "cpu" or self.density < DENSE_FROM):
            self.tensors = self._index(mask)

    def _index(self, mask: Tensor) -> list[Tensor]:
        return ops.implementation("pattern_tensors", mask.device.type)(mask.flatten(1))

    def is_of(self, mask: Tensor) -> bool:
        """Whether `mask` is the tensor this was built from, unedited as far as its version tells (inference tensors have none)."""
        return mask is self.mask and _version(mask) == self._version

    @property
    def nbytes(self) -> int:
        """Memory of the indices."""
        return sum(t.nbytes for t in self.tensors)


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version
