"""Devices without kernels, and a default device: results stay right, and nothing of the host's reaches a device's memory."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from initperf import choice, ops, rng
from initperf.kernels.reference.masks import select
from initperf.kernels.reference.moments import moments
from initperf.kernels.reference.precision import in_float64, widest
from initperf.kernels.reference.sampling import orthogonal, sample, sample_many
from tolerance import bits

ROOT = Path(__file__).resolve().parents[2]
HERE = ROOT / "tests" / "support"  # the cases that its processes run


def test_everything_works_on_a_device_without_kernels():
    """tests/support/device_cases.py, in a process where that device exists."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / "device_cases.py")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(HERE)])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=550, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout.splitlines()[-1]


@pytest.mark.parametrize("device", ["mps", "xpu", "hpu", "privateuseone"])
def test_no_kernel_is_chosen_for_other_devices(device):
    for module in ("init", "layers.linear", "layers.conv", "layers.sequential", "prune", "variance.moments"):
        __import__(f"initperf.{module}")
    assert {ops.backend_of(name, device) for name in ops.MODULES} == {"reference"}
    with choice.prefer("sparse"):
        assert not choice.sparse_pays("masked_linear", 8, (100, 100), 10, torch.float32, device)
    assert device in ops.lacking(device)
    assert "Remedy" in ops.lacking(device)


def test_float64_is_taken_where_it_is():
    assert widest("cpu") is torch.float64
    x = torch.tensor([0.1])
    assert torch.equal(in_float64(x), x.double())


def test_the_reference_makes_its_tensors_beside_its_arguments_whatever_the_default_device():
    x = torch.randn(40, 30, generator=torch.Generator().manual_seed(0))
    normal, mask = rng.normal(0, 1), x > -1

    def everything():
        found = [sample.sample_(torch.empty(50, device="cpu"), *normal, 7, 3)]
        outs = [torch.empty(50, device="cpu"), torch.empty(int(mask.sum()), device="cpu")]
        packed = torch.tensor([0b1011], dtype=torch.uint8, device="cpu")
        found.append(sample_many.sample_many_(outs[:1], [normal], [3], 7, None, True))
        found.append(sample_many.sample_many_([torch.empty(3, device="cpu")], [normal], [3], 7, [packed], True))
        found.append(sample_many.sample_many_([], [], [], 7, None, True))
        found += [*outs[:1], moments.moments([x], [(1, 1, x.numel(), 0, 0)], 4, 0.0)]
        selection = select.kth_smallest([x], [mask], 100)
        found += [selection, select.kth_smallest([x], None, 0), *select.cut([x], [mask], selection)]
        found.append(orthogonal.orthogonal_(x[:, :8].contiguous()))
        return found

    expected = everything()
    with torch.device("meta"):
        found = everything()
    for a, b in zip(found, expected, strict=True):
        assert a.device.type == "cpu"
        assert torch.equal(bits(a), bits(b)) if a.is_floating_point() else torch.equal(a, b)
