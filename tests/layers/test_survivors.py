"""Survivors and dense tensors turn into each other, of every dtype and storage."""

import pytest
import torch

from initperf.core.bits import pack_bits
from initperf.layers.base.survivors import pick, spread


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.int8, torch.complex64]
)
@pytest.mark.parametrize("shape", [(5, 7), (1, 1), (64, 64), (3, 5, 2, 2), (300, 701)])
@pytest.mark.parametrize("density", [0.0, 0.01, 0.3, 1.0])
def test_picking_and_spreading_are_torchs(dtype, shape, density):
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(shape, generator=generator) < density
    dense = (100 * torch.randn(shape, generator=generator)).to(dtype)
    for stored in (dense, dense.transpose(0, -1).contiguous().transpose(0, -1)):
        values = pick(stored, mask)
        assert torch.equal(values, stored.masked_select(mask)[:, None])
        assert not values.numel() or values.data_ptr() != stored.data_ptr()
    back = spread(values, pack_bits(mask), shape)
    assert torch.equal(back, torch.where(mask, dense, torch.zeros((), dtype=dtype)))
    assert back.dtype == dtype
    assert not values.numel() or back.data_ptr() != values.data_ptr()


def test_a_pending_negation_keeps_its_sign():
    mask, values = torch.tensor([[True, False, True]]), torch.tensor([[1.0], [2.0]])
    assert torch.equal(spread(torch._neg_view(values), pack_bits(mask), (1, 3)), torch.tensor([[-1.0, 0.0, -2.0]]))
    assert torch.equal(pick(torch._neg_view(torch.tensor([[1.0, 5.0, 2.0]])), mask), -values)
