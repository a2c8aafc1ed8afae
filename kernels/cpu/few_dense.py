"""The three products of a dense float32 weight that obeys its mask, with few batch rows.

With 2 to 16 rows MKL spends several times what reading the weight costs. Here weight rows stream through the registers once,
in groups; the weight gradient is masked as it is written. Torch's own threads share the rows (the columns, for the input
gradient). Every sum has one fixed order: the bits do not depend on threads.
"""

from __future__ import annotations

import llvmlite.binding
import numpy as np
import torch
from numba import carray, prange, types
from torch import Tensor

from .dense_ir import add_rows, dot_rows, outer_rows
from .jit import is_forked, jit, threads
from .lanes import with_address
from .memory import gradient_memory
from .spmm_ir import LANES, load, shifted, storage_pointer, store
from .team import in_team, members, number
from .vector import pointer

FEW = 16  # batch rows
LEAST, LEAST_OF_ONE = 1 << 15, 1 << 17  # weights, with several rows and with one
SERIAL = 1 << 17  # weights below which a second thread costs more than it saves
_WIDE = bool(llvmlite.binding.get_host_cpu_features().get("avx512f"))  # 16 sums and more stay in registers
_FORWARD, _GRAD_INPUT, _GRAD_WEIGHT = range(3)
_FLOATS, _BYTES = np.zeros(1, np.float32), np.zeros(1, np.uint8)
_1, _2, _3, _4, _8 = ((0,) * n for n in (1, 2, 3, 4, 8))
_TOGETHER = 4  # weight rows, of the forward pass and of the weight gradient
_ADDED = 8  # weight rows, of the input gradient
_JOB = 16


@jit()
def _dots(rows, batch, w, x, K, out):
    """dot_rows for 1 to 4 batch rows."""
    if batch == 4:
        dot_rows(rows, _4, w, K, x, K, K, out)
    elif batch == 3:
        dot_rows(rows, _3, w, K, x, K, K, out)
    elif batch == 2:
        dot_rows(rows, _2, w, K, x, K, K, out)
    else:
        dot_rows(rows, _1, w, K, x, K, K, out)


@jit()
def _forward(sizes, w, x, bias, has_bias, y, first, last):
    """Outputs first..last."""
    B, N, K = sizes
    found = np.empty(_TOGETHER * 4, np.float32)
    out = storage_pointer(np.int64(found.ctypes.data), _FLOATS)
    n = first
    while n < last:
        rows = _TOGETHER if n + _TOGETHER <= last else 1
        line = shifted(w, n * K)
        for b in range(0, B, 4):
            batch = min(4, B - b)
            if rows == _TOGETHER:
                _dots(_4, batch, line, shifted(x, b * K), K, out)
            else:
                _dots(_1, batch, line, shifted(x, b * K), K, out)
            for r in range(rows):
                add = load(bias, n + r) if has_bias else np.float32(0)
                for i in range(batch):
                    store(y, (b + i) * N + n + r, found[r * batch + i] + add)
        n += rows


@jit()
def _grad_input(sizes, w, dy, dx, first, last):
    """Columns first..last."""
    B, N, K = sizes
    width = last - first
    for b in range(B):
        for k in range(first, last):
            store(dx, b * K + k, np.float32(0))
    n = 0
    while n < N:
        rows = _ADDED if n + _ADDED <= N else 1
        line = shifted(w, n * K + first)
        for b in range(0, B, 2):
            factors, target = shifted(dy, b * N + n), shifted(dx, b * K + first)
            if rows == _ADDED and b + 2 <= B:
                add_rows(_8, _2, line, K, factors, N, width, target, K)
            elif rows == _ADDED:
                add_rows(_8, _1, line, K, factors, N, width, target, K)
            elif b + 2 <= B:
                add_rows(_1, _2, line, K, factors, N, width, target, K)
            else:
                add_rows(_1, _1, line, K, factors, N, width, target, K)
        n += rows


@jit()
def _grad_weight(sizes, dy, x, mask, dw, first, last):
    """Weight rows first..last."""
    B, N, K = sizes
    n = first
    while n < last:
        factors, target, survives = shifted(dy, n), shifted(dw, n * K), shifted(mask, n * K)
        if n + _TOGETHER <= last:
            outer_rows(_4, factors, N, x, K, B, K, survives, target, K)
            n += _TOGETHER
        else:
            outer_rows(_1, factors, N, x, K, B, K, survives, target, K)
            n += 1


@jit()
def _share_of(job, me, workers):
    what, sizes = job[0], (job[1], job[2], job[3])
    a, b = storage_pointer(job[4], _FLOATS), storage_pointer(job[5], _FLOATS)
    out = storage_pointer(job[7], _FLOATS)
    length = sizes[2] if what == _GRAD_INPUT else sizes[1]
    unit = LANES if what == _GRAD_INPUT else _TOGETHER
    parts = (length + unit - 1) // unit
    first, last = parts * me // workers * unit, min(length, parts * (me + 1) // workers * unit)
    if what == _FORWARD:
        _forward(sizes, a, b, storage_pointer(job[6], _FLOATS), job[6] != 0, out, first, last)
    elif what == _GRAD_INPUT:
        _grad_input(sizes, a, b, out, first, last)
    else:
        _grad_weight(sizes, a, b, storage_pointer(job[6], _BYTES), out, first, last)


@with_address(types.void(types.uintp))
def _member(data):
    """What one thread of a team does."""
    job = carray(pointer(data, np.int64), (_JOB,))
    me, team = number(np.uintp(job[8])), number(np.uintp(job[9]))
    for worker in range(me, job[10], team):  # fewer threads than asked for may have come
        _share_of(job, worker, job[10])


@jit()
def _run(what, B, N, K, a, b, c, out, workers, team, member):
    job = np.empty(_JOB, np.int64)
    job[0], job[1], job[2], job[3], job[4], job[5], job[6], job[7] = what, B, N, K, a, b, c, out
    if workers > 1:
        job[8], job[9], job[10] = team[1], team[2], workers
        in_team(np.uintp(team[0]), np.uintp(member), np.uintp(job.ctypes.data), np.uintp(workers))
    else:
        _share_of(job, 0, 1)


@jit(parallel=True)
def _run_parallel(what, B, N, K, a, b, c, out, workers):
    """The same on Numba's threads."""
    job = np.empty(_JOB, np.int64)
    job[0], job[1], job[2], job[3], job[4], job[5], job[6], job[7] = what, B, N, K, a, b, c, out
    for worker in prange(workers):
        _share_of(job, worker, workers)


def pays(rows: int, weights: int, dtype: torch.dtype) -> bool:
    """Whether these kernels are the faster ones, by measurement; MKL's product for one row is good, and calls cost 3 us."""
    return _WIDE and 0 < rows <= FEW and weights >= (LEAST_OF_ONE if rows == 1 else LEAST) and dtype == torch.float32


def runs(x: Tensor, weight: Tensor) -> bool:
    """Whether they run for x (B, any) and a weight, or its mask."""
    return pays(len(x), weight.numel(), x.dtype) and weight.is_cpu and weight.is_contiguous()


def _call(what: int, sizes: tuple[int, int, int], a: Tensor, b: Tensor, c: Tensor | None, out: Tensor) -> Tensor:
    addresses = a.data_ptr(), b.data_ptr(), 0 if c is None else c.data_ptr(), out.data_ptr()
    workers = 1 if sizes[1] * sizes[2] < SERIAL or is_forked() else torch.get_num_threads()
    found, member = members(_member)
    if workers > 1 and not found[0]:
        _run_parallel(what, *sizes, *addresses, threads())
    else:
        _run(what, *sizes, *addresses, workers, found, member)
    return out


def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x (B, K) weight (N, K)^T + bias, for B <= FEW."""
    (B, K), N = x.shape, weight.shape[0]
    bias = None if bias is None else bias.contiguous()
    return _call(_FORWARD, (B, N, K), weight, x.contiguous(), bias, torch.empty((B, N), dtype=x.dtype))


def grad_input(dy: Tensor, weight: Tensor) -> Tensor:
    """dy (B, N) weight (N, K), for B <= FEW."""
    (B, N), K = dy.shape, weight.shape[1]
    return _call(_GRAD_INPUT, (B, N, K), weight, dy.contiguous(), None, torch.empty((B, K), dtype=dy.dtype))


def grad_weight(dy: Tensor, x: Tensor, mask: Tensor) -> Tensor:
    """dy^T x (N, K) where the mask is True, else 0, for B <= FEW."""
    (B, N), K = dy.shape, x.shape[1]
    out = gradient_memory(mask, (N, K), x.dtype)
    return _call(_GRAD_WEIGHT, (B, N, K), dy.contiguous(), x.contiguous(), mask, out)
