"""Words of a tile, its values in float32, then the part that is wanted in the tensor's dtype."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
from numba import carray, float64, uint16, uint32, uint64, uintp
from numba.np.unsafe import ndarray

from ...contract import BLOCKS, NORMAL, TILE, TRUNC_CENTER, TRUNC_FAR, TRUNC_NARROW, TRUNC_NORMAL, TRUNC_TAIL, UNIFORM
from ..core.jit import jit
from ..core.scalars import float_bits, full_vectors, half_bits, pointer
from ..core.shares import ME, on_threads, part_of
from .formulas import (
    _BFLOAT16,
    _FLOAT16,
    _FLOAT32,
    _FLOAT64,
    _normal,
    _trunc_center,
    _trunc_far,
    _trunc_narrow,
    _trunc_normal,
    _trunc_tail,
    _uniform,
)
from .philox import tile_words

_PARAMS = 16

_to_fixed_tuple: Any = ndarray.to_fixed_tuple


@jit()
def _store(
    address: Any, code: Any, at: Any, words: Any, values: Any, first: Any, last: Any, least: Any, greatest: Any
) -> None:
    """Entries first to last - 1 of a tile to the elements from `at` on, rounded to the tensor's dtype."""
    full_vectors()
    count, r = uintp(last - first), uintp(first)
    end = at + last - first
    if code == _FLOAT32:
        single = carray(pointer(address, np.float32), end)[at:]
        for i in range(count):
            single[i] = values[r + i]
    elif code == _BFLOAT16:
        brain = carray(pointer(address, np.uint16), end)[at:]
        for i in range(count):
            bits = float_bits(values[r + i])
            brain[i] = uint16(uint32(bits + uint32(0x7FFF) + uint32((bits >> uint32(16)) & uint32(1))) >> uint32(16))
    elif code == _FLOAT16:
        half = carray(pointer(address, np.uint16), end)[at:]
        for i in range(count):
            half[i] = half_bits(values[r + i])
    elif code == _FLOAT64:
        double = carray(pointer(address, np.float64), end)[at:]
        for i in range(count):
            value = float64(values[r + i])
            value = least if value < least else value
            double[i] = greatest if value > greatest else value
    else:
        integer = carray(pointer(address, np.uint32), end)[at:]
        for i in range(count):
            integer[i] = words[r + i]


@jit()
def _piece(
    address: Any,
    code: Any,
    at: Any,
    kind: Any,
    p: Any,
    bounds: Any,
    words: Any,
    values: Any,
    tile: Any,
    first: Any,
    last: Any,
    key: Any,
) -> None:
    """Entries first to last - 1 of a tile to the elements from `at` on."""
    if last - first == TILE and code == _FLOAT32:
        values = carray(pointer(address, np.float32), at + TILE)[at:]
    low, high = 0, BLOCKS
    if first // BLOCKS == (last - 1) // BLOCKS:  # within a lane: only its blocks, in whole vectors
        low, high = first % BLOCKS // 16 * 16, (last - 1) % BLOCKS // 16 * 16 + 16
    tile_words(words, tile, low, high, key[0], key[1], key[2], key[3])
    begin, end = first // 16 * 16, (last + 15) // 16 * 16
    if kind == NORMAL:
        for half in range(first // 512 * 512, last, 512):
            _normal(words[half:], values[half:], low, high, p)
    elif kind == UNIFORM:
        _uniform(words, values, begin, end, p)
    elif kind == TRUNC_CENTER:
        _trunc_center(words, values, begin, end, p)
    elif kind == TRUNC_NORMAL:
        _trunc_normal(words, values, begin, end, p)
    elif kind == TRUNC_TAIL:
        _trunc_tail(words, values, begin, end, p)
    elif kind == TRUNC_FAR:
        _trunc_far(words, values, begin, end, p)
    elif kind == TRUNC_NARROW:
        _trunc_narrow(words, values, begin, end, p)
    if last - first < TILE or code != _FLOAT32:
        _store(address, code, at, words, values, first, last, bounds[0], bounds[1])


@jit()
def _pieces(
    begin: Any,
    end: Any,
    address: Any,
    code: Any,
    n: Any,
    kind: Any,
    params: Any,
    key: Any,
    offset: Any,
    run: Any,
    stride: Any,
) -> None:
    """Pieces begin to end - 1: piece k is slot k % slots of run k // slots, one tile's part of that run."""
    scratch = np.empty(2 * TILE + 16, np.uint32)
    scratch = scratch[(64 - scratch.ctypes.data % 64) % 64 // 4 :]
    words, values = scratch[:TILE], scratch[TILE : 2 * TILE].view(np.float32)
    constants = carray(pointer(params, np.float64), _PARAMS)
    bounds = constants[2], constants[3]
    single = constants.astype(np.float32)
    if code == _FLOAT64:
        single[2], single[3] = -np.inf, np.inf
    p = _to_fixed_tuple(single, _PARAMS)
    slots = _slots(run)
    for k in range(begin, end):
        row = k // slots
        start = offset + row * stride
        tile = start // TILE + k % slots
        first = max(start - tile * TILE, 0)
        last = min(start + min(run, n - row * run) - tile * TILE, TILE)
        if first < last:
            at = row * run + tile * TILE + first - start
            _piece(address, code, at, kind, p, bounds, words, values, uint64(tile), first, last, key)


@jit(inline="always")
def _slots(run: Any) -> Any:
    """Tiles that a run can touch, at most."""
    return (run + TILE - 2) // TILE + 1


@jit()
def _fill(
    share: Any,
    address: Any,
    code: Any,
    n: Any,
    kind: Any,
    params: Any,
    k0: Any,
    k1: Any,
    s0: Any,
    s1: Any,
    offset: Any,
    run: Any,
    stride: Any,
) -> None:
    if share[ME] < 0:
        on_threads(share)
        return
    first, last = part_of(share, (n + run - 1) // run * _slots(run))
    key = uint64(k0), uint64(k1), uint64(s0), uint64(s1)
    _pieces(first, last, address, code, n, kind, params, key, offset, run, stride)


@lru_cache(maxsize=4096)
def _constants(params: tuple[float, ...]) -> tuple[np.ndarray, int]:
    array = np.zeros(_PARAMS)
    array[: len(params)] = params
    return array, array.ctypes.data
