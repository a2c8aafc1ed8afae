"""initperf.init against torch.nn.init: names, signatures, results, warnings, errors; and the contract: value = f(seed, stream, index)."""

import inspect
import itertools
import math
import threading
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import init as torch_init

from initperf import init, ops, rng
from initperf.core.checks import InitPerfError
from initperf.kernels.reference.sampling.orthogonal import orthogonal_ as reference_orthogonal_
from tolerance import bits

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SAMPLERS = {
    "uniform_": {"a": -1.0, "b": 2.0},
    "normal_": {"mean": 1.0, "std": 0.5},
    "trunc_normal_": {"std": 0.5, "a": -1.0, "b": 1.0},
    "xavier_uniform_": {},
    "xavier_normal_": {"gain": 2.0},
    "kaiming_uniform_": {"a": math.sqrt(5)},
    "kaiming_normal_": {"mode": "fan_out", "nonlinearity": "relu"},
    "orthogonal_": {"gain": 2.0},
    "sparse_": {"sparsity": 0.5},
}
samplers = pytest.mark.parametrize("name", SAMPLERS)


def sample(name, tensor, **more):
    return getattr(init, name)(tensor, **SAMPLERS[name], **more)


def outcome(call):
    """What a call does that a caller can see: exception type or result type, and warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            result = type(call())
        except Exception as error:
            result = error
    return result, [(w.category, str(w.message)) for w in caught]


@pytest.mark.parametrize("name", torch_init.__all__)
def test_every_public_name_of_torch_exists_with_a_compatible_signature(name):
    theirs = list(inspect.signature(getattr(torch_init, name)).parameters.values())
    ours = list(inspect.signature(getattr(init, name)).parameters.values())
    for t, o in zip(theirs, ours, strict=False):
        assert (t.name, t.kind, t.default) == (o.name, o.kind, o.default)
    assert all(p.kind is inspect.Parameter.KEYWORD_ONLY for p in ours[len(theirs) :])
    assert name in init.__all__


def test_what_does_not_sample_is_torchs_own_object():
    for name in ("constant_", "ones_", "zeros_", "eye_", "dirac_", "calculate_gain", "constant", "eye", "dirac"):
        assert getattr(init, name) is getattr(torch_init, name)
    assert init._calculate_fan_in_and_fan_out is torch_init._calculate_fan_in_and_fan_out


EMPTY = torch.empty
CASES = {
    "from above to": ("uniform_", lambda: EMPTY(3), (1, 0)),
    "nan bound": ("uniform_", lambda: EMPTY(3), (float("nan"), 1.0)),
    "infinite bound": ("uniform_", lambda: EMPTY(3), (0.0, float("inf"))),
    "range beyond float32": ("uniform_", lambda: EMPTY(3), (-3e38, 3e38)),
    "bound beyond float16": ("uniform_", lambda: EMPTY(3, dtype=torch.float16), (0.0, 7e4)),
    "equal bounds": ("uniform_", lambda: EMPTY(3), (1.0, 1.0)),
    "uniform of integers": ("uniform_", lambda: EMPTY(3, dtype=torch.int64), ()),
    "normal of integers": ("normal_", lambda: EMPTY(3, dtype=torch.int32), ()),
    "trunc_normal of integers": ("trunc_normal_", lambda: EMPTY(3, dtype=torch.int64), ()),
    "orthogonal of integers": ("orthogonal_", lambda: EMPTY(3, 3, dtype=torch.int64), ()),
    "sparse of integers": ("sparse_", lambda: EMPTY(3, 3, dtype=torch.int64), (0.5,)),
    "complex normal": ("normal_", lambda: EMPTY(3, dtype=torch.complex64), ()),
    "complex uniform": ("uniform_", lambda: EMPTY(3, dtype=torch.complex64), ()),
    "complex trunc_normal": ("trunc_normal_", lambda: EMPTY(3, dtype=torch.complex64), ()),
    "float8": ("normal_", lambda: EMPTY(3, dtype=torch.float8_e4m3fn), ()),
    "negative std": ("normal_", lambda: EMPTY(3), (0.0, -1.0)),
    "nan std": ("normal_", lambda: EMPTY(3), (0.0, float("nan"))),
    "negative std, empty tensor": ("normal_", lambda: EMPTY(0), (0.0, -1.0)),
    "negative std, sparse": ("sparse_", lambda: EMPTY(3, 3), (0.5, -1.0)),
    "a above b": ("trunc_normal_", lambda: EMPTY(3), (0.0, 1.0, 2.0, -2.0)),
    "a equals b": ("trunc_normal_", lambda: EMPTY(3), (0.0, 1.0, 1.0, 1.0)),
    "mean far from the bounds": ("trunc_normal_", lambda: EMPTY(3), (5.0, 1.0, -2.0, 2.0)),
    "empty trunc_normal": ("trunc_normal_", lambda: EMPTY(0), ()),
    "xavier of one dimension": ("xavier_uniform_", lambda: EMPTY(3), ()),
    "xavier normal of one dimension": ("xavier_normal_", lambda: EMPTY(3), ()),
    "xavier of no rows": ("xavier_uniform_", lambda: EMPTY(0, 3), ()),
    "xavier of nothing": ("xavier_normal_", lambda: EMPTY(0, 0), ()),
    "xavier with negative gain": ("xavier_normal_", lambda: EMPTY(2, 3), (-1.0,)),
    "kaiming of one dimension": ("kaiming_uniform_", lambda: EMPTY(3), ()),
    "kaiming of no rows": ("kaiming_uniform_", lambda: EMPTY(0, 3), ()),
    "kaiming normal of no rows": ("kaiming_normal_", lambda: EMPTY(0), ()),
    "unknown mode": ("kaiming_normal_", lambda: EMPTY(3, 3), (0, "fan")),
    "upper-case mode": ("kaiming_normal_", lambda: EMPTY(3, 3), (0, "FAN_OUT")),
    "unknown nonlinearity": ("kaiming_uniform_", lambda: EMPTY(3, 3), (0, "fan_in", "gelu")),
    "slope that is no number": ("kaiming_uniform_", lambda: EMPTY(3, 3), ("x",)),
    "orthogonal of one dimension": ("orthogonal_", lambda: EMPTY(3), ()),
    "orthogonal of nothing": ("orthogonal_", lambda: EMPTY(0, 3), ()),
    "sparse of one dimension": ("sparse_", lambda: EMPTY(3), (0.5,)),
    "sparse beyond 1": ("sparse_", lambda: EMPTY(3, 3), (2.0,)),
    "sparse nan": ("sparse_", lambda: EMPTY(3, 3), (float("nan"),)),
    "sparse of no rows": ("sparse_", lambda: EMPTY(0, 3), (0.5,)),
    "text as a bound": ("uniform_", lambda: EMPTY(3), ("x", 1.0)),
    "a tensor as a bound": ("uniform_", lambda: EMPTY(3), (torch.tensor(0.0), torch.tensor(1.0))),
    "a vector as mean": ("normal_", lambda: EMPTY(3), (torch.zeros(3), 1.0)),
    "a NumPy number": ("normal_", lambda: EMPTY(3), (np.float32(0.5), np.float64(1.0))),
    "a list as tensor": ("uniform_", lambda: [1.0], ()),
    "wrong generator": ("uniform_", lambda: EMPTY(3), (0.0, 1.0, 3)),
    "expanded": ("uniform_", lambda: EMPTY(3, 1).expand(3, 4), ()),
    "expanded orthogonal": ("orthogonal_", lambda: EMPTY(3, 1).expand(3, 4), ()),
    "expanded sparse": ("sparse_", lambda: EMPTY(3, 1).expand(3, 4), (0.5,)),
    "sparse layout": ("uniform_", lambda: torch.eye(3).to_sparse(), ()),
    "meta": ("kaiming_uniform_", lambda: EMPTY(3, 3, device="meta"), ()),
    "meta trunc_normal, impossible": ("trunc_normal_", lambda: EMPTY(3, device="meta"), (0.0, 1.0, 2.0, -2.0)),
    "meta orthogonal": ("orthogonal_", lambda: EMPTY(3, 3, device="meta"), ()),
    "deprecated": ("uniform", lambda: EMPTY(3), ()),
    "deprecated kaiming": ("kaiming_normal", lambda: EMPTY(3, 3), ()),
}


@pytest.mark.parametrize("case", CASES)
def test_results_warnings_and_error_types_are_torchs(case):
    name, make, args = CASES[case]
    theirs, their_warnings = outcome(lambda: getattr(torch_init, name)(make(), *args))
    ours, our_warnings = outcome(lambda: getattr(init, name)(make(), *args))
    assert our_warnings == their_warnings
    if isinstance(theirs, Exception):
        assert isinstance(ours, type(theirs)), f"torch: {theirs!r}, ours: {ours!r}"
        assert str(ours)
    else:
        assert ours is theirs


def test_a_warning_names_the_callers_line():
    for call in (lambda: init.uniform(EMPTY(2)), lambda: init.kaiming_normal_(EMPTY(0, 2)), _far_bounds):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            call()
        assert [w.filename for w in caught] == [__file__]


def _far_bounds():
    return init.trunc_normal_(EMPTY(2), 5.0)


def test_stds_that_torch_lets_pass_are_refused():
    for call in (
        lambda: init.trunc_normal_(EMPTY(3), 0.0, -1.0),
        lambda: init.trunc_normal_(EMPTY(3), 0.0, float("nan")),
        lambda: init.normal_(EMPTY(3), 0.0, float("inf")),
    ):
        with pytest.raises(InitPerfError, match=r"Expected .* Got "):
            call()


@samplers
def test_a_refused_call_touches_nothing_and_draws_no_seed(name):
    tensor = torch.full((4, 4), 7.0)
    state = torch.get_rng_state()
    with pytest.raises(InitPerfError):
        sample(name, tensor, seed=-1)
    with pytest.raises(InitPerfError):
        sample(name, tensor, seed=1, generator=torch.Generator())
    assert torch.equal(torch.get_rng_state(), state)
    assert (tensor == 7).all()
    assert tensor._version == 0


@samplers
def test_the_tensor_itself_is_returned_and_no_gradient_recorded(name):
    parameter = nn.Parameter(torch.zeros(4, 6))
    assert sample(name, parameter) is parameter
    assert parameter.grad_fn is None
    assert parameter.requires_grad
    view = parameter[:2]
    assert sample(name, view) is view


@samplers
def test_a_write_counts_as_an_in_place_change(name):
    x = torch.ones(4, 6, requires_grad=True)
    w = torch.ones(4, 6)
    y = (x * w).sum()
    sample(name, w)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


@samplers
def test_inference_tensors_may_be_written_in_inference_mode_only(name):
    with torch.inference_mode():
        tensor = sample(name, torch.zeros(4, 6))
        sample(name, nn.Parameter(torch.zeros(4, 6)))
    assert tensor.ne(0).any()
    with pytest.raises(RuntimeError):
        sample(name, tensor)


@samplers
def test_fake_tensors_pass_through_as_in_torch(name):
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        theirs, _ = outcome(lambda: getattr(torch_init, name)(EMPTY(4, 6), **SAMPLERS[name]))
        ours, _ = outcome(lambda: sample(name, EMPTY(4, 6)))
    assert (type(ours) is type(theirs)) if isinstance(theirs, Exception) else (ours is theirs)


def test_a_seed_for_a_meta_tensor_is_accepted_and_for_a_complex_one_refused():
    init.normal_(EMPTY(3, device="meta"), seed=1)
    with pytest.raises(InitPerfError, match="complex64"):
        init.normal_(EMPTY(3, dtype=torch.complex64), seed=1)


def test_inside_vmap_torchs_own_rules_hold():
    with pytest.raises(RuntimeError, match="vmap"):
        torch.func.vmap(lambda x: init.normal_(x))(torch.zeros(3, 2))
    out = torch.func.vmap(lambda x: init.normal_(x), randomness="different")(torch.zeros(3, 2))
    assert len(set(out.flatten().tolist())) == 6


class Logged(torch.Tensor):
    calls: list = []

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        cls.calls.append(func)
        return super().__torch_function__(func, types, args, kwargs or {})


@samplers
def test_a_tensor_subclass_sees_what_it_sees_from_torch(name):
    tensor = torch.zeros(4, 6).as_subclass(Logged)
    logs = []
    for module in (torch_init, init):
        Logged.calls = []
        torch.manual_seed(0)
        assert type(getattr(module, name)(tensor, **SAMPLERS[name])) is Logged
        logs.append(Logged.calls)
    assert logs[0] == logs[1]


@samplers
def test_a_default_device_changes_nothing(name):
    plain = sample(name, torch.zeros(4, 6), seed=3)
    with torch.device("cpu"):
        assert torch.equal(sample(name, torch.zeros(4, 6), seed=3), plain)
        torch.manual_seed(0)
        here = sample(name, torch.zeros(4, 6))
    torch.manual_seed(0)
    assert torch.equal(sample(name, torch.zeros(4, 6)), here)


def test_a_function_mode_sees_our_functions():
    from torch.overrides import TorchFunctionMode

    class Mode(TorchFunctionMode):
        seen = []

        def __torch_function__(self, func, types, args=(), kwargs=None):
            self.seen.append(func)
            return func(*args, **(kwargs or {}))

    tensor = torch.zeros(4, 6)
    with Mode() as mode:
        init.xavier_normal_(tensor, seed=3)
    assert mode.seen == [init.xavier_normal_]
    assert torch.equal(tensor, init.xavier_normal_(torch.zeros(4, 6), seed=3))


def test_a_compiled_function_that_calls_ours_gives_the_same_values():
    @torch.compile(backend="eager")
    def build(x):
        w = torch.empty(8, 8)
        init.kaiming_normal_(w, seed=7)
        return x + w

    expected = init.kaiming_normal_(torch.empty(8, 8), seed=7) + 1
    assert torch.equal(build(torch.ones(8, 8)), expected)


@given(seed=st.integers(0, 2**64 - 1), stream=st.integers(0, 2**64 - 1), dtype=st.sampled_from(DTYPES))
@settings(deadline=None, max_examples=25)
def test_a_value_depends_on_seed_stream_and_row_major_index_alone(seed, stream, dtype):
    distribution = rng.normal(0.0, 1.0)
    flat = init.sample_into(torch.empty(60, dtype=dtype), distribution, seed=seed, stream=stream)

    def same(tensor):
        init.sample_into(tensor, distribution, seed=seed, stream=stream)
        assert torch.equal(bits(tensor).flatten(), bits(flat[: tensor.numel()]))

    same(torch.empty(3, 4, 5, dtype=dtype))
    same(torch.empty(5, 12, dtype=dtype).t())
    same(torch.empty(3, 5, 4, dtype=dtype).permute(0, 2, 1))
    same(torch.empty(2, 3, 4, 2, dtype=dtype).to(memory_format=torch.channels_last))
    same(torch.empty(10, 12, dtype=dtype)[::2, 1::2])
    same(torch.empty(7, dtype=dtype)[3:])
    same(torch.empty(60, dtype=dtype).as_strided((3, 4), (20, 5)))
    same(torch.empty((), dtype=dtype))
    same(torch.empty(0, 3, dtype=dtype))


@given(data=st.data())
@settings(deadline=None, max_examples=60)
def test_a_shard_equals_the_slice_of_the_whole(data):
    shape = data.draw(st.lists(st.integers(1, 7), min_size=1, max_size=4))
    start = [data.draw(st.integers(0, n - 1)) for n in shape]
    size = [data.draw(st.integers(0, n - s)) for n, s in zip(shape, start, strict=True)]
    dtype, distribution = data.draw(st.sampled_from([(torch.float32, rng.normal(1.0, 2.0)), (torch.int32, None)]))
    distribution = distribution or rng.uniform(0.0, 1.0, torch.float64)
    dtype = torch.float64 if dtype is torch.int32 else dtype
    whole = init.sample_into(torch.empty(shape, dtype=dtype), distribution, seed=5, stream=9)
    part = torch.empty(size, dtype=dtype)
    assert init.sample_shard_into(part, distribution, shape, start, seed=5, stream=9) is part
    assert torch.equal(bits(part), bits(whole[tuple(slice(s, s + n) for s, n in zip(start, size, strict=True))]))


def test_every_block_of_a_small_tensor_is_a_shard():
    shape = (2, 3, 4)
    whole = init.sample_into(torch.empty(shape), rng.normal(0.0, 1.0), seed=1)
    cuts = [[slice(a, b) for a in range(n) for b in range(a + 1, n + 1)] for n in shape]
    for block in itertools.product(*cuts):
        part = torch.empty(whole[block].shape)
        init.sample_shard_into(part, rng.normal(0.0, 1.0), shape, [s.start for s in block], seed=1)
        assert torch.equal(bits(part), bits(whole[block])), block


def test_rows_and_columns_of_a_large_matrix_are_shards():
    whole = init.sample_into(torch.empty(300, 500), rng.normal(0.0, 1.0), seed=1)
    for rows, columns in (
        (slice(100, 300), slice(0, 500)),
        (slice(0, 300), slice(17, 450)),
        (slice(3, 4), slice(5, 9)),
    ):
        part = torch.empty(whole[rows, columns].shape)
        start = (rows.start, columns.start)
        init.sample_shard_into(part, rng.normal(0.0, 1.0), (300, 500), start, seed=1)
        assert torch.equal(bits(part), bits(whole[rows, columns]))
        transposed = torch.empty(part.shape[::-1]).t()
        init.sample_shard_into(transposed, rng.normal(0.0, 1.0), (300, 500), start, seed=1)
        assert torch.equal(bits(transposed), bits(part))


def test_a_shard_outside_the_whole_is_refused():
    for shape, start in (((4, 4), (3, 0)), ((4,), (0,)), ((4, 4), (-1, 0))):
        with pytest.raises(InitPerfError, match="Expected"):
            init.sample_shard_into(torch.empty(2, 2), rng.normal(0.0, 1.0), shape, start, seed=1)


@samplers
def test_manual_seed_a_generator_and_the_drawn_seed_give_the_same_values(name):
    torch.manual_seed(11)
    a = sample(name, torch.zeros(5, 7))
    b = sample(name, torch.zeros(5, 7))
    assert not torch.equal(a, b)
    generator = torch.Generator().manual_seed(11)
    assert torch.equal(sample(name, torch.zeros(5, 7), generator=generator), a)
    torch.manual_seed(11)
    assert torch.equal(sample(name, torch.zeros(5, 7), seed=rng.draw_seed(None)), a)


def test_kaiming_and_xavier_are_the_uniform_and_normal_of_torchs_bounds():
    w = torch.empty(6, 5, 3)
    std = torch_init.calculate_gain("leaky_relu", 0.1) / math.sqrt(5 * 3)
    same = {
        init.kaiming_normal_: (init.normal_, (0.0, std), {"a": 0.1}),
        init.kaiming_uniform_: (init.uniform_, (-math.sqrt(3.0) * std, math.sqrt(3.0) * std), {"a": 0.1}),
        init.xavier_normal_: (init.normal_, (0.0, 2 * math.sqrt(2.0 / 33)), {"gain": 2}),
    }
    for function, (plain, args, kwargs) in same.items():
        expected = plain(torch.empty(6, 5, 3), *args, seed=4)
        assert torch.equal(bits(function(w, **kwargs, seed=4)), bits(expected))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["uniform_", "normal_", "trunc_normal_", "kaiming_uniform_", "xavier_normal_"])
def test_the_distribution_is_torchs(name, dtype):
    ours = sample(name, torch.empty(300, 400, dtype=dtype), seed=1).double().flatten()
    theirs = getattr(torch_init, name)(torch.empty(300, 400), **SAMPLERS[name]).double().flatten()
    n = ours.numel()
    spread = theirs.std().item()
    assert abs(ours.mean() - theirs.mean()) < 6 * spread / math.sqrt(n)
    assert abs(ours.std() / theirs.std() - 1) < 6 / math.sqrt(n)
    grid = torch.linspace(ours.min().item(), ours.max().item(), 50, dtype=torch.float64)
    distance = (
        torch.searchsorted(ours.sort().values, grid) - torch.searchsorted(theirs.sort().values, grid)
    ).abs().max() / n
    assert distance < 1.95 * math.sqrt(2 / n) + torch.finfo(dtype).eps  # Kolmogorov-Smirnov, p = 0.001


@pytest.mark.parametrize("shape", [(5, 5), (7, 3), (3, 7), (64, 64), (65, 64), (30, 4, 3, 3), (130, 90), (1, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_orthogonal_is_the_q_of_contract_normals_with_torchs_signs(shape, dtype):
    rows, columns = shape[0], math.prod(shape[1:])
    normals = init.normal_(torch.empty(rows, columns, dtype=dtype), seed=2)
    tall = normals if rows >= columns else normals.t()
    q, r = torch.linalg.qr(tall.double())
    q = q * r.diagonal().sign()
    expected = (q if rows >= columns else q.t()).reshape(shape)
    got = init.orthogonal_(torch.empty(shape, dtype=dtype), gain=3.0, seed=2)
    assert got.dtype == dtype
    # backward stability: |error| <= c(n) eps cond; the normals' condition is below 1e3 at these sizes
    assert (got.double() / 3 - expected).abs().max() < 1e3 * torch.finfo(dtype).eps * math.sqrt(rows * columns)
    matrix = got.double().reshape(rows, -1) / 3
    gram = matrix @ matrix.t() if rows <= columns else matrix.t() @ matrix
    assert (gram - torch.eye(len(gram), dtype=torch.float64)).abs().max() < 20 * torch.finfo(dtype).eps


@given(m=st.integers(1, 140), n=st.integers(1, 140), dtype=st.sampled_from([torch.float32, torch.float64]))
@settings(deadline=None, max_examples=6)
def test_the_compiled_householder_equals_its_plain_torch_definition(m, n, dtype):
    a = init.normal_(torch.empty(max(m, n), min(m, n), dtype=dtype), seed=m)
    b = a.clone()
    assert torch.equal(bits(ops.implementation("orthogonal_", "cpu")(a)), bits(reference_orthogonal_(b)))


def test_orthogonal_does_not_depend_on_the_number_of_threads():
    threads = torch.get_num_threads()
    parallel = init.orthogonal_(torch.empty(300, 280), seed=3)
    try:
        torch.set_num_threads(1)
        alone = init.orthogonal_(torch.empty(300, 280), seed=3)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(bits(parallel), bits(alone))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_orthogonal_in_narrow_dtypes_is_the_float32_one_rounded(dtype):
    expected = init.orthogonal_(torch.empty(20, 30), 2.0, seed=3).to(dtype)
    assert torch.equal(bits(init.orthogonal_(torch.empty(20, 30, dtype=dtype), 2.0, seed=3)), bits(expected))


@given(rows=st.integers(1, 40), columns=st.integers(1, 9), sparsity=st.floats(0, 1.2), seed=st.integers(0, 2**64 - 1))
@settings(deadline=None, max_examples=40)
def test_sparse_zeroes_the_first_rows_by_word_and_index_in_every_column(rows, columns, sparsity, seed):
    got = init.sparse_(torch.empty(rows, columns), sparsity, 2.0, seed=seed)
    values = init.normal_(torch.empty(rows, columns), 0.0, 2.0, seed=seed)
    words = np.empty((rows, columns), np.uint32)
    for r in range(rows):
        for c in range(columns):
            index = r * columns + c
            block = (index >> 10 << 8) | (index & 255)
            counter = (block & 0xFFFFFFFF, block >> 32, 1, 0)
            words[r, c] = rng.philox(counter, (seed & 0xFFFFFFFF, seed >> 32))[index >> 8 & 3]
    count = math.ceil(sparsity * rows)
    for c in range(columns):
        zeros = sorted(range(rows), key=lambda r: (words[r, c], r))[:count]
        expected = values[:, c].clone()
        expected[zeros] = 0
        assert torch.equal(got[:, c], expected)


def test_threads_that_sample_at_once_do_not_disturb_one_another():
    expected = [init.normal_(torch.empty(300, 300), seed=s) for s in range(8)]
    got = [None] * 8

    def work(s):
        got[s] = init.normal_(torch.empty(300, 300), seed=s)

    workers = [threading.Thread(target=work, args=(s,)) for s in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))
