"""The products of a compressed weight on the GPU's kernels, against float64."""

import pytest
import torch
from gpu_memory import checked_memory
from tolerance import assert_close_to_exact

from initperf.pattern import pack_bits
from initperf.reference import sparse_linear as reference

pytest.importorskip("triton")
from initperf.kernels.gpu import sparse_linear as gpu  # noqa: E402

pytestmark = pytest.mark.usefixtures(checked_memory.__name__)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("N", "K", "B", "density"), [(30, 20, 9, 0.3), (33, 45, 17, 0.1), (140, 70, 5, 0.2), (8, 8, 4, 1.0)]
)
def test_the_three_products_and_the_dense_form_are_those_of_the_definition(N, K, B, density, dtype, gpu_device):
    g = torch.Generator().manual_seed(0)
    mask = torch.rand(N, K, generator=g) < density
    bits, nnz = pack_bits(mask).to(gpu_device), int(mask.sum())
    mask = mask.to(gpu_device)
    sizes = ((nnz, 1), (N,), (B, K), (B, N))
    values, bias, x, dy = (torch.randn(*s, generator=g).to(dtype).to(gpu_device) for s in sizes)
    pattern = gpu.sparse_tensors(mask)
    for got, definition in (
        (
            gpu.sparse_linear(x, values, bias, bits, N, pattern),
            lambda x, v, b, dy: reference.sparse_linear(x, v, b, bits, N, []),
        ),
        (
            gpu.sparse_grad_input(dy, values, bits, K, pattern),
            lambda x, v, b, dy: reference.sparse_grad_input(dy, v, bits, K, []),
        ),
        (
            gpu.sparse_grad_values(dy, x, bits, pattern),
            lambda x, v, b, dy: reference.sparse_grad_values(dy, x, bits, []),
        ),
    ):
        exact = definition(x.double(), values.double(), bias.double(), dy.double())
        assert_close_to_exact(got, exact, definition(x, values, bias, dy))
    dense = gpu.expand(values, bits, N, K)
    assert torch.equal(dense, reference.expand(values, bits, N, K))
    assert torch.equal(gpu.compress(dense, bits, nnz), values)
