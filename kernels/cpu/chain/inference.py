"""A run of small sparse layers, each y = relu(x W^T + b) or without ReLU, as one call: for inference.

Small layers are bound by what surrounds their product: Python, packing, reordering weights. Here activations stay in the
second-level cache between layers, and the weights are kept in the order that each kernel reads: with a few batch rows in
the slices of kernels/cpu/chain/slices.py, with more in the units of kernels/cpu/sparse/index.py. Both orders are made from a copy of the values, and every call compares
that copy with the values (versions do not know of writes through `.data`): where they differ nothing is computed, and the
plan is made anew. A plan whose copy is made never changes but by gaining an order, so threads may share it. Sums have one
fixed order: the bits do not depend on threads.
"""

from __future__ import annotations

import threading

import numpy as np
import torch
from numba import carray, int64, uint8
from torch import Tensor

from ..core.jit import jit, threads
from ..core.memory import working_memory
from ..core.scalars import full_vectors, pointer
from ..core.shares import ME, WORKERS, among, on_threads, part_of
from ..core.vectors import LANES, ROWS, ZERO, compute_pointer, load, shifted, storage_pointer, store
from ..sparse.few_rows import FEW
from ..sparse.index import BLOCK
from ..sparse.many_rows import SERIAL, vectors_of
from ..sparse.storage import KINDS, PLACES, SLACK, take_places
from ..sparse.tiles import pack, unpack
from .layer import (
    BIAS,
    BYTES,
    FIELDS,
    INPUTS,
    NNZ,
    OTHERS,
    OUTPUTS,
    RECORDS,
    RELU,
    VALUES,
    describe,
    layer_forward,
    order_units,
    rows_of,
)
from .slices import multiply_slices, slices_of

_COPY, _BLOCKS, _SLICES, _STEPS, _SLICE_COLUMNS, _SLICE_VALUES, _SOURCE, _POSITIONS, _SLOTS = range(OTHERS, OTHERS + 9)
_UNIT_VALUES, _READY = range(OTHERS + 9, OTHERS + 11)
_IN_SLICES, _IN_UNITS = 1, 2  # bits of _READY


@jit()
def _differs(one, other, size):
    """Whether two stretches of `size` bytes, a multiple of 8, differ."""
    full_vectors()
    a, b = carray(pointer(np.uintp(one), int64), size // 8), carray(pointer(np.uintp(other), int64), size // 8)
    found = np.int64(0)
    for i in range(size // 8):
        found |= a[i] ^ b[i]
    return found != 0


@jit()
def _differs_anywhere(one, other, size):
    even = size // 8 * 8
    a, b = carray(pointer(np.uintp(one), uint8), size), carray(pointer(np.uintp(other), uint8), size)
    for i in range(even, size):
        if a[i] != b[i]:
            return True
    return _differs(one, other, even)


@jit()
def _is_current(itemsize, plan, form):
    """Whether the values are those of the copies, and in the order of `form`."""
    for i in range(plan.shape[0]):
        layer = plan[i]
        if not layer[_READY] & form or _differs_anywhere(layer[VALUES], layer[_COPY], layer[NNZ] * itemsize):
            return False
    return True


@jit()
def _fill_slices(kind, layer):
    """The values of the copy in the order of the slices."""
    values = storage_pointer(layer[_COPY], kind)
    source, out = storage_pointer(layer[_SOURCE], PLACES), compute_pointer(layer[_SLICE_VALUES], kind)
    take_places(values, source, layer[_SLOTS], out)


@jit()
def _prepare(kind, plan_at, layers, form, cursor_at):
    """Bring the copies into the order of `form`."""
    plan = rows_of(plan_at, layers)
    for i in range(layers):
        layer = plan[i]
        if not layer[_READY] & form:
            if form == _IN_SLICES:
                _fill_slices(kind, layer)
            else:
                order_units(kind, layer, layer[_COPY], compute_pointer(layer[_UNIT_VALUES], kind), cursor_at)
            layer[_READY] |= form


@jit()
def _compare(itemsize, plan_at, layers):
    """Whether the values are still those of the copies."""
    plan = rows_of(plan_at, layers)
    found = False
    for i in range(layers):
        found |= _differs_anywhere(plan[i, VALUES], plan[i, _COPY], plan[i, NNZ] * itemsize)
    return not found


@jit()
def _few(kind, itemsize, plan_at, layers, x_at, y_at, rows, size, scratch):
    """One batch row after another. size: elements of each of the three buffers in `scratch`. False, and nothing done, if not current."""
    plan = rows_of(plan_at, layers)
    if not _is_current(itemsize, plan, _IN_SLICES):
        return False
    source, out = storage_pointer(x_at, kind), storage_pointer(y_at, kind)
    buffer = compute_pointer(scratch, kind)
    partial = shifted(buffer, 2 * size)
    inputs, outputs = plan[0, INPUTS], plan[layers - 1, OUTPUTS]
    for b in range(rows):
        for k in range(inputs):
            store(buffer, k, load(source, b * inputs + k))
        for k in range(inputs, plan[0, _BLOCKS] * BLOCK):
            store(buffer, k, ZERO)
        for i in range(layers):
            layer = plan[i]
            N, blocks, slices = layer[OUTPUTS], layer[_BLOCKS], layer[_SLICES]
            x, y = shifted(buffer, i % 2 * size), shifted(buffer, (i + 1) % 2 * size)
            steps, positions = storage_pointer(layer[_STEPS], RECORDS), storage_pointer(layer[_POSITIONS], RECORDS)
            columns = storage_pointer(layer[_SLICE_COLUMNS], BYTES)
            values, bias = compute_pointer(layer[_SLICE_VALUES], kind), storage_pointer(layer[BIAS], kind)
            slot = np.int64(0)
            for kb in range(blocks):
                here = shifted(steps, kb * slices)
                sums = shifted(partial, kb * slices * LANES)
                multiply_slices(
                    here, slices, shifted(columns, slot), shifted(values, slot), shifted(x, kb * BLOCK), sums
                )
                for s in range(slices):
                    slot += LANES * np.int64(here[s])
            for n in range(N):
                total = load(bias, n) if layer[BIAS] else ZERO
                for kb in range(blocks):
                    total += load(partial, np.int64(positions[n * blocks + kb]))
                if layer[RELU] and total < ZERO:
                    total = ZERO
                store(y, n, total)
            if i + 1 < layers:
                for k in range(N, plan[i + 1, _BLOCKS] * BLOCK):
                    store(y, k, ZERO)
        y = shifted(buffer, layers % 2 * size)
        for n in range(outputs):
            store(out, b * outputs + n, load(y, n))
    return True


@jit()
def _many(share, itemsize, vectors, kind, plan_at, layers, x_at, y_at, rows, parts, size, bytes_each, scratch):
    """A share of the batch blocks through all layers. size: elements of each of the two tiles in `scratch`. False, and nothing done, if not current."""
    plan = rows_of(plan_at, layers)
    if (share[ME] < 0 or share[WORKERS] == 1) and not _is_current(itemsize, plan, _IN_UNITS):
        return False
    if share[ME] < 0:
        on_threads(share)
        return True
    first, last = part_of(share, parts)
    scratch += share[ME] * bytes_each
    lanes = vectors * LANES
    inputs, outputs = plan[0, INPUTS], plan[layers - 1, OUTPUTS]
    tiles = compute_pointer(scratch, kind)
    for part in range(first, last):
        b = part * lanes
        pack(vectors, shifted(storage_pointer(x_at, kind), b * inputs), inputs, 1, rows - b, inputs, tiles)
        for i in range(layers):
            layer = plan[i]
            x_tile, y_tile = shifted(tiles, i % 2 * size), shifted(tiles, (i + 1) % 2 * size)
            values = compute_pointer(layer[_UNIT_VALUES], kind)
            layer_forward(vectors, kind, layer, values, x_tile, y_tile)
        y = shifted(storage_pointer(y_at, kind), b * outputs)
        unpack(vectors, shifted(tiles, layers % 2 * size), outputs, rows - b, y, outputs)
    return True


Layer = tuple[Tensor, Tensor | None, Tensor, list[Tensor], bool]


class Plan:
    """A run of layers as the kernels read it: memory, addresses, and a copy of the values.

    layers: (values (nnz, 1), bias or None, mask (N, K) bool, index [units, columns, starts], relu), all on the CPU and
    contiguous, of one dtype. slices: of an earlier plan for the same masks.
    """

    def __init__(self, layers: list[Layer], slices: list[list[Tensor]] | None = None) -> None:
        self.arguments, self.lock = layers, threading.Lock()
        self.dtype = layers[0][0].dtype
        self.inputs, self.outputs = layers[0][2].shape[1], layers[-1][2].shape[0]
        self.slots = sum(index[1].numel() for _, _, _, index, _ in layers)
        self.nnz, self.weights = sum(v.numel() for v, *_ in layers), sum(mask.numel() for _, _, mask, *_ in layers)
        self.fields = torch.zeros((len(layers), FIELDS), dtype=torch.int64)
        self.slices = slices or [slices_of(mask) for _, _, mask, *_ in layers]
        self.kept: list[Tensor] = []
        compute = torch.float64 if self.dtype == torch.float64 else torch.float32
        self.itemsize, self.bytes = self.dtype.itemsize, compute.itemsize
        few, tile, rows = 0, self.inputs, 0
        for fields, of_slices, (values, bias, mask, index, relu) in zip(self.fields, self.slices, layers, strict=True):
            (N, K), (panels, _, per_panel, _) = mask.shape, index[0].shape
            steps, _, _, source = of_slices
            blocks, slices_ = steps.shape
            few = max(few, blocks * BLOCK, N, blocks * slices_ * LANES)
            tile = max(tile, panels * per_panel * ROWS)
            rows = max(rows, per_panel * ROWS)
            in_slices = torch.empty(source.numel(), dtype=compute)
            in_units = torch.empty(index[1].numel() + SLACK, dtype=compute)
            own = [in_slices, in_units, values.clone()]
            self.kept += own
            at = [t.data_ptr() for t in (*of_slices, *own)]
            addresses = [values.data_ptr(), 0 if bias is None else bias.data_ptr(), 0, 0]
            shared = describe(N, K, values.numel(), relu, addresses, index)
            here = [at[6], blocks, slices_, at[0], at[2], at[4], at[3], at[1], source.numel(), at[5], 0]
            fields[: OTHERS + len(here)] = torch.tensor(shared + here)
        self.few, self.tile, self.rows = -(-few // LANES) * LANES, tile, rows
        self.address, self.layers, self.kind = self.fields.data_ptr(), len(layers), KINDS[self.dtype]

    def prepared(self, rows: int) -> Plan:
        """This plan, or where the values have changed one with a new copy, ready for so many rows."""
        if not _compare(self.itemsize, self.address, self.layers):
            return Plan(self.arguments, self.slices).prepared(rows)
        cursor = torch.empty(8 * self.rows, dtype=torch.uint8)
        form = _IN_SLICES if rows <= FEW else _IN_UNITS
        with self.lock:
            _prepare(self.kind, self.address, self.layers, form, cursor.data_ptr())
        return self

    def __call__(self, x: Tensor, y: Tensor) -> bool:
        """y (B, outputs) of a contiguous x (B, inputs), both of the plan's dtype; False, with nothing done, if it is not prepared."""
        rows = x.shape[0]
        x_at, y_at = x.data_ptr(), y.data_ptr()
        if rows <= FEW:
            memory = working_memory(3 * self.few * self.bytes)
            what = self.kind, self.itemsize, self.address, self.layers
            return bool(_few(*what, x_at, y_at, rows, self.few, memory.data_ptr()))
        vectors = vectors_of(rows)
        lanes = vectors * LANES
        parts, size = -(-rows // lanes), self.tile * lanes
        workers = min(threads(), parts) if self.slots * rows >= SERIAL else 1
        bytes_each = 2 * size * self.bytes
        memory = working_memory(workers * bytes_each)
        plan = self.itemsize, vectors, self.kind, self.address, self.layers
        return bool(_many(among(workers), *plan, x_at, y_at, rows, parts, size, bytes_each, memory.data_ptr()))


def sparse_chain(x: Tensor, layers: list[Layer]) -> Tensor:
    """See kernels/reference/chain/inference.py; for calls that keep no plan."""
    y = torch.empty((len(x), layers[-1][2].shape[0]), dtype=x.dtype)
    if len(x):
        Plan(layers).prepared(len(x))(x.contiguous(), y)
    return y
