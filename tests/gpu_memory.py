"""Every load and store of Triton's interpreter checked against the tensors of its launch, and tensors that lie far away."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import numpy as np
import pytest
import torch

SHIFTS = dict[int, int]  # address of a tensor -> bytes by which kernels find it further up


def _span(tensor: torch.Tensor) -> int:
    """Bytes from the first element of a strided tensor to behind its last."""
    if not tensor.numel():
        return 0
    last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()


class _Checker:
    def __init__(self) -> None:
        self.shifts: SHIFTS = {}
        self.low = self.high = self.shift = np.empty(0, np.uint64)

    def launch(self, args: list[object]) -> None:
        tensors = [a for a in args if isinstance(a, torch.Tensor)]
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
def checked_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[SHIFTS]:
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

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_masked_load", checked_load)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_masked_store", checked_store)
    monkeypatch.setattr(interpreter.GridExecutor, "_init_args_hst", checked_prepare)
    yield checker.shifts


def far_away(tensor: torch.Tensor, elements: int, shifts: SHIFTS) -> torch.Tensor:
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
