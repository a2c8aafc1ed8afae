"""Every kernel, dtype, tile and run-time specialization that gpu_static compiles, each as a call of its launcher on meta tensors."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from initperf.kernels.gpu import (
    block_matmul,
    decode,
    masked_matmul,
    moments,
    sample,
    select,
    sparse_grad,
    sparse_matmul,
    targets,
)

from benchmarks.aot import Launch, changed
from benchmarks.gpu_model import most_loaded, resident
from initperf import rng
from initperf.gpu_devices import Device

SIZE = 4096  # N = K, unless a case says otherwise
F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
SHORT = {F32: "float32", BF16: "bfloat16", F16: "float16", F64: "float64", torch.int32: "int32"}


@dataclass(frozen=True)
class Work:
    """What a case computes: `units` of `unit`, `nbytes` at least through memory; the rest as gpu_model.predict has it."""

    unit: str
    units: float
    nbytes: float
    program_macs: float = 0.0
    step_macs: float = 0.0
    precision: str = "16bit"
    conflicts: dict[int, float] | None = None
    l2_bytes: float = 0.0
    dense_bytes: float = 0.0  # of the dense rival, which on the pre-masked weight is bound by these
    dense_macs: float = 0.0  # or by these


@dataclass(frozen=True)
class Case:
    op: str
    label: str
    run: Callable[[], object]
    work: Callable[[list[Launch], Device], Work] | None = None
    first: bool = False  # compiled for every target, not only the four main ones
    checked: bool = False  # compiled in the tests too, as the first ones are
    load_bits: int = 128  # the widest load and store of its first kernel: what must not get narrower
    store_bits: int = 128
    load_share: float = 0.5  # of the bytes that its main loop loads, at least this come in loads so wide
    amd_bits: int = 128  # at most this on AMD, where a warp is 64 threads and a matrix result 4 neighbours a thread
    matrix: bool = False  # must use the target's matrix instruction
    contract: bool = False  # its PTX must keep the RNG contract


def meta(*shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    return torch.empty(*shape, device="meta", dtype=dtype)


def index(*shape: int) -> torch.Tensor:
    return meta(*shape, dtype=torch.int32)


@contextlib.contextmanager
def replaced(module: Any, **names: Any) -> Iterator[None]:
    """Names of a module set to something else inside the block."""
    before = {name: getattr(module, name) for name in names}
    for name, value in names.items():
        setattr(module, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(module, name, value)


# Sampling


def _sample(kind: str, dtype: torch.dtype, n: int, offset: int = 0) -> Case:
    params = {
        "bits": lambda: rng.Distribution(rng.BITS, (0.0, 0.0, -math.inf, math.inf)),
        "uniform": lambda: rng.uniform(-1.0, 1.0, dtype),
        "normal": lambda: rng.normal(0.0, 1.0),
        "trunc_normal": lambda: rng.trunc_normal(0.0, 1.0, -2.0, 2.0, dtype),
        "trunc_normal tail": lambda: rng.trunc_normal(0.0, 1.0, 4.0, 5.0, dtype),
    }[kind]

    def run() -> object:
        distribution = params()
        warp = 2 if targets.arch().startswith("gfx") else 1
        with replaced(sample, _WARP=warp):
            return sample.sample_(meta(n, dtype=dtype), distribution.kind, distribution.params, 1, 2, offset)

    whole = n % 4096 == 0 and offset == 0
    return Case(
        "sample", f"{kind} {SHORT[dtype]}" + ("" if whole else ", odd size"), run,
        lambda launches, device: Work("value", n, n * dtype.itemsize),
        first=kind == "normal" and dtype == F32 and whole, load_bits=0,
        store_bits=128 if whole else 8 * dtype.itemsize, contract=True,
    )  # fmt: skip


# Masked products on tensor cores


def _masked(what: str, dtype: torch.dtype, b: int = SIZE, n: int = SIZE, k: int = SIZE, masked: bool = True) -> Case:
    tiles = math.ceil(n / 128) * math.ceil(k / 128)
    bits = index(n, math.ceil(k / 32))
    x, dy, w = meta(b, k, dtype=dtype), meta(b, n, dtype=dtype), meta(n, k, dtype=dtype)
    pattern, mask = [bits, index(tiles)], meta(n, k, dtype=torch.bool)

    def run() -> object:
        if what == "forward":
            return masked_matmul.masked_linear(x, w, None, mask, pattern, False)
        if what == "dx":
            return masked_matmul.masked_grad_input(dy, w, mask, pattern, False)
        kernel = masked_matmul._weight_grad_kernel
        twin = kernel if masked else changed(kernel, "tl.where(alive, acc, 0.0)", "acc")
        with replaced(masked_matmul, _weight_grad_kernel=twin):
            return masked_matmul.masked_grad_weight(dy, x, mask, pattern)

    def work(launches: list[Launch], device: Device) -> Work:
        macs = float(b) * n * k
        nbytes = dtype.itemsize * (b * k + b * n + n * k) + n * k / 8
        a = launches[0].arguments
        step = a["BLOCK_B"] * a["BLOCK_N"] * a["BLOCK_K"]
        precision = "16bit" if dtype.itemsize == 2 else "float32"
        return Work("MAC", macs, nbytes, macs / launches[0].programs, step, precision, dense_macs=macs)

    odd = any(s % 8 for s in (b, n, k))
    label = f"{what} {SHORT[dtype]} {b} x {n} x {k}" + ("" if masked else ", no mask")
    narrow = 8 * dtype.itemsize
    return Case(
        "masked_matmul", label, run, work, first=what == "dw" and dtype == BF16 and not odd and masked,
        load_bits=narrow if odd else 128, store_bits=narrow if odd else 128, amd_bits=64 if dtype.itemsize == 2 else 128,
        checked=not masked or (b, n, k) == (1000, 1000, 1000), matrix=dtype.itemsize == 2,
    )  # fmt: skip


# Few rows times a packed weight


@cache
def _packed(density: float, n: int, k: int) -> tuple[int, int, bool]:
    """Groups, bytes, and whether columns are bytes, of a random mask in bfloat16."""
    g = torch.Generator().manual_seed(0)
    rows = min(n, 256)
    mask = torch.rand(rows, k, generator=g) < density
    packed = decode.pack(torch.zeros(rows, k, dtype=BF16), mask)
    return len(packed.values) * n // rows, decode.packed_bytes(packed) * n // rows, packed.base is not None


def _decode(
    b: int,
    dtype: torch.dtype,
    density: float,
    n: int = SIZE,
    k: int = SIZE,
    split: int | None = None,
    bias: bool = False,
) -> Case:
    groups, _, narrow = _packed(density, n, k)
    columns = meta(groups, 8, dtype=torch.uint8 if narrow else torch.uint16)
    base = meta(groups, dtype=torch.uint16) if narrow else None

    def run() -> object:
        packed = (meta(groups, 8, dtype=dtype), columns, base, index(n + 1), index(n))
        return decode.decode(meta(b, k, dtype=dtype), *packed, meta(n, dtype=dtype) if bias else None, split=split)

    def work(launches: list[Launch], device: Device) -> Work:
        a = launches[0].arguments
        per_row = groups / n
        steps = math.ceil(per_row / (a["LANES"] * a["UNROLL"] * a["SPLIT"]))
        step = a["ROWS"] * a["LANES"] * a["UNROLL"] * 8 * a["MB"]
        size = dtype.itemsize
        weight = groups * 8 * (size + columns.element_size()) + (groups * 2 if narrow else 0) + (n + 1) * 4 + n * 4
        parts = 2 * a["SPLIT"] * n * a["MB"] * 4 if a["SPLIT"] > 1 else 0
        row = a["MB"] * size  # bytes of x that a survivor meets, a thread's loads at most 16 of them
        threads = max(1, 128 // max(row, 4))  # of those that one pass over the 32 banks serves
        conflict = 1.0 if threads == 1 else most_loaded(threads, threads) if threads <= 16 else 3.53
        return Work(
            "survivor", density * n * k, weight + b * (n + k) * size + parts, step * steps, step, "float32",
            {min(128, 8 * row): conflict}, device.cores * k * row, dense_bytes=(n * k + b * (n + k)) * size,
        )  # fmt: skip

    label = f"{b} rows {SHORT[dtype]}, density {density}" + (f", {n} x {k}" if (n, k) != (SIZE, SIZE) else "")
    label += ("" if narrow else ", 16-bit columns") + (f", split {split}" if split else "") + (", bias" if bias else "")
    return Case(
        "decode",
        label,
        run,
        work,
        first=label == "1 rows bfloat16, density 0.1",
        checked=label == "1 rows bfloat16, density 0.2",
        store_bits=0,
        load_share=0.15 if b < 8 else 0.5,  # a gather of x is as narrow as its rows
    )


# Compressed rows


def _wide(b: int, dtype: torch.dtype, threads: int) -> int:
    """Bits of an access when the threads of a warp share a batch of b."""
    return min(128, b // threads * dtype.itemsize * 8)


def _spmm(
    b: int, dtype: torch.dtype, density: float, columns: torch.dtype = torch.uint16, n: int = SIZE, k: int = SIZE
) -> Case:
    nnz = round(density * n * k)

    def run() -> object:
        return sparse_matmul.sparse_matmul(
            meta(b, k, dtype=dtype), meta(nnz, dtype=dtype), index(n + 1), meta(nnz, dtype=columns), index(n)
        )

    def work(launches: list[Launch], device: Device) -> Work:
        code, bb = launches[0].code, launches[0].arguments["BB"]
        size = dtype.itemsize
        together = max(resident(code, device), 1)  # rows that walk x side by side and share it in the first-level cache
        nbytes = nnz * (size + columns.itemsize) + b * (k + n) * size
        precision = "16bit" if size == 2 else "float32"
        return Work(
            "MAC", nnz * b, nbytes, nnz / n * bb, 4 * bb, precision,
            l2_bytes=math.ceil(n / together) * min(1.0, density * together) * k * b * size, dense_macs=float(b) * n * k,
        )  # fmt: skip

    label = f"{b} x {SHORT[dtype]}, density {density}, {columns.itemsize * 8}-bit columns"
    return Case(
        "sparse_matmul",
        label,
        run,
        work,
        first=b == 256 and dtype == F32 and density == 0.1 and columns == torch.uint16,
        load_bits=_wide(b, dtype, 32),
        store_bits=_wide(b, dtype, 32),
        amd_bits=_wide(b, dtype, 64),
    )


def _sddmm(b: int, dtype: torch.dtype, density: float, n: int = SIZE, k: int = SIZE) -> Case:
    nnz = round(density * n * k)

    def run() -> object:
        survivors = targets.tile(sparse_grad.TILES)[dtype.itemsize][0]
        programs = n * math.ceil(density * k / survivors)
        with replaced(sparse_grad, programs=lambda *_: (index(programs), index(programs))):
            return sparse_grad.sparse_grad(
                meta(b, n, dtype=dtype), meta(b, k, dtype=dtype), index(n + 1), meta(nnz, dtype=torch.uint16), index(n)
            )

    def work(launches: list[Launch], device: Device) -> Work:
        a, code = launches[0].arguments, launches[0].code
        size = dtype.itemsize
        together = max(resident(code, device), 1)
        batches = math.ceil(b / a["BB"]) * a["BB"]
        return Work(
            "MAC", nnz * b, nnz * (size + 2) + b * (k + n) * size, a["SURVIVORS"] * batches, a["SURVIVORS"] * a["BB"],
            "16bit" if size == 2 else "float32", l2_bytes=nnz * b * size * min(1.0, 2 / (density * together)),
            dense_macs=float(b) * n * k,
        )  # fmt: skip

    return Case(
        "sparse_grad",
        f"{b} x {SHORT[dtype]}, density {density}",
        run,
        work,
        first=dtype == F32 and b == 256,
        load_bits=_wide(b, dtype, 32),
        store_bits=0,
        amd_bits=_wide(b, dtype, 64),
    )


def _sddmm_tiles(dtype: torch.dtype, b: int = SIZE, n: int = SIZE, k: int = SIZE, density: float = 0.1) -> Case:
    nnz, words, tiles = round(density * n * k), math.ceil(k / 32), math.ceil(n / 128) * math.ceil(k / 128)

    def run() -> object:
        return sparse_grad.sparse_grad_tiles(
            meta(b, n, dtype=dtype), meta(b, k, dtype=dtype), index(n, words), index(n, words), index(tiles), nnz
        )

    def work(launches: list[Launch], device: Device) -> Work:
        a, size = launches[0].arguments, dtype.itemsize
        macs, step = float(b) * 128 * 128, a["BATCH"] * a["SIDE"] * a["SIDE"]
        nbytes = size * (b * k + b * n + nnz) + n * words * 8
        precision = "16bit" if size == 2 else "float32"
        return Work("MAC", macs * tiles, nbytes, macs, step, precision, dense_macs=float(b) * n * k)

    return Case(
        "sparse_grad", f"tiles {SHORT[dtype]} {b} x {n} x {k}", run, work, store_bits=0,
        checked=dtype == BF16 and b == SIZE, matrix=dtype.itemsize == 2,
    )  # fmt: skip


# Blocks


def _block(
    what: str, block: int, dtype: torch.dtype, b: int = SIZE, n: int = SIZE, k: int = SIZE, tf32: bool = False
) -> Case:
    density = 0.1
    rows, columns = math.ceil(n / block), math.ceil(k / block)
    blocks = round(density * rows * columns)

    def run() -> object:
        x, dy, values = meta(b, k, dtype=dtype), meta(b, n, dtype=dtype), meta(blocks, block, block, dtype=dtype)
        many = max(1, targets.tile(block_matmul.TILES)[block][1].batch // block)
        programs = rows * math.ceil(density * columns / many)
        before = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = tf32
        try:
            if what == "forward":
                return block_matmul.block_matmul(x, values, index(rows + 1), index(blocks), index(rows), n)
            if what == "dx":
                return block_matmul.block_matmul(
                    dy, values, index(columns + 1), index(blocks), index(columns), k, perm=index(blocks)
                )
            with replaced(block_matmul, programs=lambda *_: (index(programs), index(programs))):
                return block_matmul.block_grad(dy, x, index(rows + 1), index(blocks), index(rows), block)
        finally:
            torch.backends.cuda.matmul.allow_tf32 = before

    def work(launches: list[Launch], device: Device) -> Work:
        a, launch = launches[0].arguments, launches[0]
        size = dtype.itemsize
        if what == "dw":
            step = a["MANY"] * block * block * a["BATCH"]
            macs = step * math.ceil(b / a["BATCH"])
            traffic = launch.programs * b * (a["MANY"] + 1) * block
        else:
            step = a["BATCH"] * block * a["INNER"]
            macs = a["BATCH"] * block * blocks / rows * block
            traffic = math.ceil(b / a["BATCH"]) * blocks * block * (a["BATCH"] + block)
        precision = "16bit" if size == 2 else "tf32" if tf32 else "float32"
        nbytes = size * (b * k + b * n + blocks * block * block)
        return Work(
            "MAC", float(b) * blocks * block * block, nbytes, macs, step, precision,
            l2_bytes=traffic * size, dense_macs=float(b) * n * k,
        )  # fmt: skip

    odd = any(s % 8 for s in (n, k))
    label = f"{what} block {block} {'TF32' if tf32 else SHORT[dtype]} {b} x {n} x {k}"
    narrow = 8 * dtype.itemsize
    return Case(
        "block_matmul", label, run, work, first=block == 64 and dtype == BF16 and not odd, store_bits=narrow if odd else 128,
        amd_bits=64 if dtype.itemsize == 2 and what != "dw" else 128, matrix=dtype.itemsize == 2 or tf32,
    )  # fmt: skip


# Statistics and selection


def _moments(dtype: torch.dtype, across: bool) -> Case:
    n = SIZE * SIZE

    def run() -> object:
        x = meta(SIZE, SIZE, dtype=dtype)
        shape = (SIZE, SIZE, 1, SIZE, 1) if across else (1, 1, n, n, n)
        return moments.moments([x], [shape], 4, 0.0)

    return Case(
        "moments",
        f"{SHORT[dtype]}, {'a channel' if across else 'a tensor'}",
        run,
        store_bits=0,
        load_share=0.0,  # beside its wide loads it has a path for what is not aligned
        first=dtype == F32 and not across,
    )


def _select(what: str, dtype: torch.dtype, masked: bool) -> Case:
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
    )


def cases() -> list[Case]:
    """All of them; about 400 compilations over the targets."""
    whole, odd = SIZE * SIZE, (1000, 1003, 1001)
    result = [_sample(kind, dtype, whole) for kind in ("uniform", "normal", "trunc_normal") for dtype in (F32, BF16)]
    result += [_sample("normal", F16, whole), _sample("normal", F64, whole), _sample("trunc_normal tail", F32, whole)]
    result += [
        _sample("bits", torch.int32, whole),
        _sample("normal", F32, 1000),
        _sample("uniform", BF16, 1000, offset=5),
    ]

    result += [_masked(what, dtype) for what in ("forward", "dx", "dw") for dtype in (BF16, F32)]
    result += [_masked("dw", F16), _masked("dw", BF16, masked=False)]
    result += [_masked("dw", BF16, *odd), _masked("dw", BF16, 1000, 1000, 1000)]

    result += [_decode(rows, BF16, 0.1) for rows in (1, 2, 4, 8, 16, 32, 64)]
    result += [_decode(1, BF16, 0.2), _decode(16, BF16, 0.2), _decode(1, BF16, 0.02), _decode(1, F16, 0.1)]
    result += [_decode(1, F32, 0.1), _decode(8, F32, 0.1), _decode(4, BF16, 0.1, 500, 777)]
    result += [_decode(1, BF16, 0.1, split=4, bias=True)]
    result += [_decode(1, BF16, density, 28672, 8192) for density in (0.2, 0.1)]

    result += [_spmm(256, F32, density) for density in (0.2, 0.1, 0.05)] + [_spmm(256, F32, 0.1, torch.int32)]
    result += [
        _spmm(60, F32, 0.1),
        _spmm(1, F32, 0.1),
        _spmm(256, BF16, 0.02),
        _spmm(256, F16, 0.02),
        _spmm(256, F64, 0.1),
    ]
    result += [_sddmm(256, F32, 0.1), _sddmm(60, F32, 0.1), _sddmm(256, BF16, 0.02)]
    result += [_sddmm_tiles(dtype) for dtype in (BF16, F32)] + [_sddmm_tiles(BF16, *odd)]

    products = ("forward", "dx", "dw")
    result += [
        _block(what, block, dtype) for what in products for block in block_matmul.BLOCKS for dtype in (BF16, F32)
    ]
    result += [_block(what, 32, BF16, *odd) for what in products]
    result += [
        _block("forward", 64, F16),
        _block("forward", 32, F32, tf32=True),
        _block("forward", 32, BF16, 1000, 1000, 1000),
    ]

    result += [_moments(dtype, across) for dtype in (F32, F64) for across in (False, True)] + [_moments(BF16, False)]
    result += [_select(what, F32, True) for what in ("threshold", "cut")] + [_select("cut", BF16, False)]
    return result
