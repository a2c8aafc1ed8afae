"""A run of small sparse layers, y = relu(x W^T + b) or without ReLU, with all of its gradients: two calls a training step.

Activations and their gradients stay in tiles of batch lanes from the first layer to the last, so nothing is packed, or
handed through Python and autograd, in between. Every part of the batch goes through all layers with one thread; then
panels of the weights' gradients are shared by the threads. Sums over columns and over the batch have one fixed order, which
follows from the batch alone: the bits do not depend on threads.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import cast

import numpy as np
import torch
from torch import Tensor

from ..core.jit import jit, threads
from ..core.memory import working_memory
from ..core.shares import ME, among, on_threads, part_of
from ..core.vectors import LANES, ROWS, compute_pointer, shifted, storage_pointer
from ..sparse.index import PANEL
from ..sparse.many_rows import vectors_of
from ..sparse.storage import KINDS, SLACK
from ..sparse.tiles import pack, unpack
from .gradients import CURSOR, TILE_IN, TILE_OUT, chain_backward
from .layer import FIELDS, INPUTS, OUTPUTS, VALUES, describe, layer_forward, order_units, rows_of

SERIAL = 1 << 20  # multiply-adds below which a second thread costs more than it saves


@jit()
def _forward(share, vectors, kind, plan_at, layers, x_at, y_at, rows, parts, lines, tiles_at, bytes_each, scratch):
    """A share of the batch's parts through all layers; what each layer reads and leaves stays in the tiles."""
    if share[ME] < 0:
        on_threads(share)
        return
    first, last = part_of(share, parts)
    if first >= last:
        return
    scratch += share[ME] * bytes_each
    plan, lanes = rows_of(plan_at, layers), vectors * LANES
    K, N = plan[0, INPUTS], plan[layers - 1, OUTPUTS]
    x, y, tiles = storage_pointer(x_at, kind), storage_pointer(y_at, kind), compute_pointer(tiles_at, kind)
    values = compute_pointer(scratch + CURSOR, kind)
    for part in range(first, last):
        b = part * lanes
        pack(vectors, shifted(x, b * K), K, 1, rows - b, K, shifted(tiles, part * lines * lanes))
    for i in range(layers):
        layer = plan[i]
        order_units(kind, layer, layer[VALUES], values, scratch)
        for part in range(first, last):
            tile = shifted(tiles, part * lines * lanes)
            layer_forward(
                vectors,
                kind,
                layer,
                values,
                shifted(tile, layer[TILE_IN] * lanes),
                shifted(tile, layer[TILE_OUT] * lanes),
            )
    for part in range(first, last):
        b = part * lanes
        tile = shifted(tiles, (part * lines + plan[layers - 1, TILE_OUT]) * lanes)
        unpack(vectors, tile, N, rows - b, shifted(y, b * N), N)


def line_vectors_of(batch: int) -> int:
    """V, the vectors a line. Two parts of 32 lanes rather than one of 64, so that two threads share it."""
    vectors = vectors_of(batch)
    return 2 if vectors == 4 and batch <= 4 * LANES else vectors


Layer = tuple[tuple[int, int], int, list[Tensor], bool]


class TrainingPlan:
    """What these kernels know of a run of layers with given masks, in one dtype. It never changes, so threads may share it.

    layers: (shape (N, K) of the weight, survivors, the six tensors of sparse_tensors, ReLU or not).
    """

    def __init__(self, layers: Sequence[Layer], dtype: torch.dtype) -> None:
        self.dtype, self.kind = dtype, KINDS[dtype]
        self.compute = torch.float64 if dtype == torch.float64 else torch.float32
        self.indices = [index for _, _, index, _ in layers]  # to own their memory
        self.inputs, self.outputs = layers[0][0][1], layers[-1][0][0]
        self.nnz, self.weights = sum(nnz for _, nnz, *_ in layers), sum(N * K for (N, K), *_ in layers)
        padded = [index[0].shape[0] * index[0].shape[2] * ROWS for index in self.indices]
        padded_t = [index[3].shape[0] * index[3].shape[2] * ROWS for index in self.indices]
        entering = np.cumsum([0, self.inputs, *padded])  # where tiles begin: of x, then of what each layer leaves
        gradients = np.cumsum([0, *(max(a, b) for a, b in zip(padded, [*padded_t[1:], 0], strict=True))])
        self.lines, self.gradient_lines, self.lines_of_x = int(entering[-1]), int(gradients[-1]), padded_t[0]
        self.rows = [N for (N, _), *_ in layers]
        self.fields = np.zeros((len(layers), FIELDS), np.int64)
        self.panels: list[int] = []  # their slots
        for i, ((N, K), nnz, index, relu) in enumerate(layers):
            units, columns, _, across, their_columns, places = index
            other = [*across.shape[:3], across.data_ptr(), their_columns.data_ptr(), places.data_ptr(), places.numel()]
            tiles = [entering[i], entering[i + 1], gradients[i - 1], gradients[i]]
            self.fields[i] = [*describe(N, K, nnz, relu, [0] * 4, index), *other, *tiles]
            begins = [*units[:, 0, 0, 3].tolist(), columns.numel()]
            self.panels += [b - a for a, b in pairwise(begins)]
        self.slots, self.descending = sum(self.panels), [index[4].numel() for index in self.indices]
        most = max(
            PANEL, *(max(index[1].numel(), index[4].numel()) for index in self.indices)
        )  # elements, or bias sums
        self.bytes_each = -(-(most + SLACK) * self.compute.itemsize // 64) * 64 + CURSOR
        self._owners: dict[int, np.ndarray] = {}

    def owners(self, workers: int) -> np.ndarray:
        """Which worker computes the gradients of which panel: the largest first, each to the one with the least to do."""
        found = self._owners.get(workers)
        if found is None:
            found, loads = np.zeros(len(self.panels), np.int32), [0] * workers
            for p in sorted(range(len(self.panels)), key=lambda p: -self.panels[p]):
                found[p] = worker = loads.index(min(loads))
                loads[worker] += self.panels[p]
            self._owners[workers] = found
        return found

    def _at(self, addresses: list[int]) -> np.ndarray:
        """The fields of all layers with these addresses, four each."""
        fields = self.fields.copy()
        fields[:, VALUES : VALUES + 4] = np.array(addresses).reshape(-1, 4)
        return fields

    def forward(self, x: Tensor, parameters: Sequence[Tensor | None]) -> tuple[Tensor, Tensor]:
        """(y (B, outputs), the tiles for `backward`) of x (B, inputs), B > 0.

        parameters: values (nnz, 1) and bias or None, layer by layer. All are contiguous, on the CPU, and of the plan's dtype.
        """
        rows = x.shape[0]
        vectors = line_vectors_of(rows)
        lanes = vectors * LANES
        parts = -(-rows // lanes)
        addresses: list[int] = []
        for values, bias in zip(parameters[::2], parameters[1::2], strict=True):
            addresses += cast(Tensor, values).data_ptr(), 0 if bias is None else bias.data_ptr(), 0, 0
        fields, y = self._at(addresses), x.new_empty(rows, self.outputs)
        tiles = torch.empty(parts * self.lines * lanes, dtype=self.compute)
        workers = min(threads(), parts) if self.slots * rows >= SERIAL else 1
        memory = working_memory(workers * self.bytes_each)
        _forward(
            *(among(workers), vectors, self.kind, fields.ctypes.data, len(fields), x.data_ptr(), y.data_ptr()),
            *(rows, parts, self.lines, tiles.data_ptr(), self.bytes_each, memory.data_ptr()),
        )
        return y, tiles

    def backward(
        self, dy: Tensor, tiles: Tensor, values: Sequence[Tensor], needs_x: bool, needs: Sequence[bool]
    ) -> tuple[Tensor | None, list[Tensor | None]]:
        """(dx, the gradients of values and bias, layer by layer), of dy (B, outputs), contiguous; None where not needed."""
        rows = dy.shape[0]
        vectors = line_vectors_of(rows)
        lanes = vectors * LANES
        parts = -(-rows // lanes)
        gradients: list[Tensor | None] = []
        addresses: list[int] = []
        lowest = -1 if needs_x else len(values)
        for i, value in enumerate(values):
            dv = dy.new_empty(value.shape[0], 1) if needs[2 * i] else None
            db = dy.new_empty(self.rows[i]) if needs[2 * i + 1] else None
            gradients += dv, db
            addresses += value.data_ptr(), 0, 0 if dv is None else dv.data_ptr(), 0 if db is None else db.data_ptr()
            if lowest > i and not (dv is None and db is None):
                lowest = i
        fields, dx = self._at(addresses), dy.new_empty(rows, self.inputs) if needs_x else None
        gradient_lines = self.gradient_lines + (self.lines_of_x if needs_x else 0)
        count = threads()
        descending = sum(self.descending[lowest + 1 :]) * rows
        workers = (min(count, parts) if descending >= SERIAL else 1, count if self.slots * rows >= SERIAL else 1)
        owners = self.owners(workers[1])
        tile_bytes = -(-parts * gradient_lines * lanes * self.compute.itemsize // 64) * 64
        memory = working_memory(tile_bytes + max(workers) * self.bytes_each)
        at = memory.data_ptr()
        chain_backward(
            *(*(among(count) for count in workers), self.bytes_each, vectors, self.kind, fields.ctypes.data),
            *(owners.ctypes.data, (len(fields), len(owners)), dy.data_ptr(), 0 if dx is None else dx.data_ptr(), rows),
            *(parts, (self.lines, gradient_lines, lowest), tiles.data_ptr(), at, at + tile_bytes),
        )
        return dx, gradients


def sparse_chain_training(
    x: Tensor, dy: Tensor, layers: list[tuple[Tensor, Tensor | None, Tensor, list[Tensor], bool]]
) -> list[Tensor]:
    """See kernels/reference/chain/training.py; for calls that keep no plan, with B > 0."""
    described = [((mask.shape[0], mask.shape[1]), len(values), index, relu) for values, _, mask, index, relu in layers]
    plan = TrainingPlan(described, x.dtype)
    parameters = [p for values, bias, *_ in layers for p in (values, bias)]
    y, tiles = plan.forward(x.contiguous(), parameters)
    values = [values for values, *_ in layers]
    dx, gradients = plan.backward(dy.contiguous(), tiles, values, True, [p is not None for p in parameters])
    return [t for t in (y, dx, *gradients) if t is not None]
