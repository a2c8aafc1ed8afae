"""Memory for images, in huge pages: the page faults of 16 MB in small ones take longer than convolving them sparsely.

NumPy asks the kernel for huge pages from 4 MB; torch's allocator does not.
"""

from __future__ import annotations

from math import prod

import numpy as np
import torch
from torch import Tensor

_LARGE = 4 << 20  # bytes


def empty(*shape: int) -> Tensor:
    """An uninitialized float32 tensor."""
    if prod(shape) * 4 < _LARGE or torch.are_deterministic_algorithms_enabled():
        return torch.empty(shape)
    return torch.from_numpy(np.empty(shape, np.float32))


def lines(count: int, lanes: int) -> Tensor:
    """An uninitialized float32 tensor of `count` lines of `lanes`, aligned to one of 16."""
    memory = empty((count + 1) * lanes)
    start = -memory.data_ptr() // 4 % lanes
    return memory[start : start + count * lanes]
