"""The dense float32 products of weights that obey a mask, our own: which loops run, on which threads, and when they beat MKL's.

A weight is W (N, K), or the survivors (nnz, 1) of a packed mask: the products are the same, bit by bit. MKL's products with 2 to 16
rows reach a fifth of what reading the weight allows, and do not use AVX-512 on AMD's processors.
"""

from __future__ import annotations

from pathlib import Path
from typing import cast

import numpy as np
import torch
from numba import carray, types
from torch import Tensor

from ..core.jit import is_forked, jit, threads, with_address
from ..core.memory import gradient_memory, working_memory
from ..core.scalars import pointer
from ..core.shares import ALONE, ME, Share, among, on_threads
from ..core.target import has_avx512
from ..core.team import in_team, members, number
from ..core.vectors import LANES
from . import few_rows, many_rows
from .few_rows import TOGETHER
from .many_rows_ir import GROUP, PANEL

LEAST, LEAST_OF_ONE = 1 << 14, 70_000  # weights of a masked layer, with several rows and with one
LEAST_PRODUCT = 1 << 19  # multiplications, with many rows
SERIAL = 1 << 16  # weights below which a second thread costs more than it saves
SERIAL_MANY = 1 << 19  # multiplications, with many rows
_FORWARD, _GRAD_INPUT, _GRAD_WEIGHT = range(3)
FEW = {_FORWARD: 16, _GRAD_INPUT: 8, _GRAD_WEIGHT: 16}  # batch rows
_MANY = 3  # more than those: the loops for many rows
_ALL = 2 * _MANY  # the three gradients of few rows in one call
_JOB = 19
_WHAT, _BATCH, _ROWS, _COLUMNS, _A, _X, _MORE, _OUT = range(8)  # places in a job
_BITS, _BYTES, _VALUES, _SCRATCH, _EACH, _WORKERS, _ME, _TEAM = range(8, 16)
_WEIGHT, _DX, _DB = range(16, 19)  # with _ALL, where the others are those of the weight gradient


def _is_amd() -> bool:
    info = Path("/proc/cpuinfo")
    return info.is_file() and "AuthenticAMD" in info.read_text()


_WIDE = has_avx512()  # 16 sums and more stay in registers
_FASTER = _WIDE and _is_amd()  # than MKL with many rows


@jit()
def _part(length, unit, me, workers):
    """First and last of what a worker does of `length`, in units."""
    parts = (length + unit - 1) // unit
    return parts * me // workers * unit, min(length, parts * (me + 1) // workers * unit)


@jit()
def _share_of_all(me, job):
    workers, scratch = job[_WORKERS], job[_SCRATCH] + me * job[_EACH]
    sizes, bits = (job[_BATCH], job[_ROWS], job[_COLUMNS]), (job[_BITS], job[_BYTES], job[_VALUES])
    dy, x = job[_A], job[_X]
    first, last = _part(sizes[1], TOGETHER, me, workers)
    if first < last and job[_OUT]:
        few_rows.grad_weight(sizes, (dy, x, job[_MORE], job[_OUT]), bits, scratch, first, last)
    if first < last and job[_DB]:
        few_rows.grad_bias(sizes, dy, job[_DB], first, last)
    first, last = _part(sizes[2], LANES, me, workers)
    if first < last and job[_DX]:
        few_rows.grad_input(sizes, (job[_WEIGHT], dy, np.int64(0), job[_DX]), bits, scratch, first, last)


@jit()
def _share_of(share, job):
    if share[ME] < 0:
        on_threads(share)
        return
    me = share[ME]
    if job[_WHAT] == _ALL:
        _share_of_all(me, job)
        return
    workers, what, scratch = job[_WORKERS], job[_WHAT], job[_SCRATCH] + me * job[_EACH]
    sizes, at = (job[_BATCH], job[_ROWS], job[_COLUMNS]), (job[_A], job[_X], job[_MORE], job[_OUT])
    bits = (job[_BITS], job[_BYTES], job[_VALUES])
    kind, many = what % _MANY, what >= _MANY
    length = sizes[2] if kind == _GRAD_INPUT else sizes[1]
    if many:
        unit = GROUP if kind == _GRAD_WEIGHT else PANEL
    else:
        unit = LANES if kind == _GRAD_INPUT else TOGETHER
    first, last = _part(length, unit, me, workers)
    if first >= last:
        return
    if what == _FORWARD:
        few_rows.forward(sizes, at, bits, scratch, first, last)
    elif what == _GRAD_INPUT:
        few_rows.grad_input(sizes, at, bits, scratch, first, last)
    elif what == _GRAD_WEIGHT:
        few_rows.grad_weight(sizes, at, bits, scratch, first, last)
    elif kind == _FORWARD:
        many_rows.forward(sizes, at, bits, scratch, first, last)
    elif kind == _GRAD_INPUT:
        many_rows.grad_input(sizes, at, bits, scratch, first, last)
    else:
        many_rows.grad_weight(sizes, at, bits, scratch, first, last)


@with_address(types.void(types.uintp))
def _member(data):
    """What one thread of a team does."""
    job = carray(pointer(data, np.int64), (_JOB,))
    me, team = number(np.uintp(job[_ME])), number(np.uintp(job[_TEAM]))
    for worker in range(me, job[_WORKERS], team):  # fewer threads than asked for may have come
        _share_of((np.int64(worker), job[_WORKERS], np.int64(0)), job)


@jit()
def _job(what, sizes, at, bits, memory, workers, more):
    job = np.empty(_JOB, np.int64)
    job[_WHAT], job[_BATCH], job[_ROWS], job[_COLUMNS] = what, sizes[0], sizes[1], sizes[2]
    job[_A], job[_X], job[_MORE], job[_OUT] = at[0], at[1], at[2], at[3]
    job[_BITS], job[_BYTES], job[_VALUES] = bits[0], bits[1], bits[2]
    job[_SCRATCH], job[_EACH], job[_WORKERS] = memory[0], memory[1], workers
    job[_WEIGHT], job[_DX], job[_DB] = more[0], more[1], more[2]
    return job


@jit()
def _run(share, what, sizes, at, bits, memory, workers, more, team, member):
    """On torch's threads, or where there is no team on those of the share."""
    job = _job(what, sizes, at, bits, memory, workers, more)
    if workers > 1 and team[0]:
        job[_ME], job[_TEAM] = team[1], team[2]
        in_team(np.uintp(team[0]), np.uintp(member), np.uintp(job.ctypes.data), np.uintp(workers))
    else:
        _share_of(share, job)


def pays(rows: int, weights: int, dtype: torch.dtype) -> bool:
    """Whether these products are faster than torch's by more than their calls cost, by measurement; MKL's for one row is good."""
    if dtype != torch.float32 or rows <= 0:
        return False
    if rows > FEW[_FORWARD]:
        return _FASTER and rows * weights >= LEAST_PRODUCT
    return _WIDE and weights >= (LEAST_OF_ONE if rows == 1 else LEAST)


def runs(x: Tensor, weight: Tensor) -> bool:
    """Whether they run for x (B, any) and a weight, or its mask."""
    fits = weight.dtype in (x.dtype, torch.bool) and weight.is_cpu and weight.is_contiguous()
    return fits and pays(x.shape[0], weight.numel(), x.dtype)


def expands(dtype: torch.dtype) -> bool:
    """Whether they run on compressed weights of a dtype, which no other product could read."""
    return _WIDE and dtype == torch.float32


def _check(a: Tensor, x: Tensor) -> None:
    if not (a.is_cpu and x.is_cpu and a.dtype is torch.float32 and x.dtype is torch.float32):  # addresses tell nothing
        raise TypeError(f"Expected float32 operands on the CPU. Got {a.dtype} on {a.device}, {x.dtype} on {x.device}.")


def _call(
    what: int, sizes: tuple[int, int, int], a: Tensor, x: Tensor, more: Tensor | None, out: Tensor, bits: Tensor | None
) -> Tensor:
    B, N, K = sizes
    _check(a, x)
    if bits is None and what != _GRAD_WEIGHT and a.numel() != N * K:
        raise ValueError(f"Expected a weight of {N} x {K} values. Got {a.numel()}.")
    if not B * N * K:
        return out.zero_() if what != _FORWARD or more is None else out.copy_(more.expand_as(out))
    at = (a.data_ptr(), x.data_ptr(), 0 if more is None else more.data_ptr(), out.data_ptr())
    values = out if what == _GRAD_WEIGHT else a
    packed = (0, 0, 0) if bits is None else (bits.data_ptr(), bits.numel(), values.numel())
    if FEW[what] < B:
        workers = 1 if N * K * B < SERIAL_MANY or is_forked() else torch.get_num_threads()
        _launch(what + _MANY, sizes, at, packed, workers, many_rows.memory_bytes(B, N), _NO_MORE)
    else:
        _launch(what, sizes, at, packed, _workers_of_few(N * K), few_rows.memory_bytes(N), _NO_MORE)
    return out


_NO_MORE = (0, 0, 0)


def _workers_of_few(weights: int) -> int:
    return 1 if weights < SERIAL or is_forked() else torch.get_num_threads()


def _launch(
    what: int,
    sizes: tuple[int, int, int],
    at: tuple[int, int, int, int],
    packed: tuple[int, int, int],
    workers: int,
    nbytes: int,
    more: tuple[int, int, int],
) -> None:
    found, member = members(_member)
    each = -(-nbytes // 64) * 64 + 64
    memory = working_memory(workers * each)
    share: Share = ALONE
    if workers > 1 and not found[0]:
        workers = threads()
        share = among(workers)
    _run(share, what, sizes, at, packed, (memory.data_ptr(), each), workers, more, found, member)


def _packed(values: Tensor, bits: Tensor | None, weights: int) -> Tensor | None:
    """The mask to expand by; None where nothing is pruned, and the values are the dense weight."""
    return None if bits is None or values.numel() == weights else bits.contiguous()


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, rows: int, bits: Tensor | None = None) -> Tensor:
    """x (B, K) W^T + bias. weight: W (rows, K), or its survivors (nnz, 1), contiguous, and the packed mask."""
    B, K = x.shape
    bits, bias = _packed(weight, bits, rows * K), None if bias is None else bias.contiguous()
    return _call(_FORWARD, (B, rows, K), weight, x.contiguous(), bias, x.new_empty(B, rows), bits)


def grad_input(dy: Tensor, weight: Tensor, columns: int, bits: Tensor | None = None) -> Tensor:
    """dy (B, N) W. weight: W (N, columns), or likewise."""
    B, N = dy.shape
    out, bits = dy.new_empty(B, columns), _packed(weight, bits, N * columns)
    return _call(_GRAD_INPUT, (B, N, columns), weight, dy.contiguous(), None, out, bits)


def grad_weight(dy: Tensor, x: Tensor, mask: Tensor) -> Tensor:
    """dy^T x (N, K) where the bool mask, contiguous, is True, else 0."""
    (B, N), K = dy.shape, x.shape[1]
    out = gradient_memory(mask, (N, K), x.dtype)
    return _call(_GRAD_WEIGHT, (B, N, K), dy.contiguous(), x.contiguous(), mask, out, None)


def grad_values(dy: Tensor, x: Tensor, bits: Tensor, nnz: int) -> Tensor:
    """The values (nnz, 1) of dy^T x at the set bits of a packed mask."""
    (B, N), K = dy.shape, x.shape[1]
    out = gradient_memory(bits, (nnz, 1), x.dtype)
    return _call(_GRAD_WEIGHT, (B, N, K), dy.contiguous(), x.contiguous(), None, out, _packed(out, bits, N * K))


def gradients(
    dy: Tensor, x: Tensor, weight: Tensor, mask: Tensor | None, bits: Tensor | None, needs: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(dx, dw, db) of a linear layer, those that are needed (of x, weight and bias); with few rows by one call.

    weight: W (N, K) and its bool mask, contiguous; or, with `bits`, values (nnz, 1), contiguous, and so is dw.
    """
    (B, N), K = dy.shape, x.shape[1]
    needs_x, needs_weight, needs_bias = needs
    owner = cast(Tensor, mask if bits is None else bits)
    if not 0 < B <= FEW[_GRAD_INPUT] or not N * K:
        dw = None
        if needs_weight:
            dw = grad_weight(dy, x, owner) if bits is None else grad_values(dy, x, bits, weight.shape[0])
        return grad_input(dy, weight, K, bits) if needs_x else None, dw, dy.sum(0) if needs_bias else None
    dy, x, packed = dy.contiguous(), x.contiguous(), _packed(weight, bits, N * K)
    _check(dy, x)
    _check(weight, x)
    if packed is None and weight.numel() != N * K:
        raise ValueError(f"Expected a weight of {N} x {K} values. Got {weight.numel()}.")
    dx = dy.new_empty(B, K) if needs_x else None
    dw = gradient_memory(owner, weight.shape, x.dtype) if needs_weight else None
    db = dy.new_empty(N) if needs_bias else None
    at = (dy.data_ptr(), x.data_ptr(), 0 if mask is None else mask.data_ptr(), 0 if dw is None else dw.data_ptr())
    of_bits = (0, 0, 0) if packed is None else (packed.data_ptr(), packed.numel(), weight.numel())
    more = (weight.data_ptr(), 0 if dx is None else dx.data_ptr(), 0 if db is None else db.data_ptr())
    _launch(_ALL, (B, N, K), at, of_bits, _workers_of_few(N * K), few_rows.memory_bytes(N), more)
    return dx, dw, db
