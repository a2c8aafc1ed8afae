"""Cases of the products: gradients in tiles, decode, compressed rows, blocks."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache

import torch

from initperf.kernels.gpu import targets
from initperf.kernels.gpu.candidates import block_matmul, decode
from initperf.kernels.gpu.linear import masked_linear, sparse_linear
from initperf.kernels.gpu.sparse import rows as sparse_matmul
from initperf.kernels.gpu.sparse import rows_grad
from initperf.layers.choice.gpu_devices import Device
from tools.gpu_report.aot import Launch, changed
from tools.gpu_report.case import BF16, F32, F64, MAIN, SHORT, SIZE, Case, Work, allow_tf32, index, meta, replaced
from tools.gpu_report.model import most_loaded, resident

# Gradients of a weight on the matrix unit, in tiles


def _tiles(b: int, n: int, k: int, size: int, nbytes: float, tf32: bool = False) -> Callable[..., Work]:
    """Work of a gradient of (n, k) whose every tile has a survivor."""

    def work(launches: list[Launch], device: Device) -> Work:
        a, programs = launches[0].arguments, launches[0].programs
        rows, columns = (a.get("ROWS", a["SIDE"]), a.get("COLUMNS", a["SIDE"]))
        macs, step = float(b) * rows * columns, a["BATCH"] * rows * columns
        precision = "16bit" if size == 2 else "tf32" if tf32 else "float32"
        return Work(
            "MAC", macs * programs, nbytes, macs, step, precision,
            l2_bytes=float(programs) * b * (rows + columns) * size, dense_macs=float(b) * n * k,
        )  # fmt: skip

    return work


def masked_case(
    dtype: torch.dtype, b: int = SIZE, n: int = SIZE, k: int = SIZE,
    masked: bool = True, tf32: bool = False, into: bool = False,
) -> Case:  # fmt: skip
    words, tiles = math.ceil(k / 32), math.ceil(n / 128) * math.ceil(k / 128)
    x, dy, mask = meta(b, k, dtype=dtype), meta(b, n, dtype=dtype), meta(n, k, dtype=torch.bool)

    def run() -> object:
        kernel = masked_linear._masked_grad_weight
        twin = kernel if masked else changed(kernel, "tl.where(alive, acc, 0.0)", "acc")
        with replaced(masked_linear, _masked_grad_weight=twin), allow_tf32(tf32):
            grad = meta(n, k, dtype=dtype) if into else None
            return masked_linear.masked_grad_weight(dy, x, mask, [index(n, words), index(tiles)], into=grad)

    label = f"dw {'TF32' if tf32 else SHORT[dtype]} {b} x {n} x {k}"
    nbytes = dtype.itemsize * (b * k + b * n + n * k * (2 if into else 1)) + n * words * 4
    return Case(
        "masked_matmul",
        label + (", into .grad" if into else "" if masked else ", no mask"),
        run,
        _tiles(b, n, k, dtype.itemsize, nbytes, tf32) if dtype.itemsize < 8 else None,
        first=dtype == BF16 and b == SIZE and masked and not into,
        store_bits=8 * dtype.itemsize if k % 8 else 128,
        amd_bits=128 if dtype == F32 else 64,
        tested=MAIN if dtype == BF16 and (not masked or b == 1000) else ("sm_90", "gfx942") if dtype == F64 else (),
        matrix=dtype.itemsize == 2 or tf32,
    )


# Few rows times a packed weight


@cache
def _packed(density: float, n: int, k: int) -> tuple[int, int, bool]:
    """Groups, bytes, and whether columns are bytes, of a random mask in bfloat16."""
    g = torch.Generator().manual_seed(0)
    rows = min(n, 256)
    mask = torch.rand(rows, k, generator=g) < density
    packed = decode.pack(torch.zeros(rows, k, dtype=BF16), mask)
    return len(packed.values) * n // rows, decode.packed_bytes(packed) * n // rows, packed.base is not None


def decode_case(
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
        tested=MAIN if label in ("1 rows bfloat16, density 0.2", "1 rows bfloat16, density 0.1, split 4, bias") else (),
        store_bits=0,
        load_share=0.15 if b < 8 else 0.5,  # a gather of x is as narrow as its rows
    )


# Compressed rows


def _wide(b: int, dtype: torch.dtype, threads: int) -> int:
    """Bits of an access when the threads of a warp share a batch of b."""
    return min(128, b // threads * dtype.itemsize * 8)


def spmm_case(
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


def sddmm_case(b: int, dtype: torch.dtype, density: float, n: int = SIZE, k: int = SIZE) -> Case:
    nnz = round(density * n * k)

    def run() -> object:
        survivors = targets.tile(rows_grad.TILES)[dtype.itemsize][0]
        programs = n * math.ceil(density * k / survivors)
        with replaced(rows_grad, programs=lambda *_: (index(programs), index(programs))):
            return rows_grad.sparse_grad(
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


def sddmm_tiles_case(dtype: torch.dtype, b: int = SIZE, n: int = SIZE, k: int = SIZE, density: float = 0.1) -> Case:
    nnz, words, tiles = round(density * n * k), math.ceil(k / 32), math.ceil(n / 128) * math.ceil(k / 128)

    def run() -> object:
        return rows_grad.sparse_grad_tiles(
            meta(b, n, dtype=dtype), meta(b, k, dtype=dtype), index(n, words), index(n, words), index(tiles), nnz
        )

    nbytes = dtype.itemsize * (b * k + b * n + nnz) + n * words * 8
    return Case(
        "sparse_grad", f"tiles {SHORT[dtype]} {b} x {n} x {k}", run, _tiles(b, n, k, dtype.itemsize, nbytes), store_bits=0,
        tested=MAIN if dtype == BF16 and b == SIZE else (), matrix=dtype.itemsize == 2,
    )  # fmt: skip


def sparse_linear_case(what: str, dtype: torch.dtype, b: int = 256, n: int = SIZE, k: int = SIZE) -> Case:
    """What a compressed layer launches, from its pattern."""
    nnz, words = round(0.1 * n * k), math.ceil(k / 32)
    tiles = math.ceil(n / 128) * math.ceil(k / 128)
    columns = meta(nnz, dtype=torch.uint16)
    pattern = [index(n + 1), columns, index(n), index(k + 1), columns, index(k), index(nnz)]
    pattern += [index(n, words), index(n, words), index(tiles)]
    x, dy, values, bits = meta(b, k, dtype=dtype), meta(b, n, dtype=dtype), meta(nnz, 1, dtype=dtype), index(0)

    def run() -> object:
        if what == "forward":
            return sparse_linear.sparse_linear(x, values, meta(n, dtype=dtype), bits, n, pattern)
        if what == "dx":
            return sparse_linear.sparse_grad_input(dy, values, bits, k, pattern)
        return sparse_linear.sparse_grad_values(dy, x, bits, pattern)

    wide = 128 if what == "dw" else _wide(b, dtype, 64)
    return Case(
        "sparse_linear", f"{what} {SHORT[dtype]}, bias" if what == "forward" else f"{what} {SHORT[dtype]}", run,
        store_bits=0 if what == "dw" else 128, amd_bits=min(wide, 64), matrix=what == "dw",
    )  # fmt: skip


# Blocks


def block_case(
    what: str, block: int, dtype: torch.dtype, b: int = SIZE, n: int = SIZE, k: int = SIZE, tf32: bool = False
) -> Case:
    density = 0.1
    rows, columns = math.ceil(n / block), math.ceil(k / block)
    blocks = round(density * rows * columns)

    def run() -> object:
        x, dy, values = meta(b, k, dtype=dtype), meta(b, n, dtype=dtype), meta(blocks, block, block, dtype=dtype)
        many = max(1, targets.tile(block_matmul.TILES)[block][1].batch // block)
        programs = rows * math.ceil(density * columns / many)
        lists = index(programs), index(programs)
        with allow_tf32(tf32), replaced(block_matmul, programs=lambda *_: lists):
            if what == "forward":
                return block_matmul.block_matmul(x, values, index(rows + 1), index(blocks), index(rows), n)
            if what == "dx":
                return block_matmul.block_matmul(
                    dy, values, index(columns + 1), index(blocks), index(columns), k, perm=index(blocks)
                )
            return block_matmul.block_grad(dy, x, index(rows + 1), index(blocks), index(rows), block)

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
