"""`python -m benchmarks.never_slower`: layers of many shapes, batches and densities against nn.Linear, and where they are slower than allowed.

Allowed (forward, and a step of forward and both gradients): MaskedLinear takes at most dense / 0.97 where dense takes
200 us or more, else at most 10 us more; SparseLinear at most dense / 0.85 from 256 batch rows on, dense / 0.4 below.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from statistics import median

import torch
from torch import Tensor, nn

from initperf import choice
from initperf.layers.linear import MaskedLinear, SparseLinear

SHAPES = ((64, 64), (256, 256), (784, 300), (1024, 1024), (4096, 1024), (4096, 4096))
BATCHES = (1, 2, 4, 16, 64, 256, 1024, 4096)
DENSITIES = (0.01, 0.05, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0)
LARGEST = 1 << 33  # batch x inputs x outputs of the cells that are timed
SECONDS = 0.15  # of alternated rounds a cell, at least ROUNDS
ROUNDS = 5
KINDS = {"masked": MaskedLinear, "sparse": SparseLinear}


def allowed(kind: str, batch: int, dense: float) -> float:
    """Seconds that a call may take where nn.Linear takes `dense`."""
    if kind == "masked":
        return dense / 0.97 if dense >= 200e-6 else dense + 10e-6
    return dense / (0.85 if batch >= 256 else 0.4)


def timed(call: Callable[[], object], number: int) -> float:
    start = time.perf_counter()
    for _ in range(number):
        call()
    return (time.perf_counter() - start) / number


def compare(ours: Callable[[], object], theirs: Callable[[], object]) -> tuple[float, float, float]:
    """Median times of both, and the median of the ratios theirs / ours of neighbouring rounds."""
    for call in (ours, theirs, ours, theirs):
        call()
    numbers = [max(1, round(1e-3 / min(timed(call, 1) for _ in range(3)))) for call in (ours, theirs)]
    rows: list[tuple[float, float]] = []
    end = time.perf_counter() + SECONDS
    while len(rows) < ROUNDS or time.perf_counter() < end:
        rows.append((timed(ours, numbers[0]), timed(theirs, numbers[1])))
    return median(a for a, _ in rows), median(b for _, b in rows), median(b / a for a, b in rows)


def cells(shapes: list[tuple[int, int]]) -> Iterator[tuple[str, int, int, int, float]]:
    for inputs, outputs in shapes:
        for batch in BATCHES:
            if batch * inputs * outputs <= LARGEST:
                for density in DENSITIES:
                    for kind in KINDS:
                        yield kind, batch, inputs, outputs, density


def step(layer: nn.Module, x: Tensor, dy: Tensor) -> None:
    layer.zero_grad()
    x.grad = None
    layer(x).backward(dy)


def measured(kind: str, batch: int, inputs: int, outputs: int, density: float) -> dict[str, tuple[float, float, float]]:
    """What `compare` finds for a forward pass and for a step of one cell."""
    generator = torch.Generator().manual_seed(0)
    layer = KINDS[kind](inputs, outputs, mask=torch.rand(outputs, inputs, generator=generator) <= density)
    dense = layer.to_dense()
    x, dy = torch.randn(batch, inputs, requires_grad=True), torch.randn(batch, outputs)
    with torch.no_grad():
        forward = compare(lambda: layer(x), lambda: dense(x))
    return {"forward": forward, "step": compare(lambda: step(layer, x, dy), lambda: step(dense, x, dy))}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", action="append", metavar="INPUTSxOUTPUTS", help="only these; may be repeated")
    parser.add_argument("--verbose", action="store_true", help="print every cell")
    options = parser.parse_args()
    shapes = [tuple(map(int, text.split("x"))) for text in options.shape] if options.shape else list(SHAPES)
    source = "measured" if choice.measured(torch.get_num_threads()) else "built-in"
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {source} break-even table")
    slower = count = 0
    for cell in cells(shapes):
        kind, batch, inputs, outputs, density = cell
        for what, (ours, theirs, ratio) in measured(*cell).items():
            count += 1
            too_slow = theirs / ratio > allowed(kind, batch, theirs)
            slower += too_slow
            if too_slow or options.verbose:
                where = f"{kind:6s} {what:7s} {batch:4d} x {inputs} -> {outputs}, density {density}"
                times = f"{ratio:.2f}x ({1e6 * ours:.1f} us, dense {1e6 * theirs:.1f} us)"
                print(f"{'SLOWER' if too_slow else '':6s} {where}: {times}", flush=True)
    print(f"{slower} of {count} slower than allowed")
    return int(slower > 0)


if __name__ == "__main__":
    raise SystemExit(main())
