"""Between ordinary tensors and the tiles that the masked products compute on. Serial; every argument an address or a size.

A tile holds lines of `lanes` = V * 16 batch rows: tile[line][lane]. Packing and unpacking convert the storage dtype.
"""

from __future__ import annotations

import numpy as np

from ..core.jit import jit
from ..core.vectors import LANES, ROWS, ZERO, load, prefetch, shifted, store, stream, transpose_in, transpose_out


@jit()
def pack(vectors, source, stride_row, stride_column, rows, columns, tile):
    """tile[column][lane] = source[lane, column]; 0 in lanes beyond `rows`."""
    lanes = vectors * LANES
    for lane in range(0, lanes, LANES):
        valid = min(rows - lane, LANES)
        if valid <= 0:
            for j in range(columns):
                for i in range(LANES):
                    store(tile, j * lanes + lane + i, ZERO)
            continue
        start = 0
        if stride_column == 1:
            start = columns // LANES * LANES
            for j in range(0, start, LANES):
                transpose_in(
                    shifted(source, lane * stride_row + j), stride_row, valid, shifted(tile, j * lanes + lane), lanes
                )
        for j in range(start, columns):
            for i in range(valid):
                store(tile, j * lanes + lane + i, load(source, (lane + i) * stride_row + j * stride_column))
            for i in range(valid, LANES):
                store(tile, j * lanes + lane + i, ZERO)


@jit()
def unpack(vectors, tile, columns, rows, out, stride):
    """out[lane, column] = tile[column][lane] for lanes below `rows`."""
    lanes = vectors * LANES
    even = columns // LANES * LANES
    for lane in range(0, min(lanes, rows), LANES):
        valid = min(LANES, rows - lane)
        for j in range(0, even, LANES):
            transpose_out(shifted(tile, j * lanes + lane), lanes, shifted(out, lane * stride + j), stride, valid)
        for i in range(lane, lane + valid):
            for j in range(even, columns):
                store(out, i * stride + j, load(tile, j * lanes + i))


@jit()
def start_sums(vectors, bias, has_bias, rows, padded, tile):
    """tile[row][lane] = bias[row], or 0; 0 in rows beyond `rows`."""
    lanes = vectors * LANES
    for row in range(padded):
        value = load(bias, row) if has_bias and row < rows else ZERO
        for i in range(lanes):
            store(tile, row * lanes + i, value)


@jit()
def gather(units, count, columns, weight, stride_row, stride_column, out):
    """out[slot] = weight[row, column] of `count` units, padding 0. Returns the number of slots."""
    first = np.int64(units[3])
    total = np.int64(0)
    for u in range(count):
        record = shifted(units, u * 4)
        numbers = np.uint32(record[0])
        start = np.int64(record[3])
        steps = np.int64(np.uint32(record[2]) >> np.uint32(16))
        for r in range(ROWS):
            row = np.int64((numbers >> np.uint32(8 * r)) & np.uint32(255))
            line = shifted(weight, row * stride_row)
            survivors = np.int64((np.uint32(record[1 + r // 2]) >> np.uint32(16 * (r % 2))) & np.uint32(0xFFFF))
            place = start + r
            for _ in range(survivors):
                store(out, place - first, load(line, np.int64(columns[place]) * stride_column))
                place += ROWS
            for _ in range(survivors, steps):
                store(out, place - first, ZERO)
                place += ROWS
        total = start - first + ROWS * steps
    return total


@jit()
def prefetch_lines(weight, stride_row, stride_column, rows, columns, part, parts):
    """Ask for a share of weight[:rows, :columns]: that many loads later the gather finds it in the second-level cache."""
    if stride_column == 1:
        majors, minors, stride = rows, columns, stride_row
    else:
        majors, minors, stride = columns, rows, stride_column
    for major in range(majors * part // parts, majors * (part + 1) // parts):
        for minor in range(0, minors, LANES):
            prefetch(weight, major * stride + minor)


@jit()
def scatter(units, count, columns, sums, rows, width, out, stride, buffer, streams):
    """out[row, :width] = 0, then out[row, column] = sums[slot], of `count` units; rows beyond `rows` do not exist.

    streams: a line is made in `buffer` and written past the caches, which saves reading it first.
    """
    first = np.int64(units[3])
    for u in range(count):
        record = shifted(units, u * 4)
        numbers = np.uint32(record[0])
        start = np.int64(record[3])
        for r in range(ROWS):
            row = np.int64((numbers >> np.uint32(8 * r)) & np.uint32(255))
            if row >= rows:
                continue
            target = shifted(out, row * stride)
            line = buffer if streams else target
            for j in range(width):
                store(line, j, ZERO)
            survivors = np.int64((np.uint32(record[1 + r // 2]) >> np.uint32(16 * (r % 2))) & np.uint32(0xFFFF))
            place = start + r
            for _ in range(survivors):
                store(line, np.int64(columns[place]), load(sums, place - first))
                place += ROWS
            if streams:
                for j in range(0, width, LANES):
                    stream(line, target, j)
