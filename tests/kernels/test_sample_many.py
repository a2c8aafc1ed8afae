"""sample_many_: the bits of sample_ called tensor by tensor, masks, survivors and moments in the same pass; and its machine code."""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from forks import assert_same_in_a_forked_child, needs_fork
from initperf import rng
from initperf.core.bits import bits_set, pack_bits
from initperf.core.checks import InitPerfError
from initperf.init import sample_into, sample_survivors_into
from initperf.kernels.cpu.sampling import sample_many
from initperf.kernels.cpu.sampling.sample import sample_ as cpu_sample_
from initperf.kernels.cpu.sampling.sample_many import sample_many_ as cpu_sample_many_
from initperf.kernels.gpu.sampling.sample_many import sample_many_ as gpu_sample_many_
from initperf.kernels.reference.bits import unpacked
from initperf.kernels.reference.sampling.sample_many import sample_many_ as reference_sample_many_
from samples import FLOATS, assert_same_bits, distributions
from tolerance import bits

ROOT = Path(__file__).resolve().parents[2]
INF = math.inf
IMPLEMENTATIONS = pytest.mark.parametrize(
    "sample_many_", [reference_sample_many_, cpu_sample_many_, gpu_sample_many_], ids=["reference", "cpu", "gpu"]
)
SIZES = (1, 5, 300, 1024, 4096, 5001, 9000)
SEED = 2**63 + 12345


def constants(dtype):
    return [rng.uniform(c, c, dtype) for c in (0.0, -0.0, 1.0, -0.3)]


def listed(sizes=SIZES):
    """(dtype, distribution, length, stream): every dtype and kind with every length, constants between them."""
    rows = []
    for dtype in FLOATS:
        for i, d in enumerate([*distributions(dtype), *constants(dtype)]):
            rows += [
                (dtype, d, n, (len(rows) + 7 * k) * 0x9E3779B97F4A7C15 % 2**64) for k, n in enumerate(sizes[i % 2 :: 2])
            ]
    return rows


def alone(dtype, d, n, stream):
    return cpu_sample_(torch.empty(n, dtype=dtype), *d, SEED, stream)


def half(n, seed, density=0.5):
    return torch.rand(n, generator=torch.Generator().manual_seed(seed)) < density


def device_of(sample_many_, gpu_device):
    return gpu_device if sample_many_ is gpu_sample_many_ else "cpu"


def run(sample_many_, rows, masks=None, moments=False, device="cpu", lengths=None, shift=0):
    """The tensors, each in memory of its own that begins `shift` elements behind an aligned place; that around it is untouched."""
    guard = 64
    # fmt: skip
    memory = [
        torch.full((shift + (n if lengths is None else lengths[i]) + guard,), 7, dtype=t, device=device)
        for i, (t, _, n, _) in enumerate(rows)
    ]
    outs = [m[shift : len(m) - guard] for m in memory]
    masks = None if masks is None else [m if m is None else m.to(device) for m in masks]
    found = sample_many_(outs, [tuple(d) for _, d, _, _ in rows], [s for *_, s in rows], SEED, masks, moments)
    assert all((m[:shift] == 7).all() and (m[len(m) - guard :] == 7).all() for m in memory)
    return [out.cpu() for out in outs], found


@IMPLEMENTATIONS
@pytest.mark.parametrize("shift", [0, 1])
def test_a_list_gets_the_bits_of_sample_called_tensor_by_tensor(sample_many_, shift, gpu_device):
    rows = listed((1, 1025, 5001)) if sample_many_ is not cpu_sample_many_ else listed()
    outs, found = run(sample_many_, rows, device=device_of(sample_many_, gpu_device), shift=shift)
    assert found is None
    for out, row in zip(outs, rows, strict=True):
        assert_same_bits(out, alone(*row))


@IMPLEMENTATIONS
def test_masks_leave_zeros_and_nothing_else_changes(sample_many_, gpu_device):
    rows = listed((5, 4096, 5001))
    # fmt: skip
    masks = [
        [half(n, i), torch.zeros(n, dtype=torch.bool), torch.ones(n, dtype=torch.bool), None][i % 4]
        for i, (_, _, n, _) in enumerate(rows)
    ]
    outs, _ = run(sample_many_, rows, masks, device=device_of(sample_many_, gpu_device))
    for out, row, mask in zip(outs, rows, masks, strict=True):
        dense = alone(*row)
        assert_same_bits(out, dense if mask is None else dense.masked_fill(~mask, 0))


@IMPLEMENTATIONS
def test_packed_bits_give_the_survivors_of_the_dense_tensor(sample_many_, gpu_device):
    rows = listed((5, 4096, 9001))
    masks = [half(n, i, (0.0, 0.03, 0.5, 1.0)[i % 4]) for i, (_, _, n, _) in enumerate(rows)]
    packed = [torch.from_numpy(np.packbits(m.numpy(), bitorder="little")) for m in masks]
    outs, _ = run(
        sample_many_, rows, packed, device=device_of(sample_many_, gpu_device), lengths=[int(m.sum()) for m in masks]
    )
    for out, row, mask in zip(outs, rows, masks, strict=True):
        assert_same_bits(out, alone(*row)[mask])


@pytest.mark.parametrize("large", [False, True])
def test_dense_masked_and_compressed_tensors_of_any_length_stand_in_one_list(large, monkeypatch):
    """Large lists are written past the caches; here a list is large from its first byte."""
    if large:
        monkeypatch.setattr(sample_many, "_LARGE", 0)
    rows = [row for row in listed() for _ in range(3)]
    masks = [[None, half(n, i), pack_bits(half(n, i))][i % 3] for i, (_, _, n, _) in enumerate(rows)]
    lengths = [n if i % 3 < 2 else int(half(n, i).sum()) for i, (_, _, n, _) in enumerate(rows)]
    got, moments = run(cpu_sample_many_, rows, masks, True, lengths=lengths)
    want, same = run(reference_sample_many_, rows, masks, True, lengths=lengths)
    for a, b in zip(got, want, strict=True):
        assert_same_bits(a, b)
    assert torch.equal(moments.isnan(), same.isnan())


@IMPLEMENTATIONS
def test_empty_tensors_and_empty_lists_are_nothing(sample_many_, gpu_device):
    device = device_of(sample_many_, gpu_device)
    assert sample_many_([], [], [], 1) is None
    assert sample_many_([], [], [], 1, None, True).shape == (2, 0)
    rows = [(torch.float32, rng.normal(0, 1), n, n) for n in (0, 3, 0)]
    outs, found = run(sample_many_, rows, None, True, device)
    assert_same_bits(outs[1], alone(*rows[1]))
    assert found.isnan().tolist() == [[True, False, True]] * 2
    none = [torch.empty(0, dtype=torch.uint8), torch.zeros(1, dtype=torch.uint8), torch.empty(0, dtype=torch.bool)]
    outs, found = run(sample_many_, rows, none, True, device, lengths=[0, 0, 0])
    assert found.isnan().all()


def test_values_and_moments_do_not_depend_on_the_number_of_threads():
    rows = [(torch.float32, d, n, n) for d in distributions(torch.float32) for n in (70_001, 30, 8192)]
    masks = [[None, None, half(n, i)][i % 3] for i, (_, _, n, _) in enumerate(rows)]
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(run(cpu_sample_many_, rows, masks, True))
    finally:
        torch.set_num_threads(before)
    (one, first), (two, second) = results
    assert all(torch.equal(bits(a), bits(b)) for a, b in zip(one, two, strict=True))
    assert torch.equal(bits(first), bits(second))


def exact_moments(values):
    """Mean and variance in exact arithmetic, rounded at the end."""
    values = values.double()
    values = values[values.isfinite()].tolist()
    mean = math.fsum(values) / len(values)
    return mean, math.fsum((v - mean) ** 2 for v in values) / len(values)


@pytest.mark.parametrize("masked", [False, True])
def test_moments_are_those_of_the_values_to_float64s_rounding(masked):
    """A sum of n differences |d| <= width, k of them in a row in a lane, has an error below k 2^-53 n width; squares likewise.

    k = 8192 / 32 differences, 5 folds, a term a block, and less than 16 operations around them.
    """
    rows = listed((300, 9000))
    masks = [half(n, i) if masked else None for i, (_, _, n, _) in enumerate(rows)]
    outs, found = run(cpu_sample_many_, rows, masks, True)
    for out, mask, (mean, var) in zip(outs, masks, found.t().tolist(), strict=True):
        values = out if mask is None else out[mask]
        exact_mean, exact_var = exact_moments(values)
        width = float(values.double().max() - values.double().min())
        unit = (256 + 5 + 2 + 16) * 2.0**-53
        assert abs(mean - exact_mean) <= unit * (width + abs(exact_mean))
        assert abs(var - exact_var) <= 4 * unit * width**2
        if width == 0:
            assert (mean, var) == (float(values[0]), 0.0)


def test_moments_agree_with_the_moments_op(gpu_device):
    from initperf.variance.moments import moments

    rows = listed((300, 5001))
    outs, found = run(cpu_sample_many_, rows, None, True)
    want = moments(outs, order=2)
    assert torch.allclose(found[0], want.mean, rtol=0, atol=1e-12)
    assert torch.allclose(found[1], want.var, rtol=1e-12, atol=0)
    _, on_gpu = run(gpu_sample_many_, rows[::5], None, True, gpu_device)
    assert torch.allclose(on_gpu.cpu(), found[:, ::5], rtol=1e-5, atol=1e-6)  # float32 within a block there


@IMPLEMENTATIONS
def test_values_beyond_float16_count_for_nothing_in_the_moments(sample_many_, gpu_device):
    row = torch.float16, rng.normal(0.0, 40000.0), 9000, 3
    (out,), found = run(sample_many_, [row], None, True, device_of(sample_many_, gpu_device))
    assert out.isinf().any()
    assert found[:, 0].tolist() == pytest.approx(exact_moments(out), rel=1e-4)


@needs_fork
def test_a_forked_child_samples_a_list():
    def call():
        out = torch.empty(300_000)
        cpu_sample_many_([out], [tuple(rng.normal(0, 1))], [5], 1)
        return [out]

    assert_same_in_a_forked_child(call)


@pytest.mark.parametrize("n", [0, 1, 7, 8, 9, 63, 64, 1000])
def test_packed_bits_are_numpys_little_endian_ones(n):
    mask = half(n, n)
    packed = pack_bits(mask)
    assert packed.numpy().tobytes() == np.packbits(mask.numpy(), bitorder="little").tobytes()
    assert torch.equal(unpacked(packed)[:n], mask)
    assert bits_set(packed) == int(mask.sum())


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(30, 41), (1, 3), (5, 3, 3, 3), (100, 300), (7,)])
def test_survivors_are_those_of_the_whole_tensor(dtype, shape):
    for d in (rng.normal(0.0, 1.0), rng.uniform(2.0, 2.0, dtype)):
        mask = half(shape, 5, 0.3)
        whole = sample_into(torch.empty(shape, dtype=dtype), d, seed=7, stream=2**63)
        nnz = int(mask.sum())
        strided = torch.empty(nnz, 2, dtype=dtype)[:, :1]
        for values in (torch.empty(nnz, dtype=dtype), torch.empty(nnz, 1, dtype=dtype), strided):
            for given in (mask, pack_bits(mask)):
                version = values._version
                assert sample_survivors_into(values.fill_(3), d, given, shape, seed=7, stream=2**63) is values
                assert_same_bits(values.flatten(), whole[mask])
                assert values._version > version


def test_survivors_of_a_mask_that_keeps_nothing_are_none():
    values = torch.empty(0, 1)
    mask = torch.zeros(3, 5, dtype=torch.bool)
    assert sample_survivors_into(values, rng.normal(0.0, 1.0), mask, (3, 5), seed=1) is values
    meta = torch.empty(9, 1, device="meta")
    assert sample_survivors_into(meta, rng.normal(0.0, 1.0), mask, (3, 5), seed=1) is meta


def test_what_does_not_fit_survivors_is_refused_and_nothing_is_touched():
    normal = rng.normal(0.0, 1.0)
    mask = half((3, 5), 1)
    nnz = int(mask.sum())
    late = pack_bits(mask).clone()
    late[-1] |= 128
    cases = [
        ({"values": torch.ones(nnz + 1)}, "as many values"),
        ({"values": torch.ones(nnz, 2)}, "shape"),
        ({"values": torch.ones(nnz, dtype=torch.int32)}, "int32"),
        ({"mask": mask.t()}, r"\(3, 5\)"),
        ({"mask": mask.float()}, "packed bytes"),
        ({"mask": mask.tolist()}, "torch.Tensor"),
        ({"mask": pack_bits(mask)[:1]}, "2 packed bytes"),
        ({"mask": late}, "behind the 15"),
        ({"distribution": "normal"}, "Distribution"),
        ({"seed": 2**64}, "2\\*\\*64"),
        ({"stream": -1}, "2\\*\\*64"),
    ]
    for change, message in cases:
        given = {"values": torch.ones(nnz), "distribution": normal, "mask": mask, "seed": 1, "stream": 0} | change
        before = given["values"].clone()
        with pytest.raises(InitPerfError, match=message):
            # fmt: skip
            sample_survivors_into(
                given["values"],
                given["distribution"],
                given["mask"],
                (3, 5),
                seed=given["seed"],
                stream=given["stream"],
            )
        assert torch.equal(before, given["values"])


BANNED = re.compile(
    r"\b(?:(?:add|sub|mul|fma|sqrt)(?!\.rn)\.[\w.]*f32|[\w.]*\.(?:approx|ftz|full)\b[\w.]*|div\.[\w.]*f32)"
)


def facts(target):
    from initperf.kernels.gpu.sampling import sample_many as on_gpu
    from tools.gpu_report.aot import capture

    on_gpu._WARP = 2 if target.startswith("gfx") else 1
    lists = [[torch.empty(n, device="meta", dtype=t) for t in FLOATS] for n in (4096, 5001)]
    with capture(target) as launches:
        for outs in lists:
            gpu_sample_many_(outs, [tuple(rng.normal(0, 1))] * 4, [1, 2, 3, 2**64 - 1], 5)
    codes = {launch.code.text: launch.code for launch in launches}
    code = next(iter(codes.values()))
    return {
        "launches": len(launches),
        "kernels": len(codes),
        "spills": code.spills,
        "stack": code.stack,
        "wide": code.widths("store")[128],
        "inexact": sorted(set(BANNED.findall(code.text))) if target.startswith("sm") else [],
    }


@pytest.fixture(scope="module")
def compiled():
    """Facts of the machine code, from a process where Triton compiles instead of interpreting."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests/support")])
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_one_kernel_serves_every_list_with_wide_stores_no_spills_and_ieee_operations(compiled, target):
    found = compiled[target]
    assert (found["launches"], found["kernels"]) == (2, 1)
    assert (found["spills"], found["stack"], found["inexact"]) == (0, 0, [])
    assert found["wide"] >= 4 * (8 // 4 + 1 + 1 + 8 // 2)  # 4 lanes of 8 values a thread, in every dtype


if __name__ == "__main__":
    print(json.dumps({target: facts(target) for target in ("sm_80", "sm_90", "sm_100", "gfx942")}))
