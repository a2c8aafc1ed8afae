"""Products with a weight in compressed rows, and its gradient at the survivors, against float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gpu_memory import apart, checked_memory, far_away, virtual
from initperf.kernels.reference.sparse import rows as reference
from tolerance import assert_close_to_exact, bits, linear, product

pytest.importorskip("triton")
from initperf.kernels.gpu.sparse import index as pattern  # noqa: E402
from initperf.kernels.gpu.sparse import rows as gpu  # noqa: E402
from initperf.kernels.gpu.sparse import rows_grad as gpu_grad  # noqa: E402

pytestmark = pytest.mark.usefixtures(checked_memory.__name__)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SHAPES = [(1, 1, 1, 1.0), (7, 5, 13, 0.4), (33, 5, 60, 0.1), (60, 4, 20, 1.0), (16, 4, 9, 0.0), (300, 3, 17, 0.5)]


def problem(b, n, k, density, dtype, device="cpu", seed=0):
    """x (b, k), dy (b, n), weight (n, k) and mask; an empty and a full row where there are more than two."""
    g = torch.Generator().manual_seed(seed)
    mask = torch.rand(n, k, generator=g) < density
    if n > 2 and 0 < density < 1:
        mask[0], mask[-1] = False, True
    x, dy, w = (torch.randn(*shape, generator=g).to(dtype).to(device) for shape in ((b, k), (b, n), (n, k)))
    mask = mask.to(device)
    return x, dy, w * mask, mask


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("b", "n", "k", "density"), SHAPES)
def test_forward_is_the_product_of_the_survivors(b, n, k, density, dtype, gpu_device):
    x, _, weight, mask = problem(b, n, k, density, dtype, gpu_device)
    bias = torch.randn(n, generator=torch.Generator().manual_seed(1)).to(gpu_device, dtype)
    y = gpu.sparse_matmul(x, weight[mask], *reference.rows(mask), bias)
    assert_close_to_exact(y, linear(x, weight, bias))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("b", "n", "k", "density"), SHAPES)
def test_gradient_of_x_is_the_same_product_with_transposed_indices(b, n, k, density, dtype, gpu_device):
    _, dy, weight, mask = problem(b, n, k, density, dtype, gpu_device)
    by_columns, perm = reference.transposed(mask)
    dx = gpu.sparse_matmul(dy, weight[mask], *by_columns, perm=perm)
    assert_close_to_exact(dx, product(dy, weight))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("b", "n", "k", "density"), SHAPES)
def test_gradient_of_the_values_is_the_dense_one_at_the_survivors(b, n, k, density, dtype, gpu_device):
    x, dy, _, mask = problem(b, n, k, density, dtype, gpu_device)
    grad = gpu_grad.sparse_grad(dy, x, *reference.rows(mask))
    assert_close_to_exact(grad, product(dy.t(), x).at(lambda t: t[mask]))


def by_tiles(mask):
    bits, tiles = pattern.pattern_tensors(mask)
    return bits, reference.word_starts(mask), tiles, int(mask.sum())


@pytest.mark.parametrize("dtype", DTYPES[:3])
@pytest.mark.parametrize(("b", "n", "k", "density"), [*SHAPES, (20, 140, 300, 0.1), (64, 128, 256, 0.3)])
def test_gradient_by_tiles_lands_at_the_survivors_too(b, n, k, density, dtype, gpu_device):
    x, dy, _, mask = problem(b, n, k, density, dtype, gpu_device)
    mask[:, : k // 2] &= n < 130  # a tile with no survivor in the large one
    grad = gpu_grad.sparse_grad_tiles(dy, x, *by_tiles(mask))
    assert_close_to_exact(grad, product(dy.t(), x).at(lambda t: t[mask]))


@pytest.mark.parametrize("keep", [0.0, 1.0])
def test_gradient_by_tiles_of_nothing_and_of_everything(keep, gpu_device):
    x, dy, _, mask = problem(9, 33, 45, keep, torch.float32, gpu_device)
    grad = gpu_grad.sparse_grad_tiles(dy, x, *by_tiles(mask))
    assert_close_to_exact(grad, product(dy.t(), x).at(lambda t: t[mask]))


def test_both_definitions_of_the_gradient_agree():
    x, dy, _, mask = problem(9, 33, 45, 0.3, torch.float64)
    whole = reference.sparse_grad(dy, x, *reference.rows(mask))
    assert torch.equal(reference.sparse_grad_tiles(dy, x, *by_tiles(mask)), whole)


def test_one_column_kept_in_every_row(gpu_device):
    x, dy, weight, _ = problem(20, 30, 40, 1.0, torch.float32, gpu_device)
    mask = torch.zeros(30, 40, dtype=torch.bool, device=gpu_device)
    mask[:, 7] = True
    y = gpu.sparse_matmul(x, weight[mask], *reference.rows(mask))
    torch.testing.assert_close(y, x[:, 7:8] * weight[:, 7], rtol=0, atol=0)
    grad = gpu_grad.sparse_grad(dy, x, *reference.rows(mask))
    assert_close_to_exact(grad, product(dy.t(), x[:, 7]))


def test_columns_of_32_bits_give_the_same_bits_as_those_of_16(gpu_device):
    x, dy, weight, mask = problem(40, 7, 90, 0.3, torch.float32, gpu_device)
    start, columns, order = reference.rows(mask)
    wide = columns.to(torch.int32)
    assert columns.dtype == torch.uint16
    for got, want in (
        (
            gpu.sparse_matmul(x, weight[mask], start, wide, order),
            gpu.sparse_matmul(x, weight[mask], start, columns, order),
        ),
        (gpu_grad.sparse_grad(dy, x, start, wide, order), gpu_grad.sparse_grad(dy, x, start, columns, order)),
    ):
        assert torch.equal(bits(got), bits(want))


def test_non_contiguous_and_misaligned_inputs_give_the_same_bits(gpu_device):
    x, dy, weight, mask = problem(24, 10, 30, 0.4, torch.float32, gpu_device)
    start, columns, order = reference.rows(mask)
    values = weight[mask]
    want, want_grad = (
        gpu.sparse_matmul(x, values, start, columns, order),
        gpu_grad.sparse_grad(dy, x, start, columns, order),
    )

    def odd(t):
        return torch.cat((t.flatten()[:1], t.flatten()))[1:].view(t.shape)

    def strided(t):
        return torch.empty(t.shape[0], 2 * t.shape[1], device=t.device, dtype=t.dtype)[:, ::2].copy_(t)

    def by_features(t):
        return torch.empty(t.shape[1], t.shape[0], device=t.device, dtype=t.dtype).copy_(t.t()).t()

    for change in (odd, strided, by_features):
        got = gpu.sparse_matmul(change(x), odd(values), start, odd(columns), order)
        assert torch.equal(bits(got), bits(want))
        assert torch.equal(bits(gpu_grad.sparse_grad(change(dy), change(x), start, columns, order)), bits(want_grad))


def test_permuting_the_batch_permutes_the_outputs(gpu_device):
    x, _, weight, mask = problem(19, 8, 25, 0.3, torch.float32, gpu_device)
    shuffled = torch.randperm(19, generator=torch.Generator().manual_seed(1)).to(gpu_device)
    pattern = reference.rows(mask)
    y = gpu.sparse_matmul(x, weight[mask], *pattern)
    assert torch.equal(bits(gpu.sparse_matmul(x[shuffled], weight[mask], *pattern)), bits(y[shuffled]))


def test_an_infinite_input_reaches_only_rows_that_keep_its_column(gpu_device):
    x = torch.ones(3, 5, device=gpu_device)
    x[1, 2] = float("inf")
    mask = torch.ones(6, 5, dtype=torch.bool, device=gpu_device)
    mask[::2, 2] = False
    y = gpu.sparse_matmul(x, torch.ones(int(mask.sum()), device=gpu_device), *reference.rows(mask))
    assert y[1, 1::2].isinf().all()
    assert y[1, ::2].isfinite().all()
    assert y[[0, 2]].isfinite().all()


def test_elements_beyond_two_to_the_31_are_found(checked_memory):
    x, dy, weight, mask = problem(16, 6, 12, 0.5, torch.float32)
    start, columns, order = reference.rows(mask)
    wide = columns.to(torch.int32)
    xt = x.t().contiguous()
    want, want_grad = (
        gpu.sparse_matmul(xt.t(), weight[mask], start, wide, order),
        gpu_grad.sparse_grad(dy, xt.t(), start, wide, order),
    )
    shift = 1 << 29  # columns of 16 values, so elements from 2^33 on
    far = far_away(xt, shift * 16, checked_memory).t()
    assert torch.equal(bits(gpu.sparse_matmul(far, weight[mask], start, wide + shift, order)), bits(want))
    assert torch.equal(bits(gpu_grad.sparse_grad(dy, far, start, wide + shift, order)), bits(want_grad))


def test_gradient_by_tiles_of_any_memory_gives_the_same_bits(gpu_device):
    x, dy, _, mask = problem(24, 40, 72, 0.4, torch.bfloat16, gpu_device)
    want = gpu_grad.sparse_grad_tiles(dy, x, *by_tiles(mask))

    def odd(t):
        return torch.cat((t.flatten()[:1], t.flatten()))[1:].view(t.shape)

    def strided(t):
        return torch.empty(t.shape[0], 2 * t.shape[1], device=t.device, dtype=t.dtype)[:, ::2].copy_(t)

    for change in (odd, strided, lambda t: t.t().contiguous().t()):
        assert torch.equal(bits(gpu_grad.sparse_grad_tiles(change(dy), change(x), *by_tiles(mask))), bits(want))


def test_gradient_by_tiles_finds_rows_beyond_two_to_the_31_elements():
    x, dy, _, mask = problem(3, 40, 72, 0.4, torch.bfloat16)
    want = gpu_grad.sparse_grad_tiles(dy, x, *by_tiles(mask))
    assert torch.equal(bits(gpu_grad.sparse_grad_tiles(apart(dy), apart(x), *by_tiles(mask))), bits(want))


def test_outputs_beyond_two_to_the_31_elements_are_found():
    batch, rows = 1 << 20, 2050  # 2^31 + 2^21 values of y, of which the last row alone is computed
    x, _, weight, mask = problem(8, rows, 9, 0.5, torch.float32)
    start, columns, _ = reference.rows(mask)
    yt = virtual((rows, batch), (batch, 1), torch.float32)
    words = gpu.chunk_words(weight[mask]), gpu.chunk_words(columns)
    last = torch.tensor([rows - 1], dtype=torch.int32)
    gpu._sparse_matmul[(1, 1)](
        x.t().contiguous(), *words, weight[mask], columns, start, last, None, yt, 1, 1, batch // 8, BB=8, EVEN=True
    )
    assert_close_to_exact(yt[-1:, :8].t(), linear(x, weight[-1:]))


def test_no_batch_and_no_survivors(gpu_device):
    x, dy, weight, mask = problem(0, 4, 6, 0.5, torch.float32, gpu_device)
    assert gpu.sparse_matmul(x, weight[mask], *reference.rows(mask)).shape == (0, 4)
    assert torch.equal(
        gpu_grad.sparse_grad(dy, x, *reference.rows(mask)), torch.zeros(int(mask.sum()), device=gpu_device)
    )


@settings(deadline=None, max_examples=15)
@given(st.integers(1, 20), st.integers(1, 9), st.integers(1, 30), st.integers(0, 10), st.integers(0, 2**31))
def test_transposing_twice_is_nothing(b, n, k, tenths, seed):
    _, _, weight, mask = problem(b, n, k, tenths / 10, torch.float32, seed=seed)
    by_columns, perm = reference.transposed(mask)
    eye = torch.eye(n)
    assert torch.equal(reference.sparse_matmul(eye, weight[mask], *by_columns, perm=perm), weight)
    assert torch.equal(reference.sparse_matmul(torch.eye(k), weight[mask], *reference.rows(mask)), weight.t())
