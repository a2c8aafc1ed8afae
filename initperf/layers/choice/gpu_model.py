"""Which kernel a sparse layer would run on a GPU, and why: predicted times from bytes and counted instructions, on any machine.

The dense product with the pre-masked weight is always a candidate, at the speed of its data sheet. The others cost what their
compiled code was counted to take (gpu_counts.py, written by `make gpu-report`); resources overlap as in docs/gpu.md. All of it is
prediction; none of it was measured on a GPU.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

from initperf.core.checks import check, fail
from initperf.layers.choice.gpu_counts import COUNTS
from initperf.layers.choice.gpu_devices import DEVICES, Device

OPS = ("forward", "dx", "dw")
DTYPES = {"float32": 4, "bfloat16": 2, "float16": 2}
DECODE_ROWS = 64
BLOCKS = (16, 32, 64, 128)
# Of a survivor in decode beside its value: 8-bit column, its share of the base, and free places.
GROUP_BYTES = 1.25 + 0.03
# What a layer runs of the candidates where it runs a sparse kernel: kind -> (op, kernel, kernel in 16 bits).
LAYER_KERNELS = {
    "masked_grad_weight": ("dw", "masked tiles", "masked tiles"),
    "sparse_linear": ("forward", "rows", "rows"),
    "sparse_grad_input": ("dx", "rows", "rows"),
    "sparse_grad_values": ("dw", "rows at survivors", "tiles at survivors"),
}
# Targets with few counts of their own take those of the nearest with all.
NEAREST = {"sm_86": "sm_80", "sm_89": "sm_80", "sm_120": "sm_80", "gfx950": "gfx942"}
# What COUNTS holds: a key here -> the row of docs/gpu.md whose cycles a unit it takes.
KEYS = {
    **{f"decode {rows} 2": f"decode {rows} rows bfloat16, density 0.1" for rows in (1, 2, 4, 8, 16, 32, 64)},
    **{f"decode {rows} 4": f"decode {rows} rows float32, density 0.1" for rows in (1, 8)},
    "rows 4": "sparse_matmul 256 x float32, density 0.1, 16-bit columns",
    "rows 4 short": "sparse_matmul 60 x float32, density 0.1, 16-bit columns",
    "rows 2": "sparse_matmul 256 x bfloat16, density 0.02, 16-bit columns",
    "rows grad 4": "sparse_grad 256 x float32, density 0.1",
    "rows grad 2": "sparse_grad 256 x bfloat16, density 0.02",
    "tiles grad 4": "sparse_grad tiles float32 4096 x 4096 x 4096",
    "tiles grad 2": "sparse_grad tiles bfloat16 4096 x 4096 x 4096",
    "masked grad 4": "masked_matmul dw float32 4096 x 4096 x 4096",
    "masked grad 2": "masked_matmul dw bfloat16 4096 x 4096 x 4096",
    **{
        f"block {op} {block} {size}": f"block_matmul {op} block {block} {dtype} 4096 x 4096 x 4096"
        for op in OPS
        for block in BLOCKS
        for dtype, size in (("bfloat16", 2), ("float32", 4))
    },
}


class Candidate(NamedTuple):
    """A kernel and its predicted microseconds; bound: the resource that takes longest, with its share of the time."""

    kernel: str
    us: float
    bound: str


def choose(
    gpu: str,
    op: str,
    rows: int,
    outputs: int,
    inputs: int,
    density: float,
    *,
    dtype: str = "bfloat16",
    tf32: bool = False,
    tiles: float = 1.0,
    block: int | None = None,
    blocks: float = 1.0,
    compressed: bool = False,
) -> list[Candidate]:
    """Candidates for one product of a layer, the fastest first.

    op: forward, dx or dw. rows: of the batch. density: surviving fraction of the weights. tiles: fraction of 128 x 128 tiles
    with a survivor. block, blocks: the mask consists of whole blocks of that size, and keeps this fraction of them.
    compressed: only survivors are stored, so that dense has to unpack the weight first, or to pack its gradient.
    """
    if gpu not in DEVICES:
        fail(f"gpu to be one of {', '.join(DEVICES)}", gpu)
    check(op in OPS, f"op to be one of {', '.join(OPS)}", op)
    check(dtype in DTYPES, f"dtype to be one of {', '.join(DTYPES)}", dtype)
    check(min(rows, outputs, inputs) > 0, "rows, outputs and inputs above 0", (rows, outputs, inputs))
    check(0 <= density <= 1, "density between 0 and 1", density)
    check(block is None or block in BLOCKS, f"block to be one of {BLOCKS}", block)
    device, size = DEVICES[gpu], DTYPES[dtype]
    weights, activations = outputs * inputs, rows * (outputs + inputs) * size
    macs = float(rows) * weights
    peak = device.peaks["16bit" if size == 2 else "tf32" if tf32 else "float32"]
    dense_times = {"matrix": 2 * macs / peak / 1e6}
    # dense gradients are masked, and compressed weights packed or unpacked, in a pass of its own, before or after
    second_pass = 2 * weights * size if op == "dw" or compressed else 0
    found = [_candidate("dense", device, dense_times, weights * size + activations, 1, second_pass)]

    def sparse(kernel: str, key: str, units: float, nbytes: float, launches: int = 1, matrix: float = 0.0) -> None:
        counted = COUNTS[NEAREST.get(device.target, device.target)][key]
        times = {pipe: cycles * units / device.cores / device.ghz / 1e3 for pipe, cycles in counted.items()}
        found.append(_candidate(kernel, device, times | {"matrix": matrix}, nbytes, launches))

    survivors = density * weights
    if op == "dw":
        sparse(
            "masked tiles",
            f"masked grad {size}",
            macs * tiles,
            weights * (size + 1 / 8) + activations,
            2,
            2 * macs * tiles / peak / 1e6,
        )
        sparse(
            "tiles at survivors",
            f"tiles grad {size}",
            macs * tiles,
            survivors * size + weights / 4 + activations,
            1,
            2 * macs * tiles / peak / 1e6,
        )
        sparse("rows at survivors", f"rows grad {size}", survivors * rows, survivors * (size + 2) + activations, 3)
    else:
        if rows <= DECODE_ROWS:
            padded = 1 << (rows - 1).bit_length()
            counted_rows = padded if size == 2 else 1 if padded == 1 else 8
            units = survivors * max(1.0, padded / counted_rows)
            sparse(
                "decode",
                f"decode {counted_rows} {size}",
                units,
                survivors * (size + GROUP_BYTES) + activations,
                1 if rows == 1 else 2,
            )
        padded = math.ceil(rows / 256) * 256 if rows > 64 or size == 2 else 64
        sparse(
            "rows",
            f"rows {size}" + (" short" if padded == 64 else ""),
            survivors * padded,
            survivors * (size + 2) + 3 * activations,
            2,
        )
    if block is not None:
        kept = blocks * weights
        sparse(
            f"blocks of {block}",
            f"block {op} {block} {size}",
            kept * rows,
            kept * size + activations,
            1,
            2 * kept * rows / peak / 1e6,
        )
    return sorted(found, key=lambda candidate: candidate.us)


def _candidate(
    kernel: str, device: Device, times: dict[str, float], nbytes: float, launches: int, second_pass: float = 0
) -> Candidate:
    times = times | {"memory": nbytes / device.memory / 1e6}
    serial = {"launches": (launches + bool(second_pass)) * device.launch_us}
    serial["second pass"] = second_pass / device.memory / 1e6
    us = sum(t**4 for t in times.values()) ** 0.25 + sum(serial.values())
    times |= serial
    bound = max(times, key=lambda name: times[name])
    return Candidate(kernel, us, f"{bound} {times[bound] / us:.0%}")


@lru_cache(maxsize=4096)
def kernel_pays(
    device: Device, kind: str, rows: int, outputs: int, inputs: int, kept: int, dtype: str, tf32: bool
) -> bool:
    """Whether a layer's sparse kernel of `kind` (of LAYER_KERNELS) is predicted to be faster than dense on this device.

    kept: survivors; of masked_grad_weight, whose kernel pays by tile, tiles of 128 x 128 that hold one.
    """
    op, kernel, narrow = LAYER_KERNELS[kind]
    masked = kind.startswith("masked")
    share = min(1.0, kept / (-(-outputs // 128) * -(-inputs // 128) if masked else outputs * inputs))
    density, tiles = (1.0, share) if masked else (share, 1.0)
    found = choose(
        device.name, op, rows, outputs, inputs, density, dtype=dtype, tf32=tf32, tiles=tiles, compressed=not masked
    )
    wanted = (narrow if DTYPES[dtype] == 2 else kernel, "dense")
    return next(c.kernel for c in found if c.kernel in wanted) != "dense"
