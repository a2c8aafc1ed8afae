"""Exact k-th smallest key over a list of tensors, by radix histograms over the integer view, and the masks cut there.

Every float32 is read once a digit (16 + 15 bits of |w|) and once for the cut; nothing is sorted, copied or
concatenated. The kernels are serial and release the GIL: Python threads run them on contiguous ranges, so that one
compilation serves one and many threads, forked children too. Counts are integers: the same for any number of threads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from numba import uint32
from torch import Tensor

from ..core.jit import jit, threads
from ..core.scalars import full_vectors

# bits a pass: weights touch few of the 65,536 counters, so they stay in the caches, and two passes do for float32
DIGIT = 16
SMALL_DIGIT = 11  # where clearing the counters would cost more than a third pass
BLOCK = 1024  # elements counted, or searched for ties, at once
SERIAL = 1 << 21  # below this many elements threads cost more than they save
_WORDS = {2: (torch.int16, np.uint16), 4: (torch.int32, np.uint32), 8: (torch.int64, np.uint64)}
_NO_MASK = np.empty(0, np.uint8)

Segment = tuple[int, int, int]  # tensor, from, to


@jit()
def _histogram(keys, alive, absolute, shift, digit, prefix, counts):
    """counts[the digit at `shift`] += 1 for survivors whose higher bits are `prefix`."""
    bins = counts.size - 1
    high = shift + digit
    everything = alive.size == 0
    for i in range(keys.size):
        key = np.int64(keys[i] & absolute)
        if (key >> high) == prefix and (everything or alive[i] != 0):
            counts[(key >> shift) & bins] += 1


@jit()
def _first_histogram(keys, alive, absolute, shift, counts):
    """The same for the highest digit, branch-free: every survivor counts."""
    if alive.size == 0:
        for i in range(keys.size):
            counts[(keys[i] & absolute) >> shift] += 1
    else:
        for i in range(keys.size):
            counts[(keys[i] & absolute) >> shift] += alive[i]


@jit()
def _count(keys, alive, absolute, low, high):
    """Survivors with low <= key <= high."""
    full_vectors()
    count = 0
    for start in range(0, keys.size, BLOCK):
        count += _within(keys[start : start + BLOCK], alive[start : start + BLOCK], absolute, low, high)
    return count


@jit(inline="always")
def _within(keys, alive, absolute, low, high):
    """The same in a block: 32-bit counts, which fill vectors with twice as many."""
    count = uint32(0)
    if alive.size == 0:
        for i in range(keys.size):
            key = keys[i] & absolute
            count += uint32((key >= low) & (key <= high))
    else:
        for i in range(keys.size):
            key = keys[i] & absolute
            count += uint32((key >= low) & (key <= high) & (alive[i] != 0))
    return count


@jit()
def _cut(keys, alive, out, absolute, threshold, ties):
    """out = alive and key > threshold, or key == threshold beyond the first `ties` such survivors. Returns the ties left."""
    full_vectors()
    for start in range(0, keys.size, BLOCK):  # slices: LLVM cannot see that start + i is no index from the end
        some, living, kept = keys[start : start + BLOCK], alive[start : start + BLOCK], out[start : start + BLOCK]
        equal = uint32(0)
        if living.size == 0:
            for i in range(some.size):
                key = some[i] & absolute
                kept[i] = key > threshold
                equal += uint32(key == threshold)
        else:
            for i in range(some.size):
                key = some[i] & absolute
                kept[i] = (key > threshold) & (living[i] != 0)
                equal += uint32(key == threshold)
        if equal == 0:
            continue
        for i in range(some.size):
            if (some[i] & absolute) == threshold and (living.size == 0 or living[i] != 0):
                kept[i] = ties <= 0
                ties -= 1
    return ties


def _split(sizes: list[int], workers: int) -> list[list[Segment]]:
    """The concatenated index space in `workers` contiguous ranges, each as segments of single tensors."""
    total = sum(sizes)
    edges = [total * i // workers for i in range(workers + 1)]
    ranges: list[list[Segment]] = []
    for lo, hi in zip(edges, edges[1:], strict=False):
        segments, start = [], 0
        for t, size in enumerate(sizes):
            a, b = max(lo - start, 0), min(hi - start, size)
            if a < b:
                segments.append((t, a, b))
            start += size
        ranges.append(segments)
    return ranges


class _Keys:
    """The tensors as unsigned words, and the threads that walk them."""

    def __init__(self, values: Sequence[Tensor], alive: Sequence[Tensor] | None) -> None:
        torch_word, word = _WORDS[values[0].element_size()]
        is_float = values[0].is_floating_point()
        self.words = [v.detach().reshape(-1).view(torch_word).numpy().view(word) for v in values]
        self.alive = None if alive is None else [a.reshape(-1).view(torch.uint8).numpy() for a in alive]
        self.bits = 8 * values[0].element_size() - is_float
        self.absolute = word((1 << self.bits) - 1)
        self.word = word
        sizes = [w.size for w in self.words]
        large = sum(sizes) >= SERIAL
        self.digit = DIGIT if large else SMALL_DIGIT
        self.ranges = _split(sizes, threads() if large else 1)

    def _segments(self, segments: list[Segment]) -> Iterator[tuple[Segment, np.ndarray, np.ndarray]]:
        for t, a, b in segments:
            yield (t, a, b), self.words[t][a:b], _NO_MASK if self.alive is None else self.alive[t][a:b]

    def map(self, work: Callable[..., Any]) -> list[Any]:
        """work(worker index, its segments) of every range, in order."""
        if len(self.ranges) == 1:
            return [work(0, self._segments(self.ranges[0]))]
        with ThreadPoolExecutor(len(self.ranges)) as pool:
            return list(pool.map(lambda i: work(i, self._segments(self.ranges[i])), range(len(self.ranges))))

    def count(self, low: int, high: int) -> list[int]:
        """Survivors with low <= key <= high, by range."""
        return self.map(
            lambda _, segments: sum(
                _count(w, a, self.absolute, self.word(low), self.word(high)) for _, w, a in segments
            )
        )

    def histogram(self, shift: int, digit: int, prefix: int) -> np.ndarray:
        first = shift + digit == self.bits

        def work(_worker: int, segments: Iterator[tuple[Segment, np.ndarray, np.ndarray]]) -> np.ndarray:
            counts = np.zeros(1 << digit, np.int64)
            for _where, words, alive in segments:
                if first:
                    _first_histogram(words, alive, self.absolute, self.word(shift), counts)
                else:
                    _histogram(words, alive, self.absolute, shift, digit, prefix, counts)
            return counts

        return np.sum(self.map(work), axis=0)


def kth_smallest(values: Sequence[Tensor], alive: Sequence[Tensor] | None, k: int) -> Tensor:
    """See kernels/reference/masks/select.py."""
    keys = _Keys(values, alive)
    prefix, ties, shift, equal, nans = 0, k, keys.bits, 0, 0
    while shift:
        digit = min(keys.digit, shift)
        shift -= digit
        counts = keys.histogram(shift, digit, prefix)
        if shift + digit == keys.bits and values[0].is_floating_point():
            infinite = _infinity(values[0].dtype)
            if counts[infinite >> shift :].any():
                nans = sum(keys.count(infinite + 1, (1 << keys.bits) - 1))
        total = np.cumsum(counts)
        chosen = int(np.searchsorted(total, ties)) if k else 0
        equal = int(counts[chosen])
        ties -= int(total[chosen]) - equal
        prefix = prefix << digit | chosen
    return torch.tensor([prefix, ties if k else 0, equal, nans])


def _infinity(dtype: torch.dtype) -> int:
    word = _WORDS[dtype.itemsize][0]
    return int(torch.tensor(float("inf"), dtype=dtype).view(word))


def cut(values: Sequence[Tensor], alive: Sequence[Tensor] | None, selection: Tensor) -> list[Tensor]:
    """See kernels/reference/masks/select.py."""
    threshold, ties, equal, _ = (int(v) for v in selection)
    keys = _Keys(values, alive)
    masks = [torch.empty(v.shape, dtype=torch.bool) for v in values]
    outs = [m.view(-1).view(torch.uint8).numpy() for m in masks]
    if 0 < ties < equal and len(keys.ranges) > 1:
        before = np.cumsum([0, *keys.count(threshold, threshold)])
    else:
        before = np.zeros(len(keys.ranges) + 1, np.int64)

    def work(i: int, segments: Iterator[tuple[Segment, np.ndarray, np.ndarray]]) -> None:
        budget = ties - int(before[i])
        for (t, a, b), words, alive in segments:
            budget = _cut(words, alive, outs[t][a:b], keys.absolute, keys.word(threshold), budget)

    keys.map(work)
    return masks
