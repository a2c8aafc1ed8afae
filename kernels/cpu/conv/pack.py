"""Between images (batch, channel, y, x) and lines of pixels with the batch in the lanes. Serial; one channel of 16 images a call."""

from __future__ import annotations

from ..core.jit import jit
from ..core.vectors import LANES, ZERO, load, shifted, store, transpose_in, transpose_out
from .conv_ir import copy_line, zero_line


@jit()
def pack_plane(source, stride_batch, valid, height, width, first, left, rows, columns, out, lines):
    """out[r][c][lane] = source[lane][first + r][c - left] for rows x columns, and 0 outside the image and in lanes >= valid.

    source: the channel of the first image, contiguous (height, width). lines: scratch of 16 lines.
    """
    top, bottom = max(0, first), min(height, first + rows)
    for r in range(rows):
        inside = top <= first + r < bottom
        for c in range(min(left, columns) if inside else columns):
            zero_line(out, (r * columns + c) * LANES)
        if inside:
            for c in range(max(0, left + width), columns):
                zero_line(out, (r * columns + c) * LANES)
    pixels = height * width
    whole = left >= 0 and left + width <= columns
    p, end = top * width, bottom * width
    while p < end:
        start = min(p, pixels - LANES)
        y, x = p // width, p % width
        if whole and start == p and x + LANES <= width:
            place = ((y - first) * columns + x + left) * LANES
            transpose_in(shifted(source, start), stride_batch, valid, shifted(out, place), LANES)
            p += LANES
            continue
        if start >= 0:
            transpose_in(shifted(source, start), stride_batch, valid, lines, LANES)
        else:
            start = 0
            for q in range(pixels):
                for lane in range(LANES):
                    value = load(source, lane * stride_batch + q) if lane < valid else ZERO
                    store(lines, q * LANES + lane, value)
        for q in range(p, min(start + LANES, end)):
            c = x + left
            if 0 <= c < columns:
                copy_line(lines, (q - start) * LANES, out, ((y - first) * columns + c) * LANES)
            x += 1
            if x == width:
                x, y = 0, y + 1
        p = start + LANES


@jit()
def unpack_pixels(lines, pixels, valid, out, stride_batch):
    """out[lane][p] = lines[p][lane] for p < pixels and lanes below `valid`."""
    if pixels < LANES:
        for lane in range(valid):
            for p in range(pixels):
                store(out, lane * stride_batch + p, load(lines, p * LANES + lane))
        return
    for p in range(0, pixels, LANES):
        start = min(p, pixels - LANES)
        transpose_out(shifted(lines, start * LANES), LANES, shifted(out, start), stride_batch, valid)
