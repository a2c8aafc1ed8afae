"""Memory of the products: of weight gradients, and to work in. glibc maps blocks of 32 MB and more afresh at every allocation, and the page faults of a
64 MB gradient cost more than computing it at survivors only; so the block of a layer's last gradient is used again once free.
"""

from __future__ import annotations

import sys
import threading
from math import prod

import numpy as np
import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

LARGE = 32 << 20  # bytes: glibc's largest threshold between its heap and a mapping of its own
_PAGE = 2 << 20  # NumPy asks for huge pages itself
_IDLE = 3  # references to a block that only _kept, a variable and getrefcount's argument hold
_kept = WeakTensorKeyDictionary()  # mask -> the block of its last gradient: freed with the mask
_lock = threading.Lock()


def _block(size: int) -> np.ndarray:
    raw = np.empty(size + _PAGE, np.uint8)
    start = -raw.ctypes.data % _PAGE
    return raw[start : start + size]


def gradient_memory(owner: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """An uninitialized contiguous tensor; if large, in the block that the last such gradient of `owner` left, if that is free."""
    size = prod(shape) * dtype.itemsize
    if size < LARGE or torch.are_deterministic_algorithms_enabled():
        return torch.empty(*shape, dtype=dtype)
    with _lock:
        block = _kept.get(owner)
        if block is None or block.nbytes != size:
            block = _kept[owner] = _block(size)
        elif sys.getrefcount(block) > _IDLE:
            block = _block(size)
        return torch.frombuffer(block, dtype=dtype).view(shape)


_KEPT = 8 << 20  # bytes of working memory that a thread keeps
_own = threading.local()


def working_memory(size: int) -> Tensor:
    """Uninitialized bytes at a multiple of 64, that the calling thread's next call may use again."""
    if size > _KEPT or torch.are_deterministic_algorithms_enabled():  # which fills it, so that reads of nothing show
        return torch.empty(size, dtype=torch.uint8)
    memory: Tensor | None = getattr(_own, "memory", None)
    if memory is None or memory.numel() < size:
        memory = _own.memory = torch.empty(size, dtype=torch.uint8)
    return memory


def check_alike(a: Tensor, b: Tensor) -> None:
    """Raise unless both are on the CPU and of one dtype: kernels get addresses, which do not tell."""
    if not (a.dtype is b.dtype and a.is_cpu and b.is_cpu):
        raise TypeError(
            f"Expected operands of one dtype on the CPU. Got {a.dtype} on {a.device}, {b.dtype} on {b.device}."
        )
