"""The index of a mask that the CPU products read: panels of rows x blocks of columns, units of four rows of like counts.

`units`: int32 (panels, column blocks, rows a panel / 4, 4), one record a unit: four row numbers within the panel (8 bits
each), four counts (16 bits each, ascending), and where its slots begin in `columns`. `columns`: uint8, slot 4 j + r is the
j-th surviving column of the unit's row r, within the block; a row shorter than the unit's longest is padded with its last
column, whose value counts as 0. A block of X (columns x batch lanes) fits the first-level cache; within a panel rows are
ordered by count, so that trip counts repeat and padding stays near 1%.
"""

from __future__ import annotations

import numpy as np
import torch
from numba import carray, uint8
from torch import Tensor

from ..core.jit import jit, threads
from ..core.scalars import pointer
from ..core.shares import ME, among, on_threads, part_of
from ..core.vectors import ROWS

PANEL = 256  # rows; row numbers have 8 bits
BLOCK, WIDE_BLOCK = 128, 256  # columns; column numbers have 8 bits
WIDE_BELOW = 0.05  # density under which a block of 128 columns holds too few survivors a row


@jit()
def _read_tile(mask, stride_row, stride_column, rows, columns, tile):
    """tile[row, column] = mask there, read along the mask's contiguous direction."""
    if stride_column == 1:
        for i in range(rows):
            for j in range(columns):
                tile[i, j] = mask[i * stride_row + j]
    else:
        for j in range(columns):
            for i in range(rows):
                tile[i, j] = mask[i * stride_row + j * stride_column]


@jit()
def _count_panels(share, mask_address, stride_row, stride_column, sizes, block, units):
    """Rows and counts of every unit of a share of the panels, and the slots of every (panel, column block)."""
    if share[ME] < 0:
        on_threads(share)
        return
    first, last = part_of(share, units.shape[0])
    N, K = sizes
    mask_at = pointer(np.uintp(mask_address), uint8)
    mask = carray(mask_at, N * K)
    blocks, per_panel = units.shape[1], units.shape[2]
    panel = per_panel * ROWS
    tile = np.empty((panel, block), np.uint8)
    counts, order = np.empty(panel, np.int64), np.empty(panel, np.int64)
    places = np.empty(block + 2, np.int64)
    for p in range(first, last):
        rows = min(panel, N - p * panel)
        for kb in range(blocks):
            columns = min(block, K - kb * block)
            _read_tile(
                mask[p * panel * stride_row + kb * block * stride_column :],
                stride_row,
                stride_column,
                rows,
                columns,
                tile,
            )
            places[:] = 0
            for i in range(panel):
                count = np.int64(0)
                if i < rows:
                    for j in range(columns):
                        count += tile[i, j]
                counts[i] = count
                places[count + 1] += 1
            for c in range(block + 1):
                places[c + 1] += places[c]
            for i in range(panel):
                order[places[counts[i]]] = i
                places[counts[i]] += 1
            for u in range(per_panel):
                a, b, c, d = order[4 * u], order[4 * u + 1], order[4 * u + 2], order[4 * u + 3]
                units[p, kb, u, 0] = np.int32(np.uint32(a | b << 8 | c << 16 | d << 24))
                units[p, kb, u, 1] = np.int32(np.uint32(counts[a] | counts[b] << 16))
                units[p, kb, u, 2] = np.int32(np.uint32(counts[c] | counts[d] << 16))


@jit()
def _fill_panels(share, mask_address, stride_row, stride_column, sizes, block, units, columns):
    """The columns of every slot of a share of the panels."""
    if share[ME] < 0:
        on_threads(share)
        return
    first, last = part_of(share, units.shape[0])
    N, K = sizes
    mask_at = pointer(np.uintp(mask_address), uint8)
    mask = carray(mask_at, N * K)
    blocks, per_panel = units.shape[1], units.shape[2]
    panel = per_panel * ROWS
    tile = np.empty((panel, block), np.uint8)
    found = np.empty(block + 1, np.uint8)
    for p in range(first, last):
        rows = min(panel, N - p * panel)
        for kb in range(blocks):
            width = min(block, K - kb * block)
            _read_tile(
                mask[p * panel * stride_row + kb * block * stride_column :],
                stride_row,
                stride_column,
                rows,
                width,
                tile,
            )
            for u in range(per_panel):
                numbers, start = np.uint32(units[p, kb, u, 0]), np.int64(units[p, kb, u, 3])
                steps = np.int64(np.uint32(units[p, kb, u, 2]) >> np.uint32(16))
                for r in range(ROWS):
                    row = np.int64((numbers >> np.uint32(8 * r)) & np.uint32(255))
                    count = np.int64(0)
                    if row < rows:
                        for j in range(width):
                            found[count] = j
                            count += np.int64(tile[row, j])
                    for j in range(count):
                        columns[start + ROWS * j + r] = found[j]
                    last_column = found[count - 1] if count else np.uint8(0)
                    for j in range(count, steps):
                        columns[start + ROWS * j + r] = last_column


@jit()
def _place(units):
    """Number the slots: every unit's start. Returns how many there are."""
    total = np.int64(0)
    for p in range(units.shape[0]):
        for kb in range(units.shape[1]):
            for u in range(units.shape[2]):
                units[p, kb, u, 3] = total
                total += ROWS * np.int64(np.uint32(units[p, kb, u, 2]) >> np.uint32(16))
                if total >= 2**31:
                    return -1
    return total


def panel_rows(rows: int) -> int:
    """Rows a panel: at most 256, a multiple of 4, and two panels at least for two threads to share."""
    panels = max(-(-rows // PANEL), 2 if rows >= 64 else 1)
    return max(-(-rows // (panels * ROWS)), 1) * ROWS


def block_of(columns: int, blocks: int) -> int:
    """Columns a block, from how many blocks there are."""
    return BLOCK if blocks == -(-columns // BLOCK) else WIDE_BLOCK


def index_rows(mask: Tensor, density: float) -> tuple[Tensor, Tensor]:
    """(units, columns) of a bool mask of any strides, shape (N, K)."""
    N, K = mask.shape
    panel = panel_rows(N)
    block = WIDE_BLOCK if density < WIDE_BELOW else BLOCK
    units = torch.empty((-(-N // panel), -(-K // block), panel // ROWS, 4), dtype=torch.int32)
    records = units.numpy()
    workers = min(threads(), units.shape[0]) if mask.numel() >= 1 << 18 else 1
    where = (among(workers), mask.data_ptr(), mask.stride(0), mask.stride(1), (N, K), block, records)
    _count_panels(*where)
    slots = _place(records)
    if slots < 0:
        raise ValueError(f"Expected a mask of fewer than 2**31 survivors. Got shape {tuple(mask.shape)} with more.")
    columns = torch.empty(slots, dtype=torch.uint8)
    _fill_panels(*where, columns.numpy())
    return units, columns


def pattern_tensors(mask: Tensor) -> list[Tensor]:
    """[units, columns] of the mask, and of its transpose: what the launchers of kernels/cpu/linear/masked_linear.py take as `pattern`."""
    mask = mask.detach()
    density = float(torch.count_nonzero(mask)) / max(mask.numel(), 1)
    return [*index_rows(mask, density), *index_rows(mask.t(), density)]
