"""The gradients of a run of small sparse layers, on the tiles that its forward pass left (kernels/cpu/chain/training.py)."""

from __future__ import annotations

import numpy as np
from numba import carray, int32

from ..core.jit import jit
from ..core.scalars import pointer
from ..core.shares import ME, on_threads, part_of
from ..core.vectors import LANES, ROWS, ZERO, compute_pointer, load, shifted, storage_pointer, store
from ..sparse.index import PANEL
from ..sparse.storage import PLACES, STARTS, begin_rows, leave, take_places
from ..sparse.tiles import pack, unpack
from ..sparse.units_ir import correlate_unit
from .layer import (
    BYTES,
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
    multiply_units,
    rows_of,
)

# The transposed index, where a layer's tiles begin in a part's (in lines), and likewise those of their gradients.
_PANELS_T, _BLOCKS_T, _PER_PANEL_T, _UNITS_T, _COLUMNS_T, _PLACES_T, _SLOTS_T = range(OTHERS, OTHERS + 7)
TILE_IN, TILE_OUT, _GRAD_IN, _GRAD_OUT = range(OTHERS + 7, OTHERS + 11)
CURSOR = 8 * PANEL  # bytes of a worker's memory before what it computes in
_ONE = np.float32(1)


@jit()
def _pass_relu(activations, gradients, count):
    """As torch's: 0 where the activation is 0 or less, and not where it is NaN."""
    for j in range(count):
        gradient = load(gradients, j)
        store(gradients, j, ZERO if load(activations, j) <= ZERO else gradient)


@jit()
def _descend(share, vectors, kind, plan, dy_at, dx_at, rows, parts, sizes, tiles_at, gradients_at, bytes_each, scratch):
    """The gradients of a share of the parts at the output of every layer from the last to the one called `lowest` (-1: at x, too)."""
    if share[ME] < 0:
        on_threads(share)
        return
    first, last = part_of(share, parts)
    if first >= last:
        return
    scratch += share[ME] * bytes_each
    lines, gradient_lines, lowest = sizes
    layers, lanes = plan.shape[0], vectors * LANES
    K, N = plan[0, INPUTS], plan[layers - 1, OUTPUTS]
    dy, dx = storage_pointer(dy_at, kind), storage_pointer(dx_at, kind)
    tiles, gradients = compute_pointer(tiles_at, kind), compute_pointer(gradients_at, kind)
    values = compute_pointer(scratch, kind)
    for part in range(first, last):
        b = part * lanes
        tile = shifted(gradients, (part * gradient_lines + plan[layers - 1, _GRAD_OUT]) * lanes)
        pack(vectors, shifted(dy, b * N), N, 1, rows - b, N, tile)
        if plan[layers - 1, RELU]:
            _pass_relu(shifted(tiles, (part * lines + plan[layers - 1, TILE_OUT]) * lanes), tile, N * lanes)
    for i in range(layers - 1, lowest, -1):
        layer = plan[i]
        width_in, panels, blocks, per_panel = layer[INPUTS], layer[_PANELS_T], layer[_BLOCKS_T], layer[_PER_PANEL_T]
        block = block_columns(layer[OUTPUTS], blocks)
        index = panels, blocks, per_panel, block, layer[_UNITS_T], layer[_COLUMNS_T]
        places = storage_pointer(layer[_PLACES_T], PLACES)
        take_places(storage_pointer(layer[VALUES], kind), places, layer[_SLOTS_T], values)
        for part in range(first, last):
            tile = shifted(gradients, part * gradient_lines * lanes)
            below = shifted(tile, layer[_GRAD_IN] * lanes)
            for j in range(panels * per_panel * ROWS * lanes):
                store(below, j, ZERO)
            multiply_units(vectors, index, values, shifted(tile, layer[_GRAD_OUT] * lanes), below)
            if i and plan[i - 1, RELU]:
                _pass_relu(shifted(tiles, (part * lines + layer[TILE_IN]) * lanes), below, width_in * lanes)
    if lowest < 0:
        for part in range(first, last):
            b = part * lanes
            tile = shifted(gradients, (part * gradient_lines + plan[0, _GRAD_IN]) * lanes)
            unpack(vectors, tile, K, rows - b, shifted(dx, b * K), K)


@jit()
def _panel_gradient(vectors, kind, layer, p, target, parts, lines, gradient_lines, tiles, gradients, scratch):
    """The gradient of the values of panel p, to `target`."""
    lanes, panel = vectors * LANES, layer[PER_PANEL] * ROWS
    blocks, per_panel, n0 = layer[UNIT_BLOCKS], layer[PER_PANEL], p * panel
    block = block_columns(layer[INPUTS], blocks)
    units, columns = storage_pointer(layer[UNITS], RECORDS), storage_pointer(layer[UNIT_COLUMNS], BYTES)
    cursor, sums = storage_pointer(scratch, STARTS), compute_pointer(scratch + CURSOR, kind)
    begin_rows(target, n0, min(layer[OUTPUTS] - n0, panel), cursor)
    begin, last = (
        np.int64(units[p * blocks * per_panel * 4 + 3]),
        shifted(units, ((p + 1) * blocks * per_panel - 1) * 4),
    )
    end = np.int64(last[3]) + ROWS * np.int64(np.uint32(last[2]) >> np.uint32(16))
    for s in range(end - begin):
        store(sums, s, ZERO)
    for part in range(parts):
        x_tile = shifted(tiles, (part * lines + layer[TILE_IN]) * lanes)
        dy_panel = shifted(gradients, (part * gradient_lines + layer[_GRAD_OUT] + n0) * lanes)
        for kb in range(blocks):
            records = shifted(units, (p * blocks + kb) * per_panel * 4)
            slot, x_block = np.int64(records[3]), shifted(x_tile, kb * block * lanes)
            for u in range(per_panel):
                steps = np.int64(np.uint32(records[4 * u + 2]) >> np.uint32(16))
                numbers, here = np.uint32(records[4 * u]), shifted(sums, slot - begin)
                correlate_unit(vectors, shifted(columns, slot), here, x_block, dy_panel, numbers, steps)
                slot += ROWS * steps
    for kb in range(blocks):
        records = shifted(units, (p * blocks + kb) * per_panel * 4)
        done = shifted(sums, np.int64(records[3]) - begin)
        leave(target, kind, records, per_panel, columns, done, n0, kb, block, cursor, sums)


@jit()
def _panel_bias(vectors, kind, layer, p, db_at, parts, gradient_lines, gradients, scratch):
    """The gradient of the biases of panel p: sums of lanes, as products with a line of ones."""
    lanes, panel = vectors * LANES, layer[PER_PANEL] * ROWS
    n0 = p * panel
    ones, sums, db = (
        compute_pointer(scratch, kind),
        compute_pointer(scratch + CURSOR, kind),
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
            correlate_unit(vectors, zeros, shifted(sums, i), ones, shifted(tile, i * lanes), four, np.int64(1))
    for i in range(min(layer[OUTPUTS] - n0, panel)):
        store(db, n0 + i, load(sums, i))


@jit()
def _gradients(share, vectors, kind, plan, owners, parts, sizes, tiles_at, gradients_at, bytes_each, scratch):
    """The gradients of values and biases of the panels that a worker owns."""
    if share[ME] < 0:
        on_threads(share)
        return
    scratch += share[ME] * bytes_each
    lines, gradient_lines, _ = sizes
    tiles, gradients = compute_pointer(tiles_at, kind), compute_pointer(gradients_at, kind)
    flat = 0
    for i in range(plan.shape[0]):
        layer = plan[i]
        target = layer[GRAD_VALUES], layer[FIRST_SURVIVORS], layer[NNZ], np.int64(0)
        for p in range(layer[PANELS]):
            if owners[flat] == share[ME]:
                if layer[GRAD_VALUES]:
                    _panel_gradient(
                        vectors, kind, layer, p, target, parts, lines, gradient_lines, tiles, gradients, scratch
                    )
                if layer[GRAD_BIAS]:
                    _panel_bias(vectors, kind, layer, p, layer[GRAD_BIAS], parts, gradient_lines, gradients, scratch)
            flat += 1


@jit()
def chain_backward(
    descending,
    gathering,
    bytes_each,
    vectors,
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
    """The gradients at all layers, and then of all parameters. descending, gathering: the shares of each; counts: layers, panels of all."""
    plan = rows_of(plan_at, counts[0])
    owners = carray(pointer(np.uintp(owners_at), int32), counts[1])
    at = tiles_at, gradients_at
    _descend(descending, vectors, kind, plan, dy_at, dx_at, rows, parts, sizes, at[0], at[1], bytes_each, scratch)
    _gradients(gathering, vectors, kind, plan, owners, parts, sizes, at[0], at[1], bytes_each, scratch)
