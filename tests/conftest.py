"""Triton kernels run in the interpreter when there is no GPU; unwritten outputs are NaN; data beyond the package may be absent."""

import os
from pathlib import Path

import pytest
import torch

GPU = torch.cuda.is_available()
if not GPU:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports triton

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(autouse=True)
def _nan_filled_outputs():
    """Deterministic mode fills torch.empty with NaN, so an output that a kernel leaves unwritten shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def gpu_device() -> str:
    """Where Triton launchers run: the GPU, or the CPU through Triton's interpreter."""
    return "cuda" if GPU else "cpu"


@pytest.fixture
def shared_data() -> Path:
    """The folder with MNIST and CIFAR-10, if this checkout has one beside it."""
    if not SHARED_DATA.is_dir():
        pytest.skip("no ../shared/data beside this checkout: MNIST and CIFAR-10 are not shipped")
    return SHARED_DATA


requires_gpu = pytest.mark.skipif(not GPU, reason="needs a GPU")
