"""Sampling into one tensor on the CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from ...contract import NORMAL
from ..core.jit import threads
from ..core.shares import among
from .formulas import _CODES
from .sample_many import _LARGE, sample_many_
from .tiles import _constants, _fill

_PARALLEL_FROM = 1 << 16  # values; below, starting the threads costs more than they save


def sample_(
    out: Tensor,
    kind: int,
    params: tuple[float, ...],
    seed: int,
    stream: int,
    offset: int = 0,
    run: int = -1,
    stride: int = 0,
) -> Tensor:
    """See initperf.kernels.reference.sampling.sample.sample_; params is a tuple."""
    n = out.numel()
    if not n:
        return out
    if kind == NORMAL and out.dtype == torch.float32 and out.nbytes >= _LARGE and offset == 0 and run in (-1, n):
        sample_many_([out], [(kind, params)], [stream], seed)
        return out
    constants, address = _constants(params)
    words = seed & 0xFFFFFFFF, seed >> 32, stream & 0xFFFFFFFF, stream >> 32
    arguments = out.data_ptr(), _CODES[out.dtype], n, kind, address, *words, offset, run if run > 0 else n, stride
    count = threads() if n >= _PARALLEL_FROM else 1
    _fill(among(8 * count if count > 1 else 1), *arguments)
    return out
