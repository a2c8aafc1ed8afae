"""Every load and store of Triton's interpreter checked against the tensors of its launch, alignment as kernels claim it, and tensors that lie far away."""

from __future__ import annotations

import contextlib
import math
import mmap
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch


class Memory(dict[int, int]):
    """Address of a tensor -> bytes by which kernels find it further up; `also`: tensors that kernels get the address of in a table."""

    def __init__(self) -> None:
        super().__init__()
        self.also: list[torch.Tensor] = []

    def add(self, *tensors: torch.Tensor) -> None:
        self.also += tensors


def _span(tensor: torch.Tensor) -> int:
    """Bytes from the first element of a strided tensor to behind its last."""
    if not tensor.numel():
        return 0
    last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()


class _Checker:
    def __init__(self) -> None:
        self.shifts = Memory()
        self.low = self.high = self.shift = np.empty(0, np.uint64)

    def launch(self, args: list[object]) -> None:
        tensors = [a for a in args if isinstance(a, torch.Tensor)] + self.shifts.also
        spans = sorted(
            {
                (t.data_ptr() + self.shifts.get(t.data_ptr(), 0), _span(t), self.shifts.get(t.data_ptr(), 0))
                for t in tensors
            }
        )
        self.low = np.array([low for low, _, _ in spans], np.uint64)
        self.high = np.array([low + size for low, size, _ in spans], np.uint64)
        self.shift = np.array([shift for _, _, shift in spans], np.uint64)

    def addresses(self, pointers: np.ndarray, mask: np.ndarray, size: int) -> np.ndarray:
        """The real addresses of an access of `size` bytes at each pointer; raises if one leaves every tensor."""
        pointers = pointers.astype(np.uint64)
        mask = np.broadcast_to(mask, pointers.shape)
        at = np.maximum(np.searchsorted(self.low, pointers, side="right").astype(np.int64) - 1, 0)
        bad = mask & ((pointers < self.low[at]) | (pointers + np.uint64(size) > self.high[at]))
        if bad.any():
            where = int(np.flatnonzero(bad.ravel())[0])
            over = int(pointers.ravel()[where]) - int(self.high[at].ravel()[where])
            raise IndexError(
                f"{int(bad.sum())} of {int(mask.sum())} accesses outside every tensor; the first {over} bytes past one's end"
            )
        return np.where(mask, pointers - self.shift[at], pointers)


@pytest.fixture
def checked_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[Memory]:
    """No kernel of the test may touch memory outside its arguments. Yields the shifts that `far_away` fills."""
    checker = _Checker()
    if torch.cuda.is_available():
        yield checker.shifts
        return
    from triton.runtime import interpreter

    load, store = interpreter.InterpreterBuilder.create_masked_load, interpreter.InterpreterBuilder.create_masked_store
    prepare = interpreter.GridExecutor._init_args_hst

    def size(pointers: interpreter.TensorHandle) -> int:
        return max(pointers.get_element_ty().primitive_bitwidth // 8, 1)

    def moved(pointers: interpreter.TensorHandle, mask: interpreter.TensorHandle) -> interpreter.TensorHandle:
        data = checker.addresses(pointers.data, mask.data, size(pointers))
        return interpreter.TensorHandle(data, pointers.dtype, pointers.attr)

    def checked_load(self, pointers, mask, *rest):
        return load(self, moved(pointers, mask), mask, *rest)

    def checked_store(self, pointers, value, mask, *rest):
        return store(self, moved(pointers, mask), value, mask, *rest)

    def checked_prepare(self, args, kwargs):
        args, kwargs = prepare(self, args, kwargs)
        checker.launch([*args, *kwargs.values()])
        return args, kwargs

    set_attr = interpreter.TensorHandle.set_attr

    def checked_set_attr(self, key, value):
        step = np.prod(value) if key == "tt.divisibility" and isinstance(self.dtype, interpreter.tl.pointer_type) else 1
        if (self.data % np.uint64(step)).any():
            raise IndexError(f"an address said to be a multiple of {step} is none, and would be read outside")
        set_attr(self, key, value)

    monkeypatch.setattr(interpreter.TensorHandle, "set_attr", checked_set_attr)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_masked_load", checked_load)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_masked_store", checked_store)
    monkeypatch.setattr(interpreter.GridExecutor, "_init_args_hst", checked_prepare)
    yield checker.shifts


def far_away(tensor: torch.Tensor, elements: int, shifts: Memory) -> torch.Tensor:
    """The tensor, which kernels must now address `elements` further up: a virtual one, larger than any memory."""
    if torch.cuda.is_available():
        pytest.skip("virtual tensors exist in the interpreter only")
    tensor = tensor.clone()
    shifts[tensor.data_ptr()] = elements * tensor.element_size()
    return tensor


@contextlib.contextmanager
def nan_around(tensor: torch.Tensor, guard: int = 64) -> Iterator[torch.Tensor]:
    """A copy of a float tensor between bands of NaN, which must be untouched afterwards: for outputs that a kernel updates."""
    flat = torch.full((tensor.numel() + 2 * guard,), float("nan"), dtype=tensor.dtype, device=tensor.device)
    inner = flat[guard:-guard].view(tensor.shape)
    inner.copy_(tensor)
    yield inner
    assert bool(flat[:guard].isnan().all() and flat[-guard:].isnan().all()), "a kernel wrote outside its output"


def virtual(shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Zeros in reserved memory, of which only what is touched takes room: for strides and sizes beyond 2^31 elements."""
    if torch.cuda.is_available():
        pytest.skip("virtual tensors exist in the interpreter only")
    elements = 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | (0x4000 if sys.platform == "linux" else 0)  # MAP_NORESERVE
    try:
        memory = mmap.mmap(-1, elements * dtype.itemsize, flags=flags)
    except (OSError, ValueError, OverflowError):
        pytest.skip(f"{elements * dtype.itemsize >> 30} GiB of address space cannot be reserved here")
    return torch.frombuffer(memory, dtype=dtype, count=elements).as_strided(shape, strides)


def apart(tensor: torch.Tensor, stride: int = (1 << 31) + 8) -> torch.Tensor:
    """The same matrix with rows so far from each other that the second begins beyond 2^31 elements."""
    far = virtual(tuple(tensor.shape), (stride, 1), tensor.dtype)
    return far.copy_(tensor)


class LastProgram:
    """A kernel of which a launch runs the last program only, by its own number: for launches of millions."""

    def __init__(self, kernel: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.kernel, self.monkeypatch = kernel, monkeypatch

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        from triton.runtime import interpreter

        last = [n - 1 for n in grid] + [0] * (3 - len(grid))

        def launch(*args: Any, **kwargs: Any) -> None:
            with self.monkeypatch.context() as patch:
                patch.setattr(
                    interpreter.InterpreterBuilder,
                    "set_grid_idx",
                    lambda self, *_: setattr(self, "grid_idx", tuple(last)),
                )
                self.kernel[(1,)](*args, **kwargs)

        assert math.prod(grid) > 1
        return launch
