"""Exact selection of the k smallest keys of a list of tensors: the definition.

A key orders a value without comparing floats: for float tensors the bit pattern without the sign, so |w| ascending; for
int32 tensors the raw word, unsigned (random words, or scores mapped to words).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_BITS = {
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
    torch.float32: torch.int32,
    torch.float64: torch.int64,
}


def _keys(values: Tensor) -> Tensor:
    """int64 keys of one contiguous tensor, flat."""
    if values.dtype == torch.int32:
        return values.flatten().long() & 0xFFFFFFFF
    words = values.flatten().view(_BITS[values.dtype])
    return (words & torch.iinfo(words.dtype).max).long()


def kth_smallest(values: Sequence[Tensor], alive: Sequence[Tensor] | None, k: int) -> Tensor:
    """(threshold, ties, equal, nans) as int64: prune every survivor below threshold and the first `ties` of the `equal` at it.

    values: contiguous tensors of one dtype (float, or int32 words); alive: bool tensors of the same shapes, None = all
    True; 0 <= k <= survivors. nans counts NaN survivors (float dtypes).
    """
    keys = torch.cat([_keys(v) for v in values])
    if alive is not None:
        keys = keys[torch.cat([a.flatten() for a in alive])]
    nans = 0
    if values[0].is_floating_point():
        infinity = torch.tensor(float("inf"), dtype=values[0].dtype, device="cpu")
        nans = int((keys > int(_keys(infinity))).sum())
    if k == 0:
        return torch.tensor([0, 0, int((keys == 0).sum()), nans], device=keys.device)
    smallest = keys.sort().values[:k]
    threshold = smallest[-1]
    return torch.stack(
        [threshold, (smallest == threshold).sum(), (keys == threshold).sum(), torch.as_tensor(nans, device=keys.device)]
    )


def cut(values: Sequence[Tensor], alive: Sequence[Tensor] | None, selection: Tensor) -> list[Tensor]:
    """New bool masks: alive, less what `selection` (of kth_smallest) prunes. Ties go in list order, then by flat index."""
    threshold, ties = int(selection[0]), int(selection[1])
    masks = []
    for i, value in enumerate(values):
        keys = _keys(value)
        live = torch.ones_like(keys, dtype=torch.bool) if alive is None else alive[i].flatten()
        equal = live & (keys == threshold)
        rank = equal.cumsum(0)
        masks.append((live & (keys >= threshold) & ~(equal & (rank <= ties))).view(value.shape))
        ties = max(ties - int(equal.sum()), 0)
    return masks
