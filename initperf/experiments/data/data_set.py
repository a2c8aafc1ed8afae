"""An image set: three disjoint splits, fixed for ever by the RNG contract."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from initperf import rng
from initperf.core import ops

SPLIT_SEED = 0x5EED


@dataclass(frozen=True)
class Split:
    """Normalized images (N, ...) float32 and labels (N,) int64."""

    x: Tensor
    y: Tensor

    def __len__(self) -> int:
        return len(self.y)


@dataclass(frozen=True)
class DataSet:
    """Three disjoint splits; `about` says what it is, whose, and how normalized; `sha256` is of the raw pixels and labels."""

    name: str
    about: str
    classes: int
    train: Split
    val: Split
    test: Split
    sha256: str


def permutation(n: int, seed: int, stream: int | str = 0) -> Tensor:
    """0 .. n-1 in order of (word(index), index) of the RNG contract: the same on every machine and in every version."""
    words = torch.empty(n, dtype=torch.int32)
    key = rng.stream_of(stream) if isinstance(stream, str) else stream
    ops.implementation("sample_", "cpu")(words, rng.BITS, (), seed, key)
    return torch.sort(words.long() & 0xFFFFFFFF, stable=True).indices


def sha256(*arrays: np.ndarray) -> str:
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()
