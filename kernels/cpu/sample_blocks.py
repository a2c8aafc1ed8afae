"""What is done to a block of sampled values while it is in the caches: constants, zeros where pruned, survivors, moments.

A block is elements `first` to `last` - 1 at an address; a mask is the address of one byte an element, or 0.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import carray, float64, int64, uint16, uint32, uint64, uintp

from .jit import jit
from .lanes import (
    BFLOAT16,
    FLOAT16,
    FLOAT32,
    FLOAT64,
    LANES,
    S1,
    S2,
    SCALE,
    SHIFT,
    SHIFTED,
    call_lane_sums,
)
from .sample import _FLOAT16, _FLOAT32, _FLOAT64
from .vector import bits_float, full_vectors, half_float, pointer, population, trailing_zeros

RUNNING = 64  # sums that run at once where a mask is read: enough to hide what an addition takes
_KINDS = (0, FLOAT32, BFLOAT16, FLOAT16, FLOAT64)  # of kernels/cpu/lanes.py, by code
N, MEAN, SQUARES = range(3)  # of a block's record: values, their mean, the sum of (value - mean)^2


@jit()
def fill(address: Any, size: Any, first: Any, last: Any, bits: Any) -> None:
    full_vectors()
    if size == 2:
        half = carray(pointer(address, np.uint16), last)[first:]
        half[:] = uint16(bits)
    elif size == 4:
        single = carray(pointer(address, np.uint32), last)[first:]
        single[:] = uint32(bits)
    else:
        double = carray(pointer(address, np.uint64), last)[first:]
        double[:] = uint64(bits)


@jit()
def _zeroed(values: Any, mask: Any) -> None:
    """0 where the mask is; both of one length."""
    full_vectors()
    zero = values.dtype.type(0)
    for i in range(values.size):
        values[i] = values[i] if mask[i] != 0 else zero


@jit()
def prune(address: Any, size: Any, first: Any, last: Any, mask: Any) -> None:
    alive = carray(pointer(mask, np.uint8), last)[first:]
    if size == 2:
        _zeroed(carray(pointer(address, np.uint16), last)[first:], alive)
    elif size == 4:
        _zeroed(carray(pointer(address, np.uint32), last)[first:], alive)
    else:
        _zeroed(carray(pointer(address, np.uint64), last)[first:], alive)


@jit()
def _survivors(values: Any, words: Any, out: Any) -> None:
    """out[j] = values[place of the j-th set bit]."""
    count = uintp(0)
    for k in range(words.size):
        word, start = words[k], uintp(64 * k)
        while word:
            out[count] = values[start + trailing_zeros(word)]
            word &= word - uint64(1)
            count += uintp(1)


@jit()
def pick(scratch: Any, address: Any, size: Any, first: Any, last: Any, words: Any) -> None:
    if size == 2:
        _survivors(scratch.view(np.uint16), words, carray(pointer(address, np.uint16), last)[first:])
    elif size == 4:
        _survivors(scratch.view(np.uint32), words, carray(pointer(address, np.uint32), last)[first:])
    else:
        _survivors(scratch, words, carray(pointer(address, np.uint64), last)[first:])


@jit(inline="always")
def words_of(bits: Any, first: Any, last: Any) -> Any:
    """The words that hold bits first to last - 1; `first` is the first of a word."""
    return carray(pointer(bits, np.uint64), (last + 63) // 64)[first // 64 :]


@jit(inline="always")
def bits_set(words: Any) -> int:
    count = uint64(0)
    for word in words:
        count += population(word)
    return int64(count)


@jit(inline="always")
def _value(address: Any, code: Any, i: Any) -> float:
    if code == _FLOAT32:
        return float64(carray(pointer(address, np.float32), i + 1)[i])
    if code == _FLOAT64:
        return carray(pointer(address, np.float64), i + 1)[i]
    word = carray(pointer(address, np.uint16), i + 1)[i]
    return float64(half_float(word) if code == _FLOAT16 else bits_float(uint32(word) << uint32(16)))


@jit()
def _widened(address: Any, code: Any, first: Any, out: Any) -> None:
    """The out.size values from the first on as float64."""
    full_vectors()
    last = first + out.size
    if code == _FLOAT32:
        out[:] = carray(pointer(address, np.float32), last)[first:]
    elif code == _FLOAT64:
        out[:] = carray(pointer(address, np.float64), last)[first:]
    else:
        word = carray(pointer(address, np.uint16), last)[first:]
        for i in range(out.size):
            out[i] = float64(half_float(word[i]) if code == _FLOAT16 else bits_float(uint32(word[i]) << uint32(16)))


@jit()
def _surviving_sums(values: Any, alive: Any, origin: Any, sums: Any) -> int:
    """value - origin and its square, summed in sums[0] and sums[1] where it survives; returns how many do."""
    full_vectors()
    count, n = 0, values.size
    whole = n // RUNNING * RUNNING
    for i in range(n):
        count += alive[i] != 0
    for start in range(0, whole, RUNNING):
        for j in range(RUNNING):
            d = values[start + j] - origin
            d = d if alive[start + j] != 0 else 0.0
            sums[0, j] += d
            sums[1, j] += d * d
    for i in range(whole, n):
        d = values[i] - origin if alive[i] != 0 else 0.0
        sums[0, i - whole] += d
        sums[1, i - whole] += d * d
    return count


@jit(inline="always")
def _folded(sums: Any, row: Any, lanes: Any) -> float:
    """The sum of a row's lanes, in a fixed tree."""
    half = lanes // 2
    while half:
        for j in range(half):
            sums[row, j] += sums[row, j + half]
        half //= 2
    return sums[row, 0]


@jit()
def measure(
    read: Any, address: Any, code: Any, size: Any, first: Any, last: Any, mask: Any, work: Any, record: Any
) -> None:
    """The record of the finite values first to last - 1 that survive; mask: an address, or 0."""
    sums, running, wide = work
    sums[:] = 0.0
    running[:] = 0.0
    n, origin, count = last - first, 0.0, 0
    alive = carray(pointer(mask, np.uint8), last)[first:]
    i = first
    while i < last and not (mask == 0 or alive[i - first] != 0):
        i += 1
    if i < last and math.isfinite(_value(address, code, i)):
        origin = _value(address, code, i)
    if mask:
        _widened(address, code, first, wide[:n])
        count = _surviving_sums(wide[:n], alive, origin, running)
        first_sum, second_sum = _folded(running, 0, RUNNING), _folded(running, 1, RUNNING)
    else:
        count = n
        for j in range(LANES):
            sums[SHIFT, j], sums[SCALE, j] = origin, 1.0
        whole = n // LANES
        start, out = uintp(address + first * size), uintp(sums.ctypes.data)
        args = uintp(_KINDS[code]), uintp(2), uintp(SHIFTED), start, uintp(whole), uintp(LANES * size), uintp(LANES), uintp(0), out  # fmt: skip
        call_lane_sums(uintp(read), args)
        for j in range(n - whole * LANES):
            d = _value(address, code, first + whole * LANES + j) - origin
            sums[S1, j] += d
            sums[S2, j] += d * d
        first_sum, second_sum = _folded(sums, S1, LANES), _folded(sums, S2, LANES)
    if not math.isfinite(second_sum):  # float16 overflows: what is not finite counts for nothing
        first_sum, second_sum, count = 0.0, 0.0, 0
        for i in range(first, last):
            value = _value(address, code, i)
            if (mask == 0 or alive[i - first] != 0) and math.isfinite(value):
                d = value - origin
                first_sum += d
                second_sum += d * d
                count += 1
    share = first_sum / count if count else 0.0
    record[N], record[MEAN] = count, origin + share
    record[SQUARES] = max(second_sum - first_sum * share, 0.0)
