"""Direct sparse convolution: y = x * (W o M) + b, dx, and dW at survivors only, without unfolded copies.

Images are packed to lines of 16 lanes of the batch, zero-padded; a survivor (output channel n, input channel c, tap) is then
an offset into the packed image, and the sums of 8 pixels stay in registers. Blocks of input channels fit the first-level cache.
Every sum runs over channels and taps, or over images and pixels, in one fixed order: the bits do not depend on the threads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ..core.conv_memory import empty, lines
from ..core.jit import jit, threads
from ..core.memory import check_alike
from ..core.shares import ME, among, on_threads, part_of
from ..core.vectors import LANES, compute_pointer, shifted, storage_pointer
from .conv_ir import PIXELS, copy_line, correlate_row, multiply_row, zero_line
from .index import conv_pattern_tensors as conv_pattern_tensors
from .pack import pack_plane, unpack_pixels

_INTS, _FLOATS = np.zeros(1, np.int32), np.zeros(1, np.float32)
SUMS = 256 << 10  # bytes of sums that wait to leave, in the second-level cache
_offsets = WeakTensorKeyDictionary()  # taps -> {geometry: offsets}


@jit()
def _convolve(share, pixels, step, x_at, y_at, bias_at, index, values_at, sizes, packed, plan, scratch):
    """Output rows of 16 images for a share of the tasks (batch block, band of output rows)."""
    if share[ME] < 0:
        on_threads(share)
        return
    B, C, H, W, N, Ho, Wo = sizes
    stride, top, left, rows, columns = packed
    bands, band_rows, at_once, tasks, bytes_each = plan
    first, last = part_of(share, tasks)
    scratch += share[ME] * bytes_each
    starts_at, offsets_at, channels_at, blocks, live = index
    x, y = storage_pointer(x_at, _FLOATS), storage_pointer(y_at, _FLOATS)
    bias, values = storage_pointer(bias_at, _FLOATS), storage_pointer(values_at, _FLOATS)
    starts, offsets = storage_pointer(starts_at, _INTS), storage_pointer(offsets_at, _INTS)
    channels = storage_pointer(channels_at, _INTS)
    image = compute_pointer(scratch, _FLOATS)
    lines = shifted(image, live * rows * columns * LANES)
    sums = shifted(lines, LANES * LANES)
    for task in range(first, last):
        b = task // bands * LANES
        y0 = task % bands * band_rows
        y1 = min(Ho, y0 + band_rows)
        valid = min(B - b, LANES)
        for c in range(live):
            plane = shifted(x, (b * C + np.int64(channels[c])) * H * W)
            out = shifted(image, c * rows * columns * LANES)
            pack_plane(plane, C * H * W, valid, H, W, y0 * stride - top, left, rows, columns, out, lines)
        for band in range(y0, y1, at_once):
            here = min(at_once, y1 - band)
            for r in range(here):
                for tile in range(0, Wo, pixels):
                    x0 = min(tile, Wo - pixels)
                    corner = shifted(image, ((band - y0 + r) * stride * columns + x0 * step) * LANES)
                    target = shifted(sums, (r * Wo + x0) * LANES)
                    for k in range(blocks):
                        for n in range(N):
                            j = np.int64(starts[k * (N + 1) + n])
                            count = np.int64(starts[k * (N + 1) + n + 1]) - j
                            if count > 0 or k == 0:
                                multiply_row(
                                    pixels,
                                    step,
                                    shifted(offsets, j),
                                    shifted(values, j),
                                    corner,
                                    shifted(target, n * at_once * Wo * LANES),
                                    count,
                                    bias[n] if bias_at != 0 else np.float32(0),
                                    np.int64(k == 0),
                                )
            for n in range(N):
                out = shifted(y, ((b * N + n) * Ho + band) * Wo)
                unpack_pixels(shifted(sums, n * at_once * Wo * LANES), here * Wo, valid, out, N * Ho * Wo)


@jit()
def _pack_segments(source, stride_batch, valid, height, width, segment, out, plane, lines):
    """dy's rows as whole segments of pixels, [segment][pixel][lane]; a last one that begins early is 0 where it overlaps."""
    pack_plane(source, stride_batch, valid, height, width, 0, 0, height, width, plane, lines)
    place = np.int64(0)
    for y in range(height):
        for x in range(0, width, segment):
            first = min(x, width - segment)
            for i in range(segment):
                if first + i < x:
                    zero_line(out, place)
                else:
                    copy_line(plane, (y * width + first + i) * LANES, out, place)
                place += LANES


@jit()
def _correlate_rows(
    share, parts, pixels, step, b, image_at, dy_at, index, all_sums, sizes, packed, bytes_each, scratch
):
    """Add the products of 16 images to the sums of a share of the rows: a line of 16 lanes a slot."""
    if share[ME] < 0:
        on_threads(share)
        return
    n0, n1 = parts[share[ME]], parts[share[ME] + 1]
    B, C, H, W, N, Ho, Wo = sizes
    stride, _, _, rows, columns = packed
    starts_at, offsets_at, _, blocks, live = index
    starts, offsets = storage_pointer(starts_at, _INTS), storage_pointer(offsets_at, _INTS)
    dy, sums = storage_pointer(dy_at, _FLOATS), storage_pointer(np.int64(all_sums.ctypes.data), _FLOATS)
    image, lines = compute_pointer(image_at, _FLOATS), compute_pointer(scratch + share[ME] * bytes_each, _FLOATS)
    plane = shifted(lines, LANES * LANES)
    segments = shifted(plane, Ho * Wo * LANES)
    half = pixels
    a_row = (Wo + half - 1) // half
    count = Ho * a_row
    each = (count + 1) // 2 * 2 * half * LANES
    for n in range(n0, n1):
        alive = False
        for k in range(blocks):
            alive |= starts[k * (N + 1) + n + 1] > starts[k * (N + 1) + n]
        if alive:
            own = shifted(segments, (n - n0) * each)
            source = shifted(dy, (b * N + n) * Ho * Wo)
            _pack_segments(source, N * Ho * Wo, min(B - b, LANES), Ho, Wo, half, own, plane, lines)
            for i in range(count * half, each // LANES):
                zero_line(own, i * LANES)
    for s in range(0, count, 2):
        one = (s // a_row * stride * columns + min(s % a_row * half, Wo - half) * step) * LANES
        t = min(s + 1, count - 1)
        two = (t // a_row * stride * columns + min(t % a_row * half, Wo - half) * step) * LANES
        for k in range(blocks):
            for n in range(n0, n1):
                j = np.int64(starts[k * (N + 1) + n])
                slots = np.int64(starts[k * (N + 1) + n + 1]) - j
                if slots > 0:
                    correlate_row(
                        pixels,
                        step,
                        shifted(offsets, j),
                        shifted(sums, j * LANES),
                        shifted(image, one),
                        two - one,
                        shifted(segments, (n - n0) * each + s * half * LANES),
                        slots,
                    )


@jit()
def _pack_channels(share, b, x_at, index, sums, sizes, packed, image_at, bytes_each, scratch):
    """A share of the live channels of images b .. b + 15, packed whole; and before the first, a share of the sums is cleared."""
    if share[ME] < 0:
        on_threads(share)
        return
    if b == 0:
        first, last = part_of(share, sums.size // LANES)
        sums[first * LANES : last * LANES] = 0
    first, last = part_of(share, index[4])
    image, lines = compute_pointer(image_at, _FLOATS), compute_pointer(scratch + share[ME] * bytes_each, _FLOATS)
    B, C, H, W, _, _, _ = sizes
    _, top, left, rows, columns = packed
    x, channels = storage_pointer(x_at, _FLOATS), storage_pointer(index[2], _INTS)
    for c in range(first, last):
        plane = shifted(x, (b * C + np.int64(channels[c])) * H * W)
        out = shifted(image, c * rows * columns * LANES)
        pack_plane(plane, C * H * W, min(B - b, LANES), H, W, -top, left, rows, columns, out, lines)


@jit()
def _leave(share, sums, positions, out):
    """out[position of the slot] = sum of its 16 lanes, for a share of the slots."""
    if share[ME] < 0:
        on_threads(share)
        return
    first, last = part_of(share, positions.size)
    for j in range(first, last):
        line = sums[j * LANES : (j + 1) * LANES]
        total = np.float32(0)
        for i in range(LANES // 2):
            total += line[i] + line[i + LANES // 2]
        out[positions[j]] = total


@jit()
def _correlate(
    share, parts, bytes_each, pixels, step, x_at, dy_at, index, sums, positions, out, sizes, packed, image_at, scratch
):
    if sizes[0] == 0:
        sums[:] = 0
    for b in range(0, sizes[0], LANES):
        _pack_channels(share, b, x_at, index, sums, sizes, packed, image_at, bytes_each, scratch)
        _correlate_rows(share, parts, pixels, step, b, image_at, dy_at, index, sums, sizes, packed, bytes_each, scratch)
    _leave(share, sums, positions, out)


class Shape(NamedTuple):
    """Of one spatial convolution: strides, zeros before the first row and column, dilation, and the output's height and width."""

    stride: tuple[int, int]
    before: tuple[int, int]
    dilation: tuple[int, int]
    kernel: tuple[int, int]
    out: tuple[int, int]


def _tile(width: int) -> int:
    return next(v for v in PIXELS if v <= width)


def _offsets_of(taps: Tensor, geometry: Shape, rows: int, columns: int) -> Tensor:
    """Where every survivor's input begins in packed images of rows x columns."""
    kept = _offsets.setdefault(taps, {})
    key = (rows, columns, geometry.dilation)
    if key not in kept:
        height, width = geometry.kernel
        at = taps.long()
        c, y, x = at // (height * width), at // width % height, at % width
        lines = (c * rows + y * geometry.dilation[0]) * columns + x * geometry.dilation[1]
        kept[key] = (lines * LANES).to(torch.int32)
    return kept[key]


def convolve(x: Tensor, values: Tensor, bias: Tensor | None, rows: int, index: list[Tensor], geometry: Shape) -> Tensor:
    """y (B, rows, Ho, Wo) of x (B, C, H, W), contiguous, float32; values: of the index's slots."""
    B, C, H, W = x.shape
    (Ho, Wo), (sy, sx) = geometry.out, geometry.stride
    y = empty(B, rows, Ho, Wo)
    starts, taps, _, channels = index
    batch_blocks = -(-B // LANES)
    workers = threads()
    bands = 1 if batch_blocks % workers == 0 or batch_blocks >= 3 * workers else min(Ho, 2 * workers)
    band_rows = -(-Ho // bands)
    bands = -(-Ho // band_rows)
    reach = [(k - 1) * d + 1 for k, d in zip(geometry.kernel, geometry.dilation, strict=True)]
    image_rows, columns = (band_rows - 1) * sy + reach[0], (Wo - 1) * sx + reach[1]
    live = channels.numel()
    at_once = max(1, min(band_rows, SUMS // (rows * Wo * LANES * 4)))
    offsets = _offsets_of(taps, geometry, image_rows, columns)
    each = live * image_rows * columns + LANES + rows * at_once * Wo
    bytes_each = each * LANES * 4
    tasks = batch_blocks * bands
    workers = min(workers, tasks)
    scratch = lines(workers * each, LANES)
    arguments = (
        *(x.data_ptr(), y.data_ptr(), 0 if bias is None else bias.data_ptr()),
        (starts.data_ptr(), offsets.data_ptr(), channels.data_ptr(), starts.shape[0], live),
        values.data_ptr(),
        (B, C, H, W, rows, Ho, Wo),
        (sy, *geometry.before, image_rows, columns),
        (bands, band_rows, at_once, tasks, bytes_each),
        scratch.data_ptr(),
    )
    _convolve(among(workers), _tile(Wo), sx, *arguments)
    return y


def correlate(x: Tensor, dy: Tensor, out: Tensor, index: list[Tensor], geometry: Shape) -> None:
    """out[position] = the gradient of every survivor's weight, of x (B, C, H, W) and dy (B, N, Ho, Wo); out: flat."""
    B, C, H, W = x.shape
    N, Ho, Wo = dy.shape[1:]
    sy, sx = geometry.stride
    starts, taps, positions, channels = index
    reach = [(k - 1) * d + 1 for k, d in zip(geometry.kernel, geometry.dilation, strict=True)]
    rows, columns = (Ho - 1) * sy + reach[0], (Wo - 1) * sx + reach[1]
    live = channels.numel()
    offsets = _offsets_of(taps, geometry, rows, columns)
    workers = min(threads(), N)
    parts = _parts(starts, workers)
    half = _tile(Wo)
    count = Ho * -(-Wo // half)
    most = int(np.diff(parts).max())
    each = LANES + Ho * Wo + most * ((count + 1) // 2) * 2 * half
    bytes_each = each * LANES * 4
    image = lines(live * rows * columns, LANES)
    scratch = lines(workers * each, LANES)
    sums = lines(taps.numel(), LANES)
    _correlate(
        among(workers),
        parts,
        bytes_each,
        half,
        sx,
        x.data_ptr(),
        dy.data_ptr(),
        (starts.data_ptr(), offsets.data_ptr(), channels.data_ptr(), starts.shape[0], live),
        sums.numpy(),
        positions.numpy(),
        out.numpy(),
        (B, C, H, W, N, Ho, Wo),
        (sy, *geometry.before, rows, columns),
        image.data_ptr(),
        scratch.data_ptr(),
    )


def masked_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    survivors: Tensor,
    pattern: list[Tensor],
    shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    premasked: bool,
) -> Tensor:
    """See kernels/reference/conv/conv2d.py."""
    spatial = _shape(x.shape[2:], shape, stride, padding, dilation)
    check_alike(x, weight)
    bias = None if bias is None else bias.contiguous().resolve_neg()
    return convolve(x.contiguous(), _values(weight, pattern[2]), bias, shape[0], pattern[:4], spatial)


def masked_conv2d_grad_input(
    dy: Tensor,
    weight: Tensor,
    survivors: Tensor,
    pattern: list[Tensor],
    shape: Sequence[int],
    size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    premasked: bool,
) -> Tensor:
    """See kernels/reference/conv/conv2d.py; stride 1."""
    check_alike(dy, weight)
    before = [(k - 1) * d - p for k, d, p in zip(shape[2:], dilation, padding, strict=True)]
    spatial = Shape((1, 1), _pair(before), _pair(dilation), _pair(shape[2:]), _pair(size))
    return convolve(dy.contiguous(), _values(weight, pattern[6]), None, shape[1] * groups, pattern[4:], spatial)


def masked_conv2d_grad_weight(
    dy: Tensor,
    x: Tensor,
    survivors: Tensor,
    pattern: list[Tensor],
    shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """See kernels/reference/conv/conv2d.py."""
    check_alike(dy, x)
    if survivors.dtype == torch.bool:
        out = torch.zeros(list(shape), dtype=x.dtype)
    else:
        out = torch.empty((survivors.numel(), 1), dtype=x.dtype)
    spatial = _shape(x.shape[2:], shape, stride, padding, dilation)
    correlate(x.contiguous(), dy.contiguous(), out.view(-1), pattern[:4], spatial)
    return out


def _values(weight: Tensor, positions: Tensor) -> Tensor:
    return weight.contiguous().view(-1).index_select(0, positions)


def _pair(values: Sequence[int]) -> tuple[int, int]:
    return values[0], values[1]


def _shape(
    size: Sequence[int], shape: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> Shape:
    terms = zip(size, padding, dilation, shape[2:], stride, strict=True)
    out = [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, p, d, k, s in terms]
    return Shape(_pair(stride), _pair(padding), _pair(dilation), _pair(shape[2:]), _pair(out))


def _parts(starts: Tensor, workers: int) -> np.ndarray:
    """First rows of the workers' shares: about the same number of survivors each."""
    before = starts.numpy().sum(0) - starts.numpy()[:, 0].sum()
    inner = np.searchsorted(before, before[-1] * np.arange(1, workers) / workers)
    return np.concatenate(([0], inner, [len(before) - 1]))
