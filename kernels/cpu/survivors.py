"""Where the products read the weights of survivors, and where they leave gradients: the layouts of storage.

A source is a tuple of integers, and its length says which it is, when the product is compiled:
  dense       (address, stride of rows, stride of columns)
  compressed  (address of the values, address of starts): row-major survivors, those of row n from starts[n] (int64) on
  placed      (address of the values, address of places, 0, 0): slot s has the value at places[s] (int32), none if -1
A target is dense, (address, rows, columns), or compressed. Rows of a compressed one are read through `cursor`: for each
row of a task the place of its next survivor, since column blocks come in order.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba.extending import overload

from .jit import jit
from .spmm_ir import LANES, ROWS, load, shifted, storage_pointer, store
from .tiles import ZERO, gather, prefetch_lines, scatter

CACHED = 4 << 20  # weights above which they, or their gradient, are not found in a cache again
PLACES, STARTS = np.zeros(1, np.int32), np.zeros(1, np.int64)
DENSE, COMPRESSED = 3, 2  # lengths of the tuples


@jit()
def _gather_rows(records, count, values, cursor, out):
    """out[slot] = the next values of the units' rows, padding 0. Returns the number of slots."""
    place = np.int64(0)
    for u in range(count):
        record = shifted(records, u * 4)
        numbers = np.uint32(record[0])
        steps = np.int64(np.uint32(record[2]) >> np.uint32(16))
        for r in range(ROWS):
            row = np.int64((numbers >> np.uint32(8 * r)) & np.uint32(255))
            survivors = np.int64((np.uint32(record[1 + r // 2]) >> np.uint32(16 * (r % 2))) & np.uint32(0xFFFF))
            start = cursor[row]
            line, target = shifted(values, start), shifted(out, place + r)
            for j in range(survivors):
                store(target, ROWS * j, load(line, j))
            for j in range(survivors, steps):
                store(target, ROWS * j, ZERO)
            cursor[row] = start + survivors
        place += ROWS * steps
    return place


@jit()
def _gather_places(records, count, values, places, out):
    """out[slot] = values[places[slot]], padding 0. Returns the number of slots."""
    first = np.int64(records[3])
    last = shifted(records, (count - 1) * 4)
    slots = np.int64(last[3]) - first + ROWS * np.int64(np.uint32(last[2]) >> np.uint32(16))
    line = shifted(places, first)
    for s in range(slots):
        place = np.int64(line[s])
        value = load(values, max(place, np.int64(0)))
        store(out, s, value if place >= 0 else ZERO)
    return slots


@jit()
def _scatter_rows(records, count, sums, cursor, out):
    """The units' sums to the next places of their rows."""
    place = np.int64(0)
    for u in range(count):
        record = shifted(records, u * 4)
        numbers = np.uint32(record[0])
        for r in range(ROWS):
            row = np.int64((numbers >> np.uint32(8 * r)) & np.uint32(255))
            survivors = np.int64((np.uint32(record[1 + r // 2]) >> np.uint32(16 * (r % 2))) & np.uint32(0xFFFF))
            start = cursor[row]
            line, source = shifted(out, start), shifted(sums, place + r)
            for j in range(survivors):
                store(line, j, load(source, ROWS * j))
            cursor[row] = start + survivors
        place += ROWS * np.int64(np.uint32(record[2]) >> np.uint32(16))


def begin_rows(storage: Any, row: Any, rows: Any, cursor: Any) -> Any:
    """Point `cursor` at the first survivors of `rows` rows from `row` on."""


def fetch(
    source: Any, kind: Any, records: Any, count: Any, columns: Any, row: Any, column: Any, cursor: Any, out: Any
) -> Any:
    """The weights of `count` units of the panel at (row, column) in the order of their slots. Returns the number of slots."""


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

    return {DENSE: dense, COMPRESSED: compressed}.get(len(source), placed)


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
