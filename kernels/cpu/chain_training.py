"""A run of small sparse layers, y = relu(x W^T + b) or without ReLU, with all of its gradients: two calls a training step.

Activations and their gradients stay in tiles of batch lanes from the first layer to the last, so nothing is packed, or
handed through Python and autograd, in between. Every part of the batch goes through all layers with one thread; then
panels of the weights' gradients are shared by the threads. Sums over columns and over the batch have one fixed order, which
follows from the batch alone: the bits do not depend on threads.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import cast

import numpy as np
import torch
from numba import carray, int32, prange
from torch import Tensor

from .chain_layers import (
    BYTES,
    FIELDS,
    FIRST_SURVIVORS,
    GRAD_BIAS,
    GRAD_VALUES,
    INPUTS,
    NNZ,
    OTHERS,
    OUTPUTS,
    PANELS,
    PER_PANEL,
    RECORDS,
    RELU,
    UNIT_BLOCKS,
    UNIT_COLUMNS,
    UNITS,
    VALUES,
    block_columns,
    describe,
    layer_forward,
    multiply_units,
    order_units,
    rows_of,
)
from .jit import jit, threads
from .memory import working_memory
from .pattern import PANEL
from .products import widths_of
from .spmm_ir import LANES, ROWS, compute_pointer, correlate_unit, load, shifted, storage_pointer, store
from .survivors import KINDS, PLACES, SLACK, STARTS, begin_rows, leave
from .tiles import ZERO, pack, unpack
from .vector import pointer

# The transposed index, where a layer's tiles begin in a part's (in lines), and likewise those of their gradients.
_PANELS_T, _BLOCKS_T, _PER_PANEL_T, _UNITS_T, _COLUMNS_T, _PLACES_T, _SLOTS_T = range(OTHERS, OTHERS + 7)
_IN, _OUT, _GRAD_IN, _GRAD_OUT = range(OTHERS + 7, OTHERS + 11)
_CURSOR = 8 * PANEL  # bytes
SERIAL = 1 << 20  # multiply-adds below which a second thread costs more than it saves
_ONE = np.float32(1)


@jit()
def _forward_share(width, kind, plan, x_at, y_at, rows, parts, lines, tiles_at, scratch):
    """Parts parts[0]..parts[1] of the batch through all layers; what each layer reads and leaves stays in the tiles."""
    first, last = parts
    if first >= last:
        return
    layers, lanes = plan.shape[0], len(width) * LANES
    K, N = plan[0, INPUTS], plan[layers - 1, OUTPUTS]
    x, y, tiles = storage_pointer(x_at, kind), storage_pointer(y_at, kind), compute_pointer(tiles_at, kind)
    values = compute_pointer(scratch + _CURSOR, kind)
    for part in range(first, last):
        b = part * lanes
        pack(width, shifted(x, b * K), K, 1, rows - b, K, shifted(tiles, part * lines * lanes))
    for i in range(layers):
        layer = plan[i]
        order_units(kind, layer, layer[VALUES], values, scratch)
        for part in range(first, last):
            tile = shifted(tiles, part * lines * lanes)
            layer_forward(
                width, kind, layer, values, shifted(tile, layer[_IN] * lanes), shifted(tile, layer[_OUT] * lanes)
            )
    for part in range(first, last):
        b = part * lanes
        tile = shifted(tiles, (part * lines + plan[layers - 1, _OUT]) * lanes)
        unpack(width, tile, N, rows - b, shifted(y, b * N), N)


@jit()
def _forward_serial(width, kind, plan_at, layers, x_at, y_at, rows, parts, lines, tiles_at, scratch):
    _forward_share(width, kind, rows_of(plan_at, layers), x_at, y_at, rows, (0, parts), lines, tiles_at, scratch)


@jit(parallel=True)
def _forward_parallel(
    workers, bytes_each, width, kind, plan_at, layers, x_at, y_at, rows, parts, lines, tiles_at, scratch
):
    plan = rows_of(plan_at, layers)
    for t in prange(workers):
        share, memory = (parts * t // workers, parts * (t + 1) // workers), scratch + t * bytes_each
        _forward_share(width, kind, plan, x_at, y_at, rows, share, lines, tiles_at, memory)


@jit()
def _pass_relu(activations, gradients, count):
    """As torch's: 0 where the activation is 0 or less, and not where it is NaN."""
    for j in range(count):
        gradient = load(gradients, j)
        store(gradients, j, ZERO if load(activations, j) <= ZERO else gradient)


@jit()
def _order_places(kind, layer, out):
    """The layer's values in the order of the transposed index."""
    values, places = storage_pointer(layer[VALUES], kind), storage_pointer(layer[_PLACES_T], PLACES)
    for s in range(layer[_SLOTS_T]):
        place = np.int64(places[s])
        value = load(values, max(place, np.int64(0)))
        store(out, s, value if place >= 0 else ZERO)


@jit()
def _descend_share(width, kind, plan, dy_at, dx_at, rows, parts, sizes, tiles_at, gradients_at, scratch):
    """The gradients of parts parts[0]..parts[1] at the output of every layer from the last to the one called `lowest` (-1: at x, too)."""
    first, last = parts
    if first >= last:
        return
    lines, gradient_lines, lowest = sizes
    layers, lanes = plan.shape[0], len(width) * LANES
    K, N = plan[0, INPUTS], plan[layers - 1, OUTPUTS]
    dy, dx = storage_pointer(dy_at, kind), storage_pointer(dx_at, kind)
    tiles, gradients = compute_pointer(tiles_at, kind), compute_pointer(gradients_at, kind)
    values = compute_pointer(scratch, kind)
    for part in range(first, last):
        b = part * lanes
        tile = shifted(gradients, (part * gradient_lines + plan[layers - 1, _GRAD_OUT]) * lanes)
        pack(width, shifted(dy, b * N), N, 1, rows - b, N, tile)
        if plan[layers - 1, RELU]:
            _pass_relu(shifted(tiles, (part * lines + plan[layers - 1, _OUT]) * lanes), tile, N * lanes)
    for i in range(layers - 1, lowest, -1):
        layer = plan[i]
        width_in, panels, blocks, per_panel = layer[INPUTS], layer[_PANELS_T], layer[_BLOCKS_T], layer[_PER_PANEL_T]
        block = block_columns(layer[OUTPUTS], blocks)
        index = panels, blocks, per_panel, block, layer[_UNITS_T], layer[_COLUMNS_T]
        _order_places(kind, layer, values)
        for part in range(first, last):
            tile = shifted(gradients, part * gradient_lines * lanes)
            below = shifted(tile, layer[_GRAD_IN] * lanes)
            for j in range(panels * per_panel * ROWS * lanes):
                store(below, j, ZERO)
            multiply_units(width, index, values, shifted(tile, layer[_GRAD_OUT] * lanes), below)
            if i and plan[i - 1, RELU]:
                _pass_relu(shifted(tiles, (part * lines + layer[_IN]) * lanes), below, width_in * lanes)
    if lowest < 0:
        for part in range(first, last):
            b = part * lanes
            tile = shifted(gradients, (part * gradient_lines + plan[0, _GRAD_IN]) * lanes)
            unpack(width, tile, K, rows - b, shifted(dx, b * K), K)


@jit()
def _panel_gradient(width, kind, layer, p, target, parts, lines, gradient_lines, tiles, gradients, scratch):
    """The gradient of the values of panel p, to `target`."""
    lanes, panel = len(width) * LANES, layer[PER_PANEL] * ROWS
    blocks, per_panel, n0 = layer[UNIT_BLOCKS], layer[PER_PANEL], p * panel
    block = block_columns(layer[INPUTS], blocks)
    units, columns = storage_pointer(layer[UNITS], RECORDS), storage_pointer(layer[UNIT_COLUMNS], BYTES)
    cursor, sums = storage_pointer(scratch, STARTS), compute_pointer(scratch + _CURSOR, kind)
    begin_rows(target, n0, min(layer[OUTPUTS] - n0, panel), cursor)
    begin, last = (
        np.int64(units[p * blocks * per_panel * 4 + 3]),
        shifted(units, ((p + 1) * blocks * per_panel - 1) * 4),
    )
    end = np.int64(last[3]) + ROWS * np.int64(np.uint32(last[2]) >> np.uint32(16))
    for s in range(end - begin):
        store(sums, s, ZERO)
    for part in range(parts):
        x_tile = shifted(tiles, (part * lines + layer[_IN]) * lanes)
        dy_panel = shifted(gradients, (part * gradient_lines + layer[_GRAD_OUT] + n0) * lanes)
        for kb in range(blocks):
            records = shifted(units, (p * blocks + kb) * per_panel * 4)
            slot, x_block = np.int64(records[3]), shifted(x_tile, kb * block * lanes)
            for u in range(per_panel):
                steps = np.int64(np.uint32(records[4 * u + 2]) >> np.uint32(16))
                numbers, here = np.uint32(records[4 * u]), shifted(sums, slot - begin)
                correlate_unit(width, shifted(columns, slot), here, x_block, dy_panel, numbers, steps)
                slot += ROWS * steps
    for kb in range(blocks):
        records = shifted(units, (p * blocks + kb) * per_panel * 4)
        done = shifted(sums, np.int64(records[3]) - begin)
        leave(target, kind, records, per_panel, columns, done, n0, kb, block, cursor, sums)


@jit()
def _panel_bias(width, kind, layer, p, db_at, parts, gradient_lines, gradients, scratch):
    """The gradient of the biases of panel p: sums of lanes, as products with a line of ones."""
    lanes, panel = len(width) * LANES, layer[PER_PANEL] * ROWS
    n0 = p * panel
    ones, sums, db = (
        compute_pointer(scratch, kind),
        compute_pointer(scratch + _CURSOR, kind),
        storage_pointer(db_at, kind),
    )
    zeros = shifted(storage_pointer(scratch, BYTES), 8 * lanes)
    for i in range(ROWS):
        zeros[i] = 0
    for i in range(lanes):
        store(ones, i, _ONE)
    for i in range(panel):
        store(sums, i, ZERO)
    four = np.uint32(0x03020100)
    for part in range(parts):
        tile = shifted(gradients, (part * gradient_lines + layer[_GRAD_OUT] + n0) * lanes)
        for i in range(0, panel, ROWS):
            correlate_unit(width, zeros, shifted(sums, i), ones, shifted(tile, i * lanes), four, np.int64(1))
    for i in range(min(layer[OUTPUTS] - n0, panel)):
        store(db, n0 + i, load(sums, i))


@jit()
def _gradients_share(width, kind, plan, owners, me, parts, sizes, tiles_at, gradients_at, scratch):
    """The gradients of values and biases of the panels that worker `me` owns."""
    lines, gradient_lines, _ = sizes
    tiles, gradients = compute_pointer(tiles_at, kind), compute_pointer(gradients_at, kind)
    flat = 0
    for i in range(plan.shape[0]):
        layer = plan[i]
        target = layer[GRAD_VALUES], layer[FIRST_SURVIVORS], layer[NNZ], np.int64(0)
        for p in range(layer[PANELS]):
            if owners[flat] == me:
                if layer[GRAD_VALUES]:
                    _panel_gradient(
                        width, kind, layer, p, target, parts, lines, gradient_lines, tiles, gradients, scratch
                    )
                if layer[GRAD_BIAS]:
                    _panel_bias(width, kind, layer, p, layer[GRAD_BIAS], parts, gradient_lines, gradients, scratch)
            flat += 1


@jit(parallel=True)
def _descend_parallel(
    workers, bytes_each, width, kind, plan, dy_at, dx_at, rows, parts, sizes, tiles_at, gradients_at, scratch
):
    for t in prange(workers):
        share, memory = (parts * t // workers, parts * (t + 1) // workers), scratch + t * bytes_each
        _descend_share(width, kind, plan, dy_at, dx_at, rows, share, sizes, tiles_at, gradients_at, memory)


@jit(parallel=True)
def _gradients_parallel(workers, bytes_each, width, kind, plan, owners, parts, sizes, tiles_at, gradients_at, scratch):
    for t in prange(workers):
        memory = scratch + t * bytes_each
        _gradients_share(width, kind, plan, owners, t, parts, sizes, tiles_at, gradients_at, memory)


@jit()
def _backward(
    workers,
    bytes_each,
    width,
    kind,
    plan_at,
    owners_at,
    counts,
    dy_at,
    dx_at,
    rows,
    parts,
    sizes,
    tiles_at,
    gradients_at,
    scratch,
):
    """counts: layers, panels of all."""
    plan = rows_of(plan_at, counts[0])
    owners = carray(pointer(np.uintp(owners_at), int32), counts[1])
    descending, gathering = workers
    at = tiles_at, gradients_at
    if descending > 1:
        _descend_parallel(
            descending, bytes_each, width, kind, plan, dy_at, dx_at, rows, parts, sizes, at[0], at[1], scratch
        )
    else:
        _descend_share(width, kind, plan, dy_at, dx_at, rows, (0, parts), sizes, at[0], at[1], scratch)
    if gathering > 1:
        _gradients_parallel(gathering, bytes_each, width, kind, plan, owners, parts, sizes, at[0], at[1], scratch)
    else:
        _gradients_share(width, kind, plan, owners, 0, parts, sizes, at[0], at[1], scratch)


def lanes_of(batch: int) -> tuple[int, ...]:
    """V zeros: the vectors a line. Two parts of 32 rather than one of 64, so that two threads share it."""
    width = widths_of(batch)
    return (0, 0) if len(width) == 4 and batch <= 4 * LANES else width


Layer = tuple[tuple[int, int], int, list[Tensor], bool]


class TrainingPlan:
    """What these kernels know of a run of layers with given masks, in one dtype. It never changes, so threads may share it.

    layers: (shape (N, K) of the weight, survivors, the six tensors of sparse_tensors, ReLU or not).
    """

    def __init__(self, layers: Sequence[Layer], dtype: torch.dtype) -> None:
        self.dtype, self.kind = dtype, KINDS[dtype]
        self.compute = torch.float64 if dtype == torch.float64 else torch.float32
        self.indices = [index for _, _, index, _ in layers]  # to own their memory
        self.inputs, self.outputs = layers[0][0][1], layers[-1][0][0]
        self.nnz, self.weights = sum(nnz for _, nnz, *_ in layers), sum(N * K for (N, K), *_ in layers)
        padded = [index[0].shape[0] * index[0].shape[2] * ROWS for index in self.indices]
        padded_t = [index[3].shape[0] * index[3].shape[2] * ROWS for index in self.indices]
        entering = np.cumsum([0, self.inputs, *padded])  # where tiles begin: of x, then of what each layer leaves
        gradients = np.cumsum([0, *(max(a, b) for a, b in zip(padded, [*padded_t[1:], 0], strict=True))])
        self.lines, self.gradient_lines, self.lines_of_x = int(entering[-1]), int(gradients[-1]), padded_t[0]
        self.rows = [N for (N, _), *_ in layers]
        self.fields = np.zeros((len(layers), FIELDS), np.int64)
        self.panels: list[int] = []  # their slots
        for i, ((N, K), nnz, index, relu) in enumerate(layers):
            units, columns, _, across, their_columns, places = index
            other = [*across.shape[:3], across.data_ptr(), their_columns.data_ptr(), places.data_ptr(), places.numel()]
            tiles = [entering[i], entering[i + 1], gradients[i - 1], gradients[i]]
            self.fields[i] = [*describe(N, K, nnz, relu, [0] * 4, index), *other, *tiles]
            begins = [*units[:, 0, 0, 3].tolist(), columns.numel()]
            self.panels += [b - a for a, b in pairwise(begins)]
        self.slots, self.descending = sum(self.panels), [index[4].numel() for index in self.indices]
        most = max(
            PANEL, *(max(index[1].numel(), index[4].numel()) for index in self.indices)
        )  # elements, or bias sums
        self.bytes_each = -(-(most + SLACK) * self.compute.itemsize // 64) * 64 + _CURSOR
        self._owners: dict[int, np.ndarray] = {}

    def owners(self, workers: int) -> np.ndarray:
        """Which worker computes the gradients of which panel: the largest first, each to the one with the least to do."""
        found = self._owners.get(workers)
        if found is None:
            found, loads = np.zeros(len(self.panels), np.int32), [0] * workers
            for p in sorted(range(len(self.panels)), key=lambda p: -self.panels[p]):
                found[p] = worker = loads.index(min(loads))
                loads[worker] += self.panels[p]
            self._owners[workers] = found
        return found

    def _at(self, addresses: list[int]) -> np.ndarray:
        """The fields of all layers with these addresses, four each."""
        fields = self.fields.copy()
        fields[:, VALUES : VALUES + 4] = np.array(addresses).reshape(-1, 4)
        return fields

    def forward(self, x: Tensor, parameters: Sequence[Tensor | None]) -> tuple[Tensor, Tensor]:
        """(y (B, outputs), the tiles for `backward`) of x (B, inputs), B > 0.

        parameters: values (nnz, 1) and bias or None, layer by layer. All are contiguous, on the CPU, and of the plan's dtype.
        """
        rows = x.shape[0]
        width = lanes_of(rows)
        lanes = len(width) * LANES
        parts = -(-rows // lanes)
        addresses: list[int] = []
        for values, bias in zip(parameters[::2], parameters[1::2], strict=True):
            addresses += cast(Tensor, values).data_ptr(), 0 if bias is None else bias.data_ptr(), 0, 0
        fields, y = self._at(addresses), x.new_empty(rows, self.outputs)
        tiles = torch.empty(parts * self.lines * lanes, dtype=self.compute)
        workers = min(threads(), parts) if self.slots * rows >= SERIAL else 1
        memory = working_memory(workers * self.bytes_each)
        shared = (
            *(width, self.kind, fields.ctypes.data, len(fields), x.data_ptr(), y.data_ptr(), rows, parts, self.lines),
            *(tiles.data_ptr(), memory.data_ptr()),
        )
        if workers > 1:
            _forward_parallel(workers, self.bytes_each, *shared)
        else:
            _forward_serial(*shared)
        return y, tiles

    def backward(
        self, dy: Tensor, tiles: Tensor, values: Sequence[Tensor], needs_x: bool, needs: Sequence[bool]
    ) -> tuple[Tensor | None, list[Tensor | None]]:
        """(dx, the gradients of values and bias, layer by layer), of dy (B, outputs), contiguous; None where not needed."""
        rows = dy.shape[0]
        width = lanes_of(rows)
        lanes = len(width) * LANES
        parts = -(-rows // lanes)
        gradients: list[Tensor | None] = []
        addresses: list[int] = []
        lowest = -1 if needs_x else len(values)
        for i, value in enumerate(values):
            dv = dy.new_empty(value.shape[0], 1) if needs[2 * i] else None
            db = dy.new_empty(self.rows[i]) if needs[2 * i + 1] else None
            gradients += dv, db
            addresses += value.data_ptr(), 0, 0 if dv is None else dv.data_ptr(), 0 if db is None else db.data_ptr()
            if lowest > i and not (dv is None and db is None):
                lowest = i
        fields, dx = self._at(addresses), dy.new_empty(rows, self.inputs) if needs_x else None
        gradient_lines = self.gradient_lines + (self.lines_of_x if needs_x else 0)
        count = threads()
        descending = sum(self.descending[lowest + 1 :]) * rows
        workers = (min(count, parts) if descending >= SERIAL else 1, count if self.slots * rows >= SERIAL else 1)
        owners = self.owners(workers[1])
        tile_bytes = -(-parts * gradient_lines * lanes * self.compute.itemsize // 64) * 64
        memory = working_memory(tile_bytes + max(workers) * self.bytes_each)
        at = memory.data_ptr()
        _backward(
            *(workers, self.bytes_each, width, self.kind, fields.ctypes.data, owners.ctypes.data),
            *((len(fields), len(owners)), dy.data_ptr(), 0 if dx is None else dx.data_ptr(), rows, parts),
            *((self.lines, gradient_lines, lowest), tiles.data_ptr(), at, at + tile_bytes),
        )
        return dx, gradients


def sparse_chain_training(
    x: Tensor, dy: Tensor, layers: list[tuple[Tensor, Tensor | None, Tensor, list[Tensor], bool]]
) -> list[Tensor]:
    """See initperf/reference/chain_training.py; for calls that keep no plan, with B > 0."""
    described = [((mask.shape[0], mask.shape[1]), len(values), index, relu) for values, _, mask, index, relu in layers]
    plan = TrainingPlan(described, x.dtype)
    parameters = [p for values, bias, *_ in layers for p in (values, bias)]
    y, tiles = plan.forward(x.contiguous(), parameters)
    values = [values for values, *_ in layers]
    dx, gradients = plan.backward(dy.contiguous(), tiles, values, True, [p is not None for p in parameters])
    return [t for t in (y, dx, *gradients) if t is not None]
