"""The index of a mask for compressed weights: that of kernels/cpu/sparse/index.py, and where each slot's value lies in row-major order."""

from __future__ import annotations

import numpy as np
import torch
from numba import carray, uint8
from torch import Tensor

from ..core.jit import jit, threads
from ..core.scalars import pointer
from ..core.shares import ME, among, on_threads, part_of
from ..core.vectors import ROWS
from .index import block_of, index_rows

PARALLEL_FROM = 1 << 18  # weights


@jit()
def _fill_places(share, mask_address, sizes, block, units, columns, starts, places):
    """places[slot] = row-major number of the survivor of every slot of the transposed index, for a share of its column blocks."""
    if share[ME] < 0:
        on_threads(share)
        return
    first, last = part_of(share, units.shape[1])
    N, K = sizes
    mask = carray(pointer(np.uintp(mask_address), uint8), N * K)
    panels, per_panel = units.shape[0], units.shape[2]
    panel = per_panel * ROWS
    ranks, reached = np.empty((block, panel), np.int32), np.empty(block, np.int32)
    for kb in range(first, last):
        n0 = kb * block
        width = min(block, N - n0)
        for i in range(width):
            reached[i] = starts[n0 + i]
        for p in range(panels):
            k0 = p * panel
            rows = min(panel, K - k0)
            for i in range(width):
                rank = reached[i]
                line = mask[(n0 + i) * K + k0 :]
                for j in range(rows):
                    ranks[i, j] = rank
                    rank += np.int32(line[j])
                reached[i] = rank
            for u in range(per_panel):
                numbers, start = np.uint32(units[p, kb, u, 0]), np.int64(units[p, kb, u, 3])
                steps = np.int64(np.uint32(units[p, kb, u, 2]) >> np.uint32(16))
                for r in range(ROWS):
                    row = np.int64((numbers >> np.uint32(8 * r)) & np.uint32(255))
                    counts = np.uint32(units[p, kb, u, 1 + r // 2])
                    survivors = np.int64((counts >> np.uint32(16 * (r % 2))) & np.uint32(0xFFFF))
                    for j in range(survivors):
                        slot = start + ROWS * j + r
                        places[slot] = ranks[columns[slot], row]
                    for j in range(survivors, steps):
                        places[start + ROWS * j + r] = -1


def sparse_tensors(mask: Tensor) -> list[Tensor]:
    """[units, columns, starts] of the bool mask (N, K), and [units, columns, places] of its transpose.

    starts (N + 1,) int64: survivors before each row; places (slots,) int32: row-major number of each slot's survivor, or -1.
    """
    mask = mask.detach().contiguous()
    starts = torch.nn.functional.pad(mask.sum(1).cumsum(0), (1, 0))
    density = float(starts[-1]) / max(mask.numel(), 1)
    units, columns = index_rows(mask, density)
    across, their_columns = index_rows(mask.t(), density)
    places = torch.empty(their_columns.numel(), dtype=torch.int32)
    N, K = mask.shape
    blocks = across.shape[1]
    block = block_of(N, blocks)
    workers = min(threads(), blocks) if mask.numel() >= PARALLEL_FROM else 1
    arrays = (t.numpy() for t in (across, their_columns, starts, places))
    _fill_places(among(workers), mask.data_ptr(), (N, K), block, *arrays)
    return [units, columns, starts, across, their_columns, places]
