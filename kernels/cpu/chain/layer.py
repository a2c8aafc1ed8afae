"""What a chain's kernels know of a layer, and its forward product on activations that stay in tiles.

A plan is int64 (layers, FIELDS): sizes, addresses and flags; whoever made it owns the memory behind it.
"""

from __future__ import annotations

import numpy as np
from numba import carray, int64
from torch import Tensor

from ..core.jit import jit
from ..core.scalars import pointer
from ..core.vectors import LANES, ROWS, ZERO, load, shifted, storage_pointer, store
from ..sparse.index import BLOCK, WIDE_BLOCK
from ..sparse.storage import STARTS, begin_rows, fetch
from ..sparse.tiles import start_sums
from ..sparse.units_ir import multiply_unit

OUTPUTS, INPUTS, NNZ, RELU = range(4)
VALUES, BIAS, GRAD_VALUES, GRAD_BIAS = range(4, 8)  # addresses, 0 where there is none
PANELS, UNIT_BLOCKS, PER_PANEL, UNITS, UNIT_COLUMNS, FIRST_SURVIVORS, UNIT_SLOTS = range(8, 15)  # the index
OTHERS = 15  # where the fields begin that only inference, or only training, has
FIELDS = 26
BYTES, RECORDS = np.zeros(1, np.uint8), np.zeros(1, np.int32)


@jit()
def rows_of(plan_at, layers):
    """The plan as an array."""
    return carray(pointer(np.uintp(plan_at), int64), (layers, FIELDS))


@jit()
def block_columns(columns, blocks):
    """Columns a block, from how many blocks there are."""
    return BLOCK if blocks == (columns + BLOCK - 1) // BLOCK else WIDE_BLOCK


@jit()
def order_units(kind, layer, values_at, out, cursor):
    """The layer's values in the order of its units; writes SLACK elements beyond them. cursor: an int64 for each row of a panel."""
    panel = layer[PER_PANEL] * ROWS
    units, columns = storage_pointer(layer[UNITS], RECORDS), storage_pointer(layer[UNIT_COLUMNS], BYTES)
    source = (values_at, layer[FIRST_SURVIVORS], layer[NNZ], 0)
    for p in range(layer[PANELS]):
        begin_rows(source, p * panel, min(layer[OUTPUTS] - p * panel, panel), storage_pointer(cursor, STARTS))
        for kb in range(layer[UNIT_BLOCKS]):
            records = shifted(units, (p * layer[UNIT_BLOCKS] + kb) * layer[PER_PANEL] * 4)
            here, rows = shifted(out, np.int64(records[3])), storage_pointer(cursor, STARTS)
            fetch(source, kind, records, layer[PER_PANEL], columns, p * panel, kb, rows, here)


@jit()
def multiply_units(vectors, index, values, x_tile, y_tile):
    """y_tile += the product with a weight whose values are in the order of the index (panels, blocks, units a panel, columns a block, units, columns)."""
    panels, blocks, per_panel, block, units_at, columns_at = index
    units, columns = storage_pointer(units_at, RECORDS), storage_pointer(columns_at, BYTES)
    lanes, panel = vectors * LANES, per_panel * ROWS
    for kb in range(blocks):
        x_block = shifted(x_tile, kb * block * lanes)
        for p in range(panels):
            records = shifted(units, (p * blocks + kb) * per_panel * 4)
            slot = np.int64(records[3])
            for u in range(per_panel):
                steps = np.int64(np.uint32(records[4 * u + 2]) >> np.uint32(16))
                multiply_unit(
                    vectors,
                    shifted(columns, slot),
                    shifted(values, slot),
                    x_block,
                    shifted(y_tile, p * panel * lanes),
                    np.uint32(records[4 * u]),
                    steps,
                )
                slot += ROWS * steps


@jit()
def layer_forward(vectors, kind, layer, values, x_tile, y_tile):
    """y_tile = relu(bias + x_tile W^T), or without ReLU; values: in the order of the units."""
    lanes, N, K = vectors * LANES, layer[OUTPUTS], layer[INPUTS]
    padded = layer[PANELS] * layer[PER_PANEL] * ROWS
    start_sums(vectors, storage_pointer(layer[BIAS], kind), layer[BIAS] != 0, N, padded, y_tile)
    block = block_columns(K, layer[UNIT_BLOCKS])
    index = layer[PANELS], layer[UNIT_BLOCKS], layer[PER_PANEL], block, layer[UNITS], layer[UNIT_COLUMNS]
    multiply_units(vectors, index, values, x_tile, y_tile)
    if layer[RELU]:
        for j in range(N * lanes):
            value = load(y_tile, j)
            store(y_tile, j, ZERO if value < ZERO else value)


def describe(outputs: int, inputs: int, nnz: int, relu: bool, at: list[int], index: list[Tensor]) -> list[int]:
    """The fields that every chain has. at: the four addresses; index: [units, columns, starts] (kernels/cpu/sparse/compressed_index.py)."""
    units, columns, starts = index[:3]
    where = [units.data_ptr(), columns.data_ptr(), starts.data_ptr(), columns.numel()]
    return [outputs, inputs, nnz, int(relu), *at, *units.shape[:3], *where]
