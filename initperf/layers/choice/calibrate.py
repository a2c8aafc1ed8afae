"""Measures the break-even densities that initperf/layers/choice/table.py decides by: about a minute on two cores.

For every product, batch and size of layer the dense product is timed, and the sparse kernel at two densities; its time is
close to linear in density, so a line through the two meets the dense time at the break-even. The table is written whole or
not at all.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from initperf.core import ops
from initperf.core.checks import InitPerfImportError, fail
from initperf.core.files import write_atomically
from initperf.layers.choice import table as choice
from initperf.layers.choice.table import KINDS, MOST, ROWS, WEIGHTS, Table

if not ops.usable("numba"):
    fail("numba, whose kernels are timed: pip install numba", "an installation without", kind=InitPerfImportError)

from initperf.kernels.cpu.linear import masked_linear, sparse_linear  # noqa: E402
from initperf.kernels.cpu.sparse.compressed_index import sparse_tensors  # noqa: E402
from initperf.kernels.cpu.sparse.index import pattern_tensors  # noqa: E402

DENSITIES = (0.05, 0.5)
OTHERS = 8 << 20
SECONDS = 0.008  # a timing lasts at least this, or three calls
MARGIN = (
    0.95  # the sparse kernel must be that much faster: a wrong choice near the break-even costs little, a slow one more
)
# Seconds a product that a layer spends more where not all of them are dense.
OVERHEAD = {"masked": 12e-6, "sparse": 8e-6}
DTYPES = {4: torch.float32, 2: torch.bfloat16}
STEPS = len(DTYPES) * len(WEIGHTS) * len(ROWS)

Product = Callable[[], object]


def calibrate() -> Table:
    """Measure, keep the table for this machine, and use it from now on."""
    for _ in steps():
        pass
    return choice.tables(torch.get_num_threads())


def steps() -> Iterator[None]:
    """The same in STEPS steps, for a progress bar; the table counts when all are done."""
    table: Table = {f"{kind}/{size}": [[0.0] * len(WEIGHTS) for _ in ROWS] for kind in KINDS for size in DTYPES}
    for size, dtype in DTYPES.items():
        for j, weights in enumerate(WEIGHTS):
            layers = [_Layer(math.isqrt(weights), density, dtype) for density in DENSITIES]
            for i, rows in enumerate(ROWS):
                for kind, density in _break_evens(layers, rows):
                    table[f"{kind}/{size}"][i][j] = density
                yield
    threads = torch.get_num_threads()
    content = {"threads": threads, "rows": ROWS, "weights": WEIGHTS, "table": table}
    write_atomically(choice.table_path(threads), json.dumps(content))
    choice.forget()


class _Layer:
    """A square layer with random survivors, and its products."""

    def __init__(self, side: int, density: float, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(0)
        self.mask = torch.rand(side, side, generator=generator) < density
        self.weight = torch.randn(side, side, generator=generator).mul_(self.mask).to(dtype)
        self.values = self.weight[self.mask][:, None].contiguous()
        self.bits = pack_bits(self.mask)
        self.pattern, self.sparse = pattern_tensors(self.mask), sparse_tensors(self.mask)
        self.density = float(self.mask.float().mean())

    def products(self, x: Tensor) -> dict[str, tuple[Product, Product]]:
        """kind -> (sparse, dense) calls on a batch that serves as x and as dy."""
        side = len(self.mask)
        w, mask, values, bits = self.weight, self.mask, self.values, self.bits

        return {
            "masked_linear": (
                lambda: masked_linear.masked_linear(x, w, None, mask, self.pattern, True),
                lambda: masked_linear.dense_linear(x, w, None, mask, self.pattern, True),
            ),
            "masked_grad_input": (
                lambda: masked_linear.masked_grad_input(x, w, mask, self.pattern, True),
                lambda: masked_linear.dense_grad_input(x, w, mask, self.pattern, True),
            ),
            "masked_grad_weight": (
                lambda: masked_linear.masked_grad_weight(x, x, mask, self.pattern),
                lambda: masked_linear.dense_grad_weight(x, x, mask, self.pattern),
            ),
            "sparse_linear": (
                lambda: sparse_linear.sparse_linear(x, values, None, bits, side, self.sparse),
                lambda: sparse_linear.dense_linear(x, values, None, bits, side),
            ),
            "sparse_grad_input": (
                lambda: sparse_linear.sparse_grad_input(x, values, bits, side, self.sparse),
                lambda: sparse_linear.dense_grad_input(x, values, bits, side),
            ),
            "sparse_grad_values": (
                lambda: sparse_linear.sparse_grad_values(x, x, bits, self.sparse),
                lambda: sparse_linear.dense_grad_values(x, x, bits, len(values)),
            ),
        }


def pack_bits(mask: Tensor) -> Tensor:
    """The mask as bits, row-major, the first in the lowest bit of a byte."""
    return torch.from_numpy(np.packbits(mask.numpy().reshape(-1), bitorder="little"))


def _break_evens(layers: list[_Layer], rows: int) -> Iterator[tuple[str, float]]:
    x = torch.randn(rows, len(layers[0].mask), generator=torch.Generator().manual_seed(1)).to(layers[0].weight.dtype)
    low, high = (layer.products(x) for layer in layers)
    for kind in KINDS:
        calls = (low[kind][0], high[kind][0], low[kind][1])
        first, second, dense = interleaved(calls)
        slope = (second - first) / (layers[1].density - layers[0].density)
        start = first - slope * layers[0].density
        room = MARGIN * dense - OVERHEAD[kind.split("_")[0]] - start
        yield kind, min(MOST, max(0.0, room / slope)) if slope > 0 else (MOST if room > 0 else 0.0)


def interleaved(calls: tuple[Product, ...]) -> list[float]:
    """Least time of each call in rounds that take turns, after a call that warms (and compiles).

    Before each, an op of torch writes OTHERS bytes, as the layers around it do: with warm caches, and with our threads
    awake, sparse products win at densities at which they lose within a training step.
    """
    others = torch.empty(OTHERS, dtype=torch.uint8)
    for call in calls:
        call()
    best = [math.inf] * len(calls)
    end = time.perf_counter() + SECONDS * len(calls)
    rounds = 0
    while rounds < 3 or time.perf_counter() < end:
        for i, call in enumerate(calls):
            others.fill_(rounds % 2)
            start = time.perf_counter()
            call()
            best[i] = min(best[i], time.perf_counter() - start)
        rounds += 1
    return best
