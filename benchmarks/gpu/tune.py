"""Times the tiles of every TILES table on this machine's GPU, and prints the rows to put there: `python -m benchmarks.gpu.tune`.

A tile whose result differs from the present one by more than rounding, or that does not compile, is never chosen.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch

from initperf.kernels.gpu import targets
from initperf.kernels.gpu.candidates import block_matmul, decode
from initperf.kernels.gpu.linear import masked_linear
from initperf.kernels.gpu.sparse import grad_tile, index, rows_grad
from initperf.kernels.gpu.sparse import rows as sparse_matmul
from initperf.kernels.reference.candidates import block_matmul as block_reference
from initperf.kernels.reference.sparse import rows as rows_reference
from tools.gpu_report.case import replaced


@dataclass(frozen=True)
class Choice:
    """One entry of a TILES table: `put(tile)` gives the row with that entry, `run` the call that it serves."""

    name: str
    module: Any
    put: Callable[[Any], Any]
    now: Any
    others: Iterable[Any]
    run: Callable[[], torch.Tensor]


def choices(device: str, size: int, batch: int) -> Iterator[Choice]:
    """Every entry, with its alternatives, on layers of size x size."""
    g = torch.Generator().manual_seed(0)

    def random(*shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.randn(*shape, generator=g).to(device, dtype)

    mask = (torch.rand(size, size, generator=g) < 0.1).to(device)
    weight = random(size, size, dtype=torch.bfloat16)
    packed = decode.pack(weight, mask)
    tiles = dict(targets.tile(decode.TILES))
    for rows, now in tiles.items():
        x = random(rows, size, dtype=torch.bfloat16)
        others = [
            decode.Tile(r, lanes, u, w) for r, lanes, u, w in product((4, 8, 16), (2, 4, 8, 16, 32), (1, 2), (2, 4, 8))
        ]
        yield Choice(
            f"decode {rows} rows", decode, lambda t, k=rows, row=tiles: row | {k: t}, now, others,
            lambda x=x: decode.decode(x, *packed),
        )  # fmt: skip

    by_rows = rows_reference.rows(mask)
    for dtype in (torch.float32, torch.bfloat16):
        bytes_, x, dy = dtype.itemsize, random(batch, size, dtype=dtype), random(batch, size, dtype=dtype)
        values = weight[mask].to(dtype)
        row = dict(targets.tile(sparse_matmul.TILES))
        yield Choice(
            f"sparse_matmul {dtype}", sparse_matmul, lambda t, k=bytes_, row=row: row | {k: t}, row[bytes_],
            (64, 128, 256, 512), lambda x=x, v=values: sparse_matmul.sparse_matmul(x, v, *by_rows),
        )  # fmt: skip
        row = dict(targets.tile(rows_grad.TILES))
        yield Choice(
            f"sparse_grad {dtype}", rows_grad, lambda t, k=bytes_, row=row: row | {k: t}, row[bytes_],
            list(product((4, 8, 16), (64, 128, 256))), lambda x=x, dy=dy: rows_grad.sparse_grad(dy, x, *by_rows),
        )  # fmt: skip
        row, bits = dict(targets.tile(grad_tile.TILES)), index.pattern_tensors(mask)
        yield Choice(
            f"masked dw {dtype}", grad_tile, lambda t, k=bytes_, row=row: row | {k: t}, row[bytes_],
            [grad_tile.Tile(*t) for t in product((16, 32, 64), (64, 128), (64, 128), (4, 8), (1, 2, 3, 4))],
            lambda x=x, dy=dy, bits=bits: masked_linear.masked_grad_weight(dy, x, mask, bits),
        )  # fmt: skip

    x, dy = random(batch, size, dtype=torch.bfloat16), random(batch, size, dtype=torch.bfloat16)
    row = dict(targets.tile(block_matmul.TILES))
    for block, (forward, gradient) in row.items():
        blocks = (torch.rand(-(-size // block), -(-size // block), generator=g) < 0.1).to(device)
        blocks[0, 0] = True
        by_blocks, values = block_reference.block_rows(blocks), block_reference.pack_blocks(weight, blocks, block)
        others = [block_matmul.Tile(*t) for t in product((64, 128, 256), (32, 64, 128), (4, 8), (2, 3, 4))]
        yield Choice(
            f"block {block} product", block_matmul, lambda t, k=block, b=gradient, row=row: row | {k: (t, b)}, forward, others,
            lambda v=values, p=by_blocks: block_matmul.block_matmul(x, v, *p, size),
        )  # fmt: skip
        yield Choice(
            f"block {block} gradient", block_matmul, lambda t, k=block, a=forward, row=row: row | {k: (a, t)}, gradient, others,
            lambda p=by_blocks, k=block: block_matmul.block_grad(dy, x, *p, k),
        )  # fmt: skip


def seconds(run: Callable[[], object], device: str, launches: int = 20) -> float:
    """Least mean time of a launch, of five rounds of launches that end in one synchronization."""
    rounds = []
    for _ in range(5 if device == "cuda" else 1):
        start = time.perf_counter()
        for _ in range(launches if device == "cuda" else 1):
            run()
        if device == "cuda":
            torch.cuda.synchronize()
        rounds.append((time.perf_counter() - start) / launches)
    return min(rounds)


def best(choice: Choice, device: str, limit: int | None = None) -> tuple[Any, float, float]:
    """(the fastest tile, its seconds, the present tile's seconds). limit: how many others are tried."""
    want = choice.run()
    now = seconds(choice.run, device)
    fastest, least = choice.now, now
    for other in list(choice.others)[:limit]:
        with replaced(choice.module, TILES={targets.arch(): choice.put(other)}):
            try:
                got = choice.run()
                scale = want.float().abs().max()
                if not bool(((got.float() - want.float()).abs() <= 0.02 * scale).all()):
                    continue
                took = seconds(choice.run, device)
            except Exception as error:  # too much shared memory, an odd shape: not a tile for this card
                print(f"  {choice.name} {other}: {type(error).__name__}", file=sys.stderr)
                continue
        if took < least:
            fastest, least = other, took
    return fastest, least, now


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--only", default="", help="entries whose name contains this")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("Expected a GPU that torch can use. Got none: torch.cuda.is_available() is False.", file=sys.stderr)
        return 1
    print(f"{torch.cuda.get_device_name()} ({targets.arch()})")
    for choice in choices("cuda", options.size, options.batch):
        if options.only in choice.name:
            tile, least, now = best(choice, "cuda")
            print(f"{choice.name}: {tile}  {least * 1e6:.1f} us (now {choice.now}, {now * 1e6:.1f} us)", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
