"""Sampling: the Numba and the Triton kernels give the bits of the plain-torch definition, and those follow the distribution."""

import math
import threading

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import special, stats

from forks import assert_same_in_a_forked_child, needs_fork
from initperf import rng
from initperf.kernels.cpu.core import jit
from initperf.kernels.cpu.sampling.philox import tile_words
from initperf.kernels.cpu.sampling.sample import sample_ as cpu_sample_
from initperf.kernels.gpu.sampling.philox import philox as gpu_philox
from initperf.kernels.gpu.sampling.sample import sample_ as gpu_sample_
from initperf.kernels.reference.sampling.sample import _log, fma
from initperf.kernels.reference.sampling.sample import philox as reference_philox
from initperf.kernels.reference.sampling.sample import sample_ as reference_sample_
from known_answers import KNOWN
from samples import FLOATS, INF, TRUNCATIONS, assert_same_bits, distributions
from tolerance import bits

INTERVALS = [(kind, *interval) for kind, intervals in TRUNCATIONS.items() for interval in intervals]


# Version 1 of the contract: float32 bits (BITS: words) at seed 0x0123456789ABCDEF, stream 0xFEDCBA9876543210, indices
# 2^42 + 254 + 256 i + (0 to 3). Uniform on [-0.3, 1.7); normal with mean 0.1, std 0.7; the others the standard normal on
# the interval below. These never change.
KNOWN_VALUES = {
    "BITS": "eb1f0ab9 4f2e21ff 28f70fe3 034700fb 69caa161 afab3cc3 fe85b0fa 5857e96b b05726d0 7809e16c e2ffc8d7 f1dbc3a1 c8630842 494d6aac ad9405a4 60fe738e",
    "UNIFORM": "3fc4b8a4 3ea31eea 3ca42a20 be8c7d9a 3f06c875 3f8944d6 3fd81f4a 3ec7c60a 3f89f0c0 3f2346f5 3fbc9962 3fcb755c 3fa1fca2 3e8b9c0e 3f872d9e 3eea6032",
    "NORMAL": "3cb67bff befbfb1a bde4f7f7 3dfd2789 be365cf9 3f7e7a9a 3e2eb266 bf67e0b9 3f11abba 3f22c5b2 3d970d23 3e8d7998 be8ffa8a 3f464d19 3f356d90 3efe454d",
    "TRUNC_NORMAL": "3fb19071 befe25bc bf7d98b2 c00c6a93 be5fd7b0 3ef7a8bc 401cea93 becb8177 3efb70aa bd9f6134 3f9a16f1 3fcaed68 3f4769ca bf0ffada 3eebf903 be9d7829",
    "TRUNC_CENTER": "be4919e3 3f531e81 3ec91355 3cfaf636 3fa0110d bf570331 bc624a4b 3f73a649 bf54bc19 3fcf93b1 be8c8488 be07bc3f bf0bb132 3f3ff22b bf5e372b 3f8b3ad0",
    "TRUNC_TAIL": "4091332b 4082bec0 40814d30 408018be 4083ef4d 40886176 409cf369 40832275 40887063 4084a7ca 408f2963 40937f33 408ae638 4082814d 408833b8 40838563",
    "TRUNC_FAR": "41a0ff3b 41a025c8 41a011cf 41a00151 41a0366c 41a07638 41a20b33 41a02b36 41a07713 41a04097 41a0dddc 41a126c4 41a09ba8 41a02272 41a0739a 41a0309e",
    "TRUNC_NARROW": "3f8088b7 3f8108f0 3f80d7e8 3f80a7a0 3f812b20 3f803cc5 3f80a18a 3f8114b4 3f803da0 3f813d71 3f807e55 3f809155 3f805c53 3f810164 3f803a1a 3f811fd1",
}
KNOWN_INTERVALS = {
    "TRUNC_NORMAL": (-3, 3),
    "TRUNC_CENTER": (-2, 2),
    "TRUNC_TAIL": (4, 5),
    "TRUNC_FAR": (20, 21),
    "TRUNC_NARROW": (1, 1.01),
}


def filled(sample_, n, dtype, distribution, seed=1, stream=0, *rest, device="cpu", **options):
    out = torch.full((n,), 7, dtype=dtype, device=device)
    return sample_(out, *distribution, seed, stream, *rest, **options).cpu()


def cpu_block(c0, c1, c2, c3, k0, k1):
    """The words of one block, out of its tile: block c0 % 256 of tile (c1, c0) / 256, stream (c3, c2)."""
    words = np.zeros(1024, np.uint32)
    tile_words(words, np.uint64((c1 << 32 | c0) >> 8), 0, 256, *(np.uint64(w) for w in (k0, k1, c2, c3)))
    return tuple(int(w) for w in words[c0 % 256 :: 256])


@triton.jit
def gpu_block(words_ptr, out_ptr):
    c0, c1 = tl.load(words_ptr).to(tl.uint32), tl.load(words_ptr + 1).to(tl.uint32)
    c2, c3 = tl.load(words_ptr + 2).to(tl.uint32), tl.load(words_ptr + 3).to(tl.uint32)
    a, b, c, d = gpu_philox(c0, c1, c2, c3, tl.load(words_ptr + 4).to(tl.uint32), tl.load(words_ptr + 5).to(tl.uint32))
    tl.store(out_ptr, a.to(tl.int64))
    tl.store(out_ptr + 1, b.to(tl.int64))
    tl.store(out_ptr + 2, c.to(tl.int64))
    tl.store(out_ptr + 3, d.to(tl.int64))


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN)
def test_every_implementation_gives_random123_known_answers(counter, key, words, gpu_device):
    assert tuple(int(w) for w in reference_philox(*(torch.tensor([c]) for c in counter), *key)) == words
    assert cpu_block(*counter, *key) == words
    out = torch.zeros(4, dtype=torch.int64, device=gpu_device)
    gpu_block[(1,)](torch.tensor([*counter, *key], device=gpu_device), out)
    assert tuple(out.tolist()) == words


@pytest.mark.parametrize("sample_", [reference_sample_, cpu_sample_, gpu_sample_])
@pytest.mark.parametrize("name", KNOWN_VALUES)
def test_values_of_the_frozen_version(name, sample_, gpu_device):
    assert rng.VERSION == 1
    if name in KNOWN_INTERVALS:
        d = rng.trunc_normal(0.0, 1.0, *KNOWN_INTERVALS[name], torch.float32)
        assert d.kind == getattr(rng, name)
    else:
        d = {"UNIFORM": rng.uniform(-0.3, 1.7, torch.float32), "NORMAL": rng.normal(0.1, 0.7)}.get(
            name, distributions(torch.int32)[0]
        )
    dtype = torch.int32 if name == "BITS" else torch.float32
    device = gpu_device if sample_ is gpu_sample_ else "cpu"
    out = filled(sample_, 16, dtype, d, 0x0123456789ABCDEF, 0xFEDCBA9876543210, 2**42 + 254, 4, 256, device=device)
    assert " ".join(f"{v & 0xFFFFFFFF:08x}" for v in out.view(torch.int32).tolist()) == KNOWN_VALUES[name]


@pytest.mark.parametrize("dtype", [*FLOATS, torch.int32])
@pytest.mark.parametrize(
    ("n", "seed", "stream", "offset"),
    [
        (0, 0, 0, 0),
        (1, 1, 2**32, 0),
        (1023, 2**32 - 1, 2**64 - 1, 1),
        (1024, 2**63, 2**32 - 1, 1024),
        (1025, 2**64 - 1, 2**63 + 5, 2**32 - 3),
        (5000, 0, 1, 2**42 + 777),
        (70_001, 9, 2**40, 2**43 - 2048),
    ],
)
def test_cpu_equals_the_definition(dtype, n, seed, stream, offset):
    for d in distributions(dtype):
        arguments = n, dtype, d, seed, stream, offset
        assert_same_bits(filled(cpu_sample_, *arguments), filled(reference_sample_, *arguments))


def test_cpu_equals_the_definition_on_a_million_values():
    for d in distributions(torch.float32)[:3]:
        arguments = 10**6 + 7, torch.float32, d, 123, 45
        assert_same_bits(filled(cpu_sample_, *arguments), filled(reference_sample_, *arguments))


@settings(deadline=None, max_examples=40)
@given(
    st.integers(1, 3000),
    st.integers(0, 2**64 - 1),
    st.integers(0, 2**64 - 1),
    st.integers(0, 2**62),
    st.integers(1, 700),
    st.integers(0, 5000),
    st.sampled_from([*FLOATS, torch.int32]),
    st.integers(0, 6),
)
def test_cpu_equals_the_definition_for_any_shard(n, seed, stream, offset, run, gap, dtype, which):
    d = distributions(dtype)[which % len(distributions(dtype))]
    arguments = n, dtype, d, seed, stream, offset, run, run + gap
    assert_same_bits(filled(cpu_sample_, *arguments), filled(reference_sample_, *arguments))


@pytest.mark.parametrize("dtype", [*FLOATS, torch.int32])
def test_gpu_equals_cpu_in_every_dtype_and_kind(dtype, gpu_device):
    for d in distributions(dtype):
        arguments = 1025, dtype, d, 2**63 + 5, 2**40 + 3, 2**42 + 1024
        assert_same_bits(filled(gpu_sample_, *arguments, device=gpu_device), filled(cpu_sample_, *arguments))


@pytest.mark.parametrize(
    ("n", "offset", "run", "stride", "tiles"),
    [
        (0, 0, -1, 0, 1),
        (1, 2**43 + 5, -1, 0, 1),
        (1024, 0, -1, 0, 1),
        (4096, 1024, -1, 0, 2),
        (5000, 0, -1, 0, 2),
        (5000, 0, -1, 0, 4),
        (3001, 513, -1, 0, 1),
        (50, 1000, 7, 100, 1),
        (3000, 500, 1500, 4096, 2),
        (100, 2**42 - 50, 100, 200, 1),
    ],
)
def test_gpu_equals_cpu_for_any_shard_and_tile_size(n, offset, run, stride, tiles, gpu_device):
    for d in (rng.uniform(0, 1, torch.float32), rng.normal(0, 1)):
        arguments = n, torch.float32, d, 77, 2**33, offset, run, stride
        got = filled(gpu_sample_, *arguments, device=gpu_device, tiles=tiles)
        assert_same_bits(got, filled(cpu_sample_, *arguments))


def test_gpu_equals_cpu_on_a_million_values(gpu_device):
    tiles = 256 if gpu_device == "cpu" else None  # few, large programs: the interpreter pays by the program
    arguments = 10**6 + 7, torch.float32, rng.normal(0, 1), 3, 4
    assert_same_bits(filled(gpu_sample_, *arguments, device=gpu_device, tiles=tiles), filled(cpu_sample_, *arguments))


def test_thread_count_does_not_change_bits():
    before = torch.get_num_threads()
    try:
        for d in distributions(torch.bfloat16):
            torch.set_num_threads(1)
            one = filled(cpu_sample_, 300_001, torch.bfloat16, d)
            torch.set_num_threads(2)
            assert_same_bits(filled(cpu_sample_, 300_001, torch.bfloat16, d), one)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("shape", [(37, 5000), (600, 300), (4096, 3)])
def test_shards_of_rows_and_columns_are_slices_of_the_whole(shape):
    rows, columns = shape
    d = rng.normal(0, 1)
    whole = filled(cpu_sample_, rows * columns, torch.float32, d).view(shape)
    top = rows // 3
    assert_same_bits(
        filled(cpu_sample_, (rows - top) * columns, torch.float32, d, 1, 0, top * columns), whole[top:].flatten()
    )
    left, right = columns // 3, columns - columns // 4
    part = filled(cpu_sample_, rows * (right - left), torch.float32, d, 1, 0, left, right - left, columns)
    assert_same_bits(part, whole[:, left:right].flatten())


def test_a_longer_tensor_begins_with_the_shorter():
    for n in (1, 255, 256, 257, 1023, 1024, 1025, 70_000):
        a, b = (filled(cpu_sample_, m, torch.float32, rng.normal(0, 1)) for m in (n, n + 100_000))
        assert_same_bits(a, b[:n])


@pytest.mark.parametrize("n", [1, 1024, 5 * 8 * 1024 + 77])
def test_normal_values_written_past_the_caches_are_the_same(n, monkeypatch):
    """Large tensors are; here every one is large. The memory around stays as it was."""
    whole, wanted = torch.full((n + 32,), 7.0), torch.full((n + 32,), 7.0)
    kind, params = rng.normal(0.5, 2)
    cpu_sample_(wanted[16:-16], kind, params, 5, 2**63 + 3)
    monkeypatch.setattr("initperf.kernels.cpu.sampling.sample._LARGE", 0)
    monkeypatch.setattr("initperf.kernels.cpu.sampling.sample_many._LARGE", 0)
    cpu_sample_(whole[16:-16], kind, params, 5, 2**63 + 3)
    assert torch.equal(bits(whole), bits(wanted))


@pytest.mark.parametrize(("offset", "run", "stride"), [(1024, -1, 0), (0, 1000, 3000), (0, 1000, 1000), (5, 70, 90)])
def test_a_shard_is_not_taken_for_a_whole_because_it_is_large(offset, run, stride, monkeypatch):
    d = rng.normal(0.5, 2)
    wanted = filled(cpu_sample_, 5000, torch.float32, d, 5, 3, offset, run, stride)
    monkeypatch.setattr("initperf.kernels.cpu.sampling.sample._LARGE", 0)
    monkeypatch.setattr("initperf.kernels.cpu.sampling.sample_many._LARGE", 0)
    assert_same_bits(filled(cpu_sample_, 5000, torch.float32, d, 5, 3, offset, run, stride), wanted)


def test_numba_is_told_of_every_change_of_torchs_threads(monkeypatch):
    told, before = [], torch.get_num_threads()
    monkeypatch.setattr(jit, "_MAX_THREADS", 4)
    monkeypatch.setattr(jit, "_told", threading.local())
    monkeypatch.setattr(jit.numba, "set_num_threads", told.append)
    try:
        for count in (2, 2, 3, 1, 3, 2, 9):
            torch.set_num_threads(count)
            assert jit.threads() == min(count, 4)
    finally:
        torch.set_num_threads(before)
    assert told == [2, 3, 2, 4]  # one thread runs no parallel kernel


def test_seeds_streams_and_offsets_give_different_values():
    d = rng.uniform(0, 1, torch.float32)
    variants = [(0, 0), (1, 0), (2**32, 0), (0, 1), (0, 2**32), (0, 0, 2**42), (0, 0, 1024)]
    values = [filled(cpu_sample_, 2000, torch.float32, d, *v) for v in variants]
    for i, a in enumerate(values):
        for b in values[:i]:
            assert (a == b).float().mean() < 0.01


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    ("lo", "hi"), [(0.0, 1.0), (1.0, 2.0), (-1.0, 0.0), (0.1, 0.11), (-1e-3, 1e-3), (100.0, 101.5)]
)
def test_uniform_stays_in_its_bounds(dtype, lo, hi):
    out = filled(cpu_sample_, 200_000, dtype, rng.uniform(lo, hi, dtype)).double()
    assert out.min() >= lo
    assert out.max() < hi


@pytest.mark.parametrize("dtype", FLOATS)
def test_the_largest_word_does_not_reach_hi(dtype):
    """The word with all ones occurs once in 2^32: its value by the formula, through the definition of finish."""
    for lo, hi in [(0.0, 1.0), (1.0, 2.0), (-3.0, 5.0)]:
        scale, base, _, greatest = rng.uniform(lo, hi, dtype).params
        value = fma(torch.tensor([2.0**24 - 1]), scale, base).double().clamp(max=greatest).to(dtype)
        assert value.item() < hi


@pytest.mark.parametrize("dtype", FLOATS)
def test_equal_bounds_give_that_value(dtype):
    want = torch.empty(50, dtype=dtype).uniform_(0.1, 0.1)
    assert_same_bits(filled(cpu_sample_, 50, dtype, rng.uniform(0.1, 0.1, dtype)), want)
    assert_same_bits(filled(cpu_sample_, 50, dtype, rng.trunc_normal(0.0, 1.0, 0.1, 0.1, dtype)), want)


@pytest.mark.parametrize("hi", [1e-33, 1e-37, 1e-41])
def test_ranges_below_float32s_normal_numbers_are_not_flushed(hi, gpu_device):
    """(hi - lo) 2^-24 is subnormal here, so fewer values are possible, and at 1e-41 only lo: the same everywhere."""
    d = rng.uniform(0.0, hi, torch.float32)
    out = filled(cpu_sample_, 2000, torch.float32, d)
    assert (len(out.unique()) > 30) == (hi > 1e-40)
    assert out.max() < hi
    assert_same_bits(out, filled(reference_sample_, 2000, torch.float32, d))
    assert_same_bits(out, filled(gpu_sample_, 2000, torch.float32, d, device=gpu_device))


def test_halves_are_the_float32_values_rounded_once():
    single = filled(cpu_sample_, 100_000, torch.float32, rng.normal(0.0, 1e-3))
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        assert_same_bits(filled(cpu_sample_, 100_000, dtype, rng.normal(0.0, 1e-3)), single.to(dtype))


@pytest.mark.parametrize(("kind", "a", "b"), INTERVALS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_truncated_normals_stay_in_their_interval(kind, a, b, dtype):
    for mean, std in ((0.0, 1.0), (-3.7, 0.01)):
        low, high = mean + std * a, mean + std * b
        try:
            d = rng.trunc_normal(mean, std, low, high, dtype)
        except ValueError:
            assert dtype == torch.bfloat16  # no value of bfloat16 in the interval
            continue
        out = filled(cpu_sample_, 30_000, dtype, d).double()
        assert out.min() >= low
        assert out.max() <= high


def shares(words, kind):
    """The share u of the mass below the value, as the kind reads it from the word."""
    words = words.double().numpy() % 2.0**32
    if kind in (rng.TRUNC_CENTER, rng.TRUNC_NARROW):
        return (words + 2.0**31) % 2.0**32 * 2.0**-32
    return (words // 2 * 2 + 1) * 2.0**-32


def exact_quantile(u, a, b):
    """The standard normal's quantile on [a, b] in float64, from the tail that is nearer to 0 in mass."""
    if a >= 0:
        return -exact_quantile(1 - u, -b, -a)
    log_a, log_b = special.log_ndtr(a), special.log_ndtr(b)
    low = special.ndtri_exp(log_b + np.log(u + (1 - u) * np.exp(log_a - log_b)))
    log_a, log_b = special.log_ndtr(-a), special.log_ndtr(-b)
    high = -special.ndtri_exp(log_a + np.log((1 - u) + u * np.exp(log_b - log_a)))
    return np.where(low < 0, low, high)


@pytest.mark.parametrize(("kind", "a", "b"), [i for i in INTERVALS if i[0] != rng.TRUNC_NARROW])
def test_quantile_error_of_truncated_normals(kind, a, b):
    """Within 1e-6 + 4e-7 |z| of the float64 quantile: two units in the last place of z, and what 2^-24 steps of the mass move it."""
    d = rng.trunc_normal(0.0, 1.0, a, b, torch.float32)
    assert d.kind == kind
    words = filled(cpu_sample_, 100_000, torch.int32, (rng.BITS, d.params), 5)
    got = filled(cpu_sample_, 100_000, torch.float32, d, 5).double().numpy()
    u = shares(words, kind)
    exact = -exact_quantile(u, -b, -a) if d.params[0] < 0 else exact_quantile(u, a, b)
    error = np.abs(got - exact)
    assert (error <= 1e-6 + 4e-7 * np.abs(got)).all(), error.max()


@pytest.mark.parametrize(("kind", "a", "b"), [i for i in INTERVALS if i[0] == rng.TRUNC_NARROW])
def test_narrow_truncations_are_accurate_relative_to_their_width(kind, a, b):
    """The mean is chosen so that the interval begins at 0, where float32 resolves it."""
    d = rng.trunc_normal(-float(a), 1.0, 0.0, float(b) - float(a), torch.float64)
    assert d.kind == kind
    words = filled(cpu_sample_, 100_000, torch.int32, (rng.BITS, d.params), 5)
    got = filled(cpu_sample_, 100_000, torch.float64, d, 5).numpy()
    u = shares(words, kind)
    middle, width = (a + b) / 2, b - a
    if width < 1e-3:  # the density is exp(-middle x), to width^2
        want = -np.log1p(u * np.expm1(-middle * width)) / middle
    else:
        want = exact_quantile(u, a, b) - a
    assert np.abs(got - want).max() <= 4e-7 * width


def test_far_truncations_resolve_their_tail():
    """[1e6, inf) std from the mean, written as [0, inf) from a mean of -1e6: nearly an exponential with rate 1e6."""
    d = rng.trunc_normal(-1e6, 1.0, 0.0, INF, torch.float32)
    assert d.kind == rng.TRUNC_FAR
    out = filled(cpu_sample_, 100_000, torch.float32, d, 5).double().numpy()
    assert stats.kstest(out * 1e6, stats.expon.cdf).pvalue > 1e-3


def test_squared_radius_is_never_negative_and_accurate():
    """s = -2 ln(u 2^-32): every float next to the largest, where s vanishes, and some of every octave."""
    top = 2.0**32 - 256 * torch.arange(50_000, dtype=torch.float64)
    below = torch.arange(2**31, 2**32, 128 * 77, dtype=torch.float64)
    lower = torch.cat([torch.linspace(2.0**e, 2.0 ** (e + 1), 3000, dtype=torch.float64) for e in range(31)])
    for u in (top, below, lower):
        u = u.float()
        s = _log(u, 32)
        exact = -2 * torch.log(u.double() * 2.0**-32)
        assert (s >= 0).all()
        assert ((s - exact).abs() <= 3e-7 * exact).all()
    assert _log(torch.tensor([2.0**32]), 32).item() == 0
    assert _log(torch.tensor([1.0]), 32).item() == pytest.approx(64 * math.log(2), rel=1e-7)


@pytest.mark.parametrize("sample_", [reference_sample_, cpu_sample_])
def test_moments_and_fit_of_uniform_and_normal(sample_):
    n = 200_000
    u = filled(sample_, n, torch.float32, rng.uniform(0.0, 1.0, torch.float32), 11).double().numpy()
    z = filled(sample_, n, torch.float32, rng.normal(0.0, 1.0), 12).double().numpy()
    assert stats.kstest(u, stats.uniform.cdf).pvalue > 1e-3
    assert stats.kstest(z, stats.norm.cdf).pvalue > 1e-3
    for lanes in (z.reshape(-1)[: n // 1024 * 1024].reshape(-1, 4, 256),):
        corr = np.corrcoef(lanes.transpose(1, 0, 2).reshape(4, -1))
        assert np.abs(corr - np.eye(4)).max() < 5 / math.sqrt(n / 4)


@settings(deadline=None, max_examples=200)
@given(*[st.floats(width=32, allow_nan=False, allow_infinity=False, min_value=-(2.0**60), max_value=2.0**60)] * 3)
def test_the_definitions_fma_rounds_once(x, y, z):
    from fractions import Fraction

    exact = Fraction(x) * Fraction(y) + Fraction(z)
    got = fma(torch.tensor([x]), y, z).item()
    around = [np.nextafter(np.float32(got), np.float32(side)) for side in (-INF, INF)]
    assert all(
        abs(Fraction(got) - exact) <= abs(Fraction(float(other)) - exact) for other in around if np.isfinite(other)
    )


@needs_fork
def test_a_forked_child_samples_the_same_bits():
    assert_same_in_a_forked_child(lambda: [cpu_sample_(torch.empty(300_000), *rng.normal(0, 1), 1, 0)])
