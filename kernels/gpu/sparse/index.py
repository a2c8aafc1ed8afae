"""What the GPU products read of a mask: one bit a weight, and the list of tiles with a survivor. Made by torch, on the mask's device."""

from __future__ import annotations

import torch
from torch import Tensor

TILE = 128  # rows and columns of a tile of the list


def pattern_tensors(mask: Tensor) -> list[Tensor]:
    """[bits, tiles] of a bool mask (N, K).

    bits: int32 (N, ceil(K / 32)), bit j of word w = weight 32 w + j. tiles: int32, row of tiles << 16 | column of tiles,
    row-major, of the tiles of 128 x 128 that hold a survivor.
    """
    N, K = mask.shape
    words = -(-K // 32)
    padded = torch.nn.functional.pad(mask, (0, 32 * words - K)).view(N, words, 32)
    powers = torch.ones((), dtype=torch.int32, device=mask.device) << torch.arange(
        32, dtype=torch.int32, device=mask.device
    )
    bits = (padded * powers).sum(-1, dtype=torch.int32)  # distinct bits: a sum is their union, the sign bit included
    rows, columns = -(-N // TILE), -(-K // TILE)
    if max(rows, columns) >= 1 << 15:
        raise ValueError(f"Expected a mask of fewer than {TILE << 15} rows and columns. Got shape {tuple(mask.shape)}.")
    live = torch.nn.functional.pad(mask, (0, columns * TILE - K, 0, rows * TILE - N))
    live = live.view(rows, TILE, columns, TILE).any(3).any(1).nonzero().to(torch.int32)
    return [bits, (live[:, 0] << 16 | live[:, 1]).contiguous()]
