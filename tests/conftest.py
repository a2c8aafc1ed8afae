"""Triton kernels run in the interpreter, mended where its version needs that, when there is no GPU; unwritten outputs are NaN; data beyond the package may be absent."""

import os
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from device import GPU

if not GPU:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports triton

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(autouse=True, scope="session")
def _mended_interpreter():
    """Every supported Triton interprets as its newest does."""
    if not GPU and find_spec("triton"):
        import triton_interpreter

        triton_interpreter.mend()


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


@pytest.fixture(scope="session")
def gpu_rows(tmp_path_factory):
    """What tools/gpu_report/report.py reads of the machine code of all kernels: (target, op, label) -> row."""
    import gpu_rows

    found = gpu_rows.once(tmp_path_factory, "rows", "-m", "tools.gpu_report.report", "--tests", "--json")
    return {(r["target"], r["op"], r["label"]): r for r in found["rows"]}


@pytest.fixture
def shared_data() -> Path:
    """The folder with MNIST and CIFAR-10, if this checkout has one beside it."""
    if not SHARED_DATA.is_dir():
        pytest.skip("no ../shared/data beside this checkout: MNIST and CIFAR-10 are not shipped")
    return SHARED_DATA
