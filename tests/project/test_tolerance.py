"""The bound itself: no honest computation breaks it, whatever its order, and planted errors do."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tolerance import (
    Result,
    Sums,
    assert_close_to_exact,
    distance,
    linear,
    of_convolution,
    of_linear,
    of_network,
    product,
    sums,
)

LENGTHS = [8, 64, 512, 4096]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
B, N = 16, 24  # rows and columns of the products here


def normal(n, g):
    return torch.randn(B, n, generator=g), torch.randn(n, N, generator=g)


def positive(n, g):
    return tuple(t.abs() for t in normal(n, g))


def constant(n, g):
    return torch.rand(B, 1, generator=g).expand(B, n), torch.rand(1, N, generator=g).expand(n, N)


def cancelling(n, g):
    """Sums of about 1e-5 of their largest terms."""
    a, b = normal(n // 2, g)
    order = torch.randperm(2 * (n // 2), generator=g)
    noise = 1 + 1e-5 * torch.randn(B, n // 2, generator=g)
    return torch.cat([a, -a * noise], 1)[:, order], torch.cat([b, b])[order]


def heavy_tailed(n, g):
    """Ratios of normals, which have no mean: one term outweighs the others."""
    (a, b), (c, d) = normal(n, g), normal(n, g)
    return a / c, b / d


INPUTS = [normal, positive, cancelling, heavy_tailed]


def operands(make, n, dtype=torch.float32, seed=0):
    return tuple(t.to(dtype).contiguous() for t in make(n, torch.Generator().manual_seed(seed)))


def terms_of(a, b):
    """(n, B, N): the products, rounded to float32."""
    return a.float().t()[:, :, None] * b.float()[:, None]


def one_by_one(a, b):
    found = torch.zeros(B, N)
    for term in terms_of(a, b):
        found = found + term
    return found


def backwards(a, b):
    return one_by_one(a.flip(1), b.flip(0))


def pairwise(a, b):
    terms = terms_of(a, b)
    while len(terms) > 1:
        if len(terms) % 2:
            terms = torch.cat([terms, torch.zeros_like(terms[:1])])
        terms = terms[0::2] + terms[1::2]
    return terms[0]


def in_lanes(a, b, lanes=16):
    """As vector units do: one chain a lane, then a tree over lanes."""
    found = torch.zeros(lanes, B, N)
    for part in terms_of(a, b).split(lanes):
        found = torch.cat([found[: len(part)] + part, found[len(part) :]])
    while len(found) > 1:
        found = found[0::2] + found[1::2]
    return found[0]


def in_blocks(a, b, size=64):
    """As matrix products do: a chain a block of the sum, added to those before."""
    found = torch.zeros(B, N)
    for x, y in zip(a.split(size, 1), b.split(size), strict=True):
        found = found + one_by_one(x, y)
    return found


def fused(a, b):
    """A chain of fused multiplications and additions, each rounded once: float64's own rounding is 2^-29 of it."""
    found = torch.zeros(B, N)
    for term in a.double().t()[:, :, None] * b.double()[:, None]:
        found = (found.double() + term).float()
    return found


def by_torch(a, b):
    return (a.float() @ b.float()).float()


def by_torchs_sum(a, b):
    return terms_of(a, b).sum(0)


def by_numpy(a, b):
    return torch.from_numpy(a.float().numpy() @ b.float().numpy())


def by_onednn(a, b):
    if not torch.backends.mkldnn.is_available():
        pytest.skip("torch without oneDNN")
    return torch.ops.mkldnn._linear_pointwise(a.float(), b.float().t().contiguous(), None, "none", [], "")


ORDERS = [
    one_by_one, backwards, pairwise, in_lanes, in_blocks, fused, by_torch, by_torchs_sum, by_numpy, by_onednn
]  # fmt: skip


@pytest.mark.parametrize("n", [1, 2, *LENGTHS])
@pytest.mark.parametrize("make", INPUTS)
@pytest.mark.parametrize("order", ORDERS)
def test_every_honest_order_is_within_half_of_the_bounds(order, make, n):
    a, b = operands(make, n)
    if n == 1 and make is cancelling:
        a, b = operands(normal, n)
    found = distance(order(a, b), product(a, b))
    assert found.worst <= (1 if n < 64 else 0.5), "a product alone may reach its bound, many do not"
    assert found.rms <= 0.5


@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize("order", ORDERS)
def test_equal_terms_keep_the_bound_of_any_order(order, n):
    """A chain rounds them the same way again and again, which no model of chance allows."""
    a, b = operands(constant, n)
    assert distance(order(a, b), product(a, b), random=False).worst <= 0.6
    if n == 4096 and order is one_by_one:
        assert distance(order(a, b), product(a, b)).rms > 1


@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize("make", INPUTS)
@pytest.mark.parametrize("order", [one_by_one, pairwise, in_lanes])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_narrow_result_is_rounded_once(order, make, n, dtype):
    a, b = operands(make, n, dtype)
    keep = torch.ones(B, N, dtype=torch.bool)
    if make is heavy_tailed and dtype == torch.float16:  # beyond its range
        a, b = a.clamp(-100, 100), b.clamp(-100, 100)
        keep = product(a, b).exact.abs() < 60_000
    found = distance(order(a, b).to(dtype)[keep], product(a, b).at(lambda t: t[keep]))
    assert found.worst <= 1
    assert found.rms <= 0.7


def test_float64_may_be_off_as_much_as_the_value_it_is_compared_with():
    for n in LENGTHS:
        a, b = operands(normal, n, torch.float64)
        got = torch.zeros(B, N, dtype=torch.float64)
        for term in a.t()[:, :, None] * b[:, None]:
            got += term
        found = distance(got, product(a, b))
        assert found.worst <= 0.6
        assert found.rms <= 0.5
        got[3, 5] -= a[3, 0] * b[0, 5] * 1e-6
        with pytest.raises(AssertionError):
            assert_close_to_exact(got, product(a, b))


def refused(got, expected):
    found = distance(got, expected)
    return found.worst > 1 or found.rms > 1


@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("factor", [-1.0, 1.0])
def test_one_product_left_out_or_added_twice_is_refused(n, dtype, factor):
    """Any of a tenth of the mean size in float32; in 16 bits any of two units in the last place of its sum."""
    a, b = operands(normal, n, dtype)
    expected, honest = product(a, b), by_torch(a, b)
    assert not refused(honest.to(dtype), expected)
    terms = terms_of(a, b)
    least = 0.1 * expected.terms / n
    if dtype != torch.float32:
        least = 2 * torch.finfo(dtype).eps * expected.exact.abs()
    places = (terms.abs() >= least).nonzero()
    assert len(places) > (0.8 if dtype == torch.float32 else 0.02) * terms.numel()
    for k, row, column in places[torch.randperm(len(places), generator=torch.Generator().manual_seed(1))[:50]]:
        got = honest.clone()
        got[row, column] += factor * terms[k, row, column]
        assert refused(got.to(dtype), expected), (k, row, column)


@pytest.mark.parametrize("make", INPUTS)
def test_one_product_left_out_is_refused_whatever_the_inputs(make):
    for n in LENGTHS:
        a, b = operands(make, n)
        expected, terms = product(a, b), terms_of(a, b)
        for row, column in ((0, 0), (7, 11), (15, 23)):
            got = in_lanes(a, b)
            got[row, column] -= terms[:, row, column].abs().max()
            assert refused(got, expected)


@pytest.mark.parametrize("make", [normal, positive])
@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16])
def test_sums_in_16_bits_are_refused(make, n, dtype, narrow):
    a, b = operands(make, n, narrow)
    chain, tree = torch.zeros(B, N, dtype=narrow), a.t()[:, :, None] * b[:, None]
    for term in tree:
        chain = chain + term
    while len(tree) > 1:
        tree = tree[0::2] + tree[1::2]
    expected = product(a.to(dtype), b.to(dtype)) if dtype == torch.float32 else product(a, b)
    if dtype in (torch.float32, narrow):
        assert refused(chain.to(dtype), expected)
        assert refused(tree[0].to(dtype), expected)


@pytest.mark.parametrize("n", [64, 512, 4096])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_parts_of_a_sum_that_wait_in_16_bits_are_refused(n, dtype):
    a, b = operands(normal, n, dtype)
    got = sum(by_torch(x, y).to(dtype).float() for x, y in zip(a.split(n // 2, 1), b.split(n // 2), strict=True))
    assert refused(got.to(dtype), product(a, b))


def tf32(t):
    """The upper ten bits of the mantissa."""
    return (t.view(torch.int32) & ~0x1FFF).view(torch.float32)


@pytest.mark.parametrize("make", INPUTS)
@pytest.mark.parametrize("n", LENGTHS)
def test_operands_of_fewer_bits_are_refused(make, n):
    a, b = operands(make, n)
    assert refused(by_torch(tf32(a), tf32(b)), product(a, b))
    assert refused(by_torch(tf32(a), b), product(a, b))


@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_wrong_bias_is_refused(n, dtype):
    a, b = operands(normal, n, dtype)
    bias = torch.randn(N, generator=torch.Generator().manual_seed(2)).to(dtype)
    y, expected = by_torch(a, b), linear(a, b.t(), bias)
    assert_close_to_exact((y + bias).to(dtype), expected)
    for wrong in (0 * bias, 2 * bias, -bias, bias.roll(1), bias.flip(0)):
        assert refused((y + wrong).to(dtype), expected)
    one = bias.clone()
    one[7] = bias[8]
    assert refused((y + one).to(dtype), expected)
    if dtype == torch.float32:
        assert refused(y + bias.bfloat16(), expected)
    elif n >= 64:  # rounded before and after it
        assert refused(y.to(dtype) + bias, expected)


@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_and_columns_in_wrong_places_are_refused(n, dtype):
    a, b = operands(normal, n, dtype)
    y, expected = by_torch(a, b).to(dtype), product(a, b)
    swapped, doubled, missing = y.clone(), y.clone(), y.clone()
    swapped[[3, 4]] = y[[4, 3]]
    doubled[:, 5] = y[:, 6]
    missing[9] = 0
    for wrong in (swapped, doubled, missing, y.roll(1, 0), torch.zeros_like(y), torch.full_like(y, math.inf)):
        assert refused(wrong, expected)
    for value in (math.nan, math.inf):
        y[2, 3] = value
        with pytest.raises(AssertionError, match=r"of the bound at \(2, 3\)"):
            assert_close_to_exact(y, expected)


def test_what_is_no_sum_must_be_exactly_zero():
    a, b = operands(normal, 64)
    mask = torch.rand(B, N, generator=torch.Generator().manual_seed(0)) < 0.5
    expected = product(a, b).where(mask)
    assert_close_to_exact(by_torch(a, b) * mask, expected)
    for value in (1e-30, math.nan):
        got = by_torch(a, b) * mask
        got[tuple((~mask).nonzero()[5])] = value
        with pytest.raises(AssertionError):
            assert_close_to_exact(got, expected)


def test_shapes_and_dtypes_must_be_those_of_the_operands():
    a, b = operands(normal, 8)
    with pytest.raises(AssertionError, match="shape"):
        assert_close_to_exact(by_torch(a, b).t(), product(a, b))
    with pytest.raises(AssertionError, match="dtype"):
        assert_close_to_exact(by_torch(a, b).double(), product(a, b))
    assert_close_to_exact(torch.empty(0, N), product(a[:0], b))
    assert_close_to_exact(torch.zeros(B, N), product(a[:, :0], b[:0]))


def test_the_bound_of_a_value_is_what_the_papers_say():
    u = 2.0**-24
    for n in (1, 7, 99, 101, 5000):
        a, b = torch.rand(1, n) + 1, torch.rand(n, 1) + 1
        terms = float(a.double() @ b.double())
        found = product(a, b)
        assert int(found.summands) == n
        assert float(found.terms) == pytest.approx(terms)
        assert float(found.result(random=False).worst) == pytest.approx(n * u / (1 - n * u) * terms)
    one = Sums(*(torch.tensor([v], dtype=torch.float64) for v in (3.0, 3.0, 9.0, 1.0, 0.0, 0.0)), torch.bfloat16)
    assert float(one.result().worst) == pytest.approx(2.0**-7, rel=1e-4)  # half of the step between 2 and 4
    tiny = sums(lambda a, b: a * b, torch.tensor([2.0**-100]), torch.tensor([2.0**-60]))
    assert_close_to_exact(torch.zeros(1), tiny)  # below the smallest number
    with pytest.raises(AssertionError):
        assert_close_to_exact(torch.tensor([2.0**-148]), tiny)


def test_the_deviation_is_that_of_chains_in_random_order():
    """By 100 orders of the same terms. The ratio is 1 where every mantissa is 1, and 0.74 where they are spread as
    those of most numbers are: the root of the mean of 1 / m^2 over ln m, (3 / 8) / ln 2.
    """
    for make in INPUTS:
        a, b = operands(make, 200)
        expected, terms = product(a, b).result(), terms_of(a, b)[:, None]
        orders = torch.rand(100, 200, generator=torch.Generator().manual_seed(0)).argsort(1)
        found = torch.zeros(100, B, N)
        for k in range(200):
            found = found + terms[orders[:, k], 0]
        squares = ((found.double() - expected.exact) ** 2).mean(0)
        ratio = (squares / expected.variance).mean().sqrt()
        assert 0.65 < ratio < 0.85, make


def network(dtype=torch.float32):
    torch.manual_seed(0)
    layers = nn.Linear(200, 150), nn.ReLU(), nn.Linear(150, 60, bias=False), nn.ReLU(), nn.Linear(60, 10)
    return nn.Sequential(*layers).to(dtype), torch.randn(50, 200).to(dtype), torch.randn(50, 10).to(dtype)


def trained(model, x, dy):
    x = x.clone().requires_grad_()
    y = model(x)
    return [y.detach(), *torch.autograd.grad(y, [x, *model.parameters()], dy)]


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("relu_last", [False, True])
def test_networks_of_torch_are_within_the_bounds_and_faults_in_them_are_not(dtype, relu_last):
    model, x, dy = network(dtype)
    if relu_last:
        model.append(nn.ReLU())
    expected = of_network(model, x, dy)
    results = trained(model, x, dy)
    for got, right in zip(results, expected, strict=True):
        assert_close_to_exact(got, right)
    with torch.no_grad():
        hidden, weight = model[0](x), model[2].weight.clone()
        wrong = weight[7].argmax()
        model[2].weight[7, wrong] = 0  # one weight left out
        assert hidden.shape == (50, 150)
        y = model(x)
        assert refused(y, expected[0])
        model[2].weight.copy_(weight)
    if dtype != torch.float64:
        return
    for place in range(1, len(results)):
        results[place].view(-1)[results[place].abs().argmax()] *= 1 + 1e-9
        assert refused(results[place], expected[place])


def test_errors_of_operands_go_through_by_the_weights():
    x, error = torch.randn(5, 30, dtype=torch.float64), torch.rand(5, 30, dtype=torch.float64) * 1e-3
    weight = torch.randn(20, 30)
    found = linear(Result(x, error, error**2 / 3, torch.float32), weight)
    assert torch.allclose(found.worst, error @ weight.double().abs().t())
    assert torch.allclose(found.variance, error**2 / 3 @ weight.double().t() ** 2)
    for sign in (1, -1):
        assert_close_to_exact(((x + sign * error) @ weight.double().t()).float(), found)
    with pytest.raises(AssertionError):
        assert_close_to_exact(((x + 3 * error * error.sign()) @ weight.double().t()).float(), found)


@pytest.mark.parametrize(
    "arguments",
    [
        {"padding": 1},
        {"stride": 2},
        {"groups": 2, "dilation": 2},
        {"padding": 2, "padding_mode": "reflect"},
        {"bias": False},
    ],
    ids=str,
)
def test_convolutions_and_linear_layers_of_torch_are_within_the_bounds_and_faults_in_them_are_not(arguments):
    torch.manual_seed(0)
    for layer, x, of in (
        (nn.Conv2d(6, 8, 3, **arguments), torch.randn(5, 6, 9, 11), of_convolution),
        (nn.Linear(40, 30, bias="bias" not in arguments), torch.randn(5, 3, 40), of_linear),
    ):
        y = layer(x)
        dy = torch.randn_like(y)
        expected = of(layer, x, dy)
        results = trained(layer, x, dy)
        for got, right in zip(results, expected, strict=True):
            assert_close_to_exact(got, right)
        for got, right in zip(results, expected, strict=True):
            got.view(-1)[got.abs().argmax()] *= 1 + 1e-4
            assert refused(got, right)


def test_values_next_to_a_step_of_relu_may_be_either_and_no_others():
    z = Result(
        *(torch.tensor(v, dtype=torch.float64) for v in ([1.0, -1.0, 1e-9], [1e-6] * 3, [1e-14] * 3)), torch.float32
    )
    assert z.relu().worst.tolist() == [1e-6, 0, 1e-6]
    gradient = Result(*(torch.tensor(v, dtype=torch.float64) for v in ([2.0] * 3, [0.0] * 3, [0.0] * 3)), torch.float32)
    found = gradient.gated(z)
    assert found.exact.tolist() == [2, 0, 2]
    assert found.worst.tolist() == [0, 0, 2]
    for right in ([2.0, 0, 2], [2.0, 0, 0]):
        assert_close_to_exact(torch.tensor(right), found)
    for wrong in ([0.0, 0, 2], [2.0, 2, 2]):
        with pytest.raises(AssertionError):
            assert_close_to_exact(torch.tensor(wrong), found)


@settings(deadline=None, max_examples=100)
@given(
    rows=st.integers(1, 20),
    n=st.integers(1, 400),
    columns=st.integers(1, 20),
    seed=st.integers(0, 10_000),
    scales=st.tuples(st.integers(-90, 60), st.integers(-60, 60)),
    dtype=st.sampled_from(DTYPES),
    lanes=st.sampled_from([1, 3, 16, 400]),
    density=st.floats(0, 1),
)
def test_any_order_of_any_product_passes_and_any_term_left_out_does_not(
    rows, n, columns, seed, scales, dtype, lanes, density
):
    g = torch.Generator().manual_seed(seed)
    scale = [2.0**s if dtype != torch.float16 else 2.0 ** (s // 30) for s in scales]
    a = (torch.randn(rows, n, generator=g) * scale[0]).to(dtype)
    b = (torch.randn(n, columns, generator=g) * scale[1] * (torch.rand(n, columns, generator=g) < density)).to(dtype)
    terms = a.float().t()[:, :, None] * b.float()[:, None]
    parts = [part.clone() for part in terms[torch.randperm(n, generator=g)].split(-(-n // lanes))]
    chains = [torch.zeros(rows, columns) for _ in parts]
    for i, part in enumerate(parts):
        for term in part:
            chains[i] = chains[i] + term
    total = sum(chains[1:], start=chains[0])
    expected = product(a, b)
    assert_close_to_exact(total.to(dtype), expected)
    k, row, column = (int(v) for v in torch.unravel_index(terms.abs().argmax(), terms.shape))
    term, exact = float(terms[k, row, column]), float(expected.exact[row, column])
    if abs(term) > 2 * torch.finfo(dtype).eps * abs(exact) and abs(term) > 2.0**-120:
        total[row, column] -= term
        assert refused(total.to(dtype), expected)
