"""The dense float32 products of weights that obey a mask, our own: which loops run, on which threads, and when they beat MKL's.

A weight is W (N, K), or the survivors (nnz, 1) of a packed mask: the products are the same, bit by bit. MKL's products with 2 to 16
rows reach a fifth of what reading the weight allows, and do not use AVX-512 on AMD's processors.
"""

from __future__ import annotations

from pathlib import Path

import llvmlite.binding
import numpy as np
import torch
from numba import carray, prange, types
from torch import Tensor

from . import few_dense, gemm
from .few_dense import TOGETHER
from .gemm_ir import GROUP, PANEL
from .jit import is_forked, jit, threads
from .lanes import with_address
from .memory import gradient_memory, working_memory
from .spmm_ir import LANES
from .team import in_team, members, number
from .vector import pointer

LEAST, LEAST_OF_ONE = 1 << 14, 1 << 17  # weights of a masked layer, with several rows and with one
LEAST_PRODUCT = 1 << 19  # multiplications, with many rows
SERIAL = 1 << 17  # weights below which a second thread costs more than it saves
SERIAL_MANY = 1 << 19  # multiplications, with many rows
_FORWARD, _GRAD_INPUT, _GRAD_WEIGHT = range(3)
FEW = {_FORWARD: 16, _GRAD_INPUT: 8, _GRAD_WEIGHT: 16}  # batch rows
_MANY = 3  # more than those: the loops for many rows
_JOB = 16
_WHAT, _BATCH, _ROWS, _COLUMNS, _A, _X, _MORE, _OUT = range(8)  # places in a job
_BITS, _BYTES, _VALUES, _SCRATCH, _EACH, _WORKERS, _ME, _TEAM = range(8, 16)


def _is_amd() -> bool:
    info = Path("/proc/cpuinfo")
    return info.is_file() and "AuthenticAMD" in info.read_text()


_WIDE = bool(llvmlite.binding.get_host_cpu_features().get("avx512f"))  # 16 sums and more stay in registers
_FASTER = _WIDE and _is_amd()  # than MKL with many rows


@jit()
def _share_of(job, me):
    workers, what, scratch = job[_WORKERS], job[_WHAT], job[_SCRATCH] + me * job[_EACH]
    sizes, at = (job[_BATCH], job[_ROWS], job[_COLUMNS]), (job[_A], job[_X], job[_MORE], job[_OUT])
    bits = (job[_BITS], job[_BYTES], job[_VALUES])
    kind, many = what % _MANY, what >= _MANY
    length = sizes[2] if kind == _GRAD_INPUT else sizes[1]
    if many:
        unit = GROUP if kind == _GRAD_WEIGHT else PANEL
    else:
        unit = LANES if kind == _GRAD_INPUT else TOGETHER
    parts = (length + unit - 1) // unit
    first, last = parts * me // workers * unit, min(length, parts * (me + 1) // workers * unit)
    if first >= last:
        return
    if what == _FORWARD:
        few_dense.forward(sizes, at, bits, scratch, first, last)
    elif what == _GRAD_INPUT:
        few_dense.grad_input(sizes, at, bits, scratch, first, last)
    elif what == _GRAD_WEIGHT:
        few_dense.grad_weight(sizes, at, bits, scratch, first, last)
    elif kind == _FORWARD:
        gemm.forward(sizes, at, bits, scratch, first, last)
    elif kind == _GRAD_INPUT:
        gemm.grad_input(sizes, at, bits, scratch, first, last)
    else:
        gemm.grad_weight(sizes, at, bits, scratch, first, last)


@with_address(types.void(types.uintp))
def _member(data):
    """What one thread of a team does."""
    job = carray(pointer(data, np.int64), (_JOB,))
    me, team = number(np.uintp(job[_ME])), number(np.uintp(job[_TEAM]))
    for worker in range(me, job[_WORKERS], team):  # fewer threads than asked for may have come
        _share_of(job, worker)


@jit()
def _job(what, sizes, at, bits, memory, workers):
    job = np.empty(_JOB, np.int64)
    job[_WHAT], job[_BATCH], job[_ROWS], job[_COLUMNS] = what, sizes[0], sizes[1], sizes[2]
    job[_A], job[_X], job[_MORE], job[_OUT] = at[0], at[1], at[2], at[3]
    job[_BITS], job[_BYTES], job[_VALUES] = bits[0], bits[1], bits[2]
    job[_SCRATCH], job[_EACH], job[_WORKERS] = memory[0], memory[1], workers
    return job


@jit()
def _run(what, sizes, at, bits, memory, workers, team, member):
    job = _job(what, sizes, at, bits, memory, workers)
    if workers > 1:
        job[_ME], job[_TEAM] = team[1], team[2]
        in_team(np.uintp(team[0]), np.uintp(member), np.uintp(job.ctypes.data), np.uintp(workers))
    else:
        _share_of(job, 0)


@jit(parallel=True)
def _run_parallel(what, sizes, at, bits, memory, workers):
    """The same on Numba's threads."""
    job = _job(what, sizes, at, bits, memory, workers)
    for worker in prange(workers):
        _share_of(job, worker)


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


def _call(
    what: int, sizes: tuple[int, int, int], a: Tensor, x: Tensor, more: Tensor | None, out: Tensor, bits: Tensor | None
) -> Tensor:
    B, N, K = sizes
    if not (a.is_cpu and x.is_cpu and a.dtype is torch.float32 and x.dtype is torch.float32):  # addresses tell nothing
        raise TypeError(f"Expected float32 operands on the CPU. Got {a.dtype} on {a.device}, {x.dtype} on {x.device}.")
    if bits is None and what != _GRAD_WEIGHT and a.numel() != N * K:
        raise ValueError(f"Expected a weight of {N} x {K} values. Got {a.numel()}.")
    if not B * N * K:
        return out.zero_() if what != _FORWARD or more is None else out.copy_(more.expand_as(out))
    many = FEW[what] < B
    serial = N * K * B < SERIAL_MANY if many else N * K < SERIAL
    workers = 1 if serial or is_forked() else torch.get_num_threads()
    found, member = members(_member)
    each = -(-(gemm.memory_bytes(B, N) if many else few_dense.memory_bytes(N)) // 64) * 64 + 64
    memory = working_memory(workers * each)
    at = (a.data_ptr(), x.data_ptr(), 0 if more is None else more.data_ptr(), out.data_ptr())
    values = out if what == _GRAD_WEIGHT else a
    packed = (0, 0, 0) if bits is None else (bits.data_ptr(), bits.numel(), values.numel())
    if many:
        what += _MANY
    if workers > 1 and not found[0]:
        _run_parallel(what, sizes, at, packed, (memory.data_ptr(), each), threads())
    else:
        _run(what, sizes, at, packed, (memory.data_ptr(), each), workers, found, member)
    return out


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
