"""The index of a convolution's mask: survivors by blocks of input channels, output channel, input channel and tap.

starts: int32 (blocks, rows + 1), the first slot of every row in a block. taps: int32 (slots,), (number of the input channel
among the live ones * kernel height + y) * kernel width + x. positions: int32 (slots,), where the slot's weight lies in the
flat weight. channels: int32, the live input channels; others are neither packed nor read.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

PIXELS = 8  # of a tile
NEAR = 30 << 10  # bytes of a tile of X that leave room in a first-level cache of 48 KB
ENOUGH = 12  # survivors a row that pay for starting it


def index_taps(mask: np.ndarray, positions: np.ndarray) -> list[Tensor]:
    """The index of a bool mask (rows, channels, height, width); positions: of every weight, same shape."""
    rows, _, height, width = mask.shape
    n, c, y, x = np.nonzero(mask)
    channels, c = np.unique(c, return_inverse=True)
    a_row = n.size / max(rows * channels.size, 1)  # survivors a row and live channel
    near = NEAR // (height * (PIXELS + width - 1) * 64)
    block = max(1, near, int(ENOUGH / a_row) if a_row else 1)
    blocks = max(1, -(-channels.size // block))
    block = max(1, -(-channels.size // blocks))
    key = c // block * rows + n
    order = np.argsort(key, kind="stable")
    counts = np.bincount(key, minlength=blocks * rows).reshape(blocks, rows)
    starts = np.zeros((blocks, rows + 1), np.int64)
    starts[:, 1:] = counts.cumsum(1)
    starts += np.concatenate(([0], counts.sum(1).cumsum()[:-1]))[:, None]
    taps = ((c * height + y) * width + x)[order]
    found = positions[n, channels[c], y, x][order] if n.size else np.zeros(0, np.int64)
    return [torch.from_numpy(np.ascontiguousarray(a, np.int32)) for a in (starts, taps, found, channels)]


def conv_pattern_tensors(mask: Tensor, groups: int) -> list[Tensor]:
    """starts, taps, positions, channels of the mask (N, C / groups, height, width), and of the input gradient's convolution."""
    small = mask.detach().numpy()
    N, C = small.shape[0], small.shape[1] * groups
    full = np.zeros((N, C, *small.shape[2:]), bool)
    where = np.zeros(full.shape, np.int32)
    own = np.arange(small.size, dtype=np.int32).reshape(small.shape)
    for g in range(groups):
        n, c = (slice(g * size // groups, (g + 1) * size // groups) for size in (N, C))
        full[n, c], where[n, c] = small[n], own[n]
    turned = [np.flip(a, (2, 3)).swapaxes(0, 1) for a in (full, where)]
    return [*index_taps(full, where), *index_taps(*turned)]
