"""Products with a block-sparse weight, and the gradient of its blocks, against float64."""

import pytest
import torch

from gpu_memory import apart, checked_memory, far_away, virtual
from initperf.kernels.reference.candidates import block_matmul as reference
from tolerance import assert_close_to_exact, bits, linear, product

pytest.importorskip("triton")
from initperf.kernels.gpu.candidates import block_matmul as gpu  # noqa: E402

pytestmark = pytest.mark.usefixtures(checked_memory.__name__)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# batch, outputs, inputs, block, density: edges that the block does not divide, one block, none, all
SHAPES = [
    (9, 64, 96, 16, 0.4),
    (33, 50, 70, 16, 0.5),
    (5, 100, 64, 32, 0.5),
    (70, 64, 200, 64, 0.6),
    (20, 130, 128, 128, 1.0),
    (4, 32, 32, 16, 0.0),
]


def problem(b, n, k, block, density, dtype, device="cpu", seed=0):
    """x (b, k), dy (b, n), the weight (n, k), its mask of blocks, and its values."""
    g = torch.Generator().manual_seed(seed)
    mask = torch.rand(-(-n // block), -(-k // block), generator=g) < density
    if 0 < density < 1:
        mask[0], mask[-1] = False, True
    x, dy, w = (torch.randn(*shape, generator=g).to(dtype).to(device) for shape in ((b, k), (b, n), (n, k)))
    mask = mask.to(device)
    weight = w * mask.repeat_interleave(block, 0)[:n].repeat_interleave(block, 1)[:, :k]
    return x, dy, weight, mask, reference.pack_blocks(weight, mask, block)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("b", "n", "k", "block", "density"), SHAPES)
def test_forward_is_the_product_with_the_blocks(b, n, k, block, density, dtype, gpu_device):
    x, _, weight, mask, values = problem(b, n, k, block, density, dtype, gpu_device)
    bias = torch.randn(n, device=gpu_device).to(dtype)
    y = gpu.block_matmul(x, values, *reference.block_rows(mask), n, bias)
    assert_close_to_exact(y, linear(x, weight, bias))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("b", "n", "k", "block", "density"), SHAPES)
def test_gradient_of_x_reads_the_same_blocks_transposed(b, n, k, block, density, dtype, gpu_device):
    _, dy, weight, mask, values = problem(b, n, k, block, density, dtype, gpu_device)
    start, columns, order, perm = reference.block_columns(mask)
    dx = gpu.block_matmul(dy, values, start, columns, order, k, perm=perm)
    assert_close_to_exact(dx, product(dy, weight))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("b", "n", "k", "block", "density"), SHAPES)
def test_gradient_of_the_blocks_is_the_dense_one_there_and_zero_outside_the_weight(
    b, n, k, block, density, dtype, gpu_device
):
    x, dy, _, mask, _ = problem(b, n, k, block, density, dtype, gpu_device)
    grad = gpu.block_grad(dy, x, *reference.block_rows(mask), block)
    assert_close_to_exact(grad, product(dy.t(), x).at(lambda t: reference.pack_blocks(t, mask, block)))


@pytest.mark.parametrize("block", gpu.BLOCKS)
def test_reference_is_the_dense_product_and_packing_loses_nothing(block):
    x, dy, weight, mask, values = problem(3, 70, 90, block, 0.5, torch.float64)
    start, columns, order = reference.block_rows(mask)
    assert torch.equal(reference.unpack_blocks(values, start, columns, 70, 90), weight)
    y = reference.block_matmul(x, values, start, columns, order, 70)
    assert_close_to_exact(y, linear(x, weight))
    *by_columns, perm = reference.block_columns(mask)
    dx = reference.block_matmul(dy, values, *by_columns, 90, perm=perm)
    assert_close_to_exact(dx, product(dy, weight))


def test_non_contiguous_and_misaligned_inputs_give_the_same_bits(gpu_device):
    x, dy, _, mask, values = problem(12, 64, 64, 32, 0.7, torch.bfloat16, gpu_device)
    pattern = reference.block_rows(mask)
    want, want_grad = gpu.block_matmul(x, values, *pattern, 64), gpu.block_grad(dy, x, *pattern, 32)

    def odd(t):
        return torch.cat((t.flatten()[:1], t.flatten()))[1:].view(t.shape)

    def strided(t):
        return torch.empty(t.shape[0], 2 * t.shape[1], device=t.device, dtype=t.dtype)[:, ::2].copy_(t)

    def long_rows(t):
        return torch.empty(t.shape[0], t.shape[1] + 3, device=t.device, dtype=t.dtype)[:, : t.shape[1]].copy_(t)

    for change in (odd, strided, long_rows):
        assert torch.equal(bits(gpu.block_matmul(change(x), odd(values), *pattern, 64)), bits(want))
        assert torch.equal(bits(gpu.block_grad(change(dy), change(x), *pattern, 32)), bits(want_grad))


def test_blocks_beyond_two_to_the_31_elements_are_found(checked_memory):
    x, _, _, mask, values = problem(4, 32, 32, 16, 0.7, torch.float32)
    start, columns, order, perm = reference.block_columns(mask)
    want = gpu.block_matmul(x, values, start, columns, order, 32, perm=perm)
    shift = 1 << 24  # blocks of 256 values, so elements from 2^32 on
    far = far_away(values, shift * 256, checked_memory)
    assert torch.equal(bits(gpu.block_matmul(x, far, start, columns, order, 32, perm=perm + shift)), bits(want))


def test_rows_beyond_two_to_the_31_elements_are_found():
    x, dy, _, mask, values = problem(3, 64, 96, 32, 0.7, torch.bfloat16)
    pattern = reference.block_rows(mask)
    want, want_grad = gpu.block_matmul(x, values, *pattern, 64), gpu.block_grad(dy, x, *pattern, 32)
    assert torch.equal(bits(gpu.block_matmul(apart(x), values, *pattern, 64)), bits(want))
    assert torch.equal(bits(gpu.block_grad(apart(dy), apart(x), *pattern, 32)), bits(want_grad))


def test_outputs_beyond_two_to_the_31_elements_are_found():
    x, dy, _, mask, values = problem(3, 32, 32, 16, 1.0, torch.float32)
    start, columns, order = reference.block_rows(mask)
    want, want_grad = (
        gpu.block_matmul(x, values, start, columns, order, 32),
        gpu.block_grad(dy, x, start, columns, order, 16),
    )
    y, unit = virtual((3, 32), ((1 << 31) + 8, 1), torch.float32), 8
    gpu._block_matmul[(1, 2)](
        x, values, start, columns, None, order, None, y, 3, 4, 32 // unit, 4, y.stride(0) // unit,
        TRANSPOSED=False, PRECISION="ieee", UNIT=unit, EVEN_K=True, BLOCK=16, BATCH=16, INNER=32,
    )  # fmt: skip
    assert torch.equal(bits(y), bits(want))
    shift = 1 << 23  # blocks of 256 values: the last ones from 2^31 on
    grad = virtual((shift + 4, 16, 16), (256, 16, 1), torch.float32)
    rows, first = (torch.tensor(t, dtype=torch.int32) for t in ([0, 1], [shift, shift + 2]))
    far = torch.zeros(shift + 4, dtype=torch.int32)
    far[shift:] = columns
    gpu._block_grad[(2,)](
        dy, x, start + shift, far, rows, first, grad, 3, 4, 4, 4, 4,
        PRECISION="ieee", EVEN_B=False, EVEN=True, BLOCK=16, BATCH=16, MANY=8,
    )  # fmt: skip
    assert torch.equal(bits(grad[shift:]), bits(want_grad))


def test_no_batch_and_no_blocks(gpu_device):
    x, dy, _, mask, values = problem(0, 32, 32, 16, 0.5, torch.float32, gpu_device)
    pattern = reference.block_rows(mask)
    assert gpu.block_matmul(x, values, *pattern, 32).shape == (0, 32)
    assert torch.equal(gpu.block_grad(dy, x, *pattern, 16), torch.zeros_like(values))
