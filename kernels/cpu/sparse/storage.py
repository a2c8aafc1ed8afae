"""Where the products read the weights of survivors, and where they leave gradients: the layouts of storage.

A source is a tuple of integers, and its length says which it is, when the product is compiled:
  dense       (address, stride of rows, stride of columns)
  compressed  (address of the values, address of starts, nnz, 0): row-major survivors, row n's from starts[n] (int64) on
  placed      (address of the values, address of places): slot s has the value at places[s] (int32), none if -1
  ordered     (address of the values,): slot s has the value s, in the dtype that arithmetic runs in (products.in_order)
A target is dense, (address, rows, columns), or compressed. Rows of a compressed one are read through `cursor`: for each
row of a task the place of its next survivor, since column blocks come in order.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba.extending import overload

from ..core.jit import jit
from ..core.vectors import LANES, ROWS, ZERO, compute_pointer, load, prefetch, shifted, storage_pointer, store
from .interleave_ir import interleave, separate
from .tiles import gather, prefetch_lines, scatter

CACHED = 4 << 20  # weights above which they, or their gradient, are not found in a cache again
KINDS = {
    torch.float32: np.zeros(1, np.float32),
    torch.float64: np.zeros(1, np.float64),
    torch.bfloat16: np.zeros(1, np.uint16),
    torch.float16: np.zeros(1, np.int16),
}
SLACK = ROWS * LANES  # slots beyond the last that a unit's values may touch
AHEAD = 48  # values that a row's next but one block begins ahead
PLACES, STARTS = np.zeros(1, np.int32), np.zeros(1, np.int64)
ORDERED, DENSE, COMPRESSED = 1, 3, 4  # lengths of the tuples


@jit()
def _unit(record, cursor, storage):
    """(steps, counts, pointers to the next values) of the four rows of a unit; the cursor moves on."""
    numbers, low, high = np.uint32(record[0]), np.uint32(record[1]), np.uint32(record[2])
    a, b = np.int64(numbers & np.uint32(255)), np.int64((numbers >> np.uint32(8)) & np.uint32(255))
    c, d = np.int64((numbers >> np.uint32(16)) & np.uint32(255)), np.int64(numbers >> np.uint32(24))
    counts = (
        np.int64(low & np.uint32(0xFFFF)),
        np.int64(low >> np.uint32(16)),
        np.int64(high & np.uint32(0xFFFF)),
        np.int64(high >> np.uint32(16)),
    )
    lines = (
        shifted(storage, cursor[a]),
        shifted(storage, cursor[b]),
        shifted(storage, cursor[c]),
        shifted(storage, cursor[d]),
    )
    for line in lines:  # as many streams as rows: the hardware does not foresee them
        prefetch(line, AHEAD)
    cursor[a] += counts[0]
    cursor[b] += counts[1]
    cursor[c] += counts[2]
    cursor[d] += counts[3]
    return counts[3], counts, lines


@jit()
def _onwards(lines, counts, j):
    """The four rows from their value j on."""
    return (
        (shifted(lines[0], j), shifted(lines[1], j), shifted(lines[2], j), shifted(lines[3], j)),
        (counts[0] - j, counts[1] - j, counts[2] - j, counts[3] - j),
    )


@jit()
def _gather_rows(records, count, values, cursor, out):
    """out[slot] = the next values of the units' rows, padding 0. Returns the number of slots; writes up to 63 more."""
    place = np.int64(0)
    for u in range(count):
        steps, counts, lines = _unit(shifted(records, u * 4), cursor, values)
        for j in range(0, steps, LANES):
            rows, left = _onwards(lines, counts, j)
            interleave(rows, left, shifted(out, place + ROWS * j))
        place += ROWS * steps
    return place


@jit()
def take_places(values, places, count, out):
    """out[i] = values[places[i]], 0 where that is -1."""
    for i in range(count):
        place = np.int64(places[i])
        value = load(values, max(place, np.int64(0)))
        store(out, i, value if place >= 0 else ZERO)


@jit()
def _gather_places(records, count, values, places, out):
    """out[slot] = values[places[slot]], padding 0. Returns the number of slots."""
    first = np.int64(records[3])
    last = shifted(records, (count - 1) * 4)
    slots = np.int64(last[3]) - first + ROWS * np.int64(np.uint32(last[2]) >> np.uint32(16))
    take_places(values, shifted(places, first), slots, out)
    return slots


@jit()
def _scatter_rows(records, count, sums, cursor, out):
    """The units' sums to the next places of their rows; reads up to 63 slots more."""
    place = np.int64(0)
    for u in range(count):
        steps, counts, lines = _unit(shifted(records, u * 4), cursor, out)
        for j in range(0, steps, LANES):
            rows, left = _onwards(lines, counts, j)
            separate(shifted(sums, place + ROWS * j), rows, left)
        place += ROWS * steps


def begin_rows(storage: Any, row: Any, rows: Any, cursor: Any) -> Any:
    """Point `cursor` at the first survivors of `rows` rows from `row` on."""


def fetch(
    source: Any, kind: Any, records: Any, count: Any, columns: Any, row: Any, column: Any, cursor: Any, out: Any
) -> Any:
    """The weights of `count` units of the panel at (row, column) in the order of their slots, in `out` (unless they are ordered). Returns the number of slots."""


def weights_at(source: Any, kind: Any, records: Any, out: Any) -> Any:
    """Where the units' weights are after fetch."""


def ask(
    source: Any, kind: Any, row: Any, column: Any, rows: Any, columns: Any, part: Any, parts: Any, sizes: Any
) -> Any:
    """Prefetch a share of what fetch will read at (row, column), where that pays."""


def leave(
    target: Any,
    kind: Any,
    records: Any,
    count: Any,
    columns: Any,
    sums: Any,
    row: Any,
    column: Any,
    width: Any,
    cursor: Any,
    line: Any,
) -> Any:
    """The finished sums of `count` units to where they belong, 0 where pruned; `line`: memory to make a row in."""


@overload(begin_rows)
def _begin_rows(storage, row, rows, cursor):
    if len(storage) != COMPRESSED:
        return lambda storage, row, rows, cursor: None

    def compressed(storage, row, rows, cursor):
        starts = storage_pointer(storage[1], STARTS)
        for i in range(rows):
            cursor[i] = starts[row + i]

    return compressed


@overload(fetch)
def _fetch(source, kind, records, count, columns, row, column, cursor, out):
    def dense(source, kind, records, count, columns, row, column, cursor, out):
        corner = shifted(storage_pointer(source[0], kind), row * source[1] + column * source[2])
        return gather(records, count, columns, corner, source[1], source[2], out)

    def compressed(source, kind, records, count, columns, row, column, cursor, out):
        return _gather_rows(records, count, storage_pointer(source[0], kind), cursor, out)

    def placed(source, kind, records, count, columns, row, column, cursor, out):
        values, places = storage_pointer(source[0], kind), storage_pointer(source[1], PLACES)
        return _gather_places(records, count, values, places, out)

    def ordered(source, kind, records, count, columns, row, column, cursor, out):
        last = shifted(records, (count - 1) * 4)
        return np.int64(last[3]) - np.int64(records[3]) + ROWS * np.int64(np.uint32(last[2]) >> np.uint32(16))

    return {ORDERED: ordered, DENSE: dense, COMPRESSED: compressed}.get(len(source), placed)


@overload(weights_at)
def _weights_at(source, kind, records, out):
    if len(source) != ORDERED:
        return lambda source, kind, records, out: out
    return lambda source, kind, records, out: shifted(compute_pointer(source[0], kind), np.int64(records[3]))


@overload(ask)
def _ask(source, kind, row, column, rows, columns, part, parts, sizes):
    if len(source) != DENSE:
        return lambda source, kind, row, column, rows, columns, part, parts, sizes: None

    def dense(source, kind, row, column, rows, columns, part, parts, sizes):
        if sizes[1] * sizes[2] > CACHED:
            corner = shifted(storage_pointer(source[0], kind), row * source[1] + column * source[2])
            prefetch_lines(corner, source[1], source[2], rows, columns, part, parts)

    return dense


@overload(leave)
def _leave(target, kind, records, count, columns, sums, row, column, width, cursor, line):
    def dense(target, kind, records, count, columns, sums, row, column, width, cursor, line):
        address, rows, stride = target
        streams = rows * stride > CACHED and stride % LANES == 0 and address % 64 == 0
        corner = shifted(storage_pointer(address, kind), row * stride + column)
        scatter(records, count, columns, sums, rows - row, width, corner, stride, line, streams)

    def compressed(target, kind, records, count, columns, sums, row, column, width, cursor, line):
        _scatter_rows(records, count, sums, cursor, storage_pointer(target[0], kind))

    return dense if len(target) == DENSE else compressed
