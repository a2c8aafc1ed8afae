"""The gradient of a masked weight on the GPU's kernel: against float64, in any memory, into a gradient that is there."""

import pytest
import torch

from gpu_memory import apart, checked_memory, nan_around, virtual
from tolerance import assert_close_to_exact, bits, product

pytest.importorskip("triton")
from initperf.kernels.gpu.linear import masked_linear as gpu  # noqa: E402
from initperf.kernels.gpu.sparse import grad_tile  # noqa: E402
from initperf.kernels.gpu.sparse import index as pattern

pytestmark = pytest.mark.usefixtures(checked_memory.__name__)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# batch, outputs, inputs, density: sizes that divide by nothing, by 8, by a tile; one tile, several; nothing kept, everything
SHAPES = [
    (1, 1, 1, 1.0),
    (37, 41, 7, 0.3),
    (33, 130, 200, 0.05),
    (64, 128, 256, 0.3),
    (5, 70, 64, 1.0),
    (20, 129, 257, 0.5),
    (9, 40, 48, 0.0),
]


def problem(b, n, k, density, dtype, device="cpu", seed=0):
    """dy (b, n), x (b, k), the mask (n, k) with a dead and a full row where there are some, and its pattern."""
    g = torch.Generator().manual_seed(seed)
    mask = torch.rand(n, k, generator=g) < density
    if n > 2 and 0 < density < 1:
        mask[0], mask[-1] = False, True
    dy, x = (torch.randn(b, size, generator=g).to(dtype).to(device) for size in (n, k))
    mask = mask.to(device)
    return dy, x, mask, pattern.pattern_tensors(mask)


def check(got, dy, x, mask, before=None):
    """got = before + (dy^T x) o M, and exactly `before` where pruned."""
    expected = product(dy.t(), x)
    if before is None:
        assert_close_to_exact(got, expected.where(mask))
        assert not bits(got)[~mask].any(), "a pruned weight has a gradient that is not +0"
    else:
        assert_close_to_exact(got[mask], (expected + before).at(lambda t: t[mask]))
        assert torch.equal(got[~mask], before[~mask])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("b", "n", "k", "density"), SHAPES)
def test_it_is_the_product_and_zero_where_pruned(b, n, k, density, dtype, gpu_device):
    dy, x, mask, index = problem(b, n, k, density, dtype, gpu_device)
    check(gpu.masked_grad_weight(dy, x, mask, index), dy, x, mask)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("b", "n", "k", "density"), SHAPES[1:4])
def test_it_is_added_into_a_gradient_that_is_there(b, n, k, density, dtype, gpu_device):
    dy, x, mask, index = problem(b, n, k, density, dtype, gpu_device)
    before = torch.randn(n, k, generator=torch.Generator().manual_seed(1)).to(dtype).to(gpu_device)
    with nan_around(before, guard=61) as grad:  # 61: not aligned either
        assert gpu.masked_grad_weight(dy, x, mask, index, into=grad) is grad
        check(grad, dy, x, mask, before)


def test_tiles_without_a_survivor_are_not_touched(gpu_device):
    dy, x, mask, _ = problem(8, 300, 270, 0.4, torch.float32, gpu_device)
    mask[:128, 128:] = False
    index = pattern.pattern_tensors(mask)
    assert index[1].numel() == 3 * 3 - 2
    before = torch.full((300, 270), float("nan"), device=gpu_device)
    before[mask] = 0
    got = gpu.masked_grad_weight(dy, x, mask, index, into=before)
    assert got[:128, 128:].isnan().all()
    assert torch.equal(got[mask], gpu.masked_grad_weight(dy, x, mask, index)[mask])


def test_non_contiguous_and_misaligned_inputs_give_the_same_bits(gpu_device):
    dy, x, mask, index = problem(24, 64, 72, 0.4, torch.bfloat16, gpu_device)
    want = gpu.masked_grad_weight(dy, x, mask, index)

    def odd(t):
        return torch.cat((t.flatten()[:1], t.flatten()))[1:].view(t.shape)

    def strided(t):
        return torch.empty(t.shape[0], 2 * t.shape[1], device=t.device, dtype=t.dtype)[:, ::2].copy_(t)

    def long_rows(t):
        return torch.empty(t.shape[0], t.shape[1] + 3, device=t.device, dtype=t.dtype)[:, : t.shape[1]].copy_(t)

    def by_columns(t):
        return t.t().contiguous().t()

    for change in (odd, strided, long_rows, by_columns):
        assert torch.equal(bits(gpu.masked_grad_weight(change(dy), change(x), mask, index)), bits(want))
    into = odd(torch.zeros_like(want))
    assert torch.equal(bits(gpu.masked_grad_weight(dy, x, mask, index, into=into)), bits(want))


def test_rows_of_the_batch_beyond_two_to_the_31_elements_are_found():
    dy, x, mask, index = problem(3, 40, 64, 0.4, torch.bfloat16)
    want = gpu.masked_grad_weight(dy, x, mask, index)
    assert torch.equal(bits(gpu.masked_grad_weight(apart(dy), apart(x), mask, index)), bits(want))


def test_weights_beyond_two_to_the_31_elements_are_found():
    n, k = 1 << 12, (1 << 20) + 128
    dy, x = torch.randn(2, n).bfloat16(), torch.randn(2, k).bfloat16()
    grad, words = virtual((n, k), (k, 1), torch.bfloat16), virtual((n, k // 32), (k // 32, 1), torch.int32)
    words[-1, -1] = -(1 << 31)  # the last weight alone
    last = torch.tensor([(n // 128 - 1) << 16 | k // 128 - 1], dtype=torch.int32)
    gpu.masked_grad_weight(dy, x, torch.empty(0), [words, last], into=grad)
    exact = (dy[:, -1].float() * x[:, -1].float()).sum()
    assert grad[-1, -1] == exact.to(torch.bfloat16)
    assert not grad[-128:, -128:].flatten()[:-1].any()


@pytest.mark.parametrize("change", [lambda g: g.t(), lambda g: g[:-1], lambda g: g.double(), lambda g: g[:, ::2]])
def test_a_gradient_that_does_not_fit_is_refused_and_nothing_is_changed(change, gpu_device):
    dy, x, mask, index = problem(8, 16, 32, 0.5, torch.float32, gpu_device)
    into = change(torch.ones(16, 32, device=gpu_device))
    with pytest.raises(ValueError, match="Expected into to be contiguous"):
        gpu.masked_grad_weight(dy, x, mask, index, into=into)
    assert (into == 1).all()


def test_tf32_where_torch_allows_it_is_within_its_rounding_of_the_operands(gpu_device):
    dy, x, mask, index = problem(40, 129, 72, 0.4, torch.float32, gpu_device)
    before, torch.backends.cuda.matmul.allow_tf32 = torch.backends.cuda.matmul.allow_tf32, True
    try:
        got = gpu.masked_grad_weight(dy, x, mask, index)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    size = dy.double().abs().t() @ x.double().abs()
    exact = torch.where(mask, dy.double().t() @ x.double(), 0)
    assert ((got - exact).abs() <= (2.0**-9 + 40 * 2.0**-24) * size).all()  # each operand cut to 10 bits
    assert not bits(got)[~mask].any()


def test_no_batch_and_no_survivors_give_zeros(gpu_device):
    dy, x, mask, index = problem(0, 30, 40, 0.5, torch.float32, gpu_device)
    assert torch.equal(gpu.masked_grad_weight(dy, x, mask, index), torch.zeros(30, 40, device=gpu_device))


@pytest.mark.parametrize("premasked", [True, False])
def test_the_other_two_products_are_torchs_own_with_the_masked_weight(premasked, gpu_device):
    dy, x, mask, index = problem(9, 30, 40, 0.5, torch.float32, gpu_device)
    weight, bias = torch.randn(30, 40, device=gpu_device), torch.randn(30, device=gpu_device)
    masked = weight * mask
    given = masked if premasked else weight
    y = gpu.masked_linear(x, given, bias, mask, index, premasked)
    assert torch.equal(y, torch.nn.functional.linear(x, masked, bias))
    assert torch.equal(gpu.masked_grad_input(dy, given, mask, index, premasked), dy @ masked)


@pytest.mark.parametrize("target", grad_tile.TILES)
def test_every_tile_divides_those_of_the_list(target):
    for _, rows, columns, _, _ in grad_tile.TILES[target].values():
        assert pattern.TILE % rows == pattern.TILE % columns == columns % 32 == 0
