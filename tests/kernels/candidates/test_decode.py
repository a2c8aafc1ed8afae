"""Few rows times a packed sparse weight: the packing, and the product against float64."""

import pytest
import torch

from gpu_memory import checked_memory, far_away
from initperf.kernels.reference.candidates import decode as reference
from tolerance import assert_close_to_exact, bits, linear

pytest.importorskip("triton")
from initperf.kernels.gpu.candidates import decode as gpu  # noqa: E402

pytestmark = pytest.mark.usefixtures(checked_memory.__name__)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def problem(b, n, k, density, dtype, device="cpu", seed=0):
    """x (b, k), weight (n, k) and mask, with an empty row and a full row where there are two rows or more."""
    g = torch.Generator().manual_seed(seed)
    mask = torch.rand(n, k, generator=g) < density
    if n > 1 and 0 < density < 1:
        mask[0], mask[-1] = False, True
    x, w = torch.randn(b, k, generator=g).to(dtype), torch.randn(n, k, generator=g).to(dtype)
    return x.to(device), (w * mask).to(device), mask.to(device)


def check(x, weight, packed, bias=None, **options):
    y = gpu.decode(x, *packed, bias, **options)
    assert_close_to_exact(y, linear(x, weight, bias))
    return y


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("n", "k", "density"), [(5, 40, 0.3), (33, 700, 0.02), (4, 300, 1.0), (3, 20, 0.0), (1, 1, 1.0)]
)
def test_packing_is_the_definitions_to_the_bit(n, k, density, dtype):
    _, weight, mask = problem(1, n, k, density, dtype)
    for got, want in zip(gpu.pack(weight, mask), reference.pack(weight, mask), strict=True):
        assert (got is None) == (want is None)
        if got is not None:
            assert got.dtype == want.dtype
            assert torch.equal(
                bits(got) if got.is_floating_point() else got.long(),
                bits(want) if got.is_floating_point() else want.long(),
            )


@pytest.mark.parametrize(("density", "byte_columns"), [(0.1, True), (0.01, False)])
def test_unpacking_gives_the_weight_back_in_the_form_with_fewer_bytes(density, byte_columns):
    _, weight, mask = problem(1, 64, 2000, density, torch.bfloat16)
    packed = gpu.pack(weight, mask)
    assert (packed.base is not None) == byte_columns
    assert torch.equal(reference.unpack(reference.Packed(*packed), 2000), weight)


def test_columns_beyond_sixteen_bits_are_kept():
    weight = torch.zeros(2, 70_000)
    weight[0, [3, 65_535, 65_536, 69_999]] = torch.tensor([1.0, 2.0, 3.0, 4.0])
    packed = gpu.pack(weight, weight != 0)
    assert torch.equal(reference.unpack(reference.Packed(*packed), 70_000), weight)
    x = torch.randn(1, 70_000)
    check(x, weight, packed)


def test_ten_percent_takes_three_and_a_third_bytes_a_survivor():
    _, weight, mask = problem(1, 256, 4096, 0.1, torch.bfloat16)
    assert gpu.packed_bytes(gpu.pack(weight, mask)) <= 3.4 * int(mask.sum())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("b", [1, 2, 3, 8, 13, 64])
def test_product_of_few_rows(b, dtype, gpu_device):
    x, weight, mask = problem(b, 11, 150, 0.3, dtype, gpu_device)
    check(x, weight, gpu.pack(weight, mask), torch.randn(11, device=gpu_device).to(dtype))


@pytest.mark.parametrize(
    ("n", "k", "density"), [(1, 1, 1.0), (9, 3, 0.0), (9, 130, 1.0), (17, 600, 0.03), (8, 64, 0.5)]
)
@pytest.mark.parametrize("split", [1, 4])
def test_odd_shapes_and_masks_of_one_kind(n, k, density, split, gpu_device):
    x, weight, mask = problem(3, n, k, density, torch.float32, gpu_device)
    check(x, weight, gpu.pack(weight, mask), split=split)


def test_plain_columns_give_the_same_product(gpu_device):
    x, weight, mask = problem(2, 10, 3000, 0.01, torch.bfloat16, gpu_device)
    weight[-1], mask[-1] = 0, False
    packed = gpu.pack(weight, mask)
    assert packed.base is None
    check(x, weight, packed)


def test_non_contiguous_and_misaligned_inputs_give_the_same_bits(gpu_device):
    x, weight, mask = problem(4, 12, 90, 0.4, torch.bfloat16, gpu_device)
    packed = gpu.pack(weight, mask)
    want = gpu.decode(x, *packed)
    shifted = [None if t is None else torch.cat((t.flatten()[:1], t.flatten()))[1:].view(t.shape) for t in packed]
    columns = torch.empty(90, 4, device=gpu_device, dtype=x.dtype).copy_(x.t())
    wide = torch.empty(4, 180, device=gpu_device, dtype=x.dtype)[:, ::2].copy_(x)
    odd = torch.cat((x.flatten()[:1], x.flatten()))[1:].view(x.shape)
    for got in (gpu.decode(columns.t(), *packed), gpu.decode(wide, *packed), gpu.decode(odd, *shifted)):
        assert torch.equal(bits(got), bits(want))


def test_groups_beyond_two_to_the_31_elements_are_found(checked_memory):
    x, weight, mask = problem(2, 12, 90, 0.4, torch.float32)
    packed = gpu.pack(weight, mask)
    want = gpu.decode(x, *packed)
    shift = 3 << 27  # groups: survivors from 3 * 2^30 on
    values, columns, base = (far_away(t, shift * t[0].numel(), checked_memory) for t in packed[:3])
    got = gpu.decode(x, values, columns, base, packed.start + shift, packed.order)
    assert torch.equal(bits(got), bits(want))


def test_an_access_outside_a_tensor_is_seen(checked_memory):
    x, weight, mask = problem(2, 12, 90, 0.4, torch.float32)
    packed = gpu.pack(weight, mask)
    with pytest.raises(Exception, match="outside"):
        gpu.decode(x, packed.values[:-1], *packed[1:])


def test_no_rows_and_no_outputs_give_empty_tensors(gpu_device):
    x, weight, mask = problem(0, 5, 8, 0.5, torch.float32, gpu_device)
    assert gpu.decode(x, *gpu.pack(weight, mask)).shape == (0, 5)
    empty = torch.empty(0, 8, device=gpu_device)
    assert gpu.decode(torch.ones(2, 8, device=gpu_device), *gpu.pack(empty, empty.bool())).shape == (2, 0)


def test_more_than_64_rows_are_refused(gpu_device):
    x, weight, mask = problem(65, 5, 8, 0.5, torch.float32, gpu_device)
    with pytest.raises(ValueError, match="at most 64 rows"):
        gpu.decode(x, *gpu.pack(weight, mask))


def test_reference_is_the_dense_product(gpu_device):
    x, weight, mask = problem(5, 9, 70, 0.4, torch.float64)
    bias = torch.randn(9, dtype=torch.float64)
    y = reference.decode(x, *reference.pack(weight, mask), bias)
    assert_close_to_exact(y, linear(x, weight, bias))
