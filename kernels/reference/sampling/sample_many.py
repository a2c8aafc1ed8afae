"""Sampling into a list of tensors: sample_ tensor by tensor, then the masks, then the moments."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..bits import _BITS, unpacked
from ..moments.moments import moments as moments_of
from .sample import sample_


@torch.no_grad()
def sample_many_(
    outs: Sequence[Tensor],
    distributions: Sequence[tuple[int, tuple[float, ...]]],
    streams: Sequence[int],
    seed: int,
    masks: Sequence[Tensor | None] | None = None,
    moments: bool = False,
) -> Tensor | None:
    """Fill every tensor by the contract: outs[i] as sample_(outs[i], *distributions[i], seed, streams[i]) does.

    outs: contiguous, on one device, float32, bfloat16, float16 or float64. A mask of dtype bool, contiguous, as long as
    its tensor: 0 where it is False. A mask of dtype uint8, 1-d: the packed bits of a dense tensor, lowest bit first, 0
    behind its end; outs[i] gets the values of that tensor where a bit is set, in order, and has as many elements.
    moments: return mean and variance of each tensor's finite surviving values, float64 (2, len(outs)); NaN if it has none.
    """
    kept = []
    for i, (out, distribution, stream) in enumerate(zip(outs, distributions, streams, strict=True)):
        mask = masks[i] if masks is not None else None
        if mask is None:
            kept.append(sample_(out, *distribution, seed, stream))
        elif mask.dtype == torch.bool:
            kept.append(
                sample_(out, *distribution, seed, stream).masked_fill_(~mask.view(out.shape), 0)[mask.view(out.shape)]
            )
        else:
            dense = torch.empty(_BITS * mask.numel(), dtype=out.dtype, device=out.device)
            kept.append(out.copy_(sample_(dense, *distribution, seed, stream)[unpacked(mask)].view(out.shape)))
    if not moments:
        return None
    shapes = [(1, 1, x.numel(), 0, 0) for x in kept]
    return moments_of(kept, shapes, 2, 0.0)[:2] if kept else torch.empty((2, 0), dtype=torch.float64, device="cpu")
