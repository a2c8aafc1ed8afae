"""The products of a compressed weight on the GPU's kernels, against float64."""

import pytest
import torch

from gpu_memory import checked_memory
from initperf.core.bits import pack_bits
from initperf.kernels.reference.linear import sparse_linear as reference
from tolerance import assert_close_to_exact, linear, product

pytest.importorskip("triton")
from initperf.kernels.gpu.linear import sparse_linear as gpu  # noqa: E402

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
    dense, kept = reference.expand(values, bits, N, K), lambda t: t[mask][:, None]
    for module, index in ((gpu, pattern), (reference, [])):
        assert_close_to_exact(module.sparse_linear(x, values, bias, bits, N, index), linear(x, dense, bias))
        assert_close_to_exact(module.sparse_grad_input(dy, values, bits, K, index), product(dy, dense))
        assert_close_to_exact(module.sparse_grad_values(dy, x, bits, index), product(dy.t(), x).at(kept))
    assert torch.equal(gpu.expand(values, bits, N, K), dense)
    assert torch.equal(gpu.compress(dense, bits, nnz), values)
