"""The GPU's kernels against torch on the same card: dense products with the pre-masked weight, var, kthvalue.

Without a GPU nothing is timed; that both sides of every row agree is tested everywhere, small, by tests/project/test_bench_gpu.py.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from initperf.core.bits import pack_bits
from initperf.kernels.gpu.candidates import block_matmul, decode
from initperf.kernels.gpu.linear import masked_linear, sparse_linear
from initperf.kernels.gpu.masks import select
from initperf.kernels.gpu.moments import moments
from initperf.kernels.gpu.sparse import index as pattern
from initperf.kernels.reference.candidates import block_matmul as block_reference

SIZE, BATCH = 4096, 4096
BF16, F32 = torch.bfloat16, torch.float32
SHORT = {BF16: "bfloat16", F32: "float32"}


class Row(NamedTuple):
    """Ours, torch's way to the same result, and what one call of ours moves or computes."""

    ours: Callable[[], Tensor]
    theirs: Callable[[], Tensor]
    about: dict[str, Any]

    def check(self) -> None:
        """Raises where the two differ by more than the roundings of their dtype."""
        ours, theirs = self.ours(), self.theirs()
        close = 2e-2 if ours.dtype == BF16 else 1e-5
        torch.testing.assert_close(ours, theirs, rtol=close, atol=close * float(theirs.abs().max()), check_dtype=False)


class Layer:
    """Operands of a layer of size x size whose random mask keeps cells of block x block."""

    def __init__(self, device: str, size: int, batch: int, density: float, dtype: torch.dtype, block: int = 1) -> None:
        g = torch.Generator().manual_seed(0)
        cells = torch.rand(size // block, size // block, generator=g) < density
        cells[0, 0] = True
        self.cells = cells.to(device)
        self.mask = cells.repeat_interleave(block, 0).repeat_interleave(block, 1).to(device)
        self.x, self.dy = (torch.randn(batch, size, generator=g).to(device, dtype) for _ in range(2))
        self.weight = torch.randn(size, size, generator=g).to(device, dtype) * self.mask


def masked_grad(dtype: torch.dtype, density: float, into: bool, device: str, size: int, batch: int) -> Row:
    one = Layer(device, size, batch, density, dtype)
    index, about = pattern.pattern_tensors(one.mask), {"density": density, "flops": 2 * batch * size * size}
    grads = [torch.zeros_like(one.weight) if into else None for _ in range(2)]

    def ours() -> Tensor:
        return masked_linear.masked_grad_weight(one.dy, one.x, one.mask, index, into=grads[0])

    def theirs() -> Tensor:
        found = (one.dy.t() @ one.x).masked_fill_(~one.mask, 0)
        return found if grads[1] is None else grads[1].add_(found)

    return Row(ours, theirs, about)


def compressed(what: str, dtype: torch.dtype, density: float, device: str, size: int, batch: int) -> Row:
    one = Layer(device, size, min(batch, 256), density, dtype)
    lists, values, bits = sparse_linear.sparse_tensors(one.mask), one.weight[one.mask][:, None], pack_bits(one.mask)
    ours, theirs = {
        "forward": (
            lambda: sparse_linear.sparse_linear(one.x, values, None, bits, size, lists),
            lambda: one.x @ one.weight.t(),
        ),
        "dX": (
            lambda: sparse_linear.sparse_grad_input(one.dy, values, bits, size, lists),
            lambda: one.dy @ one.weight,
        ),
        "dvalues": (
            lambda: sparse_linear.sparse_grad_values(one.dy, one.x, bits, lists)[:, 0],
            lambda: (one.dy.t() @ one.x)[one.mask],
        ),
    }[what]
    return Row(ours, theirs, {"density": density})


def blocks(what: str, block: int, device: str, size: int, batch: int) -> Row:
    one = Layer(device, size, batch, 0.1, BF16, block)
    lists, values = block_reference.block_rows(one.cells), block_reference.pack_blocks(one.weight, one.cells, block)
    ours, theirs = {
        "forward": (lambda: block_matmul.block_matmul(one.x, values, *lists, size), lambda: one.x @ one.weight.t()),
        "dvalues": (
            lambda: block_matmul.block_grad(one.dy, one.x, *lists, block),
            lambda: block_reference.pack_blocks(one.dy.t() @ one.x, one.cells, block),
        ),
    }[what]
    return Row(ours, theirs, {"density": 0.1})


def few_rows(rows: int, density: float, device: str, size: int, batch: int) -> Row:
    one = Layer(device, size, rows, density, BF16)
    packed = decode.pack(one.weight, one.mask)
    about = {"density": density, "nbytes": decode.packed_bytes(packed)}
    return Row(lambda: decode.decode(one.x, *packed), lambda: one.x @ one.weight.t(), about)


def variance(dtype: torch.dtype, device: str, size: int, batch: int) -> Row:
    x = Layer(device, size, size, 1.0, dtype).x
    n = x.numel()
    return Row(
        lambda: moments.moments([x], [(1, 1, n, n, n)], 2, 0.0)[1, 0],
        lambda: x.float().var(correction=0),
        {"nbytes": x.nbytes},
    )


def threshold(dtype: torch.dtype, device: str, size: int, batch: int) -> Row:
    x = Layer(device, size, size, 1.0, dtype).x
    k, words = x.numel() // 2, torch.int32 if dtype == F32 else torch.int16
    return Row(
        lambda: select.kth_smallest([x], None, k)[0],
        lambda: x.abs().flatten().kthvalue(k).values.view(words),
        {"nbytes": x.nbytes},
    )


_GRADS = [(dtype, density) for dtype, density in ((BF16, 0.1), (F32, 0.1), (F32, 0.02))]
ROWS: dict[str, Callable[[str, int, int], Row]] = {
    **{
        f"masked dW {SHORT[dtype]}, density {density}{', into .grad' if into else ''}": partial(
            masked_grad, dtype, density, into
        )
        for dtype, density in _GRADS
        for into in (False, True)
    },
    **{
        f"compressed {what} {SHORT[dtype]}, density {density}": partial(compressed, what, dtype, density)
        for dtype, density in _GRADS
        for what in ("forward", "dX", "dvalues")
    },
    **{
        f"blocks of {block} {what}": partial(blocks, what, block)
        for block in block_matmul.BLOCKS
        for what in ("forward", "dvalues")
    },
    **{
        f"decode {rows} rows, density {density}": partial(few_rows, rows, density)
        for rows in (1, 4, 16, 64)
        for density in (0.2, 0.1)
    },
    **{f"variance {SHORT[dtype]}": partial(variance, dtype) for dtype in SHORT},
    **{f"magnitude threshold {SHORT[dtype]}": partial(threshold, dtype) for dtype in SHORT},
}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="times GPU kernels: needs a GPU")
@pytest.mark.parametrize("name", ROWS)
def test_gpu(versus, name):
    row = ROWS[name]("cuda", SIZE, BATCH)
    versus(row.ours, row.theirs, check=row.check, group=f"gpu {name}", device="cuda", **row.about)
