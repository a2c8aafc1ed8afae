"""moments: three implementations against each other and against exact values, within derived bounds."""

import math
import sys
from fractions import Fraction
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from forks import assert_same_in_a_forked_child, needs_fork
from initperf.core.checks import InitPerfError
from initperf.kernels.cpu.core.team import NO_TEAM, team
from initperf.kernels.cpu.moments import moments as cpu
from initperf.variance.moments import Moments, moments
from tolerance import Result, assert_close_to_exact, bits, sums

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
LAUNCHERS = ["cpu", "gpu", "reference"]
U = 2.0**-53

MODULES = {
    "reference": "initperf.kernels.reference.moments.moments",
    "cpu": "initperf.kernels.cpu.moments.moments",
    "gpu": "initperf.kernels.gpu.moments.moments",
}


def launch(name: str, tensors, shapes, order=4, correction=0.0) -> Moments:
    if name == "gpu":
        pytest.importorskip("triton")
        tensors = [x.to("cuda" if torch.cuda.is_available() else "cpu") for x in tensors]
    module = import_module(MODULES[name])
    rows = module.moments(tensors, shapes, order, correction)
    return Moments(rows.cpu(), [torch.Size((shape[1],)) for shape in shapes])


def flat(x: torch.Tensor) -> tuple[int, int, int, int, int]:
    return 1, 1, x.numel(), 0, 0


def exact(x: torch.Tensor) -> dict[str, float]:
    """mean, m2, skew, kurtosis of the finite values, from 80-bit two-pass sums, or from fractions where those would overflow."""
    v = x.double().numpy()
    v = v[np.isfinite(v)]
    if v.size < 3000:
        f = [Fraction(float(u)) for u in v]
        mean = sum(f) / len(f)
        m2, m3, m4 = (sum((u - mean) ** k for u in f) / len(f) for k in (2, 3, 4))
        scale = Fraction(2) ** (math.frexp(float(max(abs(u - mean) for u in f)))[1]) or Fraction(1)
        s2, s3, s4 = float(m2 / scale**2), float(m3 / scale**3), float(m4 / scale**4)
        m2 = float(m2) if m2 < Fraction(2) ** 1023 else math.inf
        mean, spread = float(mean), math.sqrt(s2) * float(scale)
    else:
        wide = v.astype(np.longdouble)
        mean = wide.mean()
        d = wide - mean
        s2, s3, s4 = (float((d**k).mean()) for k in (2, 3, 4))
        m2, mean, spread = s2, float(mean), math.sqrt(s2)
    skew, kurtosis = (s3 / s2**1.5, s4 / s2**2) if s2 else (math.nan, math.nan)
    return {"mean": mean, "m2": m2, "spread": spread, "skew": skew, "kurtosis": kurtosis}


def assert_exact(got: Moments, x: torch.Tensor, name: str = "cpu") -> None:
    """A k-th moment about a shift within r spreads of the mean has (1 + r)^k times the roundings of its sum."""
    want, reach = exact(x), (9 if name == "cpu" and x.dtype != torch.float64 else 2)
    # Roundings of a sum: a lane's additions, the tree over lanes, the sum over chunks, and a few for the formulas. On a
    # GPU: the tree over a tile of float32, and the last rounding of each value's distance from the tile's mean.
    terms = min(x.numel(), cpu.CHUNK) / 16 + x.numel() / cpu.CHUNK + 24
    if name == "gpu" and x.dtype != torch.float64:
        terms = 24 * 2**29
    spread = want["spread"]
    # Tiles of a GPU leave their means, each off by two roundings of the mean; what their distance adds to a moment about
    # the mean, in units of the spread, is off by that as well.
    apart = 4 * U * abs(want["mean"]) / spread if name == "gpu" and spread else 0.0
    finite = x[x.isfinite()]
    assert got.count.item() == finite.numel()
    assert got.nonfinite.item() == x.numel() - finite.numel()
    assert got.min.item() == finite.min().item()
    assert got.max.item() == finite.max().item()
    assert got.zeros.item() == (finite == 0).double().mean().item()
    tiny = 2.0**-1074
    assert abs(got.mean.item() - want["mean"]) <= 64 * U * abs(want["mean"]) + terms * U * reach * spread + tiny
    if want["m2"] == math.inf:
        assert got.central(2).item() == got.var.item() == math.inf
    else:
        assert abs(got.central(2).item() - want["m2"]) <= (terms * U * reach**2 + apart) * want["m2"] + tiny
    if math.isnan(want["skew"]):
        assert math.isnan(got.skew.item())
        assert math.isnan(got.kurtosis.item())
        assert got.var.item() == got.central(3).item() == got.central(4).item() == 0
    else:
        size = want["kurtosis"]  # at least 1, and at least |skew|
        assert abs(got.skew.item() - want["skew"]) <= 3 * (terms * U * reach**3 + apart) * size
        assert abs(got.kurtosis.item() - want["kurtosis"]) <= 4 * (terms * U * reach**4 + apart) * size


def values(kind: str, n: int, dtype: torch.dtype) -> torch.Tensor:
    g = torch.Generator().manual_seed(n)
    x = torch.randn(n, generator=g, dtype=torch.float64)
    info = torch.finfo(dtype)
    if kind == "shifted":
        x = x + 1e6 if dtype not in (torch.float16, torch.bfloat16) else x + 100
    elif kind == "relu":
        x = x.relu()
    elif kind == "equal":
        x = torch.full_like(x, 0.1)
    elif kind == "alternating":
        x = torch.where(torch.arange(n) % 2 == 0, 3.7, -3.7)
    elif kind == "denormal":
        x = x * info.smallest_normal / 8
    elif kind == "huge":
        x = x.clamp(-4, 4) * (info.max / 8)
    elif kind == "outlier first":
        x[:1] = 1e4
    elif kind == "non-finite":
        x[::7] = torch.nan
        x[3::11] = torch.inf
        x[5::13] = -torch.inf
    return x.to(dtype)


KINDS = ["normal", "shifted", "relu", "equal", "alternating", "denormal", "huge", "outlier first", "non-finite"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", LAUNCHERS)
def test_every_statistic_is_exact_to_float64_sums(name, dtype, kind):
    xs = [values(kind, n, dtype) for n in (2, 15, 16, 17, 333, 1999)]
    got = launch(name, xs, [flat(x) for x in xs])
    for i, x in enumerate(xs):
        assert_exact(got[i], x, name)


@pytest.mark.parametrize("kind", ["normal", "shifted", "denormal", "huge", "non-finite"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_tensors_combine_their_chunks_exactly(dtype, kind):
    x = values(kind, 3 * cpu.CHUNK + 4321, dtype)
    assert_exact(launch("cpu", [x], [flat(x)]), x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", KINDS[:-1])
def test_mean_and_variance_are_those_of_sixteen_float64_sums_of_distances_from_the_mean(dtype, kind):
    """The root-mean-square over tensors. A shift within r spreads of the mean makes squares up to (1 + r)^2 times as large."""
    xs = [values(kind, n, dtype) for n in range(20_000, 20_320, 16)]
    got, want, random = moments(xs), [exact(x) for x in xs], kind not in ("equal", "alternating")
    scale = 2.0**-600 if kind == "huge" and dtype == torch.float64 else 1.0  # squares would overflow
    reach, n = 2 if dtype == torch.float64 else 9, torch.tensor([x.numel() for x in xs], dtype=torch.float64)
    lanes = [((x.double() - w["mean"]) * scale).view(-1, 16) for x, w in zip(xs, want, strict=True)]

    def summed(function, *operands):
        return sums(lambda t: t.sum(0), sums(function, *operands).result(random=random)).result(random=random)

    first = [summed(lambda d: d.sum(0), d) for d in lanes]
    second = [summed(lambda a, b: (a * b).sum(0), d, d) for d in lanes]
    for found, name, parts, power in ((got.mean, "mean", first, 1), (got.var, "m2", second, 2)):
        right = torch.tensor([w[name] for w in want], dtype=torch.float64) * scale**power
        last = 2 * U * right.abs()  # of the division, and of the shift
        worst, variance = (torch.stack([getattr(p, name) for p in parts]) for name in ("worst", "variance"))
        grown = reach**power / n
        bound = Result(right, grown * worst + last, grown**2 * variance + last**2, torch.float64)
        fits = right < math.inf
        found = found[fits] * scale**power
        assert_close_to_exact(found, bound.at(lambda t, fits=fits: t[fits]), random=random)


@pytest.mark.parametrize("name", LAUNCHERS)
def test_no_elements_and_one_element(name):
    for dtype in DTYPES:
        none, one = torch.empty(0, dtype=dtype), torch.full((1,), -2.5, dtype=dtype)
        got = launch(name, [none, one], [flat(none), flat(one)], correction=1.0)
        assert got.count.tolist() == [0, 1]
        for field in ("mean", "var", "skew", "kurtosis", "min", "max", "zeros"):
            assert math.isnan(getattr(got, field)[0])
        assert [getattr(got, f)[1].item() for f in ("mean", "min", "max", "zeros")] == [-2.5, -2.5, -2.5, 0]
        assert all(math.isnan(getattr(got, f)[1]) for f in ("var", "skew", "kurtosis"))


@pytest.mark.parametrize("name", LAUNCHERS)
def test_nothing_finite_gives_nan_and_a_count(name):
    x = torch.tensor([torch.nan, torch.inf, -torch.inf])
    got = launch(name, [x], [flat(x)])
    assert (got.count.item(), got.nonfinite.item()) == (0, 3)
    assert all(math.isnan(getattr(got, f).item()) for f in ("mean", "var", "min", "max", "zeros", "skew"))


@pytest.mark.parametrize("name", LAUNCHERS)
def test_scaling_by_a_power_of_two_scales_and_never_overflows(name):
    x = torch.randn(5000, dtype=torch.float64) + 0.5
    base = launch(name, [x], [flat(x)])
    powers = (-900, -300, 300, 900)
    ys = [x * 2.0**k for k in powers]
    together = launch(name, ys, [flat(y) for y in ys])
    for i, k in enumerate(powers):
        got = together[i]
        assert math.isclose(got.skew.item(), base.skew.item(), rel_tol=1e-12)
        assert math.isclose(got.kurtosis.item(), base.kurtosis.item(), rel_tol=1e-12)
        assert math.isclose(got.mean.item(), math.ldexp(base.mean.item(), k), rel_tol=1e-12)
        if abs(k) < 500:
            assert math.isclose(got.var.item(), math.ldexp(base.var.item(), 2 * k), rel_tol=1e-12)


def test_means_at_both_ends_of_float64_do_not_overflow():
    x = torch.tensor([1.7e308, -1.7e308], dtype=torch.float64).repeat_interleave(cpu.CHUNK)
    got = moments(x)
    assert (got.mean.item(), got.kurtosis.item(), got.var.item()) == (0.0, 1.0, math.inf)


def shape_and_dim(x: torch.Tensor, dim) -> None:
    var, mean = torch.var_mean(x.double(), dim=dim, correction=1)
    got = moments(x, dim=dim, correction=1)
    assert got.var.shape == var.shape
    torch.testing.assert_close(got.var, var, rtol=1e-11, atol=1e-14, equal_nan=True)
    torch.testing.assert_close(got.mean, mean, rtol=1e-11, atol=1e-14, equal_nan=True)


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_any_shape_strides_and_dims_agree_with_torch(data):
    shape = data.draw(st.lists(st.integers(1, 40), min_size=1, max_size=4))
    while math.prod(shape) > 100_000:
        shape.pop()
    x = torch.randn(shape).to(data.draw(st.sampled_from(DTYPES)))
    x = x.permute(data.draw(st.permutations(range(len(shape)))))
    if data.draw(st.booleans()):
        x = x[..., :: data.draw(st.integers(1, 3))]
    if data.draw(st.booleans()):
        x = x.unsqueeze(0).expand(3, *x.shape)
    dims = data.draw(st.sets(st.integers(-x.dim(), x.dim() - 1)))
    dims = {d % x.dim() for d in dims}
    shape_and_dim(x, sorted(dims) or None)


@pytest.mark.parametrize("dtype", DTYPES)
def test_columns_in_blocks_and_their_rest(dtype):
    for rows, columns in ((3, 5), (100, 16), (1030, 40), (2500, 33)):
        x = torch.randn(rows, columns).to(dtype)
        shape_and_dim(x, 0)
        shape_and_dim(x + 100, 0)


@pytest.mark.parametrize("name", LAUNCHERS)
def test_a_bad_column_leaves_its_neighbours_alone(name):
    x = torch.randn(200, 20)
    x[:, 3] = torch.inf
    x[7, 5] = torch.nan
    x[:, 9] = 1e30
    got = launch(name, [x], [(200, 20, 1, 20, 1)])
    for c in range(20):
        alone = x[:, c].contiguous()
        if c == 3:
            assert got.count[c] == 0
        else:
            assert_exact(moments(alone), alone)
            assert math.isclose(got.var[c], exact(alone)["m2"], rel_tol=3e-6 if name == "gpu" else 1e-12)
            assert got.nonfinite[c] == (c == 5)


def test_results_do_not_depend_on_threads_or_on_the_list():
    xs = [torch.randn(n).to(d) for n in (5, 70_000, 300_001) for d in DTYPES] + [torch.randn(1100, 300)]
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = [moments(x)._rows for x in xs]
        columns = moments(xs[-1], dim=0)._rows
        torch.set_num_threads(2)
        together = moments(xs)
        for i, want in enumerate(alone):
            assert torch.equal(bits(together[i]._rows), bits(want))
        assert torch.equal(bits(moments(xs[-1], dim=0)._rows), bits(columns))
    finally:
        torch.set_num_threads(before)


def test_any_order_of_memory_gives_the_same_bits():
    x = torch.randn(70, 90)
    assert torch.equal(bits(moments(x.T)._rows), bits(moments(x)._rows))


def test_lower_order_gives_the_same_mean_and_variance():
    x = torch.randn(50_000) + 3
    low, full = moments(x, order=2), moments(x)
    assert math.isclose(low.var, full.var, rel_tol=1e-13)
    assert (low.mean, low.min, low.max, low.zeros) == (full.mean, full.min, full.max, full.zeros)
    assert torch.stack([low.skew, low.kurtosis, low.central(3), low.central(4)]).isnan().all()


def test_raw_and_central_moments_are_the_means_of_powers():
    x = torch.randn(3000, dtype=torch.float64) + 1.5
    got = moments(x)
    for k in range(5):
        assert math.isclose(got.raw(k), x.pow(k).mean(), rel_tol=1e-12)
        assert math.isclose(got.central(k), (x - x.mean()).pow(k).mean(), rel_tol=1e-11, abs_tol=1e-13)


def test_a_list_gives_one_entry_a_tensor_and_one_tensor_gives_scalars():
    xs = [torch.randn(3, 4), torch.randn(7).bfloat16(), torch.randn(2, 2, 2).double()]
    got = moments(xs)
    assert got.mean.shape == got.count.shape == (3,)
    assert got.mean.dtype == torch.float64
    assert got.count.dtype == torch.int64
    assert moments(xs[0]).mean.shape == ()
    channels = moments(xs, dim=0)
    assert [channels[i].var.shape for i in range(3)] == [(4,), (), (2, 2)]
    for i, x in enumerate(xs):
        for found in (channels[i], channels[i - 3]):
            assert torch.equal(found.mean, moments(x, dim=0).mean)
    with pytest.raises(IndexError):
        got[3]


def test_gradients_are_neither_needed_nor_recorded():
    x = torch.randn(10, requires_grad=True)
    assert not moments(x).mean.requires_grad
    assert not moments(x.view(2, 5), dim=0).mean.requires_grad


def test_kept_dimensions_that_are_not_evenly_spaced_are_read_without_a_copy():
    x = torch.randn(16, 200, 300)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        got = moments(x, dim=1)
    assert not [e for e in profile.key_averages() if e.key in ("aten::copy_", "aten::clone", "aten::contiguous")]
    torch.testing.assert_close(got.var, x.double().var(1, correction=0), rtol=1e-11, atol=0)
    assert torch.equal(got.max, x.amax(1).double())


@pytest.mark.parametrize(
    ("view", "dim"),
    [
        (lambda x: x.transpose(0, 2), 0),
        (lambda x: x[:, 3:50], (0, 2)),
        (lambda x: x[::2], 1),
        (lambda x: x.to(memory_format=torch.channels_last), (0, 2, 3)),
        (lambda x: x[..., :49].unflatten(-1, (7, 7)), (0, 2, 3, 4)),
        (lambda x: x[:, :, :, 1], -1),
        (lambda x: x.movedim(1, -1), (0, 1)),
        (lambda x: x[0, 0, 0, 0], 0),
        (lambda x: x[:0], 0),
        (lambda x: x[:, :0], 1),
        (lambda x: x, []),
    ],
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_views_agree_with_torch(view, dim, dtype):
    shape_and_dim(view(torch.randn(6, 70, 20, 64).to(dtype)), dim)


def test_runs_of_every_length_agree_with_torch():
    for length in (*range(1, 70), 127, 500):
        x = torch.randn(40, 5, length)
        shape_and_dim(x, (0, 2))
        shape_and_dim(x.double() + 1e3, (0, 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rows_far_from_their_mean_are_exact_in_every_layout(dtype):
    x = torch.randn(700, 700).to(dtype) + 1e6
    for dim in (0, 1):
        got, want = moments(x, dim=dim), x.double().sub(1e6)
        torch.testing.assert_close(got.var, want.var(dim, correction=0), rtol=1e-12, atol=0)
        torch.testing.assert_close(got.kurtosis, moments(want, dim=dim).kurtosis, rtol=1e-9, atol=0)


def test_without_torchs_threads_numbas_are_used_and_the_bits_are_the_same(monkeypatch):
    xs = [torch.randn(600_000), torch.randn(500, 900), torch.randn(5)]
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        wanted = [moments(xs)._rows, moments(xs, dim=-1)._rows]
        monkeypatch.setattr(cpu, "team", lambda: NO_TEAM)
        for want, got in zip(wanted, [moments(xs)._rows, moments(xs, dim=-1)._rows], strict=True):
            assert torch.equal(bits(got), bits(want))
    finally:
        torch.set_num_threads(before)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="torch's threads are shared on Linux")
def test_torchs_own_threads_are_found_where_it_uses_libgomp():
    if any("libgomp" in line for line in Path("/proc/self/maps").read_text().splitlines()):
        assert all(team())


@needs_fork
def test_a_forked_child_gives_the_same_bits():
    x = torch.randn(400_000)
    assert_same_in_a_forked_child(lambda: [moments(x)._rows])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: moments([]), "at least one tensor"),
        (lambda: moments(3.0), "float"),
        (lambda: moments([torch.ones(2), None]), r"tensors\[1\]"),
        (lambda: moments(torch.arange(3)), "int64"),
        (lambda: moments([torch.ones(2), torch.ones(2, dtype=torch.complex64)]), r"tensors\[1\].*complex64"),
        (lambda: moments([torch.ones(2), torch.ones(2, device="meta")]), r"tensors\[1\] on meta"),
        (lambda: moments(torch.ones(2, 2).to_sparse()), "dense"),
        (lambda: moments(torch.ones(2), dim=1), "dim"),
        (lambda: moments(torch.ones(2, 2), dim=(0, -3)), "dim"),
        (lambda: moments(torch.ones(2, 2), dim=True), "dim"),
        (lambda: moments([torch.ones(2), torch.ones(2, 2)], dim=1), "dim"),
        (lambda: moments(torch.ones(2, dtype=torch.bool)), "bool"),
        (lambda: moments({"weight": torch.ones(2)}), "dict"),
        (lambda: moments(torch.ones(2)).raw(-1), "power"),
        (lambda: moments(torch.ones(2), dim=1.0), "dim"),
        (lambda: moments(torch.ones(2, 2), dim=(0, -2)), "once"),
        (lambda: moments(torch.ones(2, device="meta")), "meta"),
        (lambda: moments(torch.ones(2), order=3), "order"),
        (lambda: moments(torch.ones(2), correction="1"), "correction"),
        (lambda: moments(torch.ones(2)).central(5), "power"),
    ],
)
def test_bad_arguments_are_named(wrong, message):
    with pytest.raises(InitPerfError, match=message):
        wrong()


def test_a_lazily_negated_tensor_is_read_as_its_values():
    x = torch.randn(5, 7, dtype=torch.complex128).conj().imag
    assert x.is_neg()
    torch.testing.assert_close(moments(x).mean, x.mean())
    torch.testing.assert_close(moments([x], dim=0).min, x.amin(0))


def test_torch_is_asked_for_one_small_tensor():
    x = torch.randn(1000)
    moments(x)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        moments(x)
    assert sum(e.count for e in profile.key_averages() if e.key == "aten::empty") == 1


def test_the_reference_shape_argument_is_that_of_the_kernels():
    x, y = torch.randn(6, 5, 64).double(), torch.randn(140, 37).double()
    shapes = [(6, 5, 64, 5 * 64, 64), (140, 37, 1, 37, 1)]
    want = launch("reference", [x, y], shapes, correction=1.0)
    for name in ("cpu", "gpu"):
        got = launch(name, [x, y], shapes, correction=1.0)
        torch.testing.assert_close(got._rows, want._rows, rtol=1e-11, atol=1e-14)
        assert torch.equal(got._rows[-2:], want._rows[-2:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gpu_merges_tiles_and_chunks_exactly(dtype, gpu_device):
    gpu = pytest.importorskip("initperf.kernels.gpu.moments.moments")
    for kind in ("shifted", "non-finite"):
        x = values(kind, (gpu.TILES[0]["tiles"] + 3) * gpu.TILES[0]["rows"] + 77, dtype)
        assert_exact(launch("gpu", [x], [flat(x)]), x, "gpu")
