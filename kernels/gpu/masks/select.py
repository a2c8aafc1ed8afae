"""Exact k-th smallest key over a list of tensors, by radix histograms over the integer view, and the masks cut there.

One launch a tensor and digit; the digit found so far stays on the device, so nothing synchronizes until the caller reads
the selection. Counts are integers, so atomic additions in any order give the same result.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

DIGIT = 8  # bits a pass: AMD's histograms, and those before Triton 3.9, keep a share of the bins in every thread
_DIGIT, _BINS = tl.constexpr(DIGIT), tl.constexpr(1 << DIGIT)
TILES = {"BLOCK": 4096, "num_warps": 8}
_WORDS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@triton.jit
def _keys_of(words_ptr, alive_ptr, start, n, BITS: tl.constexpr, MASKED: tl.constexpr, BLOCK: tl.constexpr):
    """(BLOCK,) int64 keys, and whether they exist and survive."""
    offsets = start + tl.arange(0, BLOCK)
    inside = offsets < n
    keys = tl.load(words_ptr + offsets, mask=inside, other=0).to(tl.int64) & ((1 << BITS) - 1)
    if MASKED:
        inside = inside & (tl.load(alive_ptr + offsets, mask=inside, other=0) != 0)
    return offsets, keys, inside


@triton.jit(do_not_specialize=["shift"])
def _histogram(
    # inputs: words (n,), alive (n,) uint8, state (2,) int64 = digits found so far, rank
    words_ptr,
    alive_ptr,
    state_ptr,
    # outputs: counts (2^DIGIT,) int64
    counts_ptr,
    # sizes
    n,
    # scalars, tiles
    shift,
    BITS: tl.constexpr,
    MASKED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    start = tl.program_id(0).to(tl.int64) * BLOCK
    _, keys, chosen = _keys_of(words_ptr, alive_ptr, start, n, BITS, MASKED, BLOCK)
    keys >>= shift
    chosen = chosen & (keys >> _DIGIT == tl.load(state_ptr))
    counts = tl.histogram((keys & (_BINS - 1)).to(tl.int32), _BINS, mask=chosen)
    tl.atomic_add(counts_ptr + tl.arange(0, _BINS), counts.to(tl.int64), mask=counts > 0)


@triton.jit
def _count_equal(
    # inputs: words (n,), alive (n,) uint8, selection (4,) int64
    words_ptr,
    alive_ptr,
    selection_ptr,
    # outputs: equal (blocks,) int64
    equal_ptr,
    # sizes
    n,
    # scalars, tiles
    BITS: tl.constexpr,
    MASKED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    block = tl.program_id(0)
    _, keys, alive = _keys_of(words_ptr, alive_ptr, block.to(tl.int64) * BLOCK, n, BITS, MASKED, BLOCK)
    tl.store(equal_ptr + block, tl.sum((alive & (keys == tl.load(selection_ptr))).to(tl.int64), 0))


@triton.jit
def _cut(
    # inputs: words (n,), alive (n,) uint8, selection (4,) int64, before (blocks,) int64 = equal keys of earlier blocks
    words_ptr,
    alive_ptr,
    selection_ptr,
    before_ptr,
    # outputs: mask (n,) uint8
    mask_ptr,
    # sizes
    n,
    # scalars, tiles
    BITS: tl.constexpr,
    MASKED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    block = tl.program_id(0)
    offsets, keys, alive = _keys_of(words_ptr, alive_ptr, block.to(tl.int64) * BLOCK, n, BITS, MASKED, BLOCK)
    threshold = tl.load(selection_ptr)
    ties = tl.load(selection_ptr + 1) - tl.load(before_ptr + block)
    equal = alive & (keys == threshold)
    rank = tl.cumsum(equal.to(tl.int32), 0)
    keep = alive & ((keys > threshold) | (equal & (rank > ties)))
    tl.store(mask_ptr + offsets, keep.to(tl.uint8), mask=offsets < n)


def _views(values: Sequence[Tensor], alive: Sequence[Tensor] | None) -> tuple[list[Tensor], list[Tensor], int]:
    """Integer words, uint8 masks (the words stand in where all survive), and the key's bits."""
    words = [v.detach().reshape(-1).view(_WORDS[v.element_size()]) for v in values]
    masks = words if alive is None else [a.reshape(-1).view(torch.uint8) for a in alive]
    return words, masks, 8 * values[0].element_size() - values[0].is_floating_point()


def _tiles() -> tuple[int, int]:
    return TILES["BLOCK"], TILES["num_warps"]


def kth_smallest(values: Sequence[Tensor], alive: Sequence[Tensor] | None, k: int) -> Tensor:
    """See kernels/reference/masks/select.py."""
    words, masks, bits = _views(values, alive)
    block, warps = _tiles()
    device = values[0].device
    state = torch.tensor([0, k], device=device)
    nans = torch.zeros((), dtype=torch.int64, device=device)
    equal = nans
    for shift in range((bits - 1) // DIGIT * DIGIT, -1, -DIGIT):
        counts = torch.zeros(1 << DIGIT, dtype=torch.int64, device=device)
        for word, mask in zip(words, masks, strict=True):
            if word.numel():
                grid = (triton.cdiv(word.numel(), block),)
                _histogram[grid](
                    word,
                    mask,
                    state,
                    counts,
                    word.numel(),
                    shift,
                    bits,
                    alive is not None,
                    block,
                    num_warps=warps,
                    enable_fp_fusion=False,
                )
        total = counts.cumsum(0)
        chosen = torch.searchsorted(total, state[1]) if k else torch.zeros_like(nans)
        equal = counts[chosen]
        state = torch.stack([(state[0] << DIGIT) | chosen, state[1] - total[chosen] + equal])
    if values[0].is_floating_point():
        for word, value, mask in zip(words, values, masks, strict=True):
            bad = value.reshape(-1).isnan()
            nans = nans + (bad if alive is None else bad & mask.bool()).sum() if word.numel() else nans
    return torch.stack([state[0], state[1] if k else torch.zeros_like(nans), equal, nans])


def cut(values: Sequence[Tensor], alive: Sequence[Tensor] | None, selection: Tensor) -> list[Tensor]:
    """See kernels/reference/masks/select.py."""
    words, masks, bits = _views(values, alive)
    block, warps = _tiles()
    device = values[0].device
    blocks = [triton.cdiv(w.numel(), block) for w in words]
    equal = torch.zeros(sum(blocks), dtype=torch.int64, device=device)
    parts = equal.split(blocks)
    for word, mask, part in zip(words, masks, parts, strict=True):
        if word.numel():
            _count_equal[(len(part),)](
                word,
                mask,
                selection,
                part,
                word.numel(),
                bits,
                alive is not None,
                block,
                num_warps=warps,
                enable_fp_fusion=False,
            )
    before = (equal.cumsum(0) - equal).split(blocks)
    outs = [torch.empty(v.shape, dtype=torch.bool, device=device) for v in values]
    for word, mask, part, out in zip(words, masks, before, outs, strict=True):
        if word.numel():
            flat = out.view(-1).view(torch.uint8)
            _cut[(len(part),)](
                word,
                mask,
                selection,
                part,
                flat,
                word.numel(),
                bits,
                alive is not None,
                block,
                num_warps=warps,
                enable_fp_fusion=False,
            )
    return outs
