"""Both sides of every row that is timed on a GPU give the same result."""

import pytest

pytest.importorskip("triton")
from benchmarks.gpu import bench_gpu  # noqa: E402


@pytest.mark.parametrize("name", bench_gpu.ROWS)
def test_our_call_and_torchs_agree(name, gpu_device):
    bench_gpu.ROWS[name](gpu_device, 128 if "block" in name else 64, 8).check()
