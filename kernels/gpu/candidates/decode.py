"""Product of few rows with a packed sparse weight: y = x W^T + bias for 1 to 64 rows, bound by the bytes of W.

W (N, K) is packed in groups of 8 survivors of one row, columns ascending:
- values (G, 8); columns (G, 8): uint8 distances from the group's first column, which is in base (G,) (uint16, or int32
  if K > 65536); or, where that takes fewer bytes, plain columns (uint16 or int32), and base is None;
- a group is cut where its columns spread over more than 255; free places hold value 0 and distance 0;
- rows come in `order` (N,), most groups first: row order[r] has the groups start[r] to start[r + 1].
So a thread takes a group with one 16-byte load of values and one 8-byte load of columns, and rows of one program end together.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..targets import cast, tile

MAX_ROWS = 64
MAX_GROUPS = 1 << 29  # word indices are 32 bits wide, and a group has up to 4 words of 64 bits
GROUP: tl.constexpr = tl.constexpr(8)


class Tile(NamedTuple):
    """One program: ROWS rows of W, LANES groups of each at once, UNROLL times before the next step."""

    rows: int
    lanes: int
    unroll: int
    warps: int


# Batch rows, as the next power of two -> tile. A gather of x touches LANES x 8 neighbouring survivors: few cache lines.
_NARROW = {1: Tile(8, 16, 2, 4), 2: Tile(8, 16, 2, 4), 4: Tile(8, 16, 1, 4), 8: Tile(8, 16, 1, 4)}
_WIDE = {16: Tile(8, 8, 1, 4), 32: Tile(8, 4, 1, 4), 64: Tile(8, 2, 1, 4)}
TILES = {
    "sm_80": _NARROW | _WIDE,
    "sm_90": _NARROW | _WIDE,
    "sm_100": _NARROW | _WIDE,
    "gfx942": {rows: t._replace(warps=2) for rows, t in (_NARROW | _WIDE).items()},  # 64 lanes a warp
}
PROGRAMS = 512  # fewer than this, and the groups of a row are split over several programs


class Packed(NamedTuple):
    values: Tensor
    columns: Tensor
    base: Tensor | None
    start: Tensor
    order: Tensor


def pack(weight: Tensor, mask: Tensor) -> Packed:
    """Pack the survivors of weight (N, K), where the bool mask is true, as `decode` reads them."""
    n, k = weight.shape
    row, column = mask.nonzero(as_tuple=True)
    counts = mask.sum(1)
    rank = torch.arange(row.numel(), device=row.device) - (counts.cumsum(0) - counts)[row]
    chunk = row * (k // GROUP.value + 1) + rank // GROUP.value
    first = column[(torch.arange(row.numel(), device=row.device) - rank % GROUP.value)]
    narrow = _grouped(weight, row, column, torch.stack((chunk, (column - first) // 256)), byte_columns=True)
    wide = _grouped(weight, row, column, chunk[None], byte_columns=False)
    return min(narrow, wide, key=packed_bytes)


def packed_bytes(packed: Packed) -> int:
    """What one product reads of the weight."""
    return sum(t.numel() * t.element_size() for t in packed if t is not None)


def _grouped(weight: Tensor, row: Tensor, column: Tensor, keys: Tensor, byte_columns: bool) -> Packed:
    """Pack survivors (row-major) of which neighbours with equal keys share a group."""
    n, k = weight.shape
    _, group, sizes = keys.unique_consecutive(return_inverse=True, return_counts=True, dim=1)
    if len(sizes) >= MAX_GROUPS:
        raise ValueError(f"Expected fewer than 2**32 survivors in one weight. Got {row.numel()}.")
    begin = sizes.cumsum(0) - sizes
    groups = torch.zeros(n, dtype=torch.int64, device=row.device).index_add_(0, row[begin], torch.ones_like(begin))
    order = groups.argsort(descending=True, stable=True)
    start = torch.nn.functional.pad(groups[order].cumsum(0), (1, 0))

    # groups move from row-major order to `order`
    moved = torch.empty_like(start[:-1])
    moved[order] = start[:-1]
    at = moved[row[begin]] + torch.arange(len(begin), device=row.device) - (groups.cumsum(0) - groups)[row[begin]]
    place = at[group] * GROUP.value + torch.arange(row.numel(), device=row.device) - begin[group]

    index_type = torch.uint16 if k <= 1 << 16 else torch.int32
    values = weight.new_zeros(len(begin), GROUP.value)
    values.view(-1)[place] = weight[row, column]
    base = None
    if byte_columns:
        base = torch.empty_like(begin)
        base[at] = column[begin]
        column = column - column[begin][group]
        base = base.to(index_type)
    columns = torch.zeros_like(values, dtype=torch.int64)
    columns.view(-1)[place] = column
    return Packed(
        values,
        columns.to(torch.uint8 if byte_columns else index_type),
        base,
        start.to(torch.int32),
        order.to(torch.int32),
    )


@triton.jit
def _load4(words_ptr, group, live):
    """Words 4 group to 4 group + 3 of 32 bits, in one 16-byte load (two words of 64 bits, which Triton vectorizes)."""
    at = group[:, :, None] * 2 + tl.arange(0, 2)[None, None, :]
    low, high = tl.split(tl.load(words_ptr + at, mask=live[:, :, None], other=0))
    return low.to(tl.int32), (low >> 32).to(tl.int32), high.to(tl.int32), (high >> 32).to(tl.int32)


@triton.jit
def _load(words_ptr, group, live, BITS: tl.constexpr):
    """The 8 fields of BITS bits of each group (R, L), as a tuple of BITS / 4 words of 32 bits."""
    if BITS == 8:
        word = tl.load(words_ptr + group, mask=live, other=0)
        words = word.to(tl.int32), (word >> 32).to(tl.int32)
    elif BITS == 16:
        words = _load4(words_ptr, group, live)
    else:
        words = _load4(words_ptr, 2 * group, live) + _load4(words_ptr, 2 * group + 1, live)
    return words


@triton.jit
def _halves(word, dtype: tl.constexpr):
    """Two 16-bit floats of a 32-bit word, as float32: one instruction each."""
    if dtype == tl.bfloat16:
        halves = (word << 16).to(tl.float32, bitcast=True), (word & -65536).to(tl.float32, bitcast=True)
    else:
        low = (word & 0xFFFF).to(tl.uint16).to(dtype, bitcast=True)
        high = ((word >> 16) & 0xFFFF).to(tl.uint16).to(dtype, bitcast=True)
        halves = low.to(tl.float32), high.to(tl.float32)
    return halves


@triton.jit
def _column(words, e: tl.constexpr, BITS: tl.constexpr):
    """Column e of 8."""
    column = words[e * BITS // 32]
    if BITS < 32:
        column = (column >> (e * BITS % 32)) & ((1 << BITS) - 1)
    return column


@triton.jit
def _value(words, e: tl.constexpr, dtype: tl.constexpr):
    """Value e of 8, as float32."""
    if dtype == tl.float32:
        value = words[e].to(tl.float32, bitcast=True)
    else:
        value = _halves(words[e // 2], dtype)[e % 2]
    return value


@triton.jit
def _finish(total, bias_ptr, order_ptr, y_ptr, row, N, B, stride_yb, MB: tl.constexpr):
    """y[:B, order[row]] = total (rows, MB) + bias."""
    inside = row < N
    out = tl.load(order_ptr + row, mask=inside, other=0).to(tl.int64)
    if bias_ptr is not None:
        total += tl.load(bias_ptr + out, mask=inside, other=0.0).to(tl.float32)[:, None]
    rm = tl.arange(0, MB)
    keep = inside[:, None] & (rm < B)[None, :]
    tl.store(y_ptr + out[:, None] + rm[None, :] * stride_yb, cast(total, y_ptr.dtype.element_ty), mask=keep)


@triton.jit
def _decode(
    # inputs
    x_ptr,  # (K, MB), zeros beyond B; for 16-bit dtypes and MB > 1 as words of 2
    values_ptr,  # (G, 8), as words of 64 bits
    columns_ptr,  # (G, 8), as words of 64 bits
    base_ptr,  # (G,) or None
    start_ptr,  # (N + 1,)
    order_ptr,  # (N,)
    bias_ptr,  # (N,) or None
    # outputs
    y_ptr,  # (B, N)
    part_ptr,  # (SPLIT, N, MB) float32, rows in packed order, if SPLIT > 1
    # sizes, strides
    N,
    B,
    stride_yb,
    # tiles
    DTYPE: tl.constexpr,
    COLUMN_BITS: tl.constexpr,
    MB: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    UNROLL: tl.constexpr,
    SPLIT: tl.constexpr,
):
    PAIRS: tl.constexpr = MB > 1 and DTYPE.primitive_bitwidth == 16
    WORDS: tl.constexpr = MB // 2 if PAIRS else MB  # of x, a row
    first = tl.program_id(0) * ROWS
    split = tl.program_id(1)
    row = first + tl.arange(0, ROWS)
    start = tl.load(start_ptr + row, mask=row < N, other=0)
    groups = tl.load(start_ptr + row + 1, mask=row < N, other=0) - start
    most = tl.load(start_ptr + first + 1) - tl.load(start_ptr + first)  # rows come longest first
    lane = tl.arange(0, LANES)
    word = tl.arange(0, WORDS)
    even = tl.zeros((ROWS, LANES, WORDS), tl.float32)
    odd = tl.zeros((ROWS, LANES, WORDS), tl.float32)
    for step in range(split * UNROLL * LANES, most, SPLIT * UNROLL * LANES):
        for u in tl.static_range(UNROLL):
            at = step + u * LANES + lane[None, :]
            live = at < groups[:, None]
            group = start[:, None] + at
            columns = _load(columns_ptr, group, live, COLUMN_BITS)
            values = _load(values_ptr, group, live, DTYPE.primitive_bitwidth)
            xg_ptr = x_ptr + tl.zeros((ROWS, LANES), tl.int32)
            if base_ptr is not None:
                xg_ptr += tl.load(base_ptr + group, mask=live, other=0).to(tl.int32) * WORDS
            for e in tl.static_range(GROUP):
                column = _column(columns, e, COLUMN_BITS)
                x = tl.load((xg_ptr + column * WORDS)[:, :, None] + word[None, None, :])
                value = _value(values, e, DTYPE)[:, :, None]
                if PAIRS:
                    x_even, x_odd = _halves(x, DTYPE)
                    even += value * x_even
                    odd += value * x_odd
                else:
                    even += value * x.to(tl.float32)
    total = tl.sum(even, 1)
    if PAIRS:
        total = tl.interleave(total, tl.sum(odd, 1))
    if SPLIT > 1:
        out = (split * N + row).to(tl.int64)[:, None] * MB + tl.arange(0, MB)[None, :]
        tl.store(part_ptr + out, total, mask=(row < N)[:, None])
    else:
        _finish(total, bias_ptr, order_ptr, y_ptr, row, N, B, stride_yb, MB)


@triton.jit
def _combine(
    part_ptr, order_ptr, bias_ptr, y_ptr, N, B, stride_yb, MB: tl.constexpr, ROWS: tl.constexpr, SPLIT: tl.constexpr
):
    """Second phase: y = the parts (SPLIT, N, MB) added in their order, + bias."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    total = tl.zeros((ROWS, MB), tl.float32)
    for split in tl.static_range(SPLIT):
        at = (split * N + row).to(tl.int64)[:, None] * MB + tl.arange(0, MB)[None, :]
        total += tl.load(part_ptr + at, mask=(row < N)[:, None], other=0.0)
    _finish(total, bias_ptr, order_ptr, y_ptr, row, N, B, stride_yb, MB)


def _feature_major(x: Tensor, rows: int) -> Tensor:
    """x (B, K) as (K, rows), zeros beyond B; no copy where x lies so already, which one row always does."""
    if x.shape[0] == rows and x.stride(0) == 1 and x.stride(1) == rows or x.shape[0] == rows == 1 and x.stride(1) == 1:
        return x.t()
    out = x.new_zeros(x.shape[1], rows) if x.shape[0] < rows else x.new_empty(x.shape[1], rows)
    out[:, : x.shape[0]] = x.t()
    return out


def _words(t: Tensor, word: torch.dtype) -> Tensor:
    """t as contiguous words at an address that 16 divides."""
    t = t.contiguous()
    return (t if t.data_ptr() % 16 == 0 else t.clone()).view(word)


def decode(
    x: Tensor,
    values: Tensor,
    columns: Tensor,
    base: Tensor | None,
    start: Tensor,
    order: Tensor,
    bias: Tensor | None = None,
    *,
    split: int | None = None,
) -> Tensor:
    """y (B, N) = x (B, K) W^T + bias, B <= 64, sums in float32; the same bits for any call with the same `split`.

    x, values: float32, bfloat16 or float16, one dtype, which y has too. values to order: of `pack`.
    """
    b, k = x.shape
    n = order.numel()
    if b > MAX_ROWS:
        raise ValueError(f"Expected at most {MAX_ROWS} rows. Got {b}.")
    y = x.new_empty(b, n)
    if b == 0 or n == 0:
        return y
    mb = triton.next_power_of_2(b)
    tiles = tile(TILES)[mb]
    blocks = triton.cdiv(n, tiles.rows)
    if split is None:
        split = min(8, triton.next_power_of_2(triton.cdiv(PROGRAMS, blocks)))
    part = x.new_empty(split, n, mb, dtype=torch.float32) if split > 1 else y
    xt = _feature_major(x, mb)
    dtype = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}[x.dtype]
    _decode[(blocks, split)](
        _words(xt, torch.int32) if mb > 1 and dtype != tl.float32 else xt,
        _words(values, torch.int64),
        _words(columns, torch.int64),
        base,
        start,
        order,
        bias,
        y,
        part,
        n,
        b,
        y.stride(0),
        DTYPE=dtype,
        COLUMN_BITS=columns.element_size() * 8,
        MB=mb,
        ROWS=tiles.rows,
        LANES=tiles.lanes,
        UNROLL=tiles.unroll,
        SPLIT=split,
        num_warps=tiles.warps,
        enable_fp_fusion=True,
    )
    if split > 1:
        _combine[(triton.cdiv(n, 128),)](
            part, order, bias, y, n, b, y.stride(0), MB=mb, ROWS=128, SPLIT=split, num_warps=4, enable_fp_fusion=True
        )
    return y
