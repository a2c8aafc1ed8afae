"""Product with a weight in compressed rows (CSR): y = x W^T + bias, for float32 and for very few survivors.

x and y lie feature-major, (K, B) and (N, B): a program takes one row of W and a stretch of the batch, and meets a survivor
with a whole stretch of x in one or two loads. It walks the survivors in aligned chunks of 4, whose columns and values come in
wide loads, and takes what does not fill a chunk at either end alone. Rows come in `order`, most survivors first, so that heavy
ones start first and neighbours, which share x in the first-level cache, end together.
The gradient of x is the same product with the transposed indices and the values permuted (`perm`).

Bound: each multiply-add takes one value of x from the first-level cache, 32 float32 a cycle where the arithmetic could do 128
(Gale et al. 2020, Sparse GPU Kernels for Deep Learning, reach the same quarter of the peak).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..targets import cast, tile

CHUNK: tl.constexpr = tl.constexpr(4)

# Stretch of the batch of one program (one warp), by bytes of a value: 32 bytes of each row of x a thread.
TILES = {
    "sm_80": {2: 256, 4: 256, 8: 128},
    "sm_90": {2: 256, 4: 256, 8: 128},
    "sm_100": {2: 256, 4: 256, 8: 128},
    "gfx942": {2: 512, 4: 256, 8: 128},
}


@triton.jit
def _chunk(words_ptr, chunk, BITS: tl.constexpr):
    """Words of 64 bits that hold the 4 fields of BITS bits of a chunk: one load up to 32 bits."""
    if BITS == 16:
        words = (tl.load(words_ptr + chunk),)
    elif BITS == 32:
        words = tl.split(tl.load(words_ptr + chunk * 2 + tl.arange(0, 2)))
    else:
        low = tl.split(tl.load(words_ptr + chunk * 4 + tl.arange(0, 2)))
        words = low + tl.split(tl.load(words_ptr + chunk * 4 + 2 + tl.arange(0, 2)))
    return words


@triton.jit
def _field(words, e: tl.constexpr, BITS: tl.constexpr):
    """Field e of 4, as an unsigned number in int32 or, for 64 bits, int64."""
    word = words[e * BITS // 64]
    if BITS < 64:
        word = (word >> (e * BITS % 64)).to(tl.int32)
    if BITS == 16:
        word &= 0xFFFF
    return word


@triton.jit
def _value(words, e: tl.constexpr, dtype: tl.constexpr, sums: tl.constexpr):
    """Field e of 4 values of `dtype`, in `sums`."""
    field = _field(words, e, dtype.primitive_bitwidth)
    if dtype == tl.bfloat16:
        value = (field << 16).to(tl.float32, bitcast=True)
    elif dtype == tl.float16:
        value = field.to(tl.uint16).to(tl.float16, bitcast=True)
    else:
        value = field.to(dtype, bitcast=True)
    return value.to(sums)


@triton.jit
def _sparse_matmul(
    # inputs
    xt_ptr,  # (K, ldx)
    values_words_ptr,  # (nnz,), as words of 64 bits; whole chunks only
    columns_words_ptr,  # (nnz,), the same
    values_ptr,  # (nnz,)
    columns_ptr,  # (nnz,)
    start_ptr,  # (N + 1,)
    order_ptr,  # (N,)
    bias_ptr,  # (N,) or None
    # output
    yt_ptr,  # (N, ldy)
    # sizes, strides: divided by 8, which tells Triton that 8 divides them
    B8,
    ldx8,
    ldy8,
    # tiles
    BB: tl.constexpr,
    EVEN: tl.constexpr,  # BB divides B
):
    dtype: tl.constexpr = xt_ptr.dtype.element_ty
    sums: tl.constexpr = tl.float64 if dtype == tl.float64 else tl.float32
    COLUMN_BITS: tl.constexpr = columns_ptr.dtype.element_ty.primitive_bitwidth
    row = tl.load(order_ptr + tl.program_id(0)).to(tl.int64)
    begin = tl.load(start_ptr + row)
    end = tl.load(start_ptr + row + 1)
    rb = tl.program_id(1) * BB + tl.arange(0, BB)
    inside = None if EVEN else rb < B8 * 8
    ldx = tl.cast(ldx8 * 8, tl.int64)  # a stride of 8 arrives as the constant 1
    acc = tl.zeros((BB,), sums)
    for part in tl.static_range(2):  # before the first whole chunk, behind the last
        low = begin if part == 0 else tl.maximum(end // CHUNK * CHUNK, tl.cdiv(begin, CHUNK) * CHUNK)
        high = tl.minimum(tl.cdiv(begin, CHUNK) * CHUNK, end) if part == 0 else end
        if low < high:
            for e in tl.static_range(CHUNK - 1):
                on = low + e < high
                column = tl.load(columns_ptr + low + e, mask=on, other=0).to(tl.int64)
                value = tl.load(values_ptr + low + e, mask=on, other=0.0).to(sums)
                keep = rb < tl.where(on, B8 * 8, 0)
                acc += value * tl.load(xt_ptr + column * ldx + rb, mask=keep, other=0.0).to(sums)
    for chunk in range(tl.cdiv(begin, CHUNK), end // CHUNK):
        columns = _chunk(columns_words_ptr, chunk, COLUMN_BITS)
        values = _chunk(values_words_ptr, chunk, dtype.primitive_bitwidth)
        for e in tl.static_range(CHUNK):
            x = tl.load(xt_ptr + _field(columns, e, COLUMN_BITS).to(tl.int64) * ldx + rb, mask=inside)
            acc += _value(values, e, dtype, sums) * x.to(sums)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + row).to(sums)
    tl.store(yt_ptr + row * (ldy8 * 8) + rb, cast(acc, dtype), mask=inside)


def feature_major(x: Tensor) -> Tensor:
    """x (B, K) as (K, B rounded up to 8); no copy where x lies so already."""
    b, k = x.shape
    if b % 8 == 0 and x.stride(0) == 1 and x.stride(1) % 8 == 0 and x.data_ptr() % 16 == 0:
        return x.t()
    out = x.new_empty(k, triton.cdiv(b, 8) * 8)
    out[:, :b] = x.t()
    return out


def chunk_words(t: Tensor) -> Tensor:
    """The whole chunks of t as words of 64 bits at an address that 16 divides."""
    t = t.contiguous()
    t = t if t.data_ptr() % 16 == 0 else t.clone()
    return t[: t.numel() // CHUNK.value * CHUNK.value].view(torch.int64)


def sparse_matmul(
    x: Tensor,
    values: Tensor,
    start: Tensor,
    columns: Tensor,
    order: Tensor,
    bias: Tensor | None = None,
    perm: Tensor | None = None,
) -> Tensor:
    """y (B, N) = x (B, K) W^T + bias, sums in float32 (float64 for float64); y lies feature-major, stride (1, >= B).

    x, values (nnz,), bias (N,): one dtype. W in rows: start (N + 1,) int32, columns (nnz,) uint16 or int32, order (N,) int32,
    the rows by falling number of survivors. perm (nnz,): survivor i has values[perm[i]] (for the gradient of x: dy, and the
    indices of W transposed).
    """
    b = x.shape[0]
    n = order.numel()
    values = values.flatten() if perm is None else values.flatten().index_select(0, perm)
    yt = x.new_empty(n, triton.cdiv(b, 8) * 8)
    y = yt[:, :b].t()
    if b == 0 or n == 0:
        return y
    xt = feature_major(x)
    batch = max(8, min(tile(TILES)[x.element_size()], triton.next_power_of_2(b)))
    _sparse_matmul[(n, triton.cdiv(b, batch))](
        xt,
        chunk_words(values),
        chunk_words(columns),
        values,
        columns,
        start,
        order,
        bias,
        yt,
        yt.shape[1] // 8,
        xt.stride(0) // 8,
        yt.shape[1] // 8,
        BB=batch,
        EVEN=yt.shape[1] % batch == 0,
        num_warps=1,
        enable_fp_fusion=True,
    )
    return y
