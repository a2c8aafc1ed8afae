"""The two products behind all masked and sparse layers on the CPU: y = x W^T + b, and dy^T x at survivors only.

A task owns a group of panels of rows, and a few blocks of the batch. For every block of columns it packs X with the batch
in the lanes (so that a survivor costs one broadcast and V loads and multiply-adds), brings the weights into the order of
the index (kernels/cpu/sparse/index.py), and runs the units; its sums stay in the second-level cache until they leave, transposed.
Every sum runs over columns, or over batch rows, in one fixed order: the bits do not depend on threads or tasks.
"""

from __future__ import annotations

from functools import cache, lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..core.jit import jit, threads
from ..core.memory import check_alike, working_memory
from ..core.shares import ME, among, on_threads, part_of
from ..core.vectors import LANES, ROWS, ZERO, compute_pointer, line_vectors, load, shifted, storage_pointer, store
from .few_rows import FEW, FEW_ORDERED, call_few
from .index import block_of
from .storage import KINDS, ORDERED, SLACK, STARTS, ask, begin_rows, fetch, leave, weights_at
from .tiles import pack, start_sums, unpack
from .units_ir import correlate_unit, multiply_unit

_BYTES, _RECORDS = np.zeros(1, np.uint8), np.zeros(1, np.int32)
SERIAL = 5 << 18  # multiply-adds under which a second thread costs more than it saves
TILE = 1 << 20  # bytes of sums (or of dy) that a task keeps in the second-level cache
BLOCKS = 4  # batch blocks that share one gather of the weights
COST = {4: 0.31, 2: 0.35, 1: 0.45}  # V -> measured ns a vector: fewer lanes pay more for the broadcast


@jit()
def cursor_bytes(rows):
    """Of a cursor, rounded up so that the tiles behind it stay aligned."""
    return (8 * rows + 63) // 64 * 64


@jit()
def _multiply(share, kind, units_at, columns_at, index, x_at, x_strides, source, bias_at, y_at, sizes, plan, scratch):
    """y[b, n] = bias[n] + sum over k of x[b, k] W[n, k] for a share of the tasks (batch part, group of panels)."""
    if share[ME] < 0:
        on_threads(share)
        return
    panels, blocks, per_panel, block = index
    B, N, K = sizes
    vectors, batch_blocks, task_panels, groups, tasks, bytes_each = plan
    first, last = part_of(share, tasks)
    scratch += share[ME] * bytes_each
    lanes, panel = vectors * LANES, per_panel * ROWS
    units, columns = storage_pointer(units_at, _RECORDS), storage_pointer(columns_at, _BYTES)
    x, y, bias = storage_pointer(x_at, kind), storage_pointer(y_at, kind), storage_pointer(bias_at, kind)
    cursor = storage_pointer(scratch, STARTS)
    x_tile = compute_pointer(scratch + cursor_bytes(task_panels * panel), kind)
    y_tile = shifted(x_tile, batch_blocks * block * lanes)
    values = shifted(y_tile, batch_blocks * task_panels * panel * lanes)
    for task in range(first, last):
        b0 = task // groups * batch_blocks * lanes
        p0 = task % groups * task_panels
        p1 = min(panels, p0 + task_panels)
        n0, padded = p0 * panel, (p1 - p0) * panel
        rows = min(N - n0, padded)
        count = min(batch_blocks, (B - b0 + lanes - 1) // lanes)
        begin_rows(source, n0, rows, cursor)
        for i in range(count):
            start_sums(vectors, shifted(bias, n0), bias_at != 0, rows, padded, shifted(y_tile, i * padded * lanes))
        for kb in range(blocks):
            k0 = kb * block
            for i in range(count):
                b = b0 + i * lanes
                corner = shifted(x, b * x_strides[0] + k0 * x_strides[1])
                tile = shifted(x_tile, i * block * lanes)
                pack(vectors, corner, x_strides[0], x_strides[1], B - b, min(block, K - k0), tile)
            slots = 0
            for p in range(p0, p1):
                records = shifted(units, (p * blocks + kb) * per_panel * 4)
                rows_here = shifted(cursor, (p - p0) * panel)
                slots += fetch(
                    source, kind, records, per_panel, columns, p * panel, k0, rows_here, shifted(values, slots)
                )
            for i in range(count):
                slot = np.int64(0)
                for p in range(p0, p1):
                    records = shifted(units, (p * blocks + kb) * per_panel * 4)
                    place = shifted(columns, np.int64(records[3]))
                    y_panel = shifted(y_tile, (i * padded + (p - p0) * panel) * lanes)
                    base, weights = slot, weights_at(source, kind, records, shifted(values, slot))
                    for u in range(per_panel):
                        if kb + 1 < blocks:
                            part, parts = i * per_panel + u, count * per_panel
                            ask(source, kind, p * panel, k0 + block, panel, block, part, parts, sizes)
                        steps = np.int64(np.uint32(records[4 * u + 2]) >> np.uint32(16))
                        numbers = np.uint32(records[4 * u])
                        multiply_unit(
                            vectors,
                            shifted(place, slot - base),
                            shifted(weights, slot - base),
                            shifted(x_tile, i * block * lanes),
                            y_panel,
                            numbers,
                            steps,
                        )
                        slot += ROWS * steps
        for i in range(count):
            b = b0 + i * lanes
            unpack(vectors, shifted(y_tile, i * padded * lanes), rows, B - b, shifted(y, b * N + n0), N)


@jit()
def _correlate(
    share,
    kind,
    units_at,
    columns_at,
    slots,
    index,
    dy_at,
    dy_strides,
    x_at,
    x_strides,
    sums_at,
    target,
    sizes,
    plan,
    scratch,
):
    """Sum over b of dy[b, n] x[b, k] at the survivors of a share of the groups of panels, to `target`."""
    if share[ME] < 0:
        on_threads(share)
        return
    panels, blocks, per_panel, block = index
    B, N, K = sizes
    vectors, batch_blocks, task_panels, _, tasks, bytes_each = plan
    first, last = part_of(share, tasks)
    scratch += share[ME] * bytes_each
    lanes, panel = vectors * LANES, per_panel * ROWS
    units, columns = storage_pointer(units_at, _RECORDS), storage_pointer(columns_at, _BYTES)
    dy, x = storage_pointer(dy_at, kind), storage_pointer(x_at, kind)
    sums = compute_pointer(sums_at, kind)
    cursor = storage_pointer(scratch, STARTS)
    tiles = scratch + cursor_bytes(task_panels * panel)
    x_tile = compute_pointer(tiles, kind)
    dy_tile = shifted(x_tile, batch_blocks * block * lanes)
    line = storage_pointer(tiles, kind)  # the X tile is done with when sums leave
    for task in range(first, last):
        p0 = task * task_panels
        p1 = min(panels, p0 + task_panels)
        n0, padded = p0 * panel, (p1 - p0) * panel
        rows = min(N - n0, padded)
        begin_rows(target, n0, rows, cursor)
        begin = np.int64(units[p0 * blocks * per_panel * 4 + 3])
        end = np.int64(units[p1 * blocks * per_panel * 4 + 3]) if p1 < panels else slots
        for s in range(begin, end):
            sums[s] = ZERO
        for b0 in range(0, B, batch_blocks * lanes):
            count = min(batch_blocks, (B - b0 + lanes - 1) // lanes)
            for i in range(count):
                b = b0 + i * lanes
                corner = shifted(dy, b * dy_strides[0] + n0 * dy_strides[1])
                pack(vectors, corner, dy_strides[0], dy_strides[1], B - b, rows, shifted(dy_tile, i * padded * lanes))
            for kb in range(blocks):
                k0 = kb * block
                for i in range(count):
                    b = b0 + i * lanes
                    corner = shifted(x, b * x_strides[0] + k0 * x_strides[1])
                    tile = shifted(x_tile, i * block * lanes)
                    pack(vectors, corner, x_strides[0], x_strides[1], B - b, min(block, K - k0), tile)
                for i in range(count):
                    for p in range(p0, p1):
                        records = shifted(units, (p * blocks + kb) * per_panel * 4)
                        dy_panel = shifted(dy_tile, (i * padded + (p - p0) * panel) * lanes)
                        slot = np.int64(records[3])
                        for u in range(per_panel):
                            steps = np.int64(np.uint32(records[4 * u + 2]) >> np.uint32(16))
                            numbers = np.uint32(records[4 * u])
                            correlate_unit(
                                vectors,
                                shifted(columns, slot),
                                shifted(sums, slot),
                                shifted(x_tile, i * block * lanes),
                                dy_panel,
                                numbers,
                                steps,
                            )
                            slot += ROWS * steps
                if b0 + batch_blocks * lanes >= B:
                    for p in range(p0, p1):
                        records = shifted(units, (p * blocks + kb) * per_panel * 4)
                        done = shifted(sums, np.int64(records[3]))
                        rows_here = shifted(cursor, (p - p0) * panel)
                        wide = min(block, K - k0)
                        leave(target, kind, records, per_panel, columns, done, p * panel, k0, wide, rows_here, line)


@jit()
def _order(share, kind, units_at, columns_at, index, source, sizes, out_at, bytes_each, scratch):
    """The weights of a share of the panels in the order of their slots."""
    if share[ME] < 0:
        on_threads(share)
        return
    panels, blocks, per_panel, block = index
    first, last = part_of(share, panels)
    scratch += share[ME] * bytes_each
    _, N, _ = sizes
    panel = per_panel * ROWS
    units, columns = storage_pointer(units_at, _RECORDS), storage_pointer(columns_at, _BYTES)
    cursor = storage_pointer(scratch, STARTS)
    values = compute_pointer(scratch + cursor_bytes(panel), kind)
    for p in range(first, last):
        begin_rows(source, p * panel, min(N - p * panel, panel), cursor)
        for kb in range(blocks):
            records = shifted(units, (p * blocks + kb) * per_panel * 4)
            slots = fetch(source, kind, records, per_panel, columns, p * panel, kb * block, cursor, values)
            out = shifted(compute_pointer(out_at, kind), np.int64(records[3]))
            for s in range(slots):  # fetch may write beyond its slots
                store(out, s, load(values, s))


@cache
def vectors_of(batch: int) -> int:
    """V, the vectors a line that make the padded batch cheapest."""
    return min(line_vectors(), key=lambda v: -(-batch // (v * LANES)) * v * COST[v])


@cache
def _plan(
    batch: int, lanes: int, panels: int, panel: int, size: int, workers: int, split_batch: bool
) -> tuple[int, int, int, int]:
    """(batch blocks a task, panels a task, groups of panels, tasks): sums within TILE bytes, and work for every worker."""
    total = -(-batch // lanes)
    blocks = min(total, BLOCKS)
    each = max(1, min(panels, TILE // (blocks * panel * lanes * size)))
    while True:
        groups = -(-panels // each)
        each = -(-panels // groups)
        tasks = groups * (-(-total // blocks) if split_batch else 1)
        if tasks % workers == 0 or tasks >= 4 * workers or (each == 1 and (blocks == 1 or not split_batch)):
            return blocks, each, groups, tasks
        if each > 1:
            each = -(-each // 2)
        else:
            blocks = -(-blocks // 2)


class _Call(NamedTuple):
    """What a kernel is called with, beside addresses: all that follows from the index's sizes and the batch."""

    kind: Any  # an array, of which the dtype counts
    blocking: tuple[int, int, int, int]  # panels, column blocks, units a panel, columns a block
    sizes: tuple[int, int, int]
    plan: tuple[int, ...]  # vectors a line, batch blocks a task, panels a task, groups, tasks, bytes_each
    workers: int
    bytes_each: int  # of a worker's memory: cursor, X tile, sums or dY, values


@lru_cache(maxsize=4096)
def _call(
    shape: tuple[int, ...], sizes: tuple[int, int, int], dtype: torch.dtype, workers: int, multiplies: bool
) -> _Call:
    (panels, blocks, quads, _), (B, _, K) = shape, sizes
    vectors, block = vectors_of(B), block_of(K, blocks)
    size, lanes = 8 if dtype == torch.float64 else 4, vectors * LANES
    batch_blocks, each, groups, tasks = _plan(B, lanes, panels, quads * ROWS, size, workers, multiplies)
    rows = each * quads * ROWS
    elements = batch_blocks * lanes * (block + rows) + multiplies * (rows * block + SLACK)
    bytes_each = -(-elements * size // 64) * 64 + 64 + -(-8 * rows // 64) * 64
    index, plan = (panels, blocks, quads, block), (vectors, batch_blocks, each, groups, tasks, bytes_each)
    return _Call(KINDS[dtype], index, sizes, plan, min(workers, tasks), bytes_each)


def _readable(tensor: Tensor) -> Tensor:
    """Itself where batch rows or columns are contiguous, or a contiguous copy."""
    return tensor if 1 in tensor.stride() else tensor.contiguous()


def multiply(
    x: Tensor, source: tuple[int, ...], rows: int, bias: Tensor | None, units: Tensor, columns: Tensor
) -> Tensor:
    """y (B, rows) = x (B, K) times the transpose of the weight behind `source` (storage.py), at the survivors of the index."""
    B, K = x.shape
    y = torch.empty((B, rows), dtype=x.dtype)
    if not (B and rows):
        return y
    x = _readable(x)
    bias_at = 0
    if bias is not None:
        bias = bias.contiguous()
        bias_at = bias.data_ptr()
    sizes = (B, rows, K)
    if (FEW_ORDERED if len(source) == ORDERED else FEW) >= B:
        call_few(True, x, y, source, bias_at, units, columns, sizes)
        return y
    workers = threads() if columns.numel() * max(B, LANES) >= SERIAL else 1
    call = _call(units.shape, sizes, x.dtype, workers, True)
    scratch = working_memory(call.workers * call.bytes_each)
    _multiply(
        *(among(call.workers), call.kind, units.data_ptr(), columns.data_ptr(), call.blocking),
        *(x.data_ptr(), x.stride(), source, bias_at, y.data_ptr(), sizes, call.plan, scratch.data_ptr()),
    )
    return y


def in_order(source: tuple[int, ...], shape: tuple[int, int], dtype: torch.dtype, index: list[Tensor]) -> Tensor:
    """A copy of the weight (N, K) behind `source` as an ordered source: slot by slot, in the dtype that arithmetic runs in."""
    units, columns = index
    (panels, blocks, quads, _), (N, K) = units.shape, shape
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    out = torch.empty(columns.numel(), dtype=wide)
    block, panel = block_of(K, blocks), quads * ROWS
    workers = min(threads(), panels) if columns.numel() >= 1 << 16 else 1
    each = -(-(8 * panel + (panel * block + SLACK) * wide.itemsize) // 64) * 64 + 128
    scratch = working_memory(workers * each)
    where = (units.data_ptr(), columns.data_ptr(), (panels, blocks, quads, block), source, (0, N, K), out.data_ptr())
    _order(among(workers), KINDS[dtype], *where, each, scratch.data_ptr())
    return out


def correlate(dy: Tensor, x: Tensor, target: tuple[int, ...], units: Tensor, columns: Tensor) -> None:
    """dy (B, N) transposed times x (B, K) at the survivors of the index, written to `target` (storage.py); B > 0."""
    check_alike(dy, x)
    (B, N), K = dy.shape, x.shape[1]
    dy, x = _readable(dy), _readable(x)
    sizes = (B, N, K)
    if B <= FEW:
        call_few(False, x, dy, target, 0, units, columns, sizes)
        return
    slots = columns.numel()
    workers = threads() if slots * B >= SERIAL else 1
    call = _call(units.shape, sizes, x.dtype, workers, False)
    own = call.workers * call.bytes_each
    scratch = working_memory(own + (slots + SLACK) * (8 if x.dtype == torch.float64 else 4))
    memory = scratch.data_ptr()
    _correlate(
        *(among(call.workers), call.kind, units.data_ptr(), columns.data_ptr(), slots, call.blocking),
        *(dy.data_ptr(), dy.stride(), x.data_ptr(), x.stride(), memory + own, target, sizes, call.plan, memory),
    )
