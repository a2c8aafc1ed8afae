"""The products with few batch rows, where lanes over the batch would stay empty: lanes over the slots of the index instead.

Bound by reading values and columns. A task is a panel of rows: its sums are a panel's, so the bits do not depend on threads.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..core.jit import jit, threads
from ..core.memory import working_memory
from ..core.shares import ME, among, on_threads, part_of
from ..core.vectors import ROWS, ZERO, compute_pointer, load, shifted, storage_pointer, store
from .few_rows_ir import matvec_unit, outer_unit
from .index import block_of
from .storage import KINDS, SLACK, STARTS, begin_rows, fetch, leave, weights_at

SERIAL = 1 << 18  # slots under which a second thread costs more than it saves
FEW, FEW_ORDERED = 4, 2  # batch rows, and of ordered sources; from more on, lanes over the batch cost less
_BYTES, _RECORDS = np.zeros(1, np.uint8), np.zeros(1, np.int32)


@jit()
def header_bytes(panel, block):
    """Of a worker's cursor, and of a line of a block that a row is made in: multiples of 64."""
    return (8 * panel + 63) // 64 * 64 + 8 * block


@jit()
def _read_rows(x, strides, rows, columns, padded, tile):
    """tile[row * padded + column] = x[row, column], 0 beyond the columns."""
    for b in range(rows):
        for k in range(columns):
            store(tile, b * padded + k, load(x, b * strides[0] + k * strides[1]))
        for k in range(columns, padded):
            store(tile, b * padded + k, ZERO)


@jit()
def _multiply(
    share, kind, units_at, columns_at, index, x_at, x_strides, source, bias_at, y_at, sizes, bytes_each, scratch
):
    if share[ME] < 0:
        on_threads(share)
        return
    panels, blocks, per_panel, block = index
    B, N, K = sizes
    first, last = part_of(share, panels)
    scratch += share[ME] * bytes_each
    panel, padded = per_panel * ROWS, blocks * block
    units, columns = storage_pointer(units_at, _RECORDS), storage_pointer(columns_at, _BYTES)
    y, bias = storage_pointer(y_at, kind), storage_pointer(bias_at, kind)
    cursor = storage_pointer(scratch, STARTS)
    x_rows = compute_pointer(scratch + header_bytes(panel, block), kind)
    sums = shifted(x_rows, B * padded)
    values = shifted(sums, B * panel)
    _read_rows(storage_pointer(x_at, kind), x_strides, B, K, padded, x_rows)
    for p in range(first, last):
        rows = min(N - p * panel, panel)
        begin_rows(source, p * panel, rows, cursor)
        for i in range(B * panel):
            store(sums, i, ZERO)
        for kb in range(blocks):
            records = shifted(units, (p * blocks + kb) * per_panel * 4)
            fetch(source, kind, records, per_panel, columns, p * panel, kb * block, cursor, values)
            begin, weights = np.int64(records[3]), weights_at(source, kind, records, values)
            for b in range(B):
                x_block, totals = shifted(x_rows, b * padded + kb * block), shifted(sums, b * panel)
                for u in range(per_panel):
                    slot = np.int64(records[4 * u + 3])
                    steps = np.int64(np.uint32(records[4 * u + 2]) >> np.uint32(16))
                    matvec_unit(
                        block,
                        shifted(columns, slot),
                        shifted(weights, slot - begin),
                        x_block,
                        totals,
                        np.uint32(records[4 * u]),
                        steps,
                    )
        for b in range(B):
            for i in range(rows):
                n = p * panel + i
                total = load(sums, b * panel + i)
                store(y, b * N + n, total + load(bias, n) if bias_at != 0 else total)


@jit()
def _correlate(
    share, kind, units_at, columns_at, index, dy_at, dy_strides, x_at, x_strides, target, sizes, bytes_each, scratch
):
    if share[ME] < 0:
        on_threads(share)
        return
    panels, blocks, per_panel, block = index
    B, N, K = sizes
    first, last = part_of(share, panels)
    scratch += share[ME] * bytes_each
    panel, padded = per_panel * ROWS, blocks * block
    units, columns = storage_pointer(units_at, _RECORDS), storage_pointer(columns_at, _BYTES)
    dy = storage_pointer(dy_at, kind)
    cursor = storage_pointer(scratch, STARTS)
    x_rows = compute_pointer(scratch + header_bytes(panel, block), kind)
    dy_rows = shifted(x_rows, B * padded)
    sums = shifted(dy_rows, B * panel)
    line = storage_pointer(scratch + header_bytes(panel, 0), kind)
    _read_rows(storage_pointer(x_at, kind), x_strides, B, K, padded, x_rows)
    for p in range(first, last):
        rows = min(N - p * panel, panel)
        begin_rows(target, p * panel, rows, cursor)
        corner = shifted(dy, p * panel * dy_strides[1])
        _read_rows(corner, dy_strides, B, rows, panel, dy_rows)
        for kb in range(blocks):
            records = shifted(units, (p * blocks + kb) * per_panel * 4)
            begin = np.int64(records[3])
            end = 4 * (per_panel - 1)
            slots = np.int64(records[end + 3]) - begin
            slots += ROWS * np.int64(np.uint32(records[end + 2]) >> np.uint32(16))
            for s in range(slots):
                store(sums, s, ZERO)
            for b in range(B):
                x_block, factors = shifted(x_rows, b * padded + kb * block), shifted(dy_rows, b * panel)
                for u in range(per_panel):
                    slot = np.int64(records[4 * u + 3])
                    steps = np.int64(np.uint32(records[4 * u + 2]) >> np.uint32(16))
                    outer_unit(
                        block,
                        shifted(columns, slot),
                        shifted(sums, slot - begin),
                        x_block,
                        factors,
                        np.uint32(records[4 * u]),
                        steps,
                    )
            width = min(block, K - kb * block)
            leave(target, kind, records, per_panel, columns, sums, p * panel, kb * block, width, cursor, line)


class _Call(NamedTuple):
    """What follows from the sizes of the index and the batch."""

    kind: Any  # an array, of which the dtype counts
    blocking: tuple[int, int, int, int]  # panels, column blocks, units a panel, columns a block
    workers: int
    bytes_each: (
        int  # of a worker's memory: header, X rows, sums or dY rows, the slots of a panel's block; a multiple of 64
    )


@lru_cache(maxsize=4096)
def _call(shape: tuple[int, ...], sizes: tuple[int, int, int], dtype: torch.dtype, workers: int) -> _Call:
    panels, blocks, quads, _ = shape
    block, panel = block_of(sizes[2], blocks), quads * ROWS
    elements = sizes[0] * (blocks * block + panel) + panel * block + SLACK
    size = 8 if dtype == torch.float64 else 4
    bytes_each = -(-(elements * size + 8 * panel + 8 * block) // 64) * 64 + 128
    return _Call(KINDS[dtype], (panels, blocks, quads, block), min(workers, panels), bytes_each)


def call_few(
    multiplies: bool,
    x: Tensor,
    y: Tensor,
    storage: tuple[int, ...],
    bias_at: int,
    units: Tensor,
    columns: Tensor,
    sizes: tuple[int, int, int],
) -> None:
    """For B <= FEW: y (B, N) = x (B, K) W^T + bias from the source `storage`, or y^T x at the survivors to that target.

    sizes: B, N, K.
    """
    call = _call(units.shape, sizes, x.dtype, threads() if columns.numel() >= SERIAL else 1)
    memory = working_memory(call.workers * call.bytes_each)
    scratch = memory.data_ptr()
    first = among(call.workers), call.kind, units.data_ptr(), columns.data_ptr(), call.blocking
    last = sizes, call.bytes_each, scratch
    if multiplies:
        _multiply(*first, x.data_ptr(), x.stride(), storage, bias_at, y.data_ptr(), *last)
    else:
        _correlate(*first, y.data_ptr(), y.stride(), x.data_ptr(), x.stride(), storage, *last)
