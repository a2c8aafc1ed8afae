"""The order of weights for one batch row at a time: slices, lanes over 16 rows of like counts.

X is looked up in a block of 128 columns that stays in registers for all slices of the block; nothing is summed across lanes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import carray, types, uint8
from torch import Tensor

from ..core.jit import jit
from ..core.scalars import pointer
from ..core.vectors import LANES, Loop, element_size, element_type, filled, fused, intrinsic, store_vector, vector_at
from ..sparse.few_rows_ir import lookup, lookup_table
from ..sparse.index import BLOCK


@intrinsic
def multiply_slices(typingctx: Any, steps: Any, slices: Any, columns: Any, values: Any, x: Any, sums: Any) -> Any:
    """sums[16 s + lane] = sum over j < steps[s] of values[slot] * x[columns[slot]], slot = 16 (steps before s + j) + lane."""
    element = element_type(x.dtype)
    i64 = ir.IntType(64)

    def codegen(ctx: Any, builder: Any, sig: Any, args: Any) -> Any:
        counts, count, cols, vals, block, out = args
        table = lookup_table(builder, block, element, BLOCK)
        outer = Loop(builder, count, [ir.Constant(i64, 0)])
        many = builder.sext(builder.load(builder.gep(counts, [outer.j])), i64)
        begin = outer.carried[0]
        end = builder.add(begin, builder.mul(many, ir.Constant(i64, LANES)))
        none = filled(ir.VectorType(element, LANES), 0.0)
        live = filled(ir.VectorType(ir.IntType(1), LANES), 1)
        inner = Loop(builder, end, [none], first=begin, stride=LANES)
        numbers = vector_at(builder, cols, inner.j, ir.IntType(8), 1)
        value = vector_at(builder, vals, inner.j, element, element_size(element))
        found = lookup(builder, table, block, numbers, element, live)
        inner.end([fused(builder, value, found, inner.carried[0])])
        place = builder.mul(outer.j, ir.Constant(i64, LANES))
        store_vector(builder, inner.carried[0], out, place, element_size(element))
        outer.end([end])
        return ctx.get_dummy_value()

    return types.void(steps, types.int64, columns, values, x, sums), codegen


@jit()
def _index_slices(mask_at, sizes, block, steps, positions, columns, source, fill):
    """The slices of a mask (N, K): rows by count in every block of columns, 16 a slice. Returns the slots; writes them if `fill`."""
    N, K = sizes
    mask = carray(pointer(np.uintp(mask_at), uint8), (N, K))
    blocks, slices = steps.shape
    before, counts = np.zeros(N, np.int64), np.empty(N, np.int64)
    starts = np.zeros(N, np.int64)
    for n in range(1, N):
        starts[n] = starts[n - 1]
        for k in range(K):
            starts[n] += mask[n - 1, k]
    slot = np.int64(0)
    for kb in range(blocks):
        k0, k1 = kb * block, min(K, kb * block + block)
        for n in range(N):
            counts[n] = 0
            for k in range(k0, k1):
                counts[n] += mask[n, k]
        order = np.argsort(-counts, kind="mergesort")
        for s in range(slices):
            most = counts[order[s * LANES]]
            steps[kb, s] = most
            for lane in range(LANES):
                at = s * LANES + lane
                if at < N:
                    positions[order[at], kb] = kb * slices * LANES + at
                if not fill:
                    continue
                found = np.int64(0)
                if at < N:
                    n = order[at]
                    for k in range(k0, k1):
                        if mask[n, k]:
                            columns[slot + LANES * found + lane] = k - k0
                            source[slot + LANES * found + lane] = starts[n] + before[n] + found
                            found += 1
                last = columns[slot + LANES * (found - 1) + lane] if found else np.uint8(0)
                for j in range(found, most):
                    columns[slot + LANES * j + lane] = last
                    source[slot + LANES * j + lane] = -1
            slot += LANES * most
        for n in range(N):
            before[n] += counts[n]
    return slot


def slices_of(mask: Tensor) -> list[Tensor]:
    """[steps (blocks, slices), positions (N, blocks), columns (slots,) uint8, source (slots,)] of a bool mask (N, K), int32 else.

    source: the row-major number of each slot's survivor, or -1.
    """
    N, K = mask.shape
    blocks, slices = -(-K // BLOCK), -(-N // LANES)
    steps = torch.empty((blocks, slices), dtype=torch.int32)
    positions = torch.empty((N, blocks), dtype=torch.int32)
    mask = mask.contiguous()
    arguments = mask.data_ptr(), (N, K), BLOCK, steps.numpy(), positions.numpy()
    none = np.empty(0, np.uint8), np.empty(0, np.int32)
    slots = _index_slices(*arguments, *none, False)
    columns, source = torch.empty(slots, dtype=torch.uint8), torch.empty(slots, dtype=torch.int32)
    _index_slices(*arguments, columns.numpy(), source.numpy(), True)
    return [steps, positions, columns, source]
