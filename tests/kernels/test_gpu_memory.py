"""Sampling, moments and selection on the GPU's kernels: no access outside a tensor, and elements beyond 2^31."""

import numpy as np
import pytest
import torch

from gpu_memory import LastProgram, apart, checked_memory, virtual
from initperf import rng
from initperf.kernels.reference.sampling.sample import sample_ as definition
from tolerance import bits

pytest.importorskip("triton")
from initperf.kernels.gpu.masks import select  # noqa: E402
from initperf.kernels.gpu.moments import moments  # noqa: E402
from initperf.kernels.gpu.sampling import sample, sample_many  # noqa: E402

pytestmark = pytest.mark.usefixtures(checked_memory.__name__)
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
FAR = 1 << 31


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("n", "offset", "run", "stride"), [(1, 0, -1, 0), (5001, 3, -1, 0), (700, 5, 70, 100)])
def test_sampling_writes_inside_its_tensor_only(dtype, n, offset, run, stride, gpu_device):
    normal = rng.normal(0, 1)
    got = sample.sample_(torch.empty(n, dtype=dtype, device=gpu_device), *normal, 1, 2, offset, run, stride)
    want = definition(torch.empty(n, dtype=dtype), *normal, 1, 2, offset, run, stride)
    assert torch.equal(bits(got.cpu()), bits(want))


@pytest.mark.parametrize(("offset", "run"), [(0, -1), (5, -1), (5, 1 << 20)])
def test_sampling_fills_a_tensor_beyond_two_to_the_31_elements(offset, run, monkeypatch):
    out = virtual((FAR + (1 << 20),), (1,), torch.float32)
    monkeypatch.setattr(sample, "_fill", LastProgram(sample._fill, monkeypatch))
    normal, stride = rng.normal(0, 1), 2 * run
    sample.sample_(out, *normal, 1, 2, offset, run, stride)
    index = offset + len(out) - 5 if run < 0 else offset + len(out) // run * stride - stride + run - 5
    assert torch.equal(bits(out[-5:]), bits(definition(torch.empty(5), *normal, 1, 2, index)))
    assert not out[:9].any()


@pytest.fixture
def table(checked_memory, monkeypatch):
    """sample_many_ whose kernel reads addresses from a table: what they point to is known to the checks."""
    by_word = sample_many._bits_by_word

    def known(bits):
        words, starts = by_word(bits)
        checked_memory.add(words, starts)
        return words, starts

    def run(outs, streams, masks):
        checked_memory.add(*outs, *(m for m in masks if m is not None))
        sample_many.sample_many_(outs, [tuple(rng.normal(0, 1))] * len(outs), streams, 1, masks)

    monkeypatch.setattr(sample_many, "_bits_by_word", known)
    return run


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("n", [1, 4096, 5001])
def test_a_list_is_sampled_inside_its_tensors_wherever_they_begin(n, shift, table, gpu_device):
    keep = torch.rand(n, generator=torch.Generator().manual_seed(0)) < 0.3
    packed = torch.from_numpy(np.packbits(keep.numpy(), bitorder="little")).to(gpu_device)
    outs, masks, whole = [], [], []
    for dtype in FLOATS:
        whole += [definition(torch.empty(n, dtype=dtype), *rng.normal(0, 1), 1, 2)] * 3
        for mask, length in ((None, n), (keep.to(gpu_device), n), (packed, int(keep.sum()))):
            outs.append(torch.empty(length + shift, dtype=dtype, device=gpu_device)[shift:])
            masks.append(mask)
    table(outs, [2] * len(outs), masks)
    for i, (out, want) in enumerate(zip(outs, whole, strict=True)):
        want = want if i % 3 == 0 else want.masked_fill(~keep, 0) if i % 3 == 1 else want[keep]
        assert torch.equal(bits(out.cpu()), bits(want))


@pytest.mark.parametrize("extra", [0, 5])
def test_a_list_fills_a_tensor_beyond_two_to_the_31_elements(extra, table, monkeypatch):
    out = virtual((FAR + 4096 + extra,), (1,), torch.bfloat16)
    monkeypatch.setattr(sample_many, "_fill_many", LastProgram(sample_many._fill_many, monkeypatch))
    table([out], [2], [None])
    want = definition(torch.empty(5, dtype=out.dtype), *rng.normal(0, 1), 1, 2, len(out) - 5)
    assert torch.equal(bits(out[-5:]), bits(want))
    assert not out[:9].any()


@pytest.mark.parametrize("step", [1, 3])
@pytest.mark.parametrize("dtype", FLOATS)
def test_moments_of_misaligned_and_strided_memory_are_those_of_a_copy(dtype, step, checked_memory, gpu_device):
    x = torch.randn(20000, generator=torch.Generator().manual_seed(0)).to(dtype).to(gpu_device)[step::step]
    n = len(x)
    want = moments_of(x.clone(), (1, 1, n, n, n), checked_memory)
    got = moments_of(x, (n, 1, 1, step, 1) if step > 1 else (1, 1, n, n, n), checked_memory)
    torch.testing.assert_close(got, want, rtol=1e-6 if dtype != torch.float64 else 1e-12, atol=1e-6)


def moments_of(x, shape, memory):
    memory.add(x)
    return moments.moments([x], [shape], 4, 0.0)


@pytest.mark.parametrize("dtype", FLOATS)
def test_moments_find_runs_and_rows_beyond_two_to_the_31_elements(dtype, checked_memory):
    x = torch.randn(3, 20, generator=torch.Generator().manual_seed(0)).to(dtype)
    far = apart(x)
    want = moments_of(x, (3, 1, 20, 20, 1), checked_memory)
    assert torch.equal(moments_of(far, (3, 1, 20, far.stride(0), 1), checked_memory), want)  # three runs of one channel
    want = moments_of(x, (3, 20, 1, 20, 1), checked_memory)
    assert torch.equal(
        bits(moments_of(far, (3, 20, 1, far.stride(0), 1), checked_memory)), bits(want)
    )  # across columns
    want = moments_of(x, (1, 3, 20, 20, 20), checked_memory)
    assert torch.equal(
        moments_of(far, (1, 3, 20, far.stride(0), far.stride(0)), checked_memory), want
    )  # three channels


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("masked", [False, True])
def test_selection_reads_and_writes_inside_its_tensors_only(dtype, masked, gpu_device):
    x = torch.randn(4099, generator=torch.Generator().manual_seed(0)).to(dtype).to(gpu_device)
    alive = [torch.rand(4099, device=gpu_device) < 0.5] if masked else None
    found = select.kth_smallest([x], alive, 1000)
    (mask,) = select.cut([x], alive, found)
    assert int(mask.sum()) == (int(alive[0].sum()) if masked else 4099) - 1000


def test_selection_counts_and_cuts_keys_beyond_two_to_the_31_elements(monkeypatch):
    block, n = select.TILES["BLOCK"], FAR + 4096 + 7
    last = torch.arange(n - 7, n) - FAR
    words, mask = virtual((n,), (1,), torch.int32), virtual((n,), (1,), torch.uint8)
    words[-7:] = last.to(torch.int32)
    bins = 1 << select.DIGIT
    counts, state = torch.zeros(bins, dtype=torch.int64), torch.tensor([int(last[0]) >> select.DIGIT, 0])
    grid = (-(-n // block),)
    monkeypatch.setattr(select, "_histogram", LastProgram(select._histogram, monkeypatch))
    select._histogram[grid](words, words, state, counts, n, 0, 32, False, block)
    assert torch.equal(counts, torch.bincount(last & (bins - 1), minlength=bins))
    equal = torch.zeros(grid, dtype=torch.int64)
    selection = torch.tensor([int(last[3]), 1, 0, 0])
    LastProgram(select._count_equal, monkeypatch)[grid](words, words, selection, equal, n, 32, False, block)
    assert equal.nonzero().tolist() == [[grid[0] - 1]]
    LastProgram(select._cut, monkeypatch)[grid](words, words, selection, equal * 0, mask, n, 32, False, block)
    assert mask[-7:].tolist() == [0, 0, 0, 0, 1, 1, 1]
