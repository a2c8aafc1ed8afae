"""Every kernel, dtype, tile and run-time specialization that gpu_static compiles, each as a call of its launcher on meta tensors."""

from __future__ import annotations

import torch

from initperf import rng
from initperf.kernels.gpu import targets
from initperf.kernels.gpu.candidates import block_matmul
from initperf.kernels.gpu.masks import select
from initperf.kernels.gpu.moments import moments
from initperf.kernels.gpu.sampling import sample, sample_many
from tools.gpu_report.case import BF16, F16, F32, F64, MAIN, SHORT, SIZE, Case, Work, meta, replaced
from tools.gpu_report.init_cases import init_cases
from tools.gpu_report.product_cases import (
    block_case,
    decode_case,
    masked_case,
    sddmm_case,
    sddmm_tiles_case,
    sparse_linear_case,
    spmm_case,
)

# Sampling


KINDS = {
    "bits": lambda dtype: rng.Distribution(rng.BITS, ()),
    "uniform": lambda dtype: rng.uniform(-1.0, 1.0, dtype),
    "normal": lambda dtype: rng.normal(0.0, 1.0),
    "trunc_normal": lambda dtype: rng.trunc_normal(0.0, 1.0, -2.0, 2.0, dtype),
    "trunc_normal wide": lambda dtype: rng.trunc_normal(0.0, 1.0, -3.0, 3.0, dtype),
    "trunc_normal tail": lambda dtype: rng.trunc_normal(0.0, 1.0, 4.0, 5.0, dtype),
    "trunc_normal far": lambda dtype: rng.trunc_normal(0.0, 1.0, 20.0, 21.0, dtype),
    "trunc_normal narrow": lambda dtype: rng.trunc_normal(0.0, 1.0, 1.0, 1.01, dtype),
}


def _warp() -> int:
    """Of the target that is compiled for, in units of 32 threads; the launchers ask the torch that runs."""
    return 2 if targets.arch().startswith("gfx") else 1


def sample_case(kind: str, dtype: torch.dtype, n: int, offset: int = 0, run: int = -1) -> Case:
    def launch() -> object:
        with replaced(sample, _WARP=_warp()):
            return sample.sample_(meta(n, dtype=dtype), *KINDS[kind](dtype), 1, 2, offset, run, 2 * run)

    whole = n % 4096 == 0 and offset == 0 and run < 0
    return Case(
        "sample", f"{kind} {SHORT[dtype]}" + ("" if whole else ", odd size" if run < 0 else ", shard of columns"), launch,
        lambda launches, device: Work("value", n, n * dtype.itemsize),
        first=kind == "normal" and dtype == F32 and whole, load_bits=0,
        store_bits=128 if whole else 8 * dtype.itemsize, contract=True,
    )  # fmt: skip


def sample_many_case() -> Case:
    """One kernel for every list: all kinds, dtypes and masks are branches of it."""
    outs = [meta(4096, dtype=dtype) for dtype in (F32, BF16, F16, F64)]

    def launch() -> object:
        with replaced(sample_many, _WARP=_warp()):
            return sample_many.sample_many_(outs, [tuple(rng.normal(0.0, 1.0))] * 4, [1, 2, 3, 4], 5)

    return Case("sample_many", "any list", launch, first=True, load_bits=0, load_share=0.0, contract=True)


# Statistics and selection


def moments_case(dtype: torch.dtype, across: bool, order: int = 4) -> Case:
    n = SIZE * SIZE

    def run() -> object:
        x = meta(SIZE, SIZE, dtype=dtype)
        shape = (SIZE, SIZE, 1, SIZE, 1) if across else (1, 1, n, n, n)
        return moments.moments([x], [shape], order, 0.0)

    return Case(
        "moments",
        f"{SHORT[dtype]}, {'a channel' if across else 'a tensor'}" + (", variance only" if order == 2 else ""),
        run,
        store_bits=0,
        load_share=0.0,  # beside its wide loads it has a path for what is not aligned
        first=dtype == F32 and not across and order == 4,
        tested=MAIN,
    )


def moments_list_case(tensors: int) -> Case:
    """A list of several dtypes: one launch a class, one that combines."""
    n = SIZE * SIZE
    list_ = [meta(SIZE, SIZE, dtype=dtype) for dtype in (F32, BF16, F64)] * (tensors // 3)
    return Case(
        "moments",
        f"a list of {len(list_)}",
        lambda: moments.moments(list_, [(1, 1, n, n, n)] * len(list_), 2, 0.0),
        store_bits=0,
        load_share=0.0,
        tested=MAIN,
    )


def select_case(what: str, dtype: torch.dtype, masked: bool) -> Case:
    def run() -> object:
        x = [torch.zeros(1 << 20, dtype=dtype)]  # not on meta: the launcher reads its own counts
        alive = [torch.ones(1 << 20, dtype=torch.bool)] if masked else None
        if what == "threshold":
            return select.kth_smallest(x, alive, 0)  # 0: counts of kernels that never ran have no 1000th
        return select.cut(x, alive, torch.zeros(4, dtype=torch.int64))

    return Case(
        "select",
        f"{what} {SHORT[dtype]}" + (", masked" if masked else ""),
        run,
        store_bits=0,
        load_share=0.0,  # its loop is a search, if it has one
        first=what == "cut" and dtype == F32,
        tested=MAIN if masked else (),
    )


def cases() -> list[Case]:
    """All of them; about 600 compilations over the targets."""
    whole, odd = SIZE * SIZE, (1000, 1003, 1001)
    result = [
        sample_case(kind, dtype, whole) for kind in ("uniform", "normal", "trunc_normal") for dtype in (F32, BF16)
    ]
    result += [sample_case(kind, F32, whole) for kind in KINDS if kind.startswith("trunc_normal ")]
    result += [sample_case("normal", dtype, whole) for dtype in (F16, F64)] + [sample_case("bits", torch.int32, whole)]
    result += [sample_case("normal", F32, 1000), sample_case("uniform", BF16, 1000, offset=5)]
    result += [sample_case("normal", F32, 4096, run=64), sample_many_case()]

    result += [masked_case(dtype) for dtype in (BF16, F16, F32)] + [masked_case(F32, tf32=True), masked_case(F64, 256)]
    result += [masked_case(BF16, masked=False), masked_case(BF16, into=True)]
    result += [masked_case(BF16, *sizes) for sizes in (odd, (1000, 1000, 1000))] + [masked_case(F32, 1000, 1000, 1000)]

    result += [decode_case(rows, dtype, 0.1) for dtype in (BF16, F32) for rows in (1, 2, 4, 8, 16, 32, 64)]
    result += [
        decode_case(1, BF16, 0.2),
        decode_case(16, BF16, 0.2),
        decode_case(1, BF16, 0.02),
        decode_case(1, F16, 0.1),
    ]
    result += [decode_case(1, BF16, 0.1, split=4, bias=True), decode_case(1, BF16, 0.02, 1024, 70000)]
    result += [decode_case(4, BF16, 0.1, 500, 777)]
    result += [decode_case(1, BF16, density, 28672, 8192) for density in (0.2, 0.1)]

    result += [spmm_case(256, F32, density) for density in (0.2, 0.1, 0.05)] + [spmm_case(256, F32, 0.1, torch.int32)]
    result += [spmm_case(60, F32, 0.1), spmm_case(1, F32, 0.1), spmm_case(256, F64, 0.1)]
    result += [spmm_case(256, dtype, 0.02) for dtype in (BF16, F16)]
    result += [sddmm_case(256, F32, 0.1), sddmm_case(60, F32, 0.1), sddmm_case(256, F64, 0.1)]
    result += [sddmm_case(256, dtype, 0.02) for dtype in (BF16, F16)]
    result += [sddmm_tiles_case(dtype) for dtype in (BF16, F16, F32)] + [sddmm_tiles_case(BF16, *odd)]
    result += [sparse_linear_case(what, BF16) for what in ("forward", "dx", "dw")]

    products = ("forward", "dx", "dw")
    result += [
        block_case(what, block, dtype) for what in products for block in block_matmul.BLOCKS for dtype in (BF16, F32)
    ]
    result += [block_case(what, 32, BF16, *odd) for what in products]
    result += [
        block_case("forward", 64, F16),
        block_case("forward", 32, F32, tf32=True),
        block_case("forward", 32, BF16, 1000, 1000, 1000),
    ]

    result += [moments_case(dtype, across) for dtype in (F32, F64) for across in (False, True)]
    result += [moments_case(F32, False, order=2), moments_list_case(150)]
    result += [select_case(what, F32, True) for what in ("threshold", "cut")]
    result += [select_case(what, dtype, False) for what in ("threshold", "cut") for dtype in (BF16, F64, torch.int32)]
    return result + init_cases()
