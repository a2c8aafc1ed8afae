"""Which GPU a launcher runs on, and what its operands and dtypes need. Shared by every kernel file with a TILES table."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TypeVar

import torch
import triton
import triton.language as tl
from torch import Tensor

T = TypeVar("T")

# Triton's interpreter multiplies bfloat16 as raw 16-bit words in tl.dot, and truncates casts to bfloat16.
INTERPRET: tl.constexpr = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")

# Targets without a row of their own in a TILES table take the row of the family whose shared memory and matrix
# instructions they have (CUDA programming guide, table "technical specifications per compute capability").
FAMILY = {
    "sm_86": "sm_80",
    "sm_87": "sm_80",
    "sm_89": "sm_80",
    "sm_103": "sm_100",
    "sm_120": "sm_80",
    "gfx950": "gfx942",
}


def arch() -> str:
    """Name of the current device's target: "sm_90", "gfx942"; "sm_80" in the interpreter."""
    if INTERPRET.value:
        return "sm_80"
    target = triton.runtime.driver.active.get_current_target()
    return target.arch if target.backend == "hip" else f"sm_{target.arch}"


def tile(table: Mapping[str, T]) -> T:
    """The current device's row of a TILES table."""
    name = arch()
    return table.get(name) or table.get(FAMILY.get(name, ""), table["sm_80"])


def precision(dtype: torch.dtype) -> str:
    """What `dot` does with float32: TF32 where torch's own products may."""
    return "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32 else "ieee"


def rows_of_8(x: Tensor) -> Tensor:
    """x (rows, columns) with rows at addresses that 16 divides and of a length that 8 divides, the excess 0; a copy if it is not so."""
    if x.stride(1) == 1 and x.stride(0) % 8 == 0 and x.shape[1] % 8 == 0 and x.data_ptr() % 16 == 0:
        return x
    out = x.new_zeros(x.shape[0], triton.cdiv(x.shape[1], 8) * 8)
    out[:, : x.shape[1]] = x
    return out


@triton.jit
def cast(x, dtype: tl.constexpr):
    """x, float32 or of dtype already, in dtype, rounded once to nearest even."""
    if INTERPRET and dtype == tl.bfloat16:
        word = x.to(tl.uint32, bitcast=True)
        even = ((word + 0x7FFF + ((word >> 16) & 1)) >> 16).to(tl.uint16)
        nan = (word & 0x7FFFFFFF) > 0x7F800000
        result = tl.where(nan, ((word >> 16) | 0x40).to(tl.uint16), even).to(tl.bfloat16, bitcast=True)
    else:
        result = x.to(dtype)
    return result


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr = "ieee"):
    """acc + a @ b with float32 sums, float64 for float64; float32 operands stay float32 unless PRECISION is "tf32"."""
    # One return: up to Triton 3.8 what follows the return of a constant branch is compiled too.
    if acc.dtype == tl.float64:
        total = tl.dot(a, b, acc, input_precision="ieee", out_dtype=tl.float64)
    elif INTERPRET:
        total = tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    else:
        total = tl.dot(a, b, acc, input_precision=PRECISION)
    return total
