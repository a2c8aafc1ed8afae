"""The index of a convolution's mask: survivors by blocks of input channels, output channel, input channel and tap.

starts: int32 (blocks, rows + 1), the first slot of every row in a block. taps: int32 (slots,), (number of the input channel
among the live ones * kernel height + y) * kernel width + x. positions: int32 (slots,), where the slot's weight is stored.
channels: int32, the live input channels; others are neither packed nor read.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

PIXELS = 8  # of a tile
NEAR = 30 << 10  # bytes of a tile of X that leave room in a first-level cache of 48 KB
ENOUGH = 12  # survivors a row that pay for starting it


def _index(
    rows: int, n: np.ndarray, c: np.ndarray, tap: np.ndarray, where: np.ndarray, kernel: tuple[int, int]
) -> list[Tensor]:
    """The index of survivors (output channel n, input channel c, tap), ordered so, stored at `where`."""
    height, width = kernel
    channels, c = np.unique(c, return_inverse=True)
    a_channel = n.size / max(rows * channels.size, 1)  # survivors a row
    near = NEAR // (height * (PIXELS + width - 1) * 64)
    block = max(1, near, int(ENOUGH / a_channel) if n.size else 1)
    blocks = max(1, -(-channels.size // block))
    block = max(1, -(-channels.size // blocks))
    key = c // block * rows + n
    order = np.argsort(key, kind="stable")
    counts = np.bincount(key, minlength=blocks * rows).reshape(blocks, rows)
    starts = np.zeros((blocks, rows + 1), np.int64)
    starts[:, 1:] = counts.cumsum(1)
    starts[1:] += counts.sum(1).cumsum()[:-1, None]
    arrays = (starts, (c * height * width + tap)[order], where[order], channels)
    return [torch.from_numpy(np.ascontiguousarray(a, np.int32)) for a in arrays]


def conv_pattern_tensors(mask: Tensor, groups: int, compressed: bool) -> list[Tensor]:
    """starts, taps, positions, channels of a mask (N, C / groups, height, width), and of the convolution that gives dx.

    positions: in the flat dense weight, or if `compressed` among the survivors.
    """
    N, C, height, width = mask.shape
    flat = np.flatnonzero(mask.detach().contiguous().numpy())
    where = np.arange(flat.size) if compressed else flat
    tap = flat % (height * width)
    c = flat // (height * width) % C
    n = flat // (height * width * C)
    c = c + n // max(N // groups, 1) * C
    order = np.lexsort((-tap, n, c))
    turned = (c[order], n[order], height * width - 1 - tap[order], where[order])
    kernel = (height, width)
    return [*_index(N, n, c, tap, where, kernel), *_index(C * groups, *turned, kernel)]
