"""Sparse kernel or dense product: the one place that decides, from break-even densities measured on the machine at hand.

`initperf doctor --calibrate` measures a table and keeps it for this processor, number of threads and version of the kernels
(initperf/layers/choice/calibrate.py); without one the built-in table counts, the lower figures of two machines. A table says, by product,
bytes of an element, batch rows and weights of a layer, from which density down the sparse kernel is faster.
Overrides: INITPERF_PRODUCTS=sparse or dense in the environment, or `with prefer("dense"):`. What ran is counted in
initperf.core.ops.CALLS, and logged by the logger "initperf" at level DEBUG.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import platform
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache, lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from initperf.core import ops
from initperf.core.checks import check, fail
from initperf.layers.choice.gpu_devices import Device, device_of
from initperf.layers.choice.gpu_model import DTYPES, LAYER_KERNELS, kernel_pays

KINDS = (  # the products of a masked layer, then those of a compressed one
    "masked_linear",
    "masked_grad_input",
    "masked_grad_weight",
    "sparse_linear",
    "sparse_grad_input",
    "sparse_grad_values",
)
ROWS = (1, 4, 16, 64, 256)  # batch rows
WEIGHTS = (1 << 10, 1 << 14, 1 << 18, 1 << 22, 1 << 24)  # of a layer; the last are beyond the caches
MOST = 0.95  # density from which no index is built (initperf/layers/base/pattern.py)
# By ROWS: density below which layers run as one call, where single ones may run dense.
CHAINS = (0.95, 0.5, 0.7, 0.7, 0.9)
# Likewise in training; survivors up to which three layers do; and beyond which product of rows and weights their activations leave the caches.
TRAINING_CHAINS, TRAINING_SURVIVORS = (0.95, 0.95, 0.6, 0.7, 0.75), (1 << 15, 1 << 15, 1 << 17, 1 << 17, 1 << 18)
TRAINING_LARGEST = 1 << 30
# Without AVX-512, cautiously: no such processor was measured.
TRAINING_CHAINS_NARROW = tuple(limit / 2 for limit in TRAINING_CHAINS)
# By ROWS and the last three of WEIGHTS: density below which survivors in the kernels' order win in inference.
KEPT = {
    "masked": ((0, 0.33, 0.95), (0, 0.2, 0.5), (0.1, 0.6, 0.85), (0.5, 0.95, 0.95), (0.5, 0.95, 0.95)),
    "sparse": ((0.2, 0.9, 0.95), (0, 0.35, 0.75), (0.1, 0.9, 0.95), (0.5, 0.95, 0.95), (0.5, 0.95, 0.95)),
}
# Without AVX-512: two thirds, at most, of what one thread of a Zen 4 gave whose kernels were compiled for AVX2 alone.
KEPT_NARROW = {
    "masked": ((0, 0.1, 0.1), (0.1, 0.2, 0.2), (0.1, 0.3, 0.3), (0.2, 0.25, 0.25), (0.2, 0.25, 0.25)),
    "sparse": ((0.5, 0.9, 0.9), (0.5, 0.9, 0.9), (0.5, 0.9, 0.9), (0.5, 0.6, 0.6), (0.35, 0.35, 0.35)),
}
MODES = ("auto", "sparse", "dense")

Table = dict[str, list[list[float]]]  # "kind/bytes of an element" -> [rows][weights] -> break-even density

_log = logging.getLogger("initperf")
_calibrated = True
_tables_read = 0  # times
_mode = os.environ.get("INITPERF_PRODUCTS") or "auto"
check(_mode in MODES, f"INITPERF_PRODUCTS to be one of {', '.join(MODES)}", _mode)


def sparse_pays(kind: str, rows: int, shape: Sequence[int], nnz: int, dtype: torch.dtype, device: str) -> bool:
    """Whether the sparse kernel runs for `kind` (of KINDS), or the dense product.

    rows: of the batch; shape: (N, K) of the weight; nnz: survivors; device: its type. On a GPU predicted, by initperf/layers/choice/gpu_model.py, whose
    masked_grad_weight goes by live tiles instead.
    """
    if device not in ("cpu", "cuda"):  # no kernels
        return False
    if _mode != "auto":
        return _mode == "sparse"
    if device == "cuda":
        return _pays_on_gpu(kind, rows, shape, nnz, dtype)
    weights = shape[0] * shape[1]
    return nnz < weights * break_even(kind, rows, weights, dtype.itemsize, torch.get_num_threads())


@lru_cache(maxsize=4096)
def _none_pays(
    kinds: tuple[str, ...], rows: int, shape: tuple[int, int], nnz: int, dtype: torch.dtype, mode: str, threads: int
) -> bool:
    return not any(sparse_pays(kind, rows, shape, nnz, dtype, "cpu") for kind in kinds)


def setting() -> tuple[object, ...]:
    """What a choice depends on besides its arguments."""
    return _mode, torch.get_num_threads(), _tables_read


def all_dense(storage: str, rows: int, shape: tuple[int, int], nnz: int, dtype: torch.dtype) -> bool:
    """Whether on the CPU all three products of a layer run dense. storage: "masked" or "sparse"; the rest: see sparse_pays."""
    kinds = KINDS[:3] if storage == "masked" else KINDS[3:]
    return _none_pays(kinds, rows, shape, nnz, dtype, _mode, torch.get_num_threads())


def chain_pays(rows: int, weights: int, nnz: int, dtype: torch.dtype) -> bool:
    """Whether compressed layers of so many weights together run as one call (initperf/layers/sequential.py), and not one by one."""
    if _mode != "auto":
        return _mode == "sparse"
    limit = _chain_below(rows, dtype.itemsize)
    if limit is None:
        return sparse_pays("sparse_linear", rows, (weights, 1), nnz, dtype, "cpu")
    return nnz < weights * limit


@lru_cache(maxsize=4096)
def _chain_below(rows: int, itemsize: int) -> float | None:
    """Density, where our own dense products are what a single layer could run."""
    if not _own_dense(itemsize):
        return None
    i, x = _between(ROWS, rows)
    return (1 - x) * CHAINS[i] + x * CHAINS[i + 1]


def chain_trains(layers: int, rows: int, weights: int, nnz: int) -> bool:
    """Whether a training step of so many compressed layers and weights runs as two calls, and not layer by layer."""
    if _mode != "auto":
        return _mode == "sparse"
    if rows * weights > TRAINING_LARGEST:
        return False
    density, survivors = _training_chain(rows)
    return nnz < weights * density and nnz <= survivors * (layers - 1) / 2


@lru_cache(maxsize=4096)
def _training_chain(rows: int) -> tuple[float, float]:
    """Limits of density and survivors. Threads do not count: the bits would depend on their number."""
    i, x = _between(ROWS, rows)
    survivors = TRAINING_SURVIVORS[i] ** (1 - x) * TRAINING_SURVIVORS[i + 1] ** x
    limits = TRAINING_CHAINS if has_avx512() else TRAINING_CHAINS_NARROW
    return (1 - x) * limits[i] + x * limits[i + 1], survivors


def kept_pays(storage: str, rows: int, weights: int, nnz: int, dtype: torch.dtype) -> bool:
    """Whether a layer in inference runs on survivors in the kernels' order (initperf/layers/inference/ordered_copy.py). storage: "masked" or "sparse"."""
    if _mode != "auto":
        return _mode == "sparse"
    return nnz < weights * _kept_below(storage, rows, weights, dtype.itemsize)


@lru_cache(maxsize=4096)
def _kept_below(storage: str, rows: int, weights: int, itemsize: int) -> float:
    table = KEPT if has_avx512() else KEPT_NARROW
    return _interpolated(table[storage], rows, weights, WEIGHTS[2:]) * (0.5 if itemsize == 2 else 1.0)


def _pays_on_gpu(kind: str, rows: int, shape: Sequence[int], nnz: int, dtype: torch.dtype) -> bool:
    """Where nothing is known of the card or the dtype, whatever has a kernel runs on it."""
    if kind not in LAYER_KERNELS:
        return False
    device, name = _gpu(torch.cuda.current_device()), str(dtype).removeprefix("torch.")
    if device is None or name not in DTYPES or not rows or not shape[0] * shape[1]:
        return True
    tf32 = torch.backends.cuda.matmul.allow_tf32
    return kernel_pays(device, kind, rows, shape[0], shape[1], nnz, name, tf32)


@cache
def _gpu(index: int) -> Device | None:
    about = torch.cuda.get_device_properties(index)
    return device_of(about.name, getattr(about, "gcnArchName", None) or f"sm_{about.major}{about.minor}")


@contextmanager
def prefer(mode: str) -> Iterator[None]:
    """Within the block "sparse" or "dense" products run wherever both exist, whatever the table says; "auto": as measured."""
    global _mode
    if mode not in MODES:
        fail(f"mode to be one of {', '.join(MODES)}", repr(mode))
    before, _mode = _mode, mode
    try:
        yield
    finally:
        _mode = before


@contextmanager
def built_in() -> Iterator[None]:
    """Within the block the built-in table counts: results do not depend on whether, or when, this machine was calibrated."""
    global _calibrated
    before, _calibrated = _calibrated, False
    forget()
    try:
        yield
    finally:
        _calibrated = before
        forget()


@lru_cache(maxsize=4096)
def break_even(kind: str, rows: int, weights: int, itemsize: int, threads: int) -> float:
    """Density below which the sparse kernel is the faster, interpolated in the logarithms of rows and weights."""
    result = _interpolated(tables(threads)[f"{kind}/{2 if itemsize == 2 else 4}"], rows, weights, WEIGHTS)
    _log.debug("%s, %d rows, %d weights: sparse below density %.3f", kind, rows, weights, result)
    return result


def _interpolated(found: Sequence[Sequence[float]], rows: int, weights: int, grid: Sequence[int]) -> float:
    """found[rows][weights] between the points of ROWS and `grid`, by logarithms."""
    i, x = _between(ROWS, rows)
    j, y = _between(grid, weights)
    corners = [[found[i + a][j + b] for b in (0, 1)] for a in (0, 1)]
    return sum((x if a else 1 - x) * (y if b else 1 - y) * corners[a][b] for a in (0, 1) for b in (0, 1))


def _between(grid: Sequence[int], value: int) -> tuple[int, float]:
    """The interval of the grid that holds `value`, and where in it, by logarithm; the ends are held."""
    value = min(max(value, grid[0]), grid[-1])
    for i, (low, high) in enumerate(pairwise(grid)):
        if value <= high:
            return i, math.log(value / low) / math.log(high / low)
    raise AssertionError("unreachable")


@cache
def tables(threads: int) -> Table:
    """The measured table of this machine, or the built-in one."""
    found = measured(threads) if _calibrated else None
    return found if found is not None else built_in_table()


def measured(threads: int) -> Table | None:
    """What `initperf doctor --calibrate` kept for this machine and `threads`; None if there is nothing that can be read."""
    path = table_path(threads)
    try:
        table: Any = json.loads(path.read_text())["table"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return table if _is_table(table) else None


def _is_table(table: Any) -> bool:
    return isinstance(table, dict) and all(
        isinstance(rows := table.get(f"{kind}/{size}"), list)
        and len(rows) == len(ROWS)
        and all(len(row) == len(WEIGHTS) and all(0 <= v <= 1 for v in row) for row in rows)
        for kind in KINDS
        for size in (4, 2)
    )


@cache
def table_path(threads: int) -> Path:
    """Where the table of this processor, number of threads, torch and kernels lies."""
    if not ops.usable("numba"):
        return Path("no-numba")
    from initperf.kernels.cpu.core.jit import CACHE_DIR
    from initperf.kernels.cpu.core.target import target

    what = f"{_processor()} {target()} {threads} {torch.__version__} {CACHE_DIR.name}"
    return CACHE_DIR.parent / f"break-even-{hashlib.sha256(what.encode()).hexdigest()[:16]}.json"


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.lower().startswith("model name"):
                return line
    return platform.processor() or platform.machine()


def forget() -> None:
    """Read the tables anew."""
    global _tables_read
    _tables_read += 1
    tables.cache_clear()
    _none_pays.cache_clear()
    break_even.cache_clear()


_LIMITS = {  # by ROWS, from 2**18 weights on: where our own dense products run, where torch's do, and without AVX-512
    "masked": ((0.0, 0.0, 0.06, 0.3, 0.42), (0.015, 0.01, 0.1, 1 / 3, 1 / 3), (0.0, 0.01, 0.1, 0.15, 0.15)),
    "sparse": ((0.12, 0.04, 0.2, 0.45, 0.5), (MOST, MOST, MOST, 0.7, 0.4), (0.6, 0.25, 0.6, 0.4, 0.25)),
}  # without: as KEPT_NARROW
# Where our own run: forward passes with 16 rows and 2**22 weights or more.
_FORWARD_OF_16 = {"masked": 0.15, "sparse": 0.45}


@cache
def has_avx512() -> bool:
    """Whether kernels are compiled for AVX-512, with which all figures of this package were measured."""
    if not ops.usable("numba"):
        return False
    from initperf.kernels.cpu.core.target import has_avx512 as compiled

    return compiled()


def _own_dense(itemsize: int) -> bool:
    """Whether our own dense products run on compressed weights (kernels/cpu/dense/products.py), for elements of 4 bytes."""
    return itemsize == 4 and has_avx512()


def _built_in(kind: str, size: int) -> list[list[float]]:
    """By ROWS and WEIGHTS, mostly one figure for a layer's three products, since a step with both kinds takes longest to call.

    Torch's dense products need a compressed weight to be filled first, which few rows do not repay. 16-bit ones may be
    several times faster (AMX), so those figures are half.
    """
    storage = kind.split("_")[0]
    if _own_dense(size):
        table = [[0.0, 0.0, *[limit] * 3] for limit in _LIMITS[storage][0]]
        if kind.endswith("_linear"):
            table[ROWS.index(16)][-2:] = [_FORWARD_OF_16[storage]] * 2
        return table
    limits = [limit * (0.5 if size == 2 else 1.0) for limit in _LIMITS[storage][1 if has_avx512() else 2]]
    return [[limit if storage == "sparse" else 0.0] * 2 + [limit] * 3 for limit in limits]


@cache
def built_in_table() -> Table:
    """What counts on machines that were not measured. When first asked for, since it depends on what kernels are compiled for."""
    return {f"{kind}/{size}": _built_in(kind, size) for kind in KINDS for size in (4, 2)}
